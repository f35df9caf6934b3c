// Learning curves: one plot of a test figure, one of a training loss, with a line per seed.

const MEASURES = {
  test_top1: { title: "Top-1 %", accuracy: true },
  test_map: { title: "mAP %", accuracy: true },
  test_bce: { title: "Binary cross entropy" },
  test_nll: { title: "NLL", logarithmic: true },
  test_ece: { title: "ECE" },
  ema_top1: { title: "Top-1 % of averaged weights", accuracy: true },
  ema_map: { title: "mAP % of averaged weights", accuracy: true },
  loss: { title: "Loss", logarithmic: true },
  loss_ce: { title: "Cross entropy", logarithmic: true },
  loss_logit: { title: "Logit term", logarithmic: true },
  loss_feature: { title: "Feature term", logarithmic: true },
};

const curvesOf = (name) => data.settings.flatMap((setting, number) => setting.trials.filter((trial) => trial.curves[name])
  .map((trial) => ({ setting: number, trial, epochs: trial.curves[name][0], values: trial.curves[name][1] })));

function startCurves() {
  addCurves("Test split", ["test_top1", "test_map", "test_nll", "test_bce", "test_ece", "ema_top1", "ema_map"]);
  addCurves("Training", ["loss", "loss_ce", "loss_logit", "loss_feature"]);
}

function addCurves(title, names) {
  const available = names.filter((name) => curvesOf(name).length);
  if (!available.length) return;
  const options = available.map((name) => html("option", { value: name }, MEASURES[name].title));
  const choice = html("select", { "aria-label": `${title}: figure to plot` }, ...options);
  const chosen = () => choice.value;
  const figure = addFigure("curves", {
    title,
    controls: [choice],
    plot: (width) => {
      const lines = shownCurves(chosen());
      legend(figure, width < 520 ? coloured().filter((setting) => lines.some((line) => line.setting === setting)) : []);
      return plotCurves(chosen(), lines, width);
    },
    numbers: () => curveNumbers(chosen()),
    caption: () => {
      const grey = shownCurves(chosen()).some((line) => slotOf(line.setting) === null);
      return `${MEASURES[chosen()].title} by epoch${MEASURES[chosen()].logarithmic ? ", log scale" : ""}, one line per seed.${grey ? " Grey lines: settings without a colour." : ""}`;
    },
  });
  choice.addEventListener("input", figure.draw);
}

const shownCurves = (name) => {
  const visible = new Set(shown());
  const lines = curvesOf(name).filter((line) => visible.has(line.setting));
  return lines.sort((one, other) => (slotOf(other.setting) === null) - (slotOf(one.setting) === null)); // draw grey lines first
};

function curveRange(name, lines) {
  const values = lines.flatMap((line) => line.values);
  if (!values.length) return [0, 1];
  if (MEASURES[name].accuracy) {
    const later = lines.flatMap((line) => line.values.slice(Math.floor(line.values.length / 4)));
    const [low, high] = accuracyRange(later, data.references.map((one) => one.top1));
    return [low, Math.max(high, Math.min(Math.max(...values) + 0.002, 1.005))];
  }
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (MEASURES[name].logarithmic && low > 0) return [low / 1.05, high * 1.05];
  const margin = 0.06 * (high - low || 1);
  return [Math.min(low - margin, 0), high + margin];
}

