"""Checks of a page in the browser, as JavaScript functions that return a list of problems."""

# Text with a contrast ratio below 4.5 (WCAG AA).
POOR_CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((channel) => linear(channel / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
  };
  const poor = [];
  for (const element of document.querySelectorAll("main *, header *, nav *, footer *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.matches(":disabled, option, .aside")) continue;
    const style = getComputedStyle(element);
    const colours = [element.ownerSVGElement ? style.fill : style.color, background(element)];
    const [low, high] = colours.map(light).sort((x, y) => x - y);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) poor.push([element.tagName, element.textContent.slice(0, 30), contrast]);
  }
  return poor;
}"""

# Elements wider than the window, except inside scrolling boxes; and labels of plots that leave the window.
TOO_WIDE = """() => {
  const out = (element) => {
    const { left, right, width } = element.getBoundingClientRect();
    return width && (right > innerWidth + 1 || left < -1);
  };
  const boxes = [...document.querySelectorAll("main *")].filter((one) => !one.closest(".scroll, pre, .aside, svg"));
  const texts = [...document.querySelectorAll(".plot svg text")];
  return [...boxes, ...texts].filter((one) => one.checkVisibility() && out(one)).map((one) => one.outerHTML);
}"""

# Controls, pictures and regions without a name for screen readers.
NAMELESS = """() => {
  const kinds = "button, select, input, svg[role=img], [role=region], nav, form, table";
  const named = (element) => element.getAttribute("aria-label") || element.labels?.length || element.textContent.trim()
    || document.getElementById(element.getAttribute("aria-labelledby"));
  return [...document.querySelectorAll(kinds)].filter((element) => !named(element)).map((element) => element.outerHTML);
}"""
