// The page: table of contents, theme, copy buttons, links to runs; then start everything.

function startContents() {
  const sections = [...document.querySelectorAll("main > section")].filter((section) => !section.hidden);
  const items = sections.map((section) => html("li", {}, html("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
  document.querySelector("nav").append(html("ul", {}, ...items));
}

function startTheme() {
  const choice = document.getElementById("theme");
  const set = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    choice.value = theme;
  };
  const stored = (action) => {
    try {
      return action(localStorage);
    } catch {
      return null; // some browsers have no storage for files
    }
  };
  set(stored((storage) => storage.getItem("teacher-cache-theme")) ?? "");
  choice.addEventListener("input", () => {
    set(choice.value);
    stored((storage) => storage.setItem("teacher-cache-theme", choice.value));
  });
  choice.parentElement.hidden = false;
}

function startCopying() {
  for (const button of document.querySelectorAll(".copy")) {
    const [text, label] = [button.parentElement.querySelector("code"), button.textContent];
    button.addEventListener("click", async () => {
      button.textContent = (await copy(text)) ? "Copied" : "Selected, now copy it";
      setTimeout(() => (button.textContent = label), 2000);
    });
  }
}

/** Copy the text of an element; where the browser refuses, select it and return false. */
async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return false;
  }
}

/** A link to a run unfolds it. */
function startLinks() {
  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target?.matches("details.run")) {
      target.open = true;
      target.scrollIntoView();
      target.querySelector("summary").focus({ preventScroll: true });
    }
  };
  addEventListener("hashchange", open);
  document.addEventListener("click", (event) => {
    if (event.target.closest("a")?.hash === location.hash && location.hash) open(); // the same link again
  });
  open();
}

startTheme();
startBoard();
startAccuracy();
startCosts();
startCurves();
startPredictions();
startContents();
startCopying();
startLinks();
changed();
