// A figure: a heading, a plot, a caption, a table with the plot's numbers, and a tooltip for the point near the pointer.

const tip = document.getElementById("tip");
const drawn = new Map();
const watcher = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const figure = drawn.get(entry.target);
    if (figure && Math.abs(entry.contentRect.width - figure.width) >= 1) figure.draw();
  }
});

/**
 * Add a figure to a section. It is drawn again when its width or the leaderboard changes.
 * @param section id of the section
 * @param parts title: the heading; plot(width) → {picture, points}: an SVG, and points for the tooltip, each {x, y, setting,
 *   title, lines}; numbers() → rows of cells, the header first; caption() → text; controls: elements beside the heading
 */
function addFigure(section, { title, plot, numbers, caption, controls = [] }) {
  const box = html("div", { class: "plot" });
  const under = html("figcaption");
  const cells = html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Numbers: ${title}` });
  const details = html("details", { class: "numbers" }, html("summary", {}, "Numbers"), cells);
  const head = html("div", { class: "head" }, title ? html("h3", {}, title) : null, ...controls);
  const element = html("figure", {}, ...(title || controls.length ? [head] : []), box, under, details);
  const holder = document.getElementById(section);
  holder.hidden = false;
  holder.querySelector(".plots").append(element);
  const figure = {
    element,
    width: 0,
    draw() {
      const width = box.clientWidth;
      if (!width) return;
      figure.width = width;
      const { picture, points } = plot(width);
      picture.setAttribute("role", "img");
      picture.setAttribute("aria-label", `${title}. ${caption?.() ?? ""} The table below has the numbers.`);
      box.replaceChildren(picture);
      under.textContent = caption?.() ?? "";
      if (details.open) cells.replaceChildren(numberTable(numbers(), title));
      addTooltip(picture, points);
    },
  };
  details.addEventListener("toggle", () => details.open && cells.replaceChildren(numberTable(numbers(), title)));
  drawn.set(box, figure);
  watcher.observe(box);
  listeners.push(figure.draw);
  return figure;
}

/** Remove all figures of a section. */
function clearFigures(section) {
  const holder = document.getElementById(section);
  for (const box of holder.querySelectorAll(".plot")) {
    watcher.unobserve(box);
    listeners.splice(listeners.indexOf(drawn.get(box).draw), 1);
    drawn.delete(box);
  }
  holder.querySelector(".plots").replaceChildren();
}

function numberTable([header, ...rows], title) {
  const cell = (text, place) => html(place ? "td" : "th", place ? { class: "number" } : { scope: "row" }, String(text));
  const heads = header.map((text, place) => html("th", { scope: "col", class: place ? "number" : null }, text));
  return html(
    "table", {},
    html("caption", { class: "aside" }, title),
    html("thead", {}, html("tr", {}, ...heads)),
    html("tbody", {}, ...rows.map((row) => html("tr", {}, ...row.map(cell)))),
  );
}

/** Show a tooltip for the point nearest to the pointer, and highlight its setting everywhere. */
function addTooltip(picture, points) {
  const leave = () => {
    tip.hidden = true;
    highlight(null);
  };
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let [near, distance] = [null, 30];
    for (const one of points) {
      const away = Math.hypot(one.x - x, one.y - y);
      if (away < distance) [near, distance] = [one, away];
    }
    if (!near) return leave();
    highlight(near.setting);
    tip.replaceChildren(html("b", {}, near.title), ...near.lines.map((line) => html("div", {}, line)));
    tip.hidden = false;
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    const right = box.left + near.x + 14;
    tip.style.left = `${right + width > innerWidth - 8 ? Math.max(8, right - width - 28) : right}px`;
    tip.style.top = `${clamp(box.top + near.y - height - 10, 8, innerHeight - height - 8)}px`;
  });
}

/** A legend below a plot that is too narrow for labels beside its lines. */
function legend(figure, settings) {
  figure.element.querySelector(".legend")?.remove();
  if (!settings.length) return;
  const items = settings.map((setting) => html("li", {}, key(slotOf(setting)), data.settings[setting].label));
  figure.element.querySelector(".plot").after(html("ul", { class: "legend" }, ...items));
}
