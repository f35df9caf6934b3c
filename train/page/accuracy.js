// Accuracy of the settings side by side, and against what they cost.

const COSTS = {
  parameters: { title: "Parameters", tell: (value) => `${value.toLocaleString("en")} parameters`, of: "parameters" },
  flops: { title: "FLOPs per image", tell: (value) => `${(value / 1e6).toLocaleString("en")} MFLOPs`, of: "FLOPs" },
  latency_1_ms: { title: "Latency, one image", tell: (value) => `${plain(value)} ms`, of: "ms" },
  latency_128_ms: { title: "Latency, batch of 128", tell: (value) => `${plain(value)} ms`, of: "ms" },
};
const MOST_ROWS = 40;

const withTop1 = (settings) => settings.filter((setting) => data.settings[setting].top1);
const top1 = (setting) => data.settings[setting].top1;
const isFinished = (setting) => data.settings[setting].status === "finished";
const seedsOf = (setting) => data.settings[setting].trials.filter((trial) => trial.top1 !== null && trial.finished);

function interval({ low, high }) {
  return low === null ? "one seed" : `95 % interval ${percent(low)} – ${percent(high)} %`;
}

function startAccuracy() {
  const all = withTop1(data.settings.keys().toArray());
  if (!all.length) return;
  const many = all.some((setting) => seedsOf(setting).length > 1);
  addFigure("top1", {
    title: "Top-1 on the test split, %",
    plot: plotRows,
    numbers: rowNumbers,
    caption: () => [
      many ? "Filled: mean, with its 95 % confidence interval. Open: seeds." : "",
      data.references.length ? "Vertical lines: what the teachers reach." : "",
      withTop1(shown()).length > MOST_ROWS ? `The first ${MOST_ROWS} of ${withTop1(shown()).length} rows, in the table's order.` : "",
      far(withTop1(shown())),
    ].filter(Boolean).join(" "),
  });
  for (const [name, cost] of Object.entries(COSTS)) {
    const values = new Set(known(all.filter(isFinished).map((one) => data.settings[one].costs[name])));
    if (values.size < 2) continue;
    addFigure("cost", {
      title: cost.title,
      plot: (width) => plotCost(name, width),
      numbers: () => costNumbers(name),
      caption: () => `On the front: ${front(name).map((setting) => data.settings[setting].label).join(", ") || "nothing"}. ${far(priced(name), 0.6)}`.trim(),
    });
  }
}

function range(settings, share) {
  // Not their intervals: with two seeds these say nothing, at great length.
  const counted = settings.some(isFinished) ? settings.filter(isFinished) : settings;
  const values = counted.flatMap((setting) => [top1(setting).mean, ...seedsOf(setting).map((trial) => trial.top1)]);
  return accuracyRange(values, data.references.map((one) => one.top1), share);
}

/** References that lie too far off to be drawn. */
function far(settings, share) {
  const [low, high] = range(settings, share);
  const outside = data.references.filter(({ top1 }) => top1 < low || top1 > high);
  return outside.length ? `Outside the picture: ${outside.map((one) => `${one.label} ${percent(one.top1)} %`).join(", ")}.` : "";
}

function plotRows(width) {
  const rows = withTop1(shown()).slice(0, MOST_ROWS);
  const narrow = width < 560;
  const longest = Math.max(0, ...rows.map((setting) => data.settings[setting].label.length));
  const left = narrow ? 8 : clamp(6.9 * longest + 24, 80, 300);
  const step = narrow ? 46 : 30;
  const lines = data.references.filter((one) => one.top1 >= range(rows)[0] && one.top1 <= range(rows)[1]);
  const top = 12 + 17 * lines.length;
  const bottom = top + step * Math.max(rows.length, 1);
  const scale = linear(range(rows), [left, width - 62]);
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

/** Vertical lines, their labels above one another so that close ones can be read. */
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
  if (low !== null) {
    const ends = [low, high].filter((value) => within(value) === scale(value)).map((value) => `M${scale(value)},${y - 5}v10`);
    row.append(svg("path", { class: "whisker", d: `M${within(low)},${y}H${within(high)}${ends.join("")}` }));
  }
  const seeds = seedsOf(setting);
  if (seeds.length > 1) {
    for (const trial of seeds) row.append(mark(0, within(trial.top1), y, 3, "open"));
  }
  if (scale(mean) < first) row.append(svg("path", { class: "mark", d: `M${first},${y}l9,-5v10Z` }));
  else row.append(mark(slot, scale(mean), y, 5.5, isFinished(setting) ? "" : "open"));
  row.append(svg("text", { class: "strong", x: last + 12, y: y + 4 }, percent(mean)));
  points.push({ x: within(mean), y, setting, title: label, lines: [`${percent(mean)} % top-1`, interval(top1(setting))] });
  return row;
}

