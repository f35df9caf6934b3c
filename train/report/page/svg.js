// Drawing: elements, scales, axes, marks. Lengths are CSS pixels, because plots are drawn at the width of their box.

const SVG_NAMESPACE = document.querySelector("svg").namespaceURI;

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG_NAMESPACE, name), attributes, children);
}

function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const percent = (value, digits = 2) => (value === null ? "–" : (100 * value).toFixed(digits));
const plain = (value, digits = 4) => (value === null ? "–" : Number(value.toPrecision(digits)).toLocaleString("en"));
const known = (values) => values.filter((value) => value !== null && value !== undefined);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function linear([low, high], [from, to]) {
  const scale = (value) => from + ((value - low) / (high - low || 1)) * (to - from);
  return Object.assign(scale, { domain: [low, high], range: [from, to], ticks: (count) => niceTicks(low, high, count) });
}

function logarithmic([low, high], range) {
  const inner = linear([Math.log(low), Math.log(high)], range);
  return Object.assign((value) => inner(Math.log(value)), { domain: [low, high], range, ticks: () => logTicks(low, high) });
}

function niceTicks(low, high, count = 5) {
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.75);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

/** 1, 2, 5, 10 …, or only powers of ten for a wide range; linear ticks if fewer than three of these are in the range. */
function logTicks(low, high) {
  const decades = Math.log10(high / low);
  const factors = decades > 3 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const value = Number((factor * 10 ** power).toPrecision(6));
      if (value >= low * 0.9999 && value <= high * 1.0001) ticks.push(value);
    }
  }
  return ticks.length > 2 ? ticks : niceTicks(low, high, 5).filter((value) => value > 0);
}

const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** 78000 → 78 k, for axes. */
function short(value) {
  const [size, unit] = UNITS.find(([size]) => Math.abs(value) >= size) ?? [1, ""];
  return `${Number((value / size).toPrecision(3))}${unit && " "}${unit}`;
}

/** The number of decimals at which ticks differ. */
function decimals(ticks) {
  const step = ticks.length > 1 ? Math.abs(ticks[1] - ticks[0]) : 1;
  return clamp(Math.ceil(-Math.log10(step) - 1e-9), 0, 6);
}

/** Axes with a light grid, x at the bottom and y at the left; each is `{scale, ticks, text, title}`. */
function axes(x, y) {
  const [left, right] = x.scale.range;
  const [bottom, top] = y.scale.range;
  const group = svg("g", { "aria-hidden": "true" });
  for (const value of y.ticks) {
    const at = y.scale(value);
    group.append(svg("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
    group.append(svg("text", { x: left - 7, y: at + 4, "text-anchor": "end" }, y.text(value)));
  }
  group.append(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  let freeFrom = -Infinity;
  for (const value of x.ticks) {
    const at = x.scale(value);
    const half = 3.6 * x.text(value).length;
    group.append(svg("line", { class: "axis", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
    if (at - half < freeFrom) continue;
    group.append(svg("text", { x: at, y: bottom + 18, "text-anchor": "middle" }, x.text(value)));
    freeFrom = at + half + 6;
  }
  if (x.title) group.append(svg("text", { x: right, y: bottom + 36, "text-anchor": "end" }, x.title));
  if (y.title) group.append(svg("text", { x: 0, y: top - 18 }, y.title));
  return group;
}

/** A range for accuracies. Outliers, such as a student that did not learn or a distant reference, are left out. */
function accuracyRange(values, references = [], share = 1.5) {
  const sorted = known(values).sort((one, other) => one - other);
  if (!sorted.length) return [0, 1];
  const high = sorted.at(-1);
  const middle = sorted[Math.floor(sorted.length / 2)];
  let low = sorted.length < 6 ? sorted[0] : Math.max(sorted[0], middle - 6 * Math.max(high - middle, 0.004));
  const least = low;
  let top = high;
  const reach = high > low ? Math.max(share * (high - low), 0.02) : 1;
  for (const value of references) {
    if (value >= least - reach && value <= high + reach) {
      low = Math.min(low, value);
      top = Math.max(top, value);
    }
  }
  const margin = Math.max(0.07 * (top - low), 0.002);
  return [Math.max(low - margin, -0.01), Math.min(top + margin, 1.005)];
}

const DASHES = ["", "6 3", "2 2.5", "8 3 2 3", "11 4", "2 2.5 6 2.5", "4 2", "12 3 3 3 3 3"];
const REFERENCE_DASHES = ["7 4", "2 3", "10 3 2 3", "4 4"];
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-0.88 * r},${-0.88 * r}h${1.76 * r}v${1.76 * r}h${-1.76 * r}Z`,
  (r) => `M0,${-1.15 * r}L${1.1 * r},${0.8 * r}H${-1.1 * r}Z`,
  (r) => `M0,${-1.3 * r}L${1.1 * r},0L0,${1.3 * r}L${-1.1 * r},0Z`,
  (r) => `M0,${1.15 * r}L${1.1 * r},${-0.8 * r}H${-1.1 * r}Z`,
  (r) => `M${-0.42 * r},${-1.1 * r}h${0.84 * r}v${0.68 * r}h${0.68 * r}v${0.84 * r}h${-0.68 * r}v${0.68 * r}h${-0.84 * r}v${-0.68 * r}h${-0.68 * r}v${-0.84 * r}h${0.68 * r}Z`,
  (r) => `M${-1.2 * r},${-0.62 * r}h${2.4 * r}v${1.24 * r}h${-2.4 * r}Z`,
  (r) => `M0,${-1.2 * r}L${1.14 * r},${-0.37 * r}L${0.7 * r},${0.97 * r}H${-0.7 * r}L${-1.14 * r},${-0.37 * r}Z`,
];

/** The mark of a colour slot (null for grey) at a point. */
function mark(slot, x, y, r = 5, extra = "") {
  return svg("path", { class: `mark ${extra}`, d: SHAPES[slot ?? 0](slot === null ? r * 0.8 : r), transform: `translate(${x},${y})` });
}

/** A key for tables and legends: a piece of line with the mark. */
function key(slot) {
  const picture = svg("svg", { width: 26, height: 16, viewBox: "-13 -8 26 16", class: `series ${slotClass(slot)}`, "aria-hidden": "true" });
  picture.append(svg("path", { class: "line", d: "M-12,0H12", "stroke-dasharray": DASHES[slot ?? 0] }), mark(slot, 0, 0, 4.6));
  return picture;
}

const slotClass = (slot) => (slot === null ? "other" : `slot-${slot}`);
