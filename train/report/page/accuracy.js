// Accuracy of the settings, a row per setting with its seeds and its interval.

const MAX_ROWS = 40;
const MIN_SEEDS = 3; // for an interval in a plot: that of two seeds is 12.7 standard errors long on each side, and fills it

const withTop1 = (settings) => settings.filter((setting) => data.settings[setting].top1);
const top1 = (setting) => data.settings[setting].top1;
const isFinished = (setting) => data.settings[setting].status === "finished";
const seedsOf = (setting) => data.settings[setting].trials.filter((trial) => trial.top1 !== null && trial.finished);

/** Whether a plot shows this interval. Tables and tooltips have all of them. */
const hasWhisker = ({ n, low }) => low !== null && n >= MIN_SEEDS;

function interval({ low, high }) {
  return low === null ? "one seed" : `95 % interval ${percent(low)} – ${percent(high)} %`;
}

function startAccuracy() {
  const all = withTop1([...data.settings.keys()]);
  if (!all.length) return;
  const hasSeeds = all.some((setting) => seedsOf(setting).length > 1);
  addFigure("top1", {
    title: `${data.figure.name.replace(/^t/, "T")} on the test split, %`,
    plot: plotRows,
    numbers: rowNumbers,
    caption: () => [
      hasSeeds ? `Filled marks: mean${all.some((setting) => hasWhisker(top1(setting))) ? " with 95 % confidence interval" : ""}. Open marks: seeds.` : "",
      all.some((setting) => top1(setting).n === 2) ? "Intervals of two seeds are in the table only: they would fill the plot." : "",
      withTop1(shown()).some((setting) => isCut(top1(setting), top1Range(withTop1(shown())))) ? "Arrows: the interval goes on." : "",
      data.references.length ? "Vertical lines: the teachers." : "",
      withTop1(shown()).length > MAX_ROWS ? `The first ${MAX_ROWS} of ${withTop1(shown()).length} rows of the table.` : "",
      outsideNote(withTop1(shown())),
    ].filter(Boolean).join(" "),
  });
}

const isCut = (one, [first, last]) => hasWhisker(one) && (one.low < first || one.high > last);

function top1Range(settings, share) {
  // Ignore the intervals: with two seeds they are so wide that the values would be squeezed together.
  const counted = settings.some(isFinished) ? settings.filter(isFinished) : settings;
  const values = counted.flatMap((setting) => [top1(setting).mean, ...seedsOf(setting).map((trial) => trial.top1)]);
  return accuracyRange(values, data.references.map((one) => one.top1), share);
}

/** A note on the references that are outside the plot. */
function outsideNote(settings, share) {
  const [low, high] = top1Range(settings, share);
  const outside = data.references.filter(({ top1 }) => top1 < low || top1 > high);
  return outside.length ? `Outside the plot: ${outside.map((one) => `${one.label} ${percent(one.top1)} %`).join(", ")}.` : "";
}

function plotRows(width) {
  const rows = withTop1(shown()).slice(0, MAX_ROWS);
  const narrow = width < 560;
  const longest = Math.max(0, ...rows.map((setting) => data.settings[setting].label.length));
  const left = narrow ? 8 : clamp(6.9 * longest + 24, 80, Math.max(300, 0.36 * width));
  const step = narrow ? 46 : 30;
  const lines = data.references.filter((one) => one.top1 >= top1Range(rows)[0] && one.top1 <= top1Range(rows)[1]);
  const top = 12 + 17 * lines.length;
  const bottom = top + step * Math.max(rows.length, 1);
  const scale = linear(top1Range(rows), [left, width - 62]);
  const ticks = scale.ticks(narrow ? 4 : 8);
  const picture = svg("svg", { height: bottom + 28, viewBox: `0 0 ${width} ${bottom + 28}` });
  const text = (value) => percent(value, decimals(ticks.map((tick) => 100 * tick)));
  picture.append(rowAxis(scale, ticks, text, top, bottom), ...rowReferences(lines, scale, bottom, width));
  const points = [];
  rows.forEach((setting, place) => {
    const y = top + step * (place + 0.5) + (narrow ? 9 : 0);
    picture.append(plotRow(setting, scale, y, narrow, left, points));
  });
  return { picture, points };
}