function rowNumbers() {
  const rows = withTop1(shown()).map((setting) => {
    const { mean, low, high } = top1(setting);
    return [data.settings[setting].label, percent(mean), percent(low), percent(high), seedsOf(setting).length];
  });
  return [["", "top-1 %", "95 % from", "to", "seeds"], ...rows, ...data.references.map((one) => [one.label, percent(one.top1), "–", "–", "–"])];
}

/** Finished settings of which both are known. */
const priced = (name) => withTop1(shown()).filter((setting) => isFinished(setting) && data.settings[setting].costs[name] > 0);

/** The settings that none beats, the cheapest first. */
function front(name) {
  const cost = (setting) => data.settings[setting].costs[name];
  const sorted = priced(name).sort((one, other) => cost(one) - cost(other) || top1(other).mean - top1(one).mean);
  const found = [];
  for (const setting of sorted) {
    const best = found.at(-1);
    const equal = best !== undefined && cost(best) === cost(setting) && top1(best).mean === top1(setting).mean;
    if (best === undefined || equal || top1(setting).mean > top1(best).mean) found.push(setting);
  }
  return found;
}

function plotCost(name, width) {
  const settings = priced(name);
  const costs = settings.map((setting) => data.settings[setting].costs[name]);
  const height = clamp(0.7 * width, 240, 340);
  const [low, high] = costs.length ? [Math.min(...costs), Math.max(...costs)] : [1, 10];
  const edge = (high / low) ** 0.08 * 1.04;
  const x = logarithmic([low / edge, high * edge], [46, width - 10]);
  const y = linear(range(settings, 0.6), [height - 40, 32]);
  const ticks = y.ticks(5);
  const picture = svg("svg", { height, viewBox: `0 0 ${width} ${height}` });
  picture.append(axes(
    { scale: x, ticks: x.ticks(), text: short, title: COSTS[name].of },
    { scale: y, ticks, text: (value) => percent(value, decimals(ticks.map((tick) => 100 * tick))), title: "top-1 %" },
  ));
  const labels = [];
  const named = levels(picture, y, 46, width - 10);
  labels.push(...named.map(({ text, y: at }) => ({ x: 50, y: at - 4, text, class: "halo", anchors: [[0, 0], [0, 16]] })));
  const levelBoxes = named.flatMap((one) => [one.y, one.last]).map((at) => [46, at - 1, width - 10, at + 1]);
  const stair = front(name).map((setting) => [x(data.settings[setting].costs[name]), y(top1(setting).mean)]);
  picture.append(svg("path", { class: "front", d: steps(stair, width - 10) }));
  const points = settings.map((setting) => plotPoint(picture, name, setting, x, y));
  const important = [...front(name), ...coloured()].filter((setting, place, all) => settings.includes(setting) && all.indexOf(setting) === place);
  labels.push(...important.map((setting) => ({
    x: x(data.settings[setting].costs[name]), y: clamp(y(top1(setting).mean), 32, height - 40), text: cut(data.settings[setting].label, width / 2), class: "halo strong",
    // The front runs on to the right and comes from below.
    anchors: [[-8, -8, "end"], [8, -8], [9, 16], [-9, 16, "end"], [-10, 4, "end"], [10, 4]], optional: true,
  })));
  const obstacles = points.map((one) => [one.x - 6, one.y - 6, one.x + 6, one.y + 6]);
  picture.append(...placed(labels, [40, 4, width, height - 40], obstacles, [...stairBoxes(stair, width - 10), ...levelBoxes]));
  return { picture, points };
}

