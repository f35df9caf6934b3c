// From the stored predictions: reliability of each coloured setting, and accuracy by class.

const MAX_CLASSES = 30;

function startPredictions() {
  if (data.settings.some((setting) => setting.reliability)) {
    listeners.push(updateReliability);
    updateReliability();
  }
  if (data.classes) {
    const names = data.classes.names.length;
    const figure = addFigure("classes", {
      title: "Accuracy by class, %",
      plot: (width) => {
        legend(figure, withClasses());
        return plotClasses(width);
      },
      numbers: classNumbers,
      caption: () => (withClasses().length
        ? `${names > MAX_CLASSES ? `The ${MAX_CLASSES} hardest of ${names} classes` : "The hardest class first"}, for the coloured settings; number of test images in brackets.`
        : "No coloured setting has stored predictions."),
    });
  }
}

const withClasses = () => coloured().filter((setting) => data.settings[setting].classes);

/** Show a reliability diagram for each coloured setting; draw new ones only when these change. */
let calibrated = "";
function updateReliability() {
  const settings = coloured().filter((setting) => data.settings[setting].reliability);
  if (settings.join() === calibrated) return;
  calibrated = settings.join();
  clearFigures("calibration");
  document.getElementById("calibration").hidden = !settings.length;
  for (const setting of settings) {
    addFigure("calibration", {
      title: data.settings[setting].label,
      plot: (width) => plotReliability(setting, width),
      numbers: () => reliabilityNumbers(setting),
      caption: () => calibration(setting),
    }).draw();
  }
}

function totals(setting) {
  const { count, confidence, accuracy } = data.settings[setting].reliability;
  const n = count.reduce((sum, one) => sum + one, 0);
  const mean = (values) => values.reduce((sum, value, bin) => sum + (value ?? 0) * count[bin], 0) / n;
  return { n, confidence: mean(confidence), accuracy: mean(accuracy) };
}

function calibration(setting) {
  const { confidence, accuracy } = totals(setting);
  const gap = 100 * (confidence - accuracy);
  const verdict = Math.abs(gap) < 0.5 ? "Mean confidence is within 0.5 points of the accuracy" : `Mean confidence is ${Math.abs(gap).toFixed(1)} points too ${gap > 0 ? "high" : "low"}`;
  const { ece } = data.settings[setting];
  const seeds = seedsOf(setting).length;
  return `ECE ${ece === null ? "–" : ece.toFixed(4)}${seeds > 1 ? `, mean of ${seeds} seeds` : ""}. ${verdict}.`;
}

function plotReliability(setting, width) {
  const { count, confidence, accuracy } = data.settings[setting].reliability;
  const { n } = totals(setting);
  const height = clamp(width, 150, 300);
  const x = linear([0, 1], [40, width - 8]);
  const y = linear([0, 1], [height - 40, 10]);
  const ticks = [0, 0.25, 0.5, 0.75, 1];
  const text = (value) => percent(value, 0);
  const picture = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
  picture.append(axes({ scale: x, ticks, text, title: "confidence %" }, { scale: y, ticks, text }));
  count.forEach((images, bin) => {
    const [from, to] = [x(bin / count.length), x((bin + 1) / count.length)];
    const high = (0.96 * images * (y(0) - y(1))) / n;
    if (images) picture.append(svg("rect", { class: "bars", x: from + 0.5, width: to - from - 1, y: y(0) - high, height: high }));
  });
  picture.append(svg("path", { class: "reference", fill: "none", d: `M${x(0)},${y(0)}L${x(1)},${y(1)}`, "stroke-dasharray": "4 4" }));
  const slot = slotOf(setting);
  const group = svg("g", { class: `series ${slotClass(slot)}`, "data-setting": setting });
  const points = count.flatMap((images, bin) => (images ? [{
    x: x(confidence[bin]), y: y(accuracy[bin]), setting, images, confidence: confidence[bin],
    title: `${percent(accuracy[bin], 1)} % correct`,
    lines: [`at confidence ${percent(confidence[bin], 1)} %`, `${images.toLocaleString("en")} images`],
  }] : []));
  group.append(...points.map((one) => svg("line", { class: "stem", opacity: clamp(0.15 + (4 * one.images) / n, 0.15, 0.8).toFixed(2), x1: one.x, x2: one.x, y1: y(one.confidence), y2: one.y })));
  group.append(...points.map((one) => mark(slot, one.x, one.y, clamp(2.2 + 9 * Math.sqrt(one.images / n), 2.8, 8))));
  picture.append(group);
  return { picture, points };
}

