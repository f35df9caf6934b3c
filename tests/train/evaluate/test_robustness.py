"""Errors by corruption equal plain counting; mCE equals the paper's formulas by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn

from cache_tools.errors import DivergedError
from cache_tools.format.recipe import Preprocessing
from tests.support import corrupted_folder
from train.evaluate.corruptions import CORRUPTIONS, KINDS, SEVERITIES, Corrupted, open_corrupted
from train.evaluate.robustness import robustness, summarise

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
BYTES = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))  # the network gets pixels 0 … 255
LABELS = np.arange(60, dtype=np.int64) % 7


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory: pytest.TempPathFactory) -> Corrupted:
    folder: Path = corrupted_folder.write(tmp_path_factory.mktemp("corrupted"), LABELS)
    return open_corrupted(folder, LABELS)


class Knowing(nn.Module):
    """Right about image i under (corruption, severity) unless (i + number) is below 3 · severity."""

    def forward(self, pixels: Tensor) -> Tensor:
        number, severity, image = pixels[:, :, 0, 0].round().long().T
        wrong = (image + number) % 60 < 3 * severity
        answer = (image % 7 + wrong) % 7
        return 4.0 * nn.functional.one_hot(answer, 7).float()


@pytest.mark.parametrize("batch_size", [7, 64])
def test_errors_are_counted_by_corruption_and_severity(corrupted: Corrupted, batch_size: int) -> None:
    advanced = []
    found = robustness(
        Knowing(), corrupted, BYTES, CPU, batch_size=batch_size, advance=lambda count, name: advanced.append(count)
    )
    assert found.columns == ["corruption", "kind", "severity", "n", "error", "nll", "ece", "brier"]
    assert found["corruption"].to_list() == [name for name in CORRUPTIONS for _ in SEVERITIES]
    assert found["kind"].to_list() == [KINDS[name] for name in CORRUPTIONS for _ in SEVERITIES]
    assert found["severity"].to_list() == list(SEVERITIES) * 15
    assert found["error"].to_list() == [3 * severity / 60 for severity in SEVERITIES] * 15
    confidence = np.exp(4) / (np.exp(4) + 6)
    row = found.row(4, named=True)  # severity 5: a quarter wrong
    assert row["ece"] == pytest.approx(abs(confidence - 0.75), abs=1e-5)
    assert row["nll"] == pytest.approx(-0.75 * np.log(confidence) - 0.25 * np.log((1 - confidence) / 6), rel=1e-6)
    assert sum(advanced) == 75 * 60


def test_bfloat16_gives_nearly_the_same(corrupted: Corrupted) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    scaled = Preprocessing(mean=(10.0, 3.0, 30.0), std=(10.0, 3.0, 30.0))
    one = robustness(model, corrupted, scaled, CPU)
    other = robustness(model, corrupted, scaled, CPU, "bfloat16")
    assert not one.equals(other)
    assert np.abs(one["nll"].to_numpy() - other["nll"].to_numpy()).max() < 0.02


def test_logits_that_are_not_finite_are_an_error(corrupted: Corrupted) -> None:
    class Broken(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.full((len(pixels), 7), torch.nan)

    with pytest.raises(DivergedError, match="not finite"):
        robustness(Broken(), corrupted, BYTES, CPU)


def frame(errors: np.ndarray) -> pl.DataFrame:
    """A frame like that of `robustness`, from errors [15, 5]."""
    rows = [
        {"corruption": name, "severity": severity, "error": float(errors[c, s])}
        for c, name in enumerate(CORRUPTIONS)
        for s, severity in enumerate(SEVERITIES)
    ]
    return pl.DataFrame(rows).sample(fraction=1.0, shuffle=True, seed=1)


def test_mce_is_the_mean_of_ratios_not_the_ratio_of_means() -> None:
    rng = np.random.default_rng(0)
    student, baseline = rng.uniform(0.2, 0.5, (15, 5)), rng.uniform(0.3, 0.9, (15, 5))
    found = summarise(frame(student), 0.05, frame(baseline), 0.1)
    ce = [student[c].sum() / baseline[c].sum() for c in range(15)]
    relative = [(student[c] - 0.05).sum() / (baseline[c] - 0.1).sum() for c in range(15)]
    assert found.mce == pytest.approx(np.mean(ce))
    assert found.relative_mce == pytest.approx(np.mean(relative))
    assert found.relative_corruptions == 15
    assert found.mean_error == pytest.approx(student.mean())
    assert found.baseline_mean_error == pytest.approx(baseline.mean())
    assert [row.ce for row in found.corruptions] == pytest.approx(ce)
    assert [row.relative_ce for row in found.corruptions] == pytest.approx(relative)
    assert [row.corruption for row in found.corruptions] == list(CORRUPTIONS)


def test_the_mce_of_a_student_against_itself_is_one() -> None:
    errors = frame(np.random.default_rng(1).uniform(0.2, 0.9, (15, 5)))
    found = summarise(errors, 0.1, errors, 0.1)
    assert found.mce == pytest.approx(1.0)
    assert found.relative_mce == pytest.approx(1.0)


def test_without_a_baseline_there_is_no_mce() -> None:
    found = summarise(frame(np.full((15, 5), 0.25)), 0.1)
    assert (found.mean_error, found.mce, found.relative_mce) == (pytest.approx(0.25), None, None)
    assert found.corruptions[3].error == pytest.approx(0.25)


def test_a_baseline_no_worse_than_clean_gives_no_relative_error() -> None:
    baseline = np.full((15, 5), 0.4)
    baseline[2] = 0.1  # no worse than on clean images
    found = summarise(frame(np.full((15, 5), 0.3)), 0.1, frame(baseline), 0.1)
    assert found.corruptions[2].relative_ce is None
    assert found.relative_corruptions == 14
    assert found.relative_mce == pytest.approx(0.2 / 0.3)
    assert found.mce == pytest.approx((14 * 0.75 + 3.0) / 15)


def test_a_baseline_without_errors_has_no_mce() -> None:
    baseline = np.full((15, 5), 0.4)
    baseline[2] = 0.0
    assert summarise(frame(baseline), 0.1, frame(baseline), 0.0).mce is None
