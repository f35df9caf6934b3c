"""The figures of a row against sums in plain Python, for calm, very confident and very wrong teachers."""

from __future__ import annotations

import math

import pytest
import torch

from cache_tools.analysis.figures import OtherClasses, js_divergence, sample_figures

GAPS = [0.0, 3.0, 40.0, 700.0, 5000.0, -3.0, -700.0, -5000.0]


def rows_with_gap(gap: float, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits, whose label is about `gap` above the others."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, classes, generator=generator).double() * 2
    labels = torch.randint(0, classes, (50,), generator=generator)
    logits[torch.arange(50), labels] += gap
    return logits, labels


def reference(row: list[float], label: int) -> dict[str, float]:
    order = sorted(range(len(row)), key=lambda number: (-row[number], number))
    largest = row[order[0]]
    total = math.fsum(math.exp(value - largest) for value in row)
    log_p = [value - largest - math.log(total) for value in row]
    p = [math.exp(value) for value in log_p]
    others = [number for number in order if number != label]
    # −ln p_y = ln(1 + Σ_{c≠y} exp(z_c − z_y)), which is exact where p_y is nearly 1
    above = [row[number] - row[label] for number in others]
    nll = math.log1p(math.fsum(map(math.exp, above))) if max(above) < 700 else -log_p[label]
    return {
        "top1": order[0],
        "right": order[0] == label,
        "confidence": p[order[0]],
        "label_probability": p[label],
        "nll": nll,
        "brier": math.fsum((value - (number == label)) ** 2 for number, value in enumerate(p)),
        "entropy": -math.fsum(value * log for value, log in zip(p, log_p, strict=True)),
        "rival": others[0],
        "against": p[others[0]],
        "in_top5": sum(value > row[label] for value in row) < 5,
    }


@pytest.mark.parametrize("classes", [2, 7, 40])
@pytest.mark.parametrize("gap", GAPS)
def test_figures_of_each_row(gap: float, classes: int) -> None:
    logits, labels = rows_with_gap(gap, classes)
    figures = sample_figures(logits, labels)
    assert ("in_top5" in figures) == (classes > 5)
    for row in range(len(logits)):
        expected = reference(logits[row].tolist(), int(labels[row]))
        for name, values in figures.items():
            assert values[row].item() == pytest.approx(expected[name], rel=1e-11, abs=1e-13), name


@pytest.mark.parametrize("gap", GAPS)
def test_probabilities_are_those_of_the_softmax(gap: float) -> None:
    logits, labels = rows_with_gap(gap, 9)
    kept = logits.clone()
    p = OtherClasses(logits, labels).probabilities()
    torch.testing.assert_close(p, logits.softmax(dim=1), rtol=1e-12, atol=1e-14)
    assert torch.equal(logits, kept), "the logits are not changed"


def test_the_lowest_of_equal_classes_is_the_top_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 2.0]] * 3)
    figures = sample_figures(logits, torch.tensor([1, 7, 3]))
    assert figures["top1"].tolist() == [1, 1, 1]
    assert figures["right"].tolist() == [True, False, False]
    assert figures["rival"].tolist() == [2, 1, 1]
    assert figures["in_top5"].tolist() == [True, True, False], "six classes are above the last label, none above 7"


def test_known_entropies_give_the_same_divergence() -> None:
    p, q = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(1)).double().softmax(dim=2)
    entropies = tuple(-(each * each.log()).sum(dim=1) for each in (p, q))
    torch.testing.assert_close(js_divergence(p, q, entropies), js_divergence(p, q))