function rowAxis(scale, ticks, text, top, bottom) {
  const group = svg("g", { "aria-hidden": "true" });
  for (const value of ticks) {
    const x = scale(value);
    group.append(svg("line", { class: "grid", x1: x, x2: x, y1: top, y2: bottom }));
    group.append(svg("text", { x, y: bottom + 18, "text-anchor": "middle" }, text(value)));
  }
  const [from, to] = scale.range;
  group.append(svg("line", { class: "axis", x1: from, x2: to, y1: bottom, y2: bottom }));
  return group;
}

/** Vertical lines for the references, with their labels at different heights so that they do not overlap. */
function rowReferences(lines, scale, bottom, width) {
  return [...lines].sort((one, other) => one.top1 - other.top1).flatMap((one, place) => {
    const [x, y] = [scale(one.top1), 11 + 17 * (lines.length - 1 - place)];
    const text = `${one.label} ${percent(one.top1)}`;
    const end = x - 6.6 * text.length > 0 && x > width / 2;
    return [
      svg("line", { class: "reference", x1: x, x2: x, y1: y - 9, y2: bottom, "stroke-dasharray": REFERENCE_DASHES[data.references.indexOf(one) % 4] }),
      svg("text", { class: "halo", x: x + (end ? -5 : 5), y, "text-anchor": end ? "end" : "start" }, text),
    ];
  });
}

function plotRow(setting, scale, y, narrow, left, points) {
  const { mean, low, high } = top1(setting);
  const [first, last] = scale.range;
  const slot = slotOf(setting);
  const row = svg("g", { class: `series ${slotClass(slot)}`, "data-setting": setting });
  const label = data.settings[setting].label + (isFinished(setting) ? "" : ` (${data.settings[setting].status})`);
  row.append(svg("text", narrow ? { class: "halo strong", x: left, y: y - 12 } : { class: "strong", x: left - 16, y: y + 4, "text-anchor": "end" }, cut(label, narrow ? last - left : left - 16)));
  const within = (value) => clamp(scale(value), first, last);
  if (hasWhisker(top1(setting))) {
    const ends = [[low, -1], [high, 1]].map(([value, side]) => (
      within(value) === scale(value) ? `M${scale(value)},${y - 5}v10` : `M${within(value) - 5 * side},${y - 4}l${5 * side},4l${-5 * side},4`));
    row.append(svg("path", { class: "whisker", d: `M${within(low)},${y}H${within(high)}${ends.join("")}` }));
  }
  const seeds = seedsOf(setting);
  if (seeds.length > 1) {
    for (const trial of seeds) row.append(mark(0, within(trial.top1), y, 3, "open"));
  }
  if (scale(mean) < first) row.append(svg("path", { class: "mark", d: `M${first},${y}l9,-5v10Z` }));
  else row.append(mark(slot, scale(mean), y, 5.5, isFinished(setting) ? "" : "open"));
  row.append(svg("text", { class: "strong", x: last + 12, y: y + 4 }, percent(mean)));
  points.push({ x: within(mean), y, setting, title: label, lines: [`${percent(mean)} % ${data.figure.name}`, interval(top1(setting))] });
  return row;
}

function rowNumbers() {
  const rows = withTop1(shown()).map((setting) => {
    const { mean, low, high } = top1(setting);
    return [data.settings[setting].label, percent(mean), percent(low), percent(high), seedsOf(setting).length];
  });
  return [["", `${data.figure.name} %`, "95 % from", "to", "seeds"], ...rows, ...data.references.map((one) => [one.label, percent(one.top1), "–", "–", "–"])];
}
