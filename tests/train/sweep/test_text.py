"""The table that a sweep prints."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from train.report.trials import COLUMNS
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult
from train.sweep.table import over_seeds
from train.sweep.text import sweep_text


def table(settings: list[dict[str, str]]) -> pl.DataFrame:
    """A finished trial for each of these settings, the best first."""
    common = {"student": "resnet8", "loss": "kd", "status": "finished", "parameters": 78_042}
    rows = [
        {**dict.fromkeys(COLUMNS), **common, "top1": 0.9 - 0.1 * place, **own} for place, own in enumerate(settings)
    ]
    return pl.DataFrame(rows, schema_overrides=COLUMNS)


def test_keys_with_the_same_last_part_have_a_column_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    optimisers, schedules, fractions = ("sgd", "adamw"), ("cosine", "constant"), ("0.1", "0.2")
    trials = table(
        [
            {"optimiser.name": optimiser, "schedule.name": schedule, "label_fraction": fraction}
            for optimiser, schedule, fraction in zip(optimisers, schedules, fractions, strict=True)
        ]
    )
    result = SweepResult(Path("sweep"), trials, over_seeds(trials))
    head, *rows = sweep_text(result, SweepRecipe(name="tiny", base={})).splitlines()[:3]
    assert "optimiser.name  schedule.name  label fraction  n" in head
    for optimiser, schedule, fraction, row in zip(optimisers, schedules, fractions, rows, strict=True):
        assert row.split()[:6] == ["resnet8", "kd", optimiser, schedule, fraction, "1"]
