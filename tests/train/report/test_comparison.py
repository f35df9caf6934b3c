"""Group runs into settings, find what settings differ in, and label them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.run_folders import write_run, write_sweep
from train.report.comparison import Comparison, compare
from train.report.trials import read_table, read_trials


def compared(folder: Path, *runs: dict[str, Any]) -> Comparison:
    return compare(read_trials([write_run(folder / f"run-{number}", **run) for number, run in enumerate(runs)]))


def labels(comparison: Comparison) -> list[str]:
    return [setting.label for setting in comparison.settings]


def test_seeds_of_the_same_settings_are_grouped(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {"seed": 0, "top1": 0.90},
        {"seed": 2, "top1": 0.94},
        {"seed": 1, "top1": 0.92},
        {"student": "resnet20", "top1": 0.95},
    )
    assert labels(found) == ["resnet20", "resnet8"], "the best mean comes first"
    top1 = found.settings[1].figures["top1"]
    assert [trial.seed for trial in found.settings[1].trials] == [0, 1, 2]
    assert top1.n == 3
    assert (top1.mean, top1.std) == pytest.approx((0.92, 0.02))
    assert top1.high - top1.low == pytest.approx(2 * 4.30265 * 0.02 / 3**0.5, rel=1e-5)  # type: ignore[operator]
    assert found.headline is found.settings[0]


def test_the_same_seed_twice_is_one_observation(tmp_path: Path) -> None:
    found = compared(tmp_path, {"seed": 0, "top1": 0.90}, {"seed": 0, "top1": 0.90}, {"seed": 1, "top1": 0.94})
    (setting,) = found.settings
    assert setting.figures["top1"].n == 2
    assert setting.figures["top1"].mean == pytest.approx(0.92)
    assert setting.repeated_seeds == [0]
    assert len(setting.trials) == 3


def test_labels_and_columns_show_only_differences(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {"optimiser": {"learning_rate": 0.1}, "top1": 0.93},
        {"optimiser": {"learning_rate": 0.05}, "top1": 0.92},
        {"loss": "ce", "top1": 0.91},
        {"student": "resnet20", "epochs": 6, "top1": 0.90},
    )
    assert found.varied == ("optimiser.learning_rate", "epochs")
    assert labels(found) == [
        "resnet8 · kd · lr 0.1", "resnet8 · kd · lr 0.05", "resnet8 · labels alone",
        "resnet20 · kd",
    ]  # fmt: skip
    assert found.settings[3].varied == {"epochs": "6", "optimiser.learning_rate": "0.05"}


def test_weights_of_different_losses_are_not_columns(tmp_path: Path) -> None:
    found = compared(tmp_path, {"loss": "dkd"}, {"loss": "kd"}, {"loss": "ce"})
    assert found.varied == ()
    assert sorted(labels(found)) == ["dkd", "kd", "labels alone"]


def test_different_caches_are_in_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_run(tmp_path / "one", top1=0.95)
    monkeypatch.setattr("tests.support.run_folders.FINGERPRINT", "abcdef0123" + "0" * 54)
    second = write_run(tmp_path / "two", top1=0.9)
    found = compare(read_trials([first, second]))
    assert found.varied == ("cache",)
    assert labels(found) == ["resnet8 · cache 5b0f551f", "resnet8 · cache abcdef01"]
    assert [one.label for one in found.references][:2] == ["teacher (5b0f551f)", "CLIP (5b0f551f)"]


def test_settings_with_equal_labels_are_numbered(tmp_path: Path) -> None:
    found = compared(tmp_path, {"deterministic": True, "evaluate_every": 2}, {"evaluate_every": 1, "top1": 0.8})
    assert labels(found) == ["resnet8 · deterministic true", "resnet8 · deterministic false"]
    found = compared(tmp_path / "again", {"evaluate_every": 2}, {"evaluate_every": 1, "top1": 0.8})
    assert labels(found) == ["resnet8", "resnet8 (2)"]


def test_unfinished_runs_do_not_count(tmp_path: Path) -> None:
    found = compared(
        tmp_path,
        {"seed": 0, "top1": 0.90},
        {"seed": 1, "top1": 0.20, "finished": False},
        {"student": "resnet20", "top1": 0.99, "finished": False},
    )
    assert found.settings[0].figures["top1"].n == 1
    assert found.settings[0].figures["top1"].mean == pytest.approx(0.9)
    assert not found.settings[1].finished
    assert found.settings[1].mean("top1") == pytest.approx(0.99), "it is still listed"
    assert found.headline is found.settings[0]


def test_a_failed_trial_joins_its_setting(tmp_path: Path) -> None:
    table = read_table(write_sweep(tmp_path / "sweep", {"resnet110": 0.9}, seeds=1))
    found = compare(read_trials([], table))
    setting = found.settings[0]
    assert [(trial.student, trial.status) for trial in setting.trials] == [
        ("resnet110", "finished"), ("resnet110", "failed"),
    ]  # fmt: skip
    assert setting.figures["top1"].n == 1


def test_references(tmp_path: Path) -> None:
    found = compared(tmp_path, {"seed": 0}, {"seed": 1}, {"loss": "ce"})
    assert [(one.label, one.figure, one.n) for one in found.references] == [
        ("teacher", 0.93, 400), ("CLIP", 0.81, 400), ("fusion", 0.94, 400),
    ]  # fmt: skip