/** Draw the references as levels of a plot; their labels, those that would touch as one, each at its highest level. */
function levels(picture, y, left, right) {
  const within = data.references.filter(({ top1 }) => top1 >= y.domain[0] && top1 <= y.domain[1]);
  const labels = [];
  for (const one of [...within].sort((a, b) => b.top1 - a.top1)) {
    const at = y(one.top1);
    const dash = REFERENCE_DASHES[data.references.indexOf(one) % REFERENCE_DASHES.length];
    picture.append(svg("line", { class: "reference", x1: left, x2: right, y1: at, y2: at, "stroke-dasharray": dash }));
    const near = labels.at(-1);
    if (near && at - near.last < 16) Object.assign(near, { text: `${near.text}, ${one.label}`, last: at });
    else labels.push({ text: one.label, y: at, last: at });
  }
  return labels;
}

/** A front as a stair: what the money buys. */
function steps(stair, right) {
  return stair.map(([x, y], place) => (place ? `H${x}V${y}` : `M${x},${y}`)).join("") + (stair.length ? `H${right}` : "");
}

/** The lines of a stair as boxes, for labels to keep away from. */
function stairBoxes(stair, right) {
  return stair.flatMap(([x, y], place) => [
    [x, y - 1, stair[place + 1]?.[0] ?? right, y + 1],
    ...(place ? [[x - 1, y, x + 1, stair[place - 1][1]]] : []),
  ]);
}

function plotPoint(picture, name, setting, x, y) {
  const { mean, low, high } = top1(setting);
  const cost = data.settings[setting].costs[name];
  const [at, bottom, upper] = [x(cost), y.range[0], y.range[1]];
  const slot = slotOf(setting);
  const group = svg("g", { class: `series ${slotClass(slot)}`, "data-setting": setting });
  const within = (value) => clamp(y(value), upper, bottom);
  if (low !== null && slot !== null) group.append(svg("path", { class: "whisker", d: `M${at},${within(low)}V${within(high)}` }));
  if (y(mean) > bottom) group.append(svg("path", { class: "mark", d: `M${at},${bottom}l-5,-9h10Z` }));
  else group.append(mark(slot, at, y(mean), slot === null ? 4 : 5.5));
  picture.append(group);
  const lines = [`${percent(mean)} % top-1`, interval(top1(setting)), COSTS[name].tell(cost)];
  return { x: at, y: within(mean), setting, title: data.settings[setting].label, lines };
}

/**
 * Labels where they hide neither marks nor one another, nor, if that is possible, lines; optional ones are left out where
 * there is no room. Boxes are [left, top, right, bottom].
 */
function placed(labels, room, marks, lines) {
  const taken = [...marks];
  const free = (box, boxes) => box[0] >= room[0] && box[2] <= room[2] && box[1] >= room[1] && box[3] <= room[3]
    && !boxes.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
  return labels.flatMap((label) => {
    const long = 6.7 * label.text.length;
    const ways = label.anchors.map(([dx, dy, anchor = "start"]) => {
      const left = label.x + dx - (anchor === "end" ? long : 0);
      return { dx, dy, anchor, box: [left, label.y + dy - 10, left + long, label.y + dy + 3] };
    });
    const way = ways.find(({ box }) => free(box, taken) && free(box, lines)) ?? ways.find(({ box }) => free(box, taken))
      ?? (label.optional ? null : ways[0]);
    if (!way) return [];
    taken.push(way.box);
    return svg("text", { class: label.class, x: label.x + way.dx, y: label.y + way.dy, "text-anchor": way.anchor }, label.text);
  });
}

function costNumbers(name) {
  const best = new Set(front(name));
  const rows = priced(name).map((setting) => [data.settings[setting].label, plain(data.settings[setting].costs[name], 6),
    percent(top1(setting).mean), best.has(setting) ? "yes" : "no"]);
  return [["", COSTS[name].of, "top-1 %", "on the front"], ...rows];
}