function plotCurves(name, lines, width) {
  const measure = MEASURES[name];
  const wide = width >= 520;
  const references = measure.accuracy ? data.references : [];
  const texts = [...lines.map((line) => data.settings[line.setting].label), ...references.map((one) => one.label)];
  const right = wide ? clamp(6.7 * Math.max(0, ...texts.map((text) => text.length)) + 52, 70, 0.4 * width) : 12;
  const height = clamp(0.62 * width, 250, 350);
  const epochs = lines.flatMap((line) => line.epochs);
  const last = Math.max(1, ...epochs);
  const x = linear([Math.min(1, last - 1), last], [50, width - right]);
  const domain = curveRange(name, lines);
  const y = (measure.logarithmic && domain[0] > 0 ? logarithmic : linear)(domain, [height - 40, 14]);
  const ticks = y.ticks(5);
  const text = measure.accuracy ? (value) => percent(value, decimals(ticks.map((tick) => 100 * tick))) : (value) => plain(value, 3);
  const whole = x.ticks(wide ? 7 : 5).filter((value) => Number.isInteger(value));
  const clip = `clip-${name}`;
  const picture = svg("svg", { height, viewBox: `0 0 ${width} ${height}` },
    svg("clipPath", { id: clip }, svg("rect", { x: 44, y: 6, width: width - right - 38, height: height - 46 })),
    axes({ scale: x, ticks: whole, text: String, title: "epoch" }, { scale: y, ticks, text }));
  const ends = [];
  const referenceLabels = references.length ? drawReferences(picture, y, 50, width - right) : [];
  for (const one of wide ? references : []) {
    if (one.top1 >= domain[0] && one.top1 <= domain[1]) ends.push({ at: y(one.top1), text: one.label, figure: ` ${percent(one.top1, 1)}`, reference: true });
  }
  const names = (wide ? [] : referenceLabels).map((one) => svg("text", { class: "halo", x: 52, y: one.y < 20 ? one.last + 14 : one.y - 4 }, one.text));
  const inside = svg("g", { "clip-path": `url(#${clip})` });
  const points = lines.flatMap((line) => plotCurve(inside, measure, line, x, y));
  picture.append(inside, ...names);
  if (wide) {
    for (const setting of coloured()) {
      const own = lines.filter((line) => line.setting === setting);
      if (!own.length) continue;
      const end = own.reduce((sum, line) => sum + line.values.at(-1), 0) / own.length;
      const figure = measure.accuracy ? percent(end, 1) : plain(end, 3);
      ends.push({ at: clamp(y(end), 6, height - 40), from: x(Math.max(...own.map((line) => line.epochs.at(-1)))), text: data.settings[setting].label, figure: ` ${figure}`, setting });
    }
    picture.append(...endLabels(ends, x.range[1], height, right - 24));
  }
  return { picture, points };
}

function plotCurve(inside, measure, line, x, y) {
  const slot = slotOf(line.setting);
  const places = line.epochs.map((epoch, place) => [x(epoch), y(line.values[place])]);
  const group = svg("g", { class: `series ${slotClass(slot)}`, "data-setting": line.setting });
  group.append(svg("path", { class: "line", d: `M${places.map((place) => place.map((one) => one.toFixed(1)).join(",")).join("L")}`, "stroke-dasharray": DASHES[slot ?? 0] }));
  if (slot !== null && places.length <= 15) group.append(...places.map(([px, py]) => mark(slot, px, py, 3.6)));
  inside.append(group);
  const title = data.settings[line.setting].label;
  return places.map(([px, py], place) => ({
    x: px, y: py, setting: line.setting, title,
    lines: [`seed ${line.trial.seed}, epoch ${line.epochs[place]}`, measure.accuracy ? `${percent(line.values[place])} %` : plain(line.values[place])],
  }));
}

/** Labels to the right of the ends of the lines, moved apart, each with a thin leader to its line. */
function endLabels(ends, right, height, room) {
  ends.sort((one, other) => one.at - other.at);
  const heights = spreadOut(ends.map((end) => end.at), 15, 10, height - 36);
  return ends.map((end, place) => {
    const slot = end.reference ? null : slotOf(end.setting);
    const leader = svg("path", { class: end.reference ? "axis" : "leader", fill: "none", d: `M${right + 3},${end.at}L${right + 15},${heights[place]}` });
    const text = svg("text", { class: end.reference ? "" : "strong", x: right + 19, y: heights[place] + 4 }, cut(end.text, room - 6.7 * end.figure.length) + end.figure);
    return svg("g", end.reference ? {} : { class: `series ${slotClass(slot)}`, "data-setting": end.setting }, leader, text);
  });
}

function curveNumbers(name) {
  const format = MEASURES[name].accuracy ? percent : plain;
  const rows = shownCurves(name).map((line) => {
    const best = (MEASURES[name].accuracy ? Math.max : Math.min)(...line.values);
    return [`${data.settings[line.setting].label}, seed ${line.trial.seed}`, format(line.values[0]), format(best), line.epochs[line.values.indexOf(best)], format(line.values.at(-1)), line.epochs.at(-1)];
  });
  return [["", "first", "best", "at epoch", "last", "at epoch"], ...rows];
}
