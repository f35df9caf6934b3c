"""The contact sheet of `cache-tools show` as HTML: a page of its own, or a section of another page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from cache_tools.analysis.samples import Opinion, Shown, ShownSample, ShownView
from cache_tools.analysis.samples_text import (
    RIGHT,
    WRONG,
    about_lines,
    cut,
    cut_file,
    definition,
    figure_text,
    gains,
    notes,
    title,
    view_lines,
)
from cache_tools.analysis.stats_text import points
from cache_tools.errors import RecipeError, printable
from cache_tools.plotting import LABELS

MAX_PAGE_BYTES = 2_000_000
SMALL = 96  # pictures up to this side are shown pixel by pixel
_LONGEST = 80  # characters of a name in the page
# How pictures are stored in the page, the first one that fits: longest side, quality of a JPEG (None: PNG).
_ENCODINGS = ((SMALL, None), (288, 88), (224, 85), (160, 80), (112, 75), (72, 70), (48, 60))
_LEGEND = "Bars and numbers are probabilities; the label is underlined."
_NONE_SUSPICIOUS = "<p>No sample has a top-1 other than its label in any view.</p>"


def render_sheet(shown: Shown) -> str:
    """One HTML page with its pictures, below MAX_PAGE_BYTES, which loads nothing.

    Raises:
        RecipeError: names so long that no page below MAX_PAGE_BYTES holds them.
    """
    pictures = _fit_pictures([shown], MAX_PAGE_BYTES - len(_page(shown, _nothing()).encode()))
    if pictures is None:
        raise RecipeError(
            "the page would be too large",
            expected=f"at most {MAX_PAGE_BYTES / 1e6:g} MB",
            next_step="show fewer samples or views (--count, --view), or write a .png",
        )
    return _page(shown, iter(pictures))


def render_sections(sheets: Sequence[Shown], room: int) -> str:
    """Several sheets of one cache and student as a part of another page, with its styles, in at most `room` bytes.

    The page needs the variables of `sheet_page.css`, and `img-src data:` in its policy. The first sheet is unfolded.

    Raises:
        RecipeError: there is no room for the pictures.
    """
    pictures = _fit_pictures(sheets, room - len(_sections(sheets, _nothing()).encode()))
    if pictures is None:
        raise RecipeError(
            "the page has no room for them",
            expected=f"at most {MAX_PAGE_BYTES / 1e6:g} MB",
            next_step="write a page of fewer runs, or a sheet of its own with cache-tools show",
        )
    return _sections(sheets, iter(pictures))


def alternative_text(shown: Shown, sample: ShownSample, view: ShownView) -> str:
    """What a picture shows, in words: the label, and what each source says."""
    names = shown.about.class_names
    parts = []
    for source in shown.sources:
        opinion = view.opinions[source]
        number, p = opinion.top[0]
        verdict = "right" if opinion.right else "wrong"
        parts.append(f"{LABELS[source]}: {cut(names[number], _LONGEST)} {p:.2f}, {verdict}")
    return f"Sample {sample.sample}, view {view.view}, label {cut(names[sample.label], _LONGEST)}. {'; '.join(parts)}."


def _nothing() -> Iterator[str]:
    while True:
        yield ""


def _fit_pictures(sheets: Sequence[Shown], room: int) -> list[str] | None:
    """The pictures of all views as data URLs, of less than `room` characters together; None if they do not fit."""
    pictures = [view.pixels for shown in sheets for sample in shown.samples for view in sample.views]
    for side, quality in _ENCODINGS:
        if quality is None and any(max(picture.shape[:2]) > side for picture in pictures):
            continue
        sources, size = [], 0
        for picture in pictures:
            sources.append(_data_url(picture, side, quality))
            size += len(sources[-1])
            if size >= room:
                break
        else:
            if size < room:
                return sources
    return None


def _page(shown: Shown, pictures: Iterator[str]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    heading = _text(title(shown))
    samples = "\n".join(_article(shown, sample, pictures, 2, "") for sample in shown.samples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=True)}">
<meta name="color-scheme" content="light dark">
<title>{heading}</title>
<style>
{_styles("sheet_page.css")}{_styles("sheet.css")}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
{_list(about_lines(shown))}
</header>
<main class="sheet">
{_gains_section(shown)}
{samples or _NONE_SUSPICIOUS}
</main>
<footer>
{"".join(f"<p>{_text(line)}</p>" for line in notes(shown, of_mean=False))}
<p>{_LEGEND}
Written by teacher-cache {_text(version("teacher-cache"))}.
This single file loads nothing else: you can keep, send and open it anywhere.</p>
</footer>
</body>
</html>
"""


