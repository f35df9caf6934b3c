// Labels: cut them to a width, move them apart, place them where they hide nothing.

/** Cut a text to about this width in pixels. The middle goes, because labels often differ at their ends. */
function cut(text, width) {
  const length = Math.max(Math.floor(width / 6.7), 3);
  if (text.length <= length) return text;
  const tail = Math.floor((length - 1) / 2);
  return `${text.slice(0, length - 1 - tail).trimEnd()}…${text.slice(text.length - tail).trimStart()}`;
}

/** Sorted heights, moved as little as possible to be `gap` apart within [low, high]. */
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

/** Draw the references as horizontal lines. Return their labels; labels that would touch become one, at the highest line. */
function drawReferences(picture, y, left, right) {
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
 * Place labels so that they hide neither marks nor each other nor, if possible, lines. Optional labels that find no
 * place are left out. Boxes are [left, top, right, bottom].
 */
function placeLabels(labels, room, marks, lines) {
  const occupied = [...marks];
  const isFree = (box, boxes) => box[0] >= room[0] && box[2] <= room[2] && box[1] >= room[1] && box[3] <= room[3]
    && !boxes.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3]);
  return labels.flatMap((label) => {
    const length = 6.7 * label.text.length;
    const places = label.anchors.map(([dx, dy, anchor = "start"]) => {
      const left = label.x + dx - (anchor === "end" ? length : 0);
      return { dx, dy, anchor, box: [left, label.y + dy - 10, left + length, label.y + dy + 3] };
    });
    const place = places.find(({ box }) => isFree(box, occupied) && isFree(box, lines))
      ?? places.find(({ box }) => isFree(box, occupied)) ?? (label.optional ? null : places[0]);
    if (!place) return [];
    occupied.push(place.box);
    return svg("text", { class: label.class, x: label.x + place.dx, y: label.y + place.dy, "text-anchor": place.anchor }, label.text);
  });
}
