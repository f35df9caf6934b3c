"""The gain over labels alone in a sweep: in its table, its text, its JSON and its page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.next_commands import commands_in
from tests.support.run_folders import write_run
from train.recipe.loading import load_train_recipe
from train.report.comparison import compare
from train.report.trials import read_table, read_trials, save_table
from train.sweep.recipe import SweepRecipe, Trial
from train.sweep.run import SweepResult
from train.sweep.search_recipe import figure_text
from train.sweep.table import over_seeds, trials_table
from train.sweep.text import sweep_text

Tops = Mapping[tuple[str, str], Sequence[float | None]]
FULL: Tops = {
    ("resnet8", "kd"): (0.900, 0.920, 0.970),
    ("resnet8", "ce"): (0.880, 0.930, 0.940),
    ("vgg8", "kd"): (0.800, 0.810, 0.820),
    ("vgg8", "ce"): (0.850, 0.840, 0.860),
}
T_095 = {1: 12.7062, 2: 4.30265}  # Student's t(0.975, n − 1), from a printed table


def result(folder: Path, tops: Tops, **settings: Any) -> SweepResult:
    """A sweep with these figures by student, loss and seed; None for a trial that did not finish."""
    trials: list[Trial] = []
    for (student, loss), values in tops.items():
        for seed, top1 in enumerate(values):
            run = folder / "trials" / f"{student}-{loss}-{seed}"
            write_run(
                run, student=student, loss=loss, seed=seed, top1=top1 or 0.1, finished=top1 is not None, **settings
            )
            recipe = load_train_recipe(str(run / "recipe.yaml"), (), {"out": str(run)})
            own = {"student": student, "loss": loss, "seed": seed}
            trials.append(Trial(number=len(trials), settings=own, recipe=recipe))
    table = trials_table(trials, {})
    return SweepResult(folder, table, over_seeds(table))


def differences(tops: Tops, student: str) -> list[float]:
    pairs = zip(tops[student, "kd"], tops[student, "ce"], strict=False)
    return [one - other for one, other in pairs if one is not None and other is not None]


def mean_std_half(values: Sequence[float]) -> tuple[float, float, float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, std, T_095[len(values) - 1] * std / math.sqrt(len(values))


@pytest.mark.parametrize("student", ["resnet8", "vgg8"])
def test_the_gain_is_the_mean_of_the_differences_by_seed(tmp_path: Path, student: str) -> None:
    found = result(tmp_path, FULL)
    own = differences(FULL, student)
    rows = {(row["student"], row["loss"], row["seed"]): row["gain"] for row in found.trials.to_dicts()}
    assert [rows[student, "kd", seed] for seed in range(3)] == pytest.approx(own)
    assert [rows[student, "ce", seed] for seed in range(3)] == [None] * 3
    (row,) = [row for row in found.settings.to_dicts() if (row["student"], row["loss"]) == (student, "kd")]
    figures = row["gain"], row["gain_std"], row["gain_ci95"]
    assert figures == pytest.approx(mean_std_half(own), rel=1e-4)
    assert row["gain_n"] == 3
    save_table(found.trials, tmp_path)
    page = {one.label: one for one in compare(read_trials([], read_table(tmp_path))).settings}
    gain = page[f"{student} · kd"].figures["gain"]
    assert (gain.n, gain.mean, gain.std) == (3, pytest.approx(row["gain"]), pytest.approx(row["gain_std"]))
    assert gain.high == pytest.approx(row["gain"] + row["gain_ci95"]), "page and table agree"
    assert "gain" not in page[f"{student} · labels alone"].figures


def test_the_text_has_the_gain_and_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = sweep_text(result(tmp_path, FULL), SweepRecipe(name="any", base={}))
    for student in ("resnet8", "vgg8"):
        mean, std, half = (100 * value for value in mean_std_half(differences(FULL, student)))
        (line,) = [line for line in text.splitlines() if line.startswith(student) and "kd" in line and "%" not in line
                   and f"{mean:+.2f} ± {std:.2f}" in line]  # fmt: skip
        assert f"±{half:.2f}" in line
    assert "gain: top-1 minus that of the same student on labels alone" in text
    assert max(map(len, text.splitlines()[:15])) <= 80


def test_pairs_are_the_seeds_that_both_have(tmp_path: Path) -> None:
    tops: Tops = {("resnet8", "kd"): (0.9, 0.8, None, 0.7), ("resnet8", "ce"): (0.85, None, 0.7, 0.69)}
    found = result(tmp_path, tops)
    (row,) = [row for row in found.settings.to_dicts() if row["loss"] == "kd"]
    mean, std, half = mean_std_half([0.05, 0.01])
    assert (row["n"], row["gain_n"]) == (3, 2)
    assert (row["gain"], row["gain_std"], row["gain_ci95"]) == pytest.approx((mean, std, half), rel=1e-4)
    text = sweep_text(found, SweepRecipe(name="any", base={}))
    assert f"±{100 * half:.2f} (2)" in text


def test_one_pair_has_no_interval(tmp_path: Path) -> None:
    found = result(tmp_path, {("vgg8", "kd"): (0.9, 0.8), ("vgg8", "ce"): (0.95,)})
    (row,) = [row for row in found.settings.to_dicts() if row["loss"] == "kd"]
    assert (row["gain_n"], row["gain"], row["gain_std"], row["gain_ci95"]) == (1, pytest.approx(-0.05), None, None)


def test_without_labels_alone_the_text_says_how_to_get_the_gain(tmp_path: Path) -> None:
    found = result(tmp_path, {("vgg8", "kd"): (0.9,), ("vgg8", "dkd"): (0.8,)})
    assert found.settings["gain_n"].to_list() == [0, 0]
    text = sweep_text(found, SweepRecipe(name="any", base={}))
    assert "No gain over labels alone is known: add --losses dkd,kd,ce." in text
    only = result(tmp_path / "labels", {("vgg8", "ce"): (0.9,)})
    assert "gain" not in sweep_text(only, SweepRecipe(name="any", base={}))


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [("test_top1", 0.92346, "92.35%"), ("ema_top1", 1.0, "100.00%"), ("test_top5", 0.5, "50.00%"),
     ("test_nll", 0.92346, "0.9235"), ("loss", 3.8e22, "3.80e+22")],
)  # fmt: skip
def test_the_best_figure_of_a_search_is_in_per_cent_if_it_is_an_accuracy(metric: str, value: float, text: str) -> None:
    assert figure_text(metric, value) == text


def test_the_interval_of_two_seeds_is_said_to_be_wide(tmp_path: Path) -> None:
    two = sweep_text(result(tmp_path / "2", {("vgg8", "kd"): (0.9, 0.8)}), SweepRecipe(name="any", base={}))
    three = sweep_text(result(tmp_path / "3", {("vgg8", "kd"): (0.9, 0.8, 0.7)}), SweepRecipe(name="any", base={}))
    assert "very wide for two. Use --seeds 3 or more." in two
    assert "very wide" not in three


def test_a_sweep_ends_with_the_next_commands(tmp_path: Path) -> None:
    folder = tmp_path / "my sweep"
    text = sweep_text(result(folder, FULL), SweepRecipe(name="any", base={}))
    assert commands_in(text) == [
        ["evaluate-student", str(folder / "trials" / "resnet8-kd-0")], ["report-students", str(folder)],
    ]  # fmt: skip


def test_every_line_of_a_table_fits_with_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = "timm:mobilenetv4_conv_small_050"
    monkeypatch.setenv("COLUMNS", "80")
    found = result(tmp_path, {(student, "kd"): (0.9, 0.8, 0.7), (student, "ce"): (0.6, 0.7, 0.8)})
    tables, _, _ = sweep_text(found, SweepRecipe(name="any", base={})).partition("Mean ±")
    assert max(map(len, tables.splitlines())) <= 80
    assert f"{100 * 0.1:+.2f} ± {100 * 0.2:.2f}" in tables