function reliabilityNumbers(setting) {
  const { count, confidence, accuracy } = data.settings[setting].reliability;
  const bins = count.map((images, bin) => [`${percent(bin / count.length, 1)} – ${percent((bin + 1) / count.length, 1)}`,
    images.toLocaleString("en"), percent(confidence[bin], 1), percent(accuracy[bin], 1)]);
  return [["confidence %", "images", "mean confidence %", "correct %"], ...bins];
}

/** Labels of the classes, the one with the lowest mean accuracy over the coloured settings first. */
function hardest() {
  const mean = (label) => {
    const values = known(withClasses().map((setting) => data.settings[setting].classes[label]));
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 2;
  };
  return data.classes.names.map((_, label) => [mean(label), label]).sort((one, other) => one[0] - other[0] || one[1] - other[1]).map(([, label]) => label);
}

function plotClasses(width) {
  const settings = withClasses();
  const rows = hardest().slice(0, MAX_CLASSES);
  const narrow = width < 560;
  const name = (label) => {
    const text = data.classes.names[label];
    return `${cut(text, 210)} (${data.classes.counts[label].toLocaleString("en")})`;
  };
  const left = narrow ? 10 : clamp(6.9 * Math.max(...rows.map((label) => name(label).length)) + 26, 80, 280);
  const step = narrow ? 40 : 25;
  const bottom = 8 + step * rows.length;
  const values = known(settings.flatMap((setting) => rows.map((label) => data.settings[setting].classes[label])));
  const scale = linear([Math.max(0, Math.min(1, ...values) - 0.02), 1.004], [left, width - 14]);
  const ticks = scale.ticks(narrow ? 4 : 8);
  const picture = svg("svg", { height: bottom + 28, viewBox: `0 0 ${width} ${bottom + 28}` });
  picture.append(rowAxis(scale, ticks, (value) => percent(value, decimals(ticks.map((tick) => 100 * tick))), 4, bottom));
  const points = [];
  rows.forEach((label, place) => {
    const y = 8 + step * (place + 0.5) + (narrow ? 8 : 0);
    picture.append(svg("text", narrow ? { class: "strong", x: left, y: y - 12 } : { class: "strong", x: left - 14, y: y + 4, "text-anchor": "end" }, name(label)));
    picture.append(svg("line", { class: "grid", x1: left, x2: width - 14, y1: y, y2: y }));
  });
  const apart = Math.min(3.5, (step - 12) / settings.length);
  settings.forEach((setting, number) => {
    const slot = slotOf(setting);
    const group = svg("g", { class: `series ${slotClass(slot)}`, "data-setting": setting });
    rows.forEach((label, place) => {
      const value = data.settings[setting].classes[label];
      if (value === null) return;
      const height = 8 + step * (place + 0.5) + (narrow ? 8 : 0);
      const one = { x: scale(value), y: height + apart * (number - (settings.length - 1) / 2), setting };
      group.append(mark(slot, one.x, one.y, 4.8));
      points.push({ ...one, title: data.settings[setting].label, lines: [`${data.classes.names[label]}: ${percent(value, 1)} %`] });
    });
    picture.append(group);
  });
  return { picture, points };
}

function classNumbers() {
  const settings = withClasses();
  const rows = hardest().map((label) => [data.classes.names[label], data.classes.counts[label].toLocaleString("en"),
    ...settings.map((setting) => percent(data.settings[setting].classes[label], 1))]);
  return [["", "images", ...settings.map((setting) => data.settings[setting].label)], ...rows];
}
