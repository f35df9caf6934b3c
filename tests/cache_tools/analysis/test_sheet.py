"""The sheet of `cache-tools show`: the size of the PNG, and a page that is whole, small, safe and readable."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from cache_tools import plotting
from cache_tools.analysis import sheet, sheet_page
from cache_tools.analysis.choice import Choice
from cache_tools.analysis.samples import Shown, show_samples
from cache_tools.errors import RecipeError, StorageError
from cache_tools.plotting import LABELS
from tests.support.page_checks import NAMELESS, POOR_CONTRAST, TOO_WIDE
from tests.support.show_case import CLASSES, write_cache, write_pictures

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e\"'&"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    root = tmp_path_factory.mktemp("sheet")
    cache = write_cache(root / "c.zarr", write_pictures(root / "pictures"), store="components")
    return show_samples(cache, Choice("disagree", count=3), [0, 2])


def with_pictures(shown: Shown, side: int, copies: int = 1) -> Shown:
    """The same opinions about noise of another size."""
    rng = np.random.default_rng(0)
    samples = [
        dataclasses.replace(
            each,
            views=tuple(
                dataclasses.replace(view, pixels=rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
                for view in each.views
            ),
        )
        for each in shown.samples
        for _ in range(copies)
    ]
    return dataclasses.replace(shown, samples=tuple(samples))


class Page(HTMLParser):
    """A parsed page. Fails on tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "br"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def decoded(source: str | None) -> Image.Image:
    match = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", source or "")
    assert match is not None
    picture = Image.open(io.BytesIO(base64.b64decode(match[2])))
    assert picture.format is not None
    assert picture.format.lower() == match[1]
    return picture


@pytest.mark.medium
def test_png_has_a_row_per_sample_and_a_column_per_view(shown: Shown, tmp_path: Path) -> None:
    sizes = {}
    one = dataclasses.replace(shown, samples=shown.samples[:1])
    two = dataclasses.replace(shown, samples=shown.samples[:2])
    wide = dataclasses.replace(
        shown,
        views=(0, 2, 2, 2),
        samples=tuple(dataclasses.replace(each, views=each.views + each.views) for each in shown.samples[:1]),
    )
    for name, part in {"one": one, "two": two, "wide": wide}.items():
        sheet.write_sheet(part, tmp_path / "new" / f"{name}.png")
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            sizes[name] = picture.size
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50, "pictures are drawn"
    row, cell = 140 * sheet._ROW, 140 * (1.05 + 2 * 0.12 + 3 * (1.3 + 0.12))
    assert sizes["two"][1] - sizes["one"][1] == pytest.approx(row, abs=1)
    assert sizes["one"][0] == pytest.approx(2 * cell + 70, abs=1)
    assert sizes["wide"][0] == pytest.approx(4 * cell + 70, abs=1)
    assert sizes["wide"][1] == sizes["one"][1]


def test_png_names_classes_probabilities_and_verdicts(shown: Shown) -> None:
    (axes,) = sheet.draw_sheet(shown).axes
    words = [text.get_text() for text in axes.texts]
    opinions = [opinion for each in shown.samples for view in each.views for opinion in view.opinions.values()]
    assert words.count("✓") == sum(opinion.right for opinion in opinions) > 0
    assert words.count("✗") == sum(not opinion.right for opinion in opinions) > 0
    for opinion in opinions:
        for number, p in opinion.top:
            assert CLASSES[number] in words
            assert f"{p:.2f}" in words
    assert len(axes.images) == 6
    bold = {text.get_text() for text in axes.texts if text.get_fontweight() == "bold"}
    assert {CLASSES[each.label] for each in shown.samples} <= bold, "the label is marked"


