"""cache_tools/analysis/fidelity.py: it learns, is the same every time, and by the KD loss that training uses."""

from __future__ import annotations

import pytest
import torch

from cache_tools.analysis import fidelity
from cache_tools.analysis.fidelity import BATCH, LEARNING_RATE, fit_student
from train import losses


def data(classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 12, generator=generator) * torch.linspace(0.1, 9.0, 12) + 4
    return inputs, 2 * torch.tanh(inputs @ torch.randn(12, classes, generator=generator) / 9)


@pytest.mark.parametrize("hidden", [None, 20])
def test_against_a_plain_training_loop(hidden: int | None) -> None:
    inputs, targets = data()
    found = fit_student(inputs, targets, (7, 15), hidden=hidden, temperatures=(1.0, 3.0), seed=5)
    standard = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0)
    torch.manual_seed(5)
    layers = (
        [torch.nn.Linear(12, 6)]
        if hidden is None
        else [torch.nn.Linear(12, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 6)]
    )
    student = torch.nn.Sequential(*layers)
    optimiser = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    for step in range(1, 16):
        batch = torch.randint(300, (BATCH,))
        said = student(standard[batch])
        loss = losses.kd(said, targets[batch], 1.0) + losses.kd(said, targets[batch], 3.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in found:
            torch.testing.assert_close(found[step], student(standard).detach(), rtol=1e-4, atol=1e-5)
    assert list(found) == [7, 15]


def test_it_learns_and_leaves_the_generators_alone() -> None:
    inputs, targets = data()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with torch.no_grad():
        first, again = (fit_student(inputs, targets, (50, 300)) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[stage], again[stage]) for stage in first)
    distances = [fidelity.divergence(targets, first[stage], 1.0) for stage in (50, 300)]
    assert distances[1] < 0.7 * distances[0]
    assert not first[300].requires_grad
