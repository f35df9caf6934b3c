"""The page: one HTML file with everything that one or many runs found, to be opened from disk by any browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import polars as pl

from cache_tools.errors import DataError, StorageError
from cache_tools.files import put_durably
from train.report.comparison import Comparison, compare
from train.report.data import page_data
from train.report.leaderboard import leaderboard
from train.report.summary import facts, filters, headline, notices, run_details, summary
from train.report.trials import read_trials

# The template says of which files, in which order, its script is made: the page is of one version, even where the
# package was updated while a run was going on.
_SCRIPT = re.compile(r"\{\{script: ([\w. ]+)\}\}")


def write_report(runs: Sequence[Path], out: Path, *, trials: pl.DataFrame | None = None, title: str = "") -> Path:
    """Write the page of run folders of `train-student`, each with its twin on labels alone.

    The file asks for nothing outside itself: styles, script and data are in it, and its own policy forbids the rest.

    Args:
        out: the HTML file; its folder is made if need be.
        trials: a sweep's table (as `train.sweep.table` makes them). It adds what the folders
            do not know (FLOPs, latency, status) and the trials without a folder; runs that only it names are read too.
        title: of the page; made from the runs if empty.

    Returns:
        `out`.

    Raises:
        NotFoundError: a path that is no run folder.
        DataError: nothing to report, or a damaged file.
        StorageError: a file in place of the folder of `out`.
    """
    found = read_trials(runs, trials)
    if not found:
        raise DataError("no trials to report", where=out, next_step="name at least one run folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError("cannot write: a file is where a folder should be", where=error.filename) from error
    put_durably(out, render(compare(found), title).encode())
    return out


def render(comparison: Comparison, title: str = "") -> str:
    """The page as text."""
    page = files("train.report") / "page"
    template = (page / "page.html").read_text(encoding="utf-8")
    names = _SCRIPT.search(template)
    assert names is not None, "the template has a script"
    script = "\n".join((page / name).read_text(encoding="utf-8") for name in names[1].split())
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    anchors = {trial: f"run-{number}" for number, trial in enumerate(comparison.trials)}
    heading = title or headline(comparison)
    data = page_data(comparison)
    parts = {
        "title": escape(heading),
        "policy": escape(_policy(script), quote=True),
        "style": (page / "page.css").read_text(encoding="utf-8"),
        "summary": summary(comparison),
        "facts": facts(comparison),
        "notices": notices(comparison),
        "filters": filters(comparison),
        "board": leaderboard(comparison, anchors),
        "runs": run_details(comparison, anchors),
        "written": escape(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, teacher-cache {version('teacher-cache')}"),
        # Inside a script element nothing but the end tag ends it.
        "data": json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": script,
    }
    return _filled(_SCRIPT.sub("{{script}}", template), parts)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Every `{{name}}` of the template replaced, in one pass: what is put in is never searched."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but ours."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    return f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"
