"""The contact sheet of `cache-tools show`: pictures of samples with what each source says, as PNG or HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from cache_tools.analysis.samples import Opinion, Shown, ShownSample, ShownView
from cache_tools.analysis.samples_text import (
    RIGHT,
    WRONG,
    about_lines,
    cut,
    cut_file,
    figure_text,
    gains,
    notes,
    title,
    view_lines,
)
from cache_tools.analysis.stats import make_folder, put_file
from cache_tools.analysis.stats_text import points
from cache_tools.errors import RecipeError, printable
from cache_tools.files import SafeFolder
from cache_tools.plotting import COLOURS, DARK_GREY, GREEN, INK, LABELS, VERMILLION, new_canvas, plain, png

MAX_PAGE_BYTES = 2_000_000
_LONGEST = 80  # characters of a name in the page
_SMALL = 96  # pictures up to this side are shown pixel by pixel
# How pictures are stored in the page, the first one that fits: longest side, quality of a JPEG (None: PNG).
_ENCODINGS = ((_SMALL, None), (288, 88), (224, 85), (160, 80), (112, 75), (72, 70), (48, 60))

# Of the PNG, in inches.
_MARGIN, _PICTURE, _SOURCE, _GAP, _LINE, _BAR, _NUMBER = 0.25, 1.05, 1.3, 0.12, 0.18, 0.165, 0.3
_HEADING = 0.085  # of a letter
_ROW = 2 * _LINE + 5 * _BAR + 0.34


def write_sheet(shown: Shown, out: Path) -> None:
    """Write a PNG or an HTML page, by the ending of `out`, and its folder if there is none.

    Raises:
        RecipeError: another ending, or names so long that no page below MAX_PAGE_BYTES holds them.
        StorageError: a folder is in the way, or the disk is full or read-only.
    """
    suffix = out.suffix.lower()
    if suffix not in (".png", ".html"):
        raise RecipeError("a sheet is PNG or HTML", expected="a file that ends in .png or .html", found=out)
    make_folder(out.parent)
    data = png(draw_sheet(shown)) if suffix == ".png" else render_sheet(shown).encode()
    folder = SafeFolder(out.parent)
    folder.remove_partials()  # of killed commands
    put_file(folder, out.name, data)


def draw_sheet(shown: Shown) -> Any:
    """A matplotlib figure: a row per sample, a column per view, a block of five bars per source."""
    names, sources = shown.about.class_names, shown.sources
    cell = _PICTURE + _GAP + len(sources) * (_SOURCE + _GAP) + _GAP
    lines = [*about_lines(shown), *(f"{head}: {_gains_line(rows)}" for head, rows in gains(shown))]
    lines += notes(shown, of_mean=False)
    top = _MARGIN + 0.42 + _LINE * len(lines) + 0.15
    width = max(2 * _MARGIN + len(shown.views) * cell, 9.0)
    figure, axes = new_canvas(width, top + _ROW * len(shown.samples) + _MARGIN)
    axes.text(_MARGIN, _MARGIN, plain(title(shown)), va="top", fontsize=14, fontweight="bold", color=INK)
    for number, line in enumerate(lines):
        axes.text(_MARGIN, _MARGIN + 0.4 + _LINE * number, plain(line), va="top", fontsize=8.5, color=DARK_GREY)
    for number, sample in enumerate(shown.samples):
        y = top + _ROW * number
        axes.plot((_MARGIN, width - _MARGIN), (y - 0.08, y - 0.08), color=DARK_GREY, linewidth=0.4)
        axes.text(_MARGIN, y, plain(_heading(shown, sample, width)), va="top", fontsize=9, fontweight="bold", color=INK)
        for place, view in enumerate(sample.views):
            _draw_view(axes, _MARGIN + place * cell, y + _LINE + 0.03, sample, view, names)
    axes.set(xlim=(0, width), ylim=(figure.get_figheight(), 0))
    axes.set_aspect("auto")
    return figure


def render_sheet(shown: Shown) -> str:
    """One HTML page with its pictures, below MAX_PAGE_BYTES, which loads nothing."""
    without = len(_page(shown, [""] * len(shown.samples) * len(shown.views)).encode())
    pictures = [view.pixels for sample in shown.samples for view in sample.views]
    for side, quality in _ENCODINGS:
        if quality is None and any(max(picture.shape[:2]) > side for picture in pictures):
            continue
        sources, size = [], without
        for picture in pictures:
            sources.append(_data_url(picture, side, quality))
            size += len(sources[-1])
            if size >= MAX_PAGE_BYTES:
                break
        else:
            return _page(shown, sources)
    raise RecipeError(
        "the page would be too large",
        expected=f"at most {MAX_PAGE_BYTES / 1e6:g} MB",
        next_step="show fewer samples or views (--count, --view), or write a .png",
    )


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


# The picture


def _draw_view(axes: Any, x: float, y: float, sample: ShownSample, view: ShownView, names: Sequence[str]) -> None:
    height, width = view.pixels.shape[:2]
    scale = _PICTURE / max(height, width)
    right, bottom = x + width * scale, y + height * scale
    smooth = "antialiased" if max(height, width) > _SMALL else "nearest"
    axes.imshow(view.pixels, extent=(x, right, bottom, y), interpolation=smooth, aspect="auto")
    about = ", ".join([f"view {view.view}", *view_lines(view)])
    axes.text(x, bottom + 0.03, plain(about), va="top", fontsize=6.5, color=DARK_GREY)
    for place, (source, opinion) in enumerate(view.opinions.items()):
        left = x + _PICTURE + _GAP + place * (_SOURCE + _GAP)
        _draw_opinion(axes, left, y, source, opinion, sample.label, names)


def _draw_opinion(
    axes: Any, x: float, y: float, source: str, opinion: Opinion, label: int, names: Sequence[str]
) -> None:
    from matplotlib.patches import Rectangle

    mark, colour = (RIGHT, GREEN) if opinion.right else (WRONG, VERMILLION)
    axes.add_patch(Rectangle((x, y + 0.03), 0.09, 0.09, color=COLOURS[source], linewidth=0))
    axes.text(x + 0.13, y, LABELS[source], va="top", fontsize=7.5, color=INK)
    axes.text(x + _SOURCE, y, mark, va="top", ha="right", fontsize=8.5, color=colour, fontweight="bold")
    for rank, (number, p) in enumerate(opinion.top):
        top = y + _LINE + rank * _BAR
        axes.add_patch(
            Rectangle((x, top), max(p, 0.003) * _SOURCE, _BAR * 0.84, color=COLOURS[source], alpha=0.32, linewidth=0)
        )
        style = {"va": "center", "fontsize": 7, "color": INK, "fontweight": "bold" if number == label else "normal"}
        middle = top + _BAR * 0.42
        name = axes.text(x + 0.03, middle, plain(cut(names[number], 13 if number == label else 15)), **style)
        name.set_clip_path(Rectangle((x, top), _SOURCE - _NUMBER, _BAR, transform=axes.transData))
        axes.text(x + _SOURCE, middle, f"{p:.2f}", ha="right", **style)


def _heading(shown: Shown, sample: ShownSample, width: float) -> str:
    """Number, label, figure and file of a sample, on a sheet of `width` inches."""
    parts = [f"sample {sample.sample}", f"label: {cut(shown.about.class_names[sample.label], 24)}"]
    if (figure := figure_text(shown, sample)) is not None:
        parts.append(figure)
    if sample.name is not None:
        left = int((width - 2 * _MARGIN) / _HEADING) - sum(len(part) + 3 for part in parts)
        parts.append(cut_file(sample.name, max(left, 12)))
    return " · ".join(parts)


def _gains_line(rows: Any) -> str:
    each = ", ".join(f"{cut(row['class'], 24)} {points(row['gain_over_teacher'])}" for row in rows.to_dicts())
    return f"{each} (points of top-1 over the teacher)"


# The page


def _page(shown: Shown, pictures: Sequence[str]) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    style = (files("cache_tools.analysis") / "sheet.css").read_text(encoding="utf-8")
    heading, left = _text(title(shown)), iter(pictures)
    samples = "\n".join(_article(shown, sample, left) for sample in shown.samples)
    if not shown.samples:
        samples = "<p>No sample has a top-1 other than its label in any view.</p>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy, quote=True)}">
<meta name="color-scheme" content="light dark">
<title>{heading}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<ul>
{"".join(f"<li>{_text(line)}</li>" for line in about_lines(shown))}
</ul>
</header>
<main>
{_gains_section(shown)}
{samples}
</main>
<footer>
{"".join(f"<p>{_text(line)}</p>" for line in notes(shown, of_mean=False))}
<p>Bars and numbers are probabilities; the label is underlined.
Written by teacher-cache {_text(version("teacher-cache"))}.
This single file loads nothing else: you can keep, send and open it anywhere.</p>
</footer>
</body>
</html>
"""


def _article(shown: Shown, sample: ShownSample, pictures: Iterable[str]) -> str:
    name = f"sample-{sample.sample}"
    label = _text(cut(shown.about.class_names[sample.label], _LONGEST))
    lines = [] if sample.name is None else [cut_file(sample.name, 120)]
    lines += [] if (figure := figure_text(shown, sample)) is None else [figure]
    about = "".join(f"<p>{_text(line)}</p>" for line in lines)
    views = "\n".join(
        _figure(shown, sample, view, picture) for view, picture in zip(sample.views, pictures, strict=False)
    )
    return f"""<article aria-labelledby="{name}">
<h2 id="{name}">Sample {sample.sample}: {label}</h2>
{about}
<div class="{"views" if len(shown.sources) <= 3 else "views wide"}">
{views}
</div>
</article>"""


def _figure(shown: Shown, sample: ShownSample, view: ShownView, picture: str) -> str:
    height, width = view.pixels.shape[:2]
    small = ' class="small"' if max(height, width) <= _SMALL else ""
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
