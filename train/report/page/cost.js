// Accuracy of the settings against their costs, with the Pareto front of the settings shown.

const COSTS = {
  parameters: { title: "Parameters", format: (value) => `${value.toLocaleString("en")} parameters`, unit: "parameters" },
  flops: { title: "FLOPs per image", format: (value) => `${(value / 1e6).toLocaleString("en")} MFLOPs`, unit: "FLOPs" },
  latency_1_ms: { title: "Latency, one image", format: (value) => `${plain(value)} ms`, unit: "ms" },
  latency_128_ms: { title: "Latency, batch of 128", format: (value) => `${plain(value)} ms`, unit: "ms" },
};

function startCosts() {
  const finished = withTop1([...data.settings.keys()]).filter(isFinished);
  for (const [name, cost] of Object.entries(COSTS)) {
    const values = new Set(known(finished.map((one) => data.settings[one].costs[name])));
    if (values.size < 2) continue;
    addFigure("cost", {
      title: cost.title,
      plot: (width) => plotCost(name, width),
      numbers: () => costNumbers(name),
      caption: () => `On the front: ${front(name).map((setting) => data.settings[setting].label).join(", ") || "none"}. ${outsideNote(withCost(name), 0.6)}`.trim(),
    });
  }
}

/** Finished settings with a known top-1 and cost. */
const withCost = (name) => withTop1(shown()).filter((setting) => isFinished(setting) && data.settings[setting].costs[name] > 0);

/** The settings on the Pareto front, the cheapest first. */
function front(name) {
  const cost = (setting) => data.settings[setting].costs[name];
  const sorted = withCost(name).sort((one, other) => cost(one) - cost(other) || top1(other).mean - top1(one).mean);
  const found = [];
  for (const setting of sorted) {
    const best = found.at(-1);
    const equal = best !== undefined && cost(best) === cost(setting) && top1(best).mean === top1(setting).mean;
    if (best === undefined || equal || top1(setting).mean > top1(best).mean) found.push(setting);
  }
  return found;
}

function plotCost(name, width) {
  const settings = withCost(name);
  const costs = settings.map((setting) => data.settings[setting].costs[name]);
  const height = clamp(0.7 * width, 240, 340);
  const [low, high] = costs.length ? [Math.min(...costs), Math.max(...costs)] : [1, 10];
  const edge = (high / low) ** 0.08 * 1.04;
  const x = logarithmic([low / edge, high * edge], [46, width - 10]);
  const y = linear(top1Range(settings, 0.6), [height - 40, 32]);
  const ticks = y.ticks(5);
  const picture = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
  picture.append(axes(
    { scale: x, ticks: x.ticks(), text: short, title: COSTS[name].unit },
    { scale: y, ticks, text: (value) => percent(value, decimals(ticks.map((tick) => 100 * tick))), title: `${data.figure.name} %` },
  ));
  const labels = [];
  const referenceLabels = drawReferences(picture, y, 46, width - 10);
  labels.push(...referenceLabels.map(({ text, y: at }) => ({ x: 50, y: at - 4, text, class: "halo", anchors: [[0, 0], [0, 16]] })));
  const referenceBoxes = referenceLabels.flatMap((one) => [one.y, one.last]).map((at) => [46, at - 1, width - 10, at + 1]);
  const stair = front(name).map((setting) => [x(data.settings[setting].costs[name]), y(top1(setting).mean)]);
  picture.append(svg("path", { class: "front", d: steps(stair, width - 10) }));
  const below = picture.appendChild(svg("g"));
  const points = settings.map((setting) => plotPoint(picture, below, name, setting, x, y));
  const important = [...front(name), ...coloured()].filter((setting, place, all) => settings.includes(setting) && all.indexOf(setting) === place);
  labels.push(...important.map((setting) => ({
    x: x(data.settings[setting].costs[name]), y: clamp(y(top1(setting).mean), 32, height - 40), text: cut(data.settings[setting].label, width / 2), class: "halo strong",
    // Try above left first: the line of the front arrives from below and continues to the right.
    anchors: [[-8, -8, "end"], [8, -8], [9, 16], [-9, 16, "end"], [-10, 4, "end"], [10, 4]], optional: true,
  })));
  const obstacles = points.map((one) => [one.x - 6, one.y - 6, one.x + 6, one.y + 6]);
  picture.append(...placeLabels(labels, [40, 4, width, height - 40], obstacles, [...stairBoxes(stair, width - 10), ...referenceBoxes]));
  return { picture, points };
}

/** The front as a stair: the best top-1 at each cost. */
function steps(stair, right) {
  return stair.map(([x, y], place) => (place ? `H${x}V${y}` : `M${x},${y}`)).join("") + (stair.length ? `H${right}` : "");
}

/** The lines of the stair as boxes that labels avoid. */
function stairBoxes(stair, right) {
  return stair.flatMap(([x, y], place) => [
    [x, y - 1, stair[place + 1]?.[0] ?? right, y + 1],
    ...(place ? [[x - 1, y, x + 1, stair[place - 1][1]]] : []),
  ]);
}

function plotPoint(picture, below, name, setting, x, y) {
  const { mean, low, high } = top1(setting);
  const cost = data.settings[setting].costs[name];
  const [at, bottom, upper] = [x(cost), y.range[0], y.range[1]];
  const slot = slotOf(setting);
  const own = { class: `series ${slotClass(slot)}`, "data-setting": setting };
  const group = svg("g", own);
  const within = (value) => clamp(y(value), upper, bottom);
  // Leave out intervals that are taller than the plot.
  if (hasWhisker(top1(setting)) && slot !== null && high - low < y.domain[1] - y.domain[0]) {
    below.append(svg("g", own, svg("path", { class: "whisker", d: `M${at},${within(low)}V${within(high)}` })));
  }
  if (y(mean) > bottom) group.append(svg("path", { class: "mark", d: `M${at},${bottom}l-5,-9h10Z` }));
  else group.append(mark(slot, at, y(mean), slot === null ? 4 : 5.5));
  picture.append(group);
  const lines = [`${percent(mean)} % ${data.figure.name}`, interval(top1(setting)), COSTS[name].format(cost)];
  return { x: at, y: within(mean), setting, title: data.settings[setting].label, lines };
}

function costNumbers(name) {
  const best = new Set(front(name));
  const rows = withCost(name).map((setting) => [data.settings[setting].label, data.settings[setting].costs[name].toLocaleString("en"),
    percent(top1(setting).mean), best.has(setting) ? "yes" : "no"]);
  return [["", COSTS[name].unit, `${data.figure.name} %`, "on the front"], ...rows];
}