def _sections(sheets: Sequence[Shown], pictures: Iterator[str]) -> str:
    first = sheets[0]
    parts = []
    for number, shown in enumerate(sheets):
        samples = "\n".join(_article(shown, each, pictures, 4, f"{shown.choice.order}-") for each in shown.samples)
        how = "" if (ranked := definition(shown)) is None else f"<p>{_text(ranked[:1].upper() + ranked[1:])}.</p>"
        parts.append(
            f"<details{'' if number else ' open'}><summary><h3>{_text(title(shown))}</h3></summary>\n"
            f"{how}\n{samples or _NONE_SUSPICIOUS}\n</details>"
        )
    lines = [*notes(first, of_mean=False), _LEGEND]
    return f"""<style>
{_styles("sheet.css")}</style>
<div class="sheet">
{_list(about_lines(first))}
{_gains_section(first)}
{"".join(parts)}
<div class="notes">{"".join(f"<p>{_text(line)}</p>" for line in lines)}</div>
</div>"""


def _styles(name: str) -> str:
    return (files("cache_tools.analysis") / name).read_text(encoding="utf-8")


def _list(lines: Iterable[str]) -> str:
    return f"<ul>\n{''.join(f'<li>{_text(line)}</li>' for line in lines)}\n</ul>"


def _article(shown: Shown, sample: ShownSample, pictures: Iterable[str], level: int, prefix: str) -> str:
    name = f"{prefix}sample-{sample.sample}"
    label = _text(cut(shown.about.class_names[sample.label], _LONGEST))
    lines = [] if sample.name is None else [cut_file(sample.name, 120)]
    lines += [] if (figure := figure_text(shown, sample)) is None else [figure]
    about = "".join(f"<p>{_text(line)}</p>" for line in lines)
    views = "\n".join(
        _figure(shown, sample, view, picture) for view, picture in zip(sample.views, pictures, strict=False)
    )
    return f"""<article aria-labelledby="{name}">
<h{level} id="{name}">Sample {sample.sample}: {label}</h{level}>
{about}
<div class="{"views" if len(shown.sources) <= 3 else "views wide"}">
{views}
</div>
</article>"""


def _figure(shown: Shown, sample: ShownSample, view: ShownView, picture: str) -> str:
    height, width = view.pixels.shape[:2]
    small = ' class="small"' if max(height, width) <= SMALL else ""
    words = _text(alternative_text(shown, sample, view))
    about = "".join(f"{_text(line)}<br>" for line in view_lines(view)).removesuffix("<br>")
    opinions = [(source, view.opinions[source]) for source in shown.sources]
    heads = "".join(_head(source, opinion) for source, opinion in opinions)
    rows = "\n".join(
        f'<tr><th scope="row">{rank + 1}</th>'
        + "".join(_cell(source, opinion, rank, sample.label, shown.about.class_names) for source, opinion in opinions)
        + "</tr>"
        for rank in range(max(len(opinion.top) for _, opinion in opinions))
    )
    return f"""<figure>
<div class="picture"><img{small} src="{picture}" width="{width}" height="{height}" alt="{words}">
<figcaption><b>View {view.view}</b>{about}</figcaption></div>
<table><caption class="aside">Most probable classes of sample {sample.sample} in view {view.view}</caption>
<thead><tr><th scope="col"><span class="aside">rank</span></th>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table>
</figure>"""


def _head(source: str, opinion: Opinion) -> str:
    kind, mark = ("right", RIGHT) if opinion.right else ("wrong", WRONG)
    return (
        f'<th scope="col" class="{source}"><span class="dot"></span>{LABELS[source]} '
        f'<span class="{kind}"><span aria-hidden="true">{mark}</span> {kind}</span></th>'
    )


def _cell(source: str, opinion: Opinion, rank: int, label: int, names: Sequence[str]) -> str:
    number, p = opinion.top[rank]
    own, note = (" label", '<span class="aside"> (the label)</span>') if number == label else ("", "")
    name = _text(cut(names[number], _LONGEST))
    return (
        f'<td class="{source}{own}" style="--p:{100 * p:.1f}%"><div class="said"><span>{name}{note}</span> '
        f"<span>{p:.2f}</span></div></td>"
    )


def _gains_section(shown: Shown) -> str:
    tables = []
    for heading, rows in gains(shown):
        lines = "".join(
            f'<tr><th scope="row">{_text(cut(row["class"], _LONGEST))}</th><td class="number">{row["n"]:,}</td>'
            f'<td class="number">{points(row["gain_over_teacher"])}</td>'
            f'<td class="number">{points(row["gain_over_clip"])}</td></tr>'
            for row in rows.to_dicts()
        )
        heads = "".join(
            f'<th scope="col" class="number">{head}</th>' for head in ("samples", "over teacher", "over CLIP")
        )
        tables.append(
            f"<table><caption>{_text(heading[:1].upper() + heading[1:])}, in points of top-1</caption>"
            f'<thead><tr><th scope="col">class</th>{heads}</tr></thead><tbody>{lines}</tbody></table>'
        )
    if not tables:
        return ""
    return (
        '<section aria-label="What the fusion gains, class by class, in points of top-1">'
        f'<div class="gains">{"".join(tables)}</div></section>'
    )


def _data_url(pixels: Any, side: int, quality: int | None) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png" if quality is None else "jpeg"
    if quality is None:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    """A user's text in the page."""
    return escape(printable(text), quote=True)
