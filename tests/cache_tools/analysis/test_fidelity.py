"""cache_tools/analysis/fidelity.py: measures against their definitions in numpy float64, and the small student."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_tools.analysis import fidelity
from cache_tools.analysis.fidelity import BATCH, LEARNING_RATE, fit_student
from cache_tools.codecs import TopK
from tests.support.codec_rows import WIDTH, logits, softmax
from train import losses
from train.losses.tail import kd_tail


def test_gradient_error() -> None:
    target, decoded, student = (logits(20, seed=s) for s in (0, 1, 2))
    tensors = [torch.from_numpy(rows) for rows in (target, decoded, student)]
    for temperature in (1.0, 4.0):
        p, d, q = (softmax(rows, temperature) for rows in (target, decoded, student))
        found = fidelity.gradient_error(tensors[0], tensors[1], tensors[2], temperature)
        assert found == pytest.approx(np.linalg.norm(d - p) / np.linalg.norm(q - p), rel=1e-9)
    assert fidelity.gradient_error(tensors[0], tensors[0], tensors[2], 4.0) == 0.0


def test_gradient_error_is_that_of_the_loss() -> None:
    target, student = torch.from_numpy(logits(20)), torch.from_numpy(logits(20, seed=1)).requires_grad_()
    decoded = target + 0.1 * torch.from_numpy(logits(20, seed=2))
    exact, other = (torch.autograd.grad(losses.kd(student, rows, 4.0), student)[0] for rows in (target, decoded))
    assert fidelity.gradient_error(target, decoded, student.detach(), 4.0) == pytest.approx(
        float((other - exact).norm() / exact.norm()), rel=1e-4
    )


def test_tail_gradient_error_is_that_of_the_loss() -> None:
    values = logits(20)
    target, student = torch.from_numpy(values), torch.from_numpy(logits(20, seed=1)).requires_grad_()
    codec = TopK(num_classes=WIDTH, max_classes=3)
    targets = codec.sparse(codec.encode(values))
    joint = torch.cat([targets.log_p, targets.log_tail[:, None]], dim=1).softmax(dim=1)
    known = torch.zeros(20, WIDTH + 1).scatter_(1, targets.classes, joint[:, :-1])[:, :WIDTH]
    exact = torch.autograd.grad(losses.kd(student, target, 1.0), student)[0]
    found = torch.autograd.grad(kd_tail(student, *targets, 1.0), student)[0]
    error = fidelity.tail_gradient_error(target, known, student.detach(), 1.0)
    assert error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-4)


def test_divergence_and_agreement() -> None:
    target, decoded = logits(20), logits(20, seed=1)
    p, d = softmax(target, 2.0), softmax(decoded, 2.0)
    tensors = torch.from_numpy(target), torch.from_numpy(decoded)
    assert fidelity.divergence(*tensors, 2.0) == pytest.approx((p * np.log(p / d)).sum(axis=1).mean(), rel=1e-9)
    assert fidelity.agreement(*tensors) == (target.argmax(1) == decoded.argmax(1)).mean()


def data(classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 12, generator=generator) * torch.linspace(0.1, 9.0, 12) + 4
    return inputs, 2 * torch.tanh(inputs @ torch.randn(12, classes, generator=generator) / 9)


@pytest.mark.parametrize("hidden", [None, 20])
def test_fit_student_equals_a_plain_training_loop(hidden: int | None) -> None:
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
        logits_BC = student(standard[batch])
        loss = losses.kd(logits_BC, targets[batch], 1.0) + losses.kd(logits_BC, targets[batch], 3.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in found:
            torch.testing.assert_close(found[step], student(standard).detach(), rtol=1e-4, atol=1e-5)
    assert list(found) == [7, 15]


def test_fit_student_learns_and_keeps_the_state_of_the_generators() -> None:
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
