"""The section of the page with pictures: samples of a cache with what teacher, CLIP, fusion and a student say.

It is written only for a cache that the user has named: it copies images into the page, and a received run must not
choose which ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from cache_tools.errors import CacheError
from cache_tools.reader import TeacherCache
from train.report.comparison import Comparison
from train.report.records import FINISHED, TrialRecord

COUNT, VIEWS = 4, 2  # samples of each kind; views of each, which are also those that samples are ranked by
_TITLE = "What the teachers say"


@dataclass(frozen=True)
class PictureSource:
    """Where the pictures of a page come from.

    Attributes:
        cache: its path, URL, name or fingerprint, as the user names it.
        data_dir: where its images are, if they were moved since the build.
        device: that the student runs on.
    """

    cache: str | Path
    data_dir: Path | None = None
    device: str = "auto"


def pictures_section(source: PictureSource, comparison: Comparison, room: int) -> tuple[str, list[str]]:
    """The section as HTML of at most `room` bytes, and what it lacks, a line each.

    Without the cache, its images or the student, the section says why.
    """
    problems: list[str] = []
    try:
        cache = TeacherCache.open(source.cache)
        body = _sheets(cache, source, comparison, room - 4000, problems)
    except CacheError as error:
        body = ""
        problems.append(f"There are no pictures: {error}")
    lines = "".join(f"<li>{escape(line, quote=True)}</li>" for line in problems)
    notice = f'<ul class="notices">{lines}</ul>' if lines else ""
    return (
        f'<section id="pictures" aria-labelledby="title-pictures">\n<h2 id="title-pictures">{_TITLE}</h2>\n'
        f"{notice}\n{body}\n</section>"
    ), problems


def _sheets(cache: TeacherCache, source: PictureSource, comparison: Comparison, room: int, problems: list[str]) -> str:
    # Imported here: a page without pictures needs nothing of this.
    from cache_tools.analysis.choice import Choice
    from cache_tools.analysis.samples import show_choices
    from cache_tools.analysis.sheet_page import render_sections
    from cache_tools.analysis.stats import sources_of

    uncertain = Choice("confused" if len(sources_of(cache.recipe)) == 1 else "disagree", count=COUNT)
    choices = [Choice("even", count=COUNT), uncertain, Choice("suspicious", count=COUNT)]
    views = list(cache.complete_views[:VIEWS]) or None

    def sheets(student: str | None) -> str:
        shown = show_choices(cache, choices, views, student=student, data_dir=source.data_dir, device=source.device)
        return render_sections(shown, room)

    trial = _best(comparison, cache.manifest.fingerprint)
    if trial is None:
        problems.append("There is no finished run, so no student is shown.")
        return sheets(None)
    try:
        return sheets(str(trial.folder))
    except CacheError as error:
        body = sheets(None)  # raises again if the reason is not the student
        problems.append(f"The student is not shown: {error}")
        return body


def _best(comparison: Comparison, fingerprint: str) -> TrialRecord | None:
    """The first finished run of the best setting that learned from this cache; else that of the best setting."""
    finished = [trial for trial in comparison.trials if trial.status == FINISHED and trial.folder is not None]
    return next((trial for trial in finished if trial.fingerprint == fingerprint), next(iter(finished), None))
