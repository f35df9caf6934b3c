"""Shortcuts for tiny trainings and builds. What they replace takes longer than the rest, and has tests of its own."""

from __future__ import annotations

import base64
import functools
from pathlib import Path

import pytest

import train.evaluate.confusion
import train.evaluate.robustness_plot
import train.run.state
import train.sweep.run
from train.cost import measure

SMALLEST_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def take_shortcuts(patch: pytest.MonkeyPatch) -> None:
    """Runs and evaluations draw one pixel; sweeps time each student five times instead of for two seconds."""
    patch.setattr(train.run.state, "plot_curves", _draw_one_pixel)
    patch.setattr(train.evaluate.confusion, "plot_confusion", lambda *_, **__: SMALLEST_PNG)
    patch.setattr(train.evaluate.robustness_plot, "plot_robustness", lambda *_, **__: SMALLEST_PNG)
    patch.setattr(train.sweep.run, "measure", functools.partial(measure, budget_s=0.0))


def share_tokenizer(patch: pytest.MonkeyPatch) -> None:
    """All CLIPs of a process have one tokenizer, so CLIP's vocabulary is read once. It keeps no state but a memo."""
    import open_clip.factory

    patch.setattr(open_clip.factory, "SimpleTokenizer", functools.cache(open_clip.SimpleTokenizer))


def _draw_one_pixel(history: object, path: Path, *_: object) -> None:
    path.write_bytes(SMALLEST_PNG)
