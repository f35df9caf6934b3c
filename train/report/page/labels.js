// Labels: cut to their room, moved apart, placed where they hide nothing.

/** A text that fits into so many pixels, about: without its middle, for labels often differ at their ends. */
function cut(text, room) {
  const most = Math.max(Math.floor(room / 6.7), 3);
  if (text.length <= most) return text;
  const tail = Math.floor((most - 1) / 2);
  return `${text.slice(0, most - 1 - tail).trimEnd()}…${text.slice(text.length - tail).trimStart()}`;
}

/** Heights moved as little as needed to be `gap` apart within [low, high]; in the order they come in, which is sorted. */
function spreadOut(heights, gap, low, high) {
  const placed = [];
  const bottom = (group) => {
    const span = gap * (group.length - 1);
    return Math.max(Math.min(group.reduce((sum, one) => sum + one, 0) / group.length - span / 2, high - span), low);
  };
  for (const height of heights) {
    let group = [height];
    while (placed.length && bottom(group) < bottom(placed.at(-1)) + gap * placed.at(-1).length) group = [...placed.pop(), ...group];
    placed.push(group);
  }
  return placed.flatMap((group) => group.map((_, place) => bottom(group) + gap * place));
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