@pytest.mark.medium
def test_png_text_stays_in_its_place(shown: Shown) -> None:
    """Long names of classes and files: no name reaches its probability, no line the edge of the sheet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    long = tuple(f"{letter} WWWWWWWWWWWW name of a mammal" for letter in CLASSES)
    about = shown.about.model_copy(update={"class_names": long})
    row = {"rival_class": "academic gown, academic robe", "views_against": 2}
    name = "academic_gown, academic robe, judge's robe/n000018_photograph.jpeg"
    samples = [dataclasses.replace(each, label=0, name=name, suspicion=row) for each in shown.samples[:1]]
    named = dataclasses.replace(shown, samples=tuple(samples), choice=Choice("suspicious"))
    figure = sheet.draw_sheet(named)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert max(box.x1 for box in boxes) <= figure.get_figwidth() * 140
    figure = sheet.draw_sheet(dataclasses.replace(named, about=about))
    renderer = FigureCanvasAgg(figure).get_renderer()
    small = [text for text in figure.axes[0].texts if text.get_fontsize() == 7]
    assert len(small) == 2 * 2 * 3 * 5
    for text, p in zip(small[::2], small[1::2], strict=True):
        clip = text.get_clip_box()
        assert clip is not None
        assert clip.x1 < p.get_window_extent(renderer).x0, (text.get_text(), p.get_text())


def test_names_in_other_scripts_are_drawn_with_other_fonts(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib's default font lacks some characters of STIX, which comes with it; where no font has one, a note."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    def characters(family: str) -> set[str]:
        return {chr(each) for each in get_font(findfont(FontProperties(family))).get_charmap()}

    own, *others = characters("DejaVu Sans"), characters("STIXGeneral")
    name = next(each for each in sorted(others[0] - own) if each.isprintable() and each > "\u2000")
    about = shown.about.model_copy(update={"class_names": (name, *CLASSES[1:])})
    named = dataclasses.replace(shown, about=about)
    families, missing = plotting.fonts_for(f"{name}abc")
    assert len(families) > 1
    assert missing == ""
    assert all("No font" not in text.get_text() for text in sheet.draw_sheet(named).axes[0].texts)
    figure = sheet.draw_sheet(named)
    with_font = plotting.png(figure)
    monkeypatch.setattr(plotting, "_fonts", list)
    figure = sheet.draw_sheet(named)
    note = f"No font here has the character U+{ord(name):04X}, shown as boxes."
    assert note in [text.get_text() for text in figure.axes[0].texts]
    assert plotting.png(figure) != with_font


def test_page_says_everything_and_loads_nothing(shown: Shown, tmp_path: Path) -> None:
    sheet.write_sheet(shown, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    (policy,) = [each["content"] for each in page.all("meta") if "http-equiv" in each]
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert not {"script", "link", "iframe", "object", "form", "a"} & {name for name, _ in page.elements}
    views = [(each, view) for each in shown.samples for view in each.views]
    images = page.all("img")
    assert len(images) == len(views)
    for attributes, (each, view) in zip(images, views, strict=True):
        picture = decoded(attributes["src"])
        assert np.array_equal(np.asarray(picture), view.pixels), "a small picture is kept as it is"
        words = attributes["alt"] or ""
        assert f"Sample {each.sample}, view {view.view}, label {CLASSES[each.label]}." in words
        for source, opinion in view.opinions.items():
            number, p = opinion.top[0]
            verdict = "right" if opinion.right else "wrong"
            assert f"{LABELS[source]}: {CLASSES[number]} {p:.2f}, {verdict}" in words
        for opinion in view.opinions.values():
            for number, p in opinion.top:
                assert {CLASSES[number], f"{p:.2f}"} <= set(page.texts)
    assert len(page.all("caption")) == len(page.all("table"))
    assert {each.get("scope") for each in page.all("th")} == {"row", "col"}
    anchors = [each["id"] for each in page.all("h2")]
    assert [each["aria-labelledby"] for each in page.all("article")] == anchors
    assert len(set(anchors)) == len(shown.samples)


def test_names_cannot_become_markup(shown: Shown) -> None:
    names = (HOSTILE, *CLASSES[1:])
    samples = [dataclasses.replace(each, name=HOSTILE, label=0) for each in shown.samples]
    hostile = dataclasses.replace(
        shown,
        about=shown.about.model_copy(update={"class_names": names, "dataset": HOSTILE}),
        choice=Choice("class", class_name=HOSTILE),
        samples=tuple(dataclasses.replace(each, figure=None) for each in samples),
        helped=None if shown.helped is None else shown.helped.with_columns(pl.lit(HOSTILE).alias("class")),
    )
    text = sheet.render_sheet(hostile)
    page = Page(text)
    assert "<img src=x" not in text
    assert all(each.isprintable() or each == "\n" for each in text)
    escaped = html.escape(HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e"), quote=True)
    assert escaped in text
    assert all((each["src"] or "").startswith("data:image/") for each in page.all("img"))


@pytest.mark.parametrize(("side", "copies", "kind"), [(16, 1, "PNG"), (224, 1, "JPEG"), (224, 33, "JPEG")])
def test_page_stays_below_two_megabytes(shown: Shown, side: int, copies: int, kind: str) -> None:
    large = with_pictures(shown, side, copies)
    text = sheet.render_sheet(large)
    assert len(text.encode()) < sheet.MAX_PAGE_BYTES
    pictures = [decoded(each["src"]) for each in Page(text).all("img")]
    assert {picture.format for picture in pictures} == {kind}
    sides = {picture.size for picture in pictures}
    assert len(sides) == 1
    assert (sides == {(side, side)}) == (copies == 1), "many large pictures are made smaller"


def test_text_that_fits_no_page_is_refused(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet_page, "MAX_PAGE_BYTES", 10_000)
    with pytest.raises(RecipeError, match=r"page would be too large.*--count, --view"):
        sheet.render_sheet(shown)


def test_wide_pictures_keep_their_shape(shown: Shown) -> None:
    first = shown.samples[0]
    view = dataclasses.replace(first.views[0], pixels=np.full((100, 400, 3), 200, np.uint8))
    wide = dataclasses.replace(shown, samples=(dataclasses.replace(first, views=(view,)),), views=(0,))
    (attributes,) = Page(sheet.render_sheet(wide)).all("img")
    assert decoded(attributes["src"]).size == (288, 72)


def test_other_endings_and_files_in_the_way_are_refused(shown: Shown, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ends in .png or .html"):
        sheet.write_sheet(shown, tmp_path / "page.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        sheet.write_sheet(shown, tmp_path / "file" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(StorageError):
        sheet.write_sheet(shown, tmp_path / "folder.html")


def test_no_suspicious_sample_is_an_empty_sheet(shown: Shown) -> None:
    empty = dataclasses.replace(shown, samples=(), choice=Choice("suspicious"))
    assert "No sample has a top-1 other than its label in any view." in Page(sheet.render_sheet(empty)).texts
    assert sheet.draw_sheet(empty).axes


@pytest.mark.medium
def test_page_in_a_browser(shown: Shown, tmp_path: Path) -> None:
    """At two widths, in both themes: nothing is too wide, nameless, hard to read, or loaded."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    file = tmp_path / "page.html"
    names = ("a class with a rather long name", "Donaudampfschifffahrtsgesellschaft", *CLASSES[2:])
    about = shown.about.model_copy(update={"class_names": names})
    sheet.write_sheet(dataclasses.replace(shown, about=about), file)
    requested: list[str] = []
    messages: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1200, 400):
            for scheme in ("light", "dark"):
                page: Any = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.on("request", lambda request: requested.append(request.url))
                page.on("console", lambda message: messages.append(message.text))
                page.goto(file.as_uri())
                for check in (POOR_CONTRAST, TOO_WIDE, NAMELESS):
                    assert page.evaluate(check) == [], (width, scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
                page.close()
        browser.close()
    assert messages == []
    assert {url.partition(",")[0] for url in requested} <= {file.as_uri(), "data:image/png;base64"}
