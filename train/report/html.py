"""Write the page: a single HTML file with the results of one or many runs, for any browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl

from cache_tools.console import print_line
from cache_tools.errors import DataError, StorageError, printable
from cache_tools.files import find_leftovers, remove_leftover
from train.report.comparison import Comparison, compare
from train.report.data import page_data
from train.report.leaderboard import leaderboard
from train.report.pictures import PictureSource, pictures_section
from train.report.summary import facts, filters, headline, notices, run_details, summary
from train.report.trials import read_trials
from train.weights.run_files import write_file

MAX_PAGE_BYTES = 2_000_000  # of a page with pictures
# The template names the files of its script, in order. Template and script are read together, so that the page is of
# one version even if the package is updated while a run goes on.
_SCRIPT = re.compile(r"\{\{script: ([\w. ]+)\}\}")


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    trials: pl.DataFrame | None = None,
    title: str = "",
    pictures: PictureSource | None = None,
) -> Path:
    """Write the page of run folders of `train-student`, each with its twin on labels alone.

    The file contains its styles, script and data, and its content security policy forbids it to load anything else.

    Args:
        out: the HTML file; its folder is created if it does not exist.
        trials: a sweep's table (of `train.sweep.table`). It adds FLOPs, latency and status of runs, trials without a
            folder, and runs that are only in the table.
        title: of the page; by default made from the runs.
        pictures: a cache whose samples are shown with what teacher, CLIP, fusion and the best student say. Where they
            cannot be shown, the page and a line on stderr say why.

    Returns:
        `out`.

    Raises:
        NotFoundError: a path that is no run folder.
        DataError: nothing to report, or a damaged file.
        StorageError: a file where the folder of `out` should be.
    """
    found = read_trials(runs, trials)
    if not found:
        raise DataError("no trials to report", where=out, next_step="name at least one run folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError("cannot write: a file is where a folder should be", where=error.filename) from error
    write_file(out, render(compare(found), title, pictures).encode())
    for leftover in find_leftovers(out.parent, f"{out.name}."):  # of a command that was killed here
        remove_leftover(leftover)
    return out


def render(comparison: Comparison, title: str = "", pictures: PictureSource | None = None) -> str:
    """The page as HTML text."""
    page = files("train.report") / "page"
    template = (page / "page.html").read_text(encoding="utf-8")
    names = _SCRIPT.search(template)
    assert names is not None, "the template has a script"
    script = "\n".join((page / name).read_text(encoding="utf-8") for name in names[1].split())
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    anchors = {trial: f"run-{number}" for number, trial in enumerate(comparison.trials)}
    heading = title or headline(comparison)
    data = _printable(page_data(comparison))
    ours = {
        "policy": escape(_policy(script, has_pictures=pictures is not None), quote=True),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "script": script,
    }
    parts = {
        "title": escape(heading),
        "summary": summary(comparison),
        "facts": facts(comparison),
        "notices": notices(comparison),
        "filters": filters(comparison),
        "board": leaderboard(comparison, anchors),
        "runs": run_details(comparison, anchors),
        "written": escape(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, teacher-cache {version('teacher-cache')}"),
        # Only an end tag ends a script element, so it is enough to escape `<`.
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    shown = {name: printable(part, keep="\n") for name, part in parts.items()}
    template = _SCRIPT.sub("{{script}}", template)
    if pictures is None:
        return _filled(template, ours | shown | {"pictures": ""})
    without = len(_filled(template, ours | shown | {"pictures": ""}).encode())
    section, problems = pictures_section(pictures, comparison, MAX_PAGE_BYTES - without)
    for line in problems:
        print_line(line, file=sys.stderr)
    return _filled(template, ours | shown | {"pictures": section})


def _printable(data: Any) -> Any:
    """Plain data with every character escaped that could change how a name looks in the page."""
    if isinstance(data, dict):
        return {_printable(key): _printable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_printable(value) for value in data]
    return printable(data) if isinstance(data, str) else data


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with every `{{name}}` replaced, in one pass, so that values may contain `{{name}}`."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(script: str, *, has_pictures: bool) -> str:
    """The content security policy: load nothing, run only our script, and show pictures that are in the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    images = " img-src data:;" if has_pictures else ""
    return f"default-src 'none'; {sources};{images} base-uri 'none'; form-action 'none'"
