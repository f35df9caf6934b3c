// The leaderboard: it sorts, filters and colours settings; the plots follow it.

const data = JSON.parse(document.getElementById("data").textContent);
const table = document.getElementById("board");
const bodies = new Map([...table.tBodies].map((body) => [Number(body.dataset.setting), body]));
const slots = Array(SHAPES.length).fill(null); // colour slot → setting
const listeners = [];

/** Indices of the settings that pass the filters, in the order of the table. */
const shown = () => [...table.tBodies].filter((body) => !body.hidden).map((body) => Number(body.dataset.setting));
const slotOf = (setting) => (slots.includes(setting) ? slots.indexOf(setting) : null);
const coloured = () => shown().filter((setting) => slotOf(setting) !== null);

let pending = 0;
function changed() {
  cancelAnimationFrame(pending);
  pending = requestAnimationFrame(() => listeners.forEach((listener) => listener()));
}

function startBoard() {
  data.settings.forEach((_, setting) => setting < slots.length && (slots[setting] = setting));
  for (const [setting, body] of bodies) {
    drawKey(setting);
    body.addEventListener("pointerenter", () => highlight(setting));
    body.addEventListener("pointerleave", () => highlight(null));
    body.querySelector(".unfold")?.addEventListener("click", (event) => unfold(body, event.currentTarget));
  }
  const headers = [...table.tHead.rows[0].cells].filter((header) => header.dataset.key);
  headers.forEach((header) => header.querySelector("button").addEventListener("click", () => press(header)));
  const first = headers.find((header) => header.dataset.key === data.figure.key);
  if (first && bodies.size > 1) first.setAttribute("aria-sort", "descending"); // the order of the file
  for (const name of ["text", "student", "loss"]) document.getElementById(`filter-${name}`)?.addEventListener("input", filter);
  const form = document.querySelector(".filters");
  form?.addEventListener("submit", (event) => event.preventDefault());
  form?.addEventListener("reset", () => setTimeout(filter));
  if (form) updateStatus();
}

function unfold(body, button) {
  const open = button.getAttribute("aria-expanded") !== "true";
  button.setAttribute("aria-expanded", open);
  body.querySelectorAll("tr.seed").forEach((row) => (row.hidden = !open));
}

/** Sort by a column; a second press reverses the order. */
function press(header) {
  const current = header.getAttribute("aria-sort");
  const direction = current ? (current === "ascending" ? "descending" : "ascending") : header.dataset.first;
  table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", direction);
  const number = header.classList.contains("number");
  const value = (body) => {
    const text = body.rows[0].cells[header.cellIndex].dataset.value;
    return text === undefined || text === "–" ? null : number ? Number(text) : text;
  };
  // Settings are texts, but learning rates sort as numbers: 1e-05 before 0.001 before 0.25.
  const numeric = (one, other) => number || !Number.isNaN(one - other);
  const compare = (one, other) => (numeric(one, other) ? one - other : one.localeCompare(other, "en", { numeric: true }));
  const sorted = [...table.tBodies].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === null || b === null) return (a === null) - (b === null); // unknown values come last in both directions
    return direction === "ascending" ? compare(a, b) : compare(b, a);
  });
  table.append(...sorted);
  updateStatus(`sorted by ${header.textContent.trim()}, ${direction}`);
  changed();
}

function filter() {
  const [text, student, loss] = ["text", "student", "loss"].map((name) => document.getElementById(`filter-${name}`).value);
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const [setting, body] of bodies) {
    const cells = [...body.rows[0].cells].filter((cell) => !cell.classList.contains("number"));
    const own = [data.settings[setting].label, ...cells.map((cell) => cell.textContent)].join(" ").toLowerCase();
    const wanted = (!student || body.dataset.student === student) && (!loss || body.dataset.loss === loss);
    body.hidden = !(wanted && words.every((word) => own.includes(word)));
    document.querySelectorAll(`.run[data-setting="${setting}"]`).forEach((run) => (run.hidden = body.hidden));
  }
  document.getElementById("filter-clear").disabled = !(text || student || loss);
  updateStatus();
  changed();
}

function updateStatus(more = "") {
  const [count, all] = [shown().length, bodies.size];
  const settings = count === all ? `${all} settings` : `${count} of ${all} settings`;
  const grey = count - coloured().length;
  const parts = [settings, more, grey && count > 1 ? `${grey} in grey, press a mark to colour its setting` : ""];
  document.getElementById("shown").textContent = `${parts.filter(Boolean).join("; ")}.`;
}

/** Give a setting a colour or take it away. At most eight settings have one. */
function pick(setting, wanted) {
  if (wanted && !slots.includes(null)) {
    const last = coloured().at(-1) ?? slots[0];
    slots[slots.indexOf(last)] = null;
    drawKey(last);
  }
  slots[wanted ? slots.indexOf(null) : slots.indexOf(setting)] = wanted ? setting : null;
  drawKey(setting);
  updateStatus();
  changed();
}

/** Draw the mark of a setting in the list of runs and in the table, where it switches the colour. */
function drawKey(setting) {
  const slot = slotOf(setting);
  const place = bodies.get(setting).querySelector(".key");
  const old = place.querySelector("input");
  if (bodies.size > 1 && !old) {
    const box = html("input", { type: "checkbox", "aria-label": `${data.settings[setting].label} in colour` });
    box.addEventListener("change", () => pick(setting, box.checked));
    place.append(html("label", { class: "pick" }, box));
  }
  const box = place.querySelector("input");
  if (box) box.checked = slot !== null;
  const holder = place.querySelector("label") ?? place;
  holder.querySelector("svg")?.remove();
  holder.append(key(slot));
  document.querySelectorAll(`.run[data-setting="${setting}"] .key`).forEach((other) => other.replaceChildren(key(slot)));
}

/** Highlight one setting in the table and all plots; null for none. */
function highlight(setting) {
  document.querySelectorAll(".near").forEach((element) => element.classList.remove("near"));
  document.getElementById("content").classList.toggle("pointing", setting !== null);
  if (setting === null) return;
  bodies.get(setting).classList.add("near");
  document.querySelectorAll(`.plot [data-setting="${setting}"]`).forEach((element) => element.classList.add("near"));
}
