"""The page in headless Chromium: pointer, keyboard, themes, phone, no network.

Skipped where Playwright or Chromium is not installed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support.page_checks import NAMELESS, POOR_CONTRAST, TOO_WIDE
from tests.support.run_folders import write_run, write_sweep
from tests.support.turns import slow
from train.report.html import write_report
from train.report.spread import pareto_front
from train.report.trials import read_table

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect  # Playwright's other ways to wait need `eval`, which the policy of the page forbids
expect.set_options(timeout=20_000)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

RATES = (0.25, 0.5, 1e-05, 0.0833, 0.001)
STUDENTS = {"resnet8": 0.85, "resnet20": 0.91, "wrn_16_2": 0.925, "vgg8": 0.93, "ShuffleV2": 0.915}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pages: a sweep (12 settings of up to 3 seeds), a run with its twin, a search, three intervals."""
    folder = tmp_path_factory.mktemp("pages")
    sweep = write_sweep(folder / "sweep", STUDENTS, losses=("kd", "ce"))
    write_report([], folder / "sweep.html", trials=read_table(sweep), title="A sweep")
    run = write_run(folder / "run", top1=0.9)
    write_run(run / "labels-only", loss="ce", top1=0.86)
    write_report([run], folder / "one.html")
    searched = [
        write_run(
            folder / f"searched-{rate}",
            student="MobileNetV2",
            top1=0.8 + place / 100,
            optimiser={"learning_rate": rate, "weight_decay": 0.00123 + place / 1000},
        )
        for place, rate in enumerate(RATES)
    ]
    write_report(searched, folder / "searched.html")
    apart = {"resnet8": 0.01, "resnet20": 0.005, "vgg8": 0.02}
    seeds = [
        write_run(folder / f"{student}-{seed}", student=student, seed=seed, top1=0.8 + step * seed)
        for student, step in apart.items()
        for seed in range(2)
    ]
    write_report(seeds, folder / "intervals.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def sweep_page(browser: Any, folder: Path) -> Iterator[Any]:
    """The page of the sweep, open for several tests: drawing it takes seconds. They undo what others would notice."""
    with opener(browser, folder) as opened:
        yield opened()


@pytest.fixture
def show(browser: Any, folder: Path) -> Iterator[Any]:
    """Open a page by name."""
    with opener(browser, folder) as opened:
        yield opened


@contextmanager
def opener(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens pages. Afterwards check that they printed no message or error and requested only their own file."""
    contexts: list[Any] = []
    messages: list[str] = []
    requested: list[str] = []

    def record(route: Any) -> None:
        requested.append(route.request.url)
        route.continue_()

    def opened(name: str = "sweep", width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.route("**/*", record)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto((folder / f"{name}.html").as_uri())
        page.wait_for_selector(".plot svg[role=img]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert messages == []
    assert {url.partition("#")[0] for url in requested} <= {page.as_uri() for page in folder.glob("*.html")}


def rows(page: Any, key: str) -> list[str]:
    """The cells of a column in the visible rows of settings, from the top."""
    place = page.locator(f"#board thead th[data-key={key}]").evaluate("cell => cell.cellIndex")
    return [
        cell.strip() for cell in page.locator(f"#board tr.setting > :nth-child({place + 1}):visible").all_inner_texts()
    ]


def numbers(page: Any, key: str) -> list[float | None]:
    first = [text.replace(",", "").split()[0].split("±")[0] for text in rows(page, key)]
    return [None if text == "–" else float(text) for text in first]


def press(page: Any, key: str) -> None:
    page.locator(f"#board th[data-key={key}] button").click()


def show_numbers(figure: Any) -> None:
    """Unfold the table below a plot. The page fills it a moment after the click."""
    figure.locator("details.numbers summary").click()
    expect(figure.locator("details.numbers tbody tr")).not_to_have_count(0)


def rising(values: list[float | None]) -> bool:
    """Whether values rise, with unknown values last."""
    known = [value for value in values if value is not None]
    return values == sorted(known) + [None] * (len(values) - len(known))


def test_the_leaderboard_sorts_in_both_directions(sweep_page: Any) -> None:
    page = sweep_page
    header = page.locator("#board th[data-key=parameters]")
    assert not rising(numbers(page, "parameters"))
    press(page, "parameters")
    assert rising(numbers(page, "parameters"))
    assert header.get_attribute("aria-sort") == "ascending"
    assert None in numbers(page, "parameters"), "the failed trial has none"
    press(page, "parameters")
    known = [value for value in numbers(page, "parameters") if value is not None]
    assert known == sorted(known, reverse=True)
    assert numbers(page, "parameters")[-1] is None, "unknown values stay last"
    assert page.locator("#board [aria-sort]").count() == 1
    assert "sorted by Parameters, descending" in page.locator("#shown").inner_text()
    press(page, "top1")
    assert page.locator("#board th[data-key=top1]").get_attribute("aria-sort") == "descending", "larger is better"
    assert numbers(page, "top1")[0] == 92.5


@pytest.mark.slow
def test_intervals_sort_by_their_width(show: Any) -> None:
    page = show("intervals")
    for order in (["resnet20", "resnet8", "vgg8"], ["vgg8", "resnet8", "resnet20"]):
        press(page, "interval")
        assert [cell.split()[0] for cell in rows(page, "student")] == order


@pytest.mark.slow
def test_sorting_by_keyboard(show: Any) -> None:
    page = show()
    page.locator("#board th[data-key=nll] button").focus()
    page.keyboard.press("Enter")
    assert rising(numbers(page, "nll"))
    page.keyboard.press("Space")
    assert page.locator("#board th[data-key=nll]").get_attribute("aria-sort") == "descending"
    page.locator("#board th[data-key=student] button").focus()
    page.keyboard.press("Enter")
    names = list(dict.fromkeys(rows(page, "student")))
    assert names == ["resnet8", "resnet20", "resnet110", "ShuffleV1", "ShuffleV2", "vgg8", "wrn_16_2"], "8 before 110"


@pytest.mark.slow
def test_learning_rates_sort_by_size_and_are_not_broken_on_a_phone(show: Any) -> None:
    page = show("searched", width=390)
    press_key = "#board th[data-key='setting-optimiser.learning_rate'] button"
    page.locator(press_key).evaluate("button => button.click()")  # a phone shows settings below the names
    shown = page.locator("#board tr.setting .rest").all_inner_texts()
    assert re.findall(r"lr (\S+)", " ".join(" ".join(shown).split())) == [str(rate) for rate in sorted(RATES)]
    broken = page.evaluate("""() => {
      const walker = document.createTreeWalker(document.getElementById("board"), NodeFilter.SHOW_TEXT);
      const broken = [];
      while (walker.nextNode()) {
        const text = walker.currentNode;
        for (const found of text.parentElement.closest(".rest") ? text.data.matchAll(/[\\d.]{4,}/g) : []) {
          const number = document.createRange();
          number.setStart(text, found.index);
          number.setEnd(text, found.index + found[0].length);
          if (number.getClientRects().length !== 1) broken.push(found[0]);
        }
      }
      return broken;
    }""")
    assert broken == []


def test_filters_apply_to_table_plots_and_runs(sweep_page: Any) -> None:
    page = sweep_page
    assert len(rows(page, "student")) == 12
    page.fill("#filter-text", "RESNET kd")
    assert set(rows(page, "student")) == {"resnet8", "resnet20", "resnet110"}
    assert page.locator("#shown").inner_text().startswith("3 of 12 settings")
    expect(page.locator("#top1 .plot .series")).to_have_count(2)  # one setting has no figure
    assert page.locator("details.run:visible").count() == 7
    page.fill("#filter-text", "")
    page.select_option("#filter-loss", "labels alone")
    assert set(rows(page, "loss")) == {"labels alone"}
    page.select_option("#filter-student", "vgg8")
    assert rows(page, "student") == ["vgg8"]
    page.fill("#filter-text", "nothing like it")
    assert rows(page, "student") == []
    page.click("#filter-clear")
    expect(page.locator("#board tbody:visible")).to_have_count(12)
    expect(page.locator("#filter-student")).to_have_value("")
    expect(page.locator("#filter-clear")).to_be_disabled()


@pytest.mark.slow
def test_seeds_unfold(show: Any) -> None:
    page = show()
    button = page.locator("#board .unfold").first
    assert page.locator("#board tr.seed:visible").count() == 0
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    assert page.locator("#board tr.seed:visible").count() == 3
    assert "93.00" in page.locator("#board tr.seed:visible").first.inner_text()
    button.click()
    assert page.locator("#board tr.seed:visible").count() == 0


def test_the_pareto_front_equals_that_of_python(sweep_page: Any) -> None:
    page = sweep_page
    for place, cost in enumerate(("parameters", "flops", "latency_1_ms", "latency_128_ms")):
        data = page.evaluate("JSON.parse(document.getElementById('data').textContent).settings")
        finished = [setting for setting in data if setting["status"] == "finished"]
        values = [setting["top1"]["mean"] for setting in finished]
        expected = pareto_front([setting["costs"][cost] for setting in finished], values)
        figure = page.locator("#cost figure").nth(place)
        show_numbers(figure)
        on_front = {
            row.locator("th").inner_text(): row.locator("td").last.inner_text() == "yes"
            for row in figure.locator("tbody tr").all()
        }
        assert on_front == dict(zip((setting["label"] for setting in finished), expected, strict=True))
    assert page.locator("#cost figure").count() == 4


@pytest.mark.slow
def test_the_front_is_that_of_the_settings_shown(show: Any) -> None:
    page = show()
    caption = page.locator("#cost figcaption").first
    assert "labels alone" not in caption.inner_text()
    page.select_option("#filter-loss", "labels alone")
    expect(caption).to_contain_text("resnet8 · labels alone")


@pytest.mark.slow
def test_calibration_captions_are_the_figures_of_the_runs(show: Any, folder: Path) -> None:
    """ECE is the mean over the seeds, as in the table; the gap is that of all predictions of these seeds."""
    page = show("intervals")
    figures = page.locator("#calibration figure").all()
    assert len(figures) == 3
    for figure in figures:
        student = figure.locator("h3").inner_text()
        runs = [folder / f"{student}-{seed}" for seed in range(2)]
        ece = sum(json.loads((run / "result.json").read_text())["last"]["ece"] for run in runs) / 2
        table = pl.concat([pl.read_parquet(run / "test.parquet") for run in runs])
        gap = 100 * float((table["confidence"] - (table["label"] == table["predicted"])).mean())  # type: ignore[arg-type]
        caption = figure.locator("figcaption").inner_text()
        assert caption.startswith(f"ECE {ece:.4f}, mean of 2 seeds. ")
        assert f"{abs(gap):.1f} points too {'high' if gap > 0 else 'low'}" in caption or abs(gap) < 0.55


@pytest.mark.slow
def test_intervals_of_two_seeds_are_not_drawn(show: Any) -> None:
    page = show("intervals")
    assert page.locator("#top1 .plot .whisker").count() == 0
    assert "Intervals of two seeds are in the table only" in page.locator("#top1 figcaption").inner_text()
    show_numbers(page.locator("#top1 figure"))
    assert page.locator("#top1 figure tbody tr").first.locator("td").nth(1).inner_text() != "–"
    page = show("sweep")
    assert page.locator("#top1 .plot .whisker").count() == 10, "three seeds have an interval"
    assert "two seeds" not in page.locator("#top1 figcaption").inner_text()


@pytest.mark.slow
def test_marks_switch_colours(show: Any) -> None:
    page = show()
    boxes = page.locator("#board .pick input")
    assert boxes.count() == 12
    assert [boxes.nth(k).is_checked() for k in range(12)] == [True] * 8 + [False] * 4
    assert page.locator("#calibration figure").count() == 8
    boxes.nth(0).focus()
    page.keyboard.press("Space")
    expect(page.locator("#calibration figure")).to_have_count(7)
    boxes.nth(9).check()
    boxes.nth(8).check()
    assert [boxes.nth(k).is_checked() for k in range(10)] == [False] + [True] * 7 + [True, False], "eight at most"
    expect(page.locator("#top1 .plot .series:not(.other)")).to_have_count(8)


@pytest.mark.slow
def test_learning_curves_show_the_chosen_figure(show: Any) -> None:
    page = show()
    first = page.locator("#curves figure").first
    assert first.locator(".series path.line").count() == 31  # one per run with metrics
    assert "Top-1" in first.locator("figcaption").inner_text()
    first.locator("select").select_option("test_nll")
    expect(first.locator("figcaption")).to_contain_text("NLL")
    show_numbers(first)
    expect(first.locator("tbody tr")).to_have_count(31)


@pytest.mark.slow
def test_the_tooltip_shows_the_nearest_point(show: Any) -> None:
    page = show()
    mark = page.locator("#top1 .plot .series .mark:not(.open)").first
    mark.scroll_into_view_if_needed()
    mark.hover()
    expect(page.locator("#tip")).to_contain_text("vgg8 · kd")
    expect(page.locator("#tip")).to_contain_text("92.50 % top-1")
    expect(page.locator("#board tbody.near")).to_have_attribute("data-student", "vgg8")
    page.mouse.move(2, 2)
    expect(page.locator("#tip")).to_be_hidden()


def test_a_link_unfolds_its_run_and_its_command_can_be_copied(sweep_page: Any) -> None:
    page = sweep_page
    page.fill("#filter-text", "resnet110")
    page.locator("#board tbody:visible th a").click()
    run = page.locator("details.run[open]")
    assert "CUDA out of memory" in run.inner_text()
    button = run.locator(".command .copy")
    button.click()
    expect(button).to_have_text("Copied")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "train-student digits --student resnet110 --loss kd --seed 0"
    run.locator("summary").first.click()
    page.click("#filter-clear")


def test_themes(show: Any) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page = show(scheme=scheme)
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    page.select_option("#theme", "light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["light"]
    page.reload()
    page.wait_for_selector(".plot svg[role=img]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["light"], "the page remembers it"
    page.select_option("#theme", "")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["dark"]


@pytest.mark.parametrize("scheme", ["light", slow("dark")])
def test_text_has_enough_contrast(request: pytest.FixtureRequest, scheme: str) -> None:
    """WCAG AA: a contrast ratio of at least 4.5."""
    is_light = scheme == "light"
    page = request.getfixturevalue("sweep_page") if is_light else request.getfixturevalue("show")(scheme=scheme)
    summary = page.locator("details.run summary").first
    summary.click()
    assert page.evaluate(POOR_CONTRAST) == []
    summary.click()


@pytest.mark.parametrize(("name", "width"), [("sweep", 360), slow("one", 360), slow("sweep", 768), slow("one", 768)])
def test_nothing_is_wider_than_the_screen(show: Any, name: str, width: int) -> None:
    page = show(name, width=width)
    for figure in page.locator("figure:visible").all():
        show_numbers(figure)
    for run in page.locator("details.run:visible > summary").all()[:10]:
        run.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(TOO_WIDE) == []


@pytest.mark.slow
def test_plots_follow_the_width(show: Any) -> None:
    page = show(width=1200)
    page.set_viewport_size({"width": 500, "height": 900})
    expect(page.locator("#top1 svg[role=img]")).to_have_attribute("viewBox", re.compile("^0 0 4[0-9][0-9] "))
    drawn = page.evaluate(
        "[...document.querySelectorAll('#top1 svg[role=img]')].map((s) => [s.viewBox.baseVal.width, s.clientWidth])"
    )
    assert all(abs(inner - outer) <= 1 for inner, outer in drawn)


def test_everything_has_a_name_for_screen_readers(sweep_page: Any) -> None:
    page = sweep_page
    assert page.evaluate(NAMELESS) == []
    plots = page.locator(".plot svg[role=img]")
    assert plots.count() > 10
    labels = [plots.nth(k).get_attribute("aria-label") for k in range(plots.count())]
    assert all(label and len(label) > 30 for label in labels)
    assert page.locator("figure details.numbers").count() == plots.count(), "each plot has a table"
    order = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((heading) => Number(heading.tagName[1]))")
    assert all(later - earlier <= 1 for earlier, later in pairwise(order))


@pytest.mark.slow
def test_every_section_is_reachable_by_keyboard(show: Any) -> None:
    page = show("one")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.closest('section')?.id ?? ''"))
    assert {"leaderboard", "top1", "curves", "calibration", "classes", "runs"} <= reached


@pytest.mark.slow
def test_a_single_run_needs_no_filters(show: Any) -> None:
    page = show("one")
    assert page.locator(".filters").count() == 0
    assert rows(page, "loss") == ["kd", "labels alone"]
    assert page.locator("#cost").is_hidden(), "both students cost the same"
    assert page.locator(".facts").inner_text().count("%") == 5


def test_without_javascript_the_figures_are_shown(browser: Any, folder: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((folder / "sweep.html").as_uri())
    text = page.locator("body").inner_text()
    assert "92.50" in text
    assert "does not run" in text
    assert "Calibration" not in text
    context.close()
