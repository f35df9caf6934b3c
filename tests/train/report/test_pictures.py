"""The pictures of the page: what they show, that the user names their cache, and what the page says without them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_tools.errors import RecipeError
from tests.support import tiny_run
from tests.support.page_checks import NAMELESS, POOR_CONTRAST, TOO_WIDE
from tests.support.run_folders import write_run
from tests.support.show_case import CLASSES, declare_plugins, write_cache, write_pictures
from train.report import html, write_report
from train.report.cli import app
from train.report.pictures import COUNT, VIEWS, PictureSource
from train.run import train_student

pytestmark = pytest.mark.medium

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run beside its cache `c.zarr` and its `pictures`, with a page that has pictures."""
    root = tmp_path_factory.mktemp("with-pictures")
    cache = write_cache(root / "c.zarr", write_pictures(root / "pictures"), store="components")
    with pytest.MonkeyPatch.context() as patch:
        declare_plugins(patch)
        train_student(tiny_run.recipe(cache.path, root / "run", epochs=1, loggers=()), pictures=True)
    return root / "run"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    declare_plugins(monkeypatch)


def test_the_page_shows_samples_with_all_opinions(run: Path) -> None:
    text = (run / "report.html").read_text()
    for heading in (
        "Samples spread evenly over the classes",
        "Where teacher and CLIP differ most",
        "Suspicious labels",
    ):
        assert f"<h3>{heading}</h3>" in text
    words = re.findall(r'<img[^>]* alt="([^"]*)"', text)
    assert len(words) == text.count("<img") == 3 * COUNT * VIEWS
    assert all(re.search(r"label (\w+)\. teacher: .*; CLIP: .*; fusion: .*; student: ", each) for each in words)
    assert {re.search(r"label (\w+)", each)[1] for each in words} <= set(CLASSES)  # type: ignore[index]
    assert "student: resnet8, 1 epoch" in text
    names = re.findall(r' id="([^"]+)"', text)
    assert len(names) == len(set(names))
    assert "img-src data:;" in text
    assert len(text.encode()) < html.MAX_PAGE_BYTES


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(run: Path) -> None:
    """At two widths, in both themes, all unfolded: nothing is too wide, nameless, hard to read, or loaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    page_url = (run / "report.html").as_uri()
    requested: list[str] = []
    messages: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1200, 400):
            for scheme in ("light", "dark"):
                page: Any = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.on("request", lambda request: requested.append(request.url))
                page.on("console", lambda message: messages.append(message.text))
                page.goto(page_url)
                page.wait_for_selector(".plot svg[role=img]")
                for summary in page.locator("#pictures details > summary").all()[1:]:
                    summary.press("Enter")
                assert page.locator("#pictures img:visible").count() == 3 * COUNT * VIEWS
                assert page.evaluate("[...document.images].every((one) => one.naturalWidth > 0 && one.alt)")
                for check in (POOR_CONTRAST, TOO_WIDE, NAMELESS):
                    assert page.evaluate(check) == [], (width, scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                page.get_by_role("link", name="What the teachers say").click()
                page.close()
        browser.close()
    assert messages == []
    assert {url.partition("#")[0].partition(",")[0] for url in requested} <= {page_url, "data:image/png;base64"}


def test_only_a_cache_that_the_user_names_is_opened(run: Path, tmp_path: Path) -> None:
    """The run's own record of its cache and images is not enough."""
    text = write_report([run], tmp_path / "page.html").read_text()
    assert "<img" not in text
    assert "img-src" not in text
    assert 'id="pictures"' not in text
    done = CliRunner().invoke(
        app, [str(run), "--out", str(tmp_path / "named.html"), "--pictures", str(run.parent / "c.zarr")]
    )
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "named.html").read_text().count("<img") == 3 * COUNT * VIEWS


def test_without_cache_images_student_or_room_the_page_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, page = run.parent / "c.zarr", tmp_path / "page.html"

    def lines(runs: Path, source: PictureSource) -> tuple[str, int]:
        text = write_report([runs], page, pictures=source).read_text()
        [notice] = re.findall(r'<section id="pictures"[^>]*>.*?<li>(.*?)</li>', text, flags=re.DOTALL)
        shown = capsys.readouterr().err
        assert notice[:25] in shown
        return notice, text.count("<img")

    no_cache = lines(run, PictureSource(tmp_path / "<b>none"))
    assert no_cache[0].startswith("There are no pictures: no cache here")
    assert "&lt;b&gt;none" in no_cache[0]
    no_images = lines(run, PictureSource(cache, tmp_path))
    assert no_images[0].startswith("There are no pictures: ")
    assert no_cache[1] == no_images[1] == 0
    other = write_run(tmp_path / "run")
    notice, count = lines(other, PictureSource(cache))
    assert notice.startswith("The student is not shown: ")
    assert count == 3 * COUNT * VIEWS
    monkeypatch.setattr(html, "MAX_PAGE_BYTES", 120_000)
    notice, count = lines(run, PictureSource(cache))
    assert notice.startswith("There are no pictures: the page has no room for them")
    assert count == 0


def test_pictures_without_a_cache_are_refused(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path / "c.zarr", tmp_path / "run").model_copy(update={"cache": None})
    with pytest.raises(RecipeError, match="no cache whose samples could be shown"):
        train_student(recipe, pictures=True)
    failed = CliRunner().invoke(app, [str(tmp_path), "--data-dir", str(tmp_path)])
    assert failed.exit_code == 2
    assert "add --pictures CACHE" in failed.stderr.replace("Add", "add")
