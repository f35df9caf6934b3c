"""KD with a bucket for the tail equals a float64 reference and, with all classes, the full KL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from cache_tools.codecs import Sampled, TopK
from train import losses
from train.losses.tail import kd_tail

CLASSES = 9
NOTHING = -1e30


def random_logits(rows: int = 16, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)) * scale


def top(target: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Exact top-k targets at a temperature, in the dtype of `target`, with one empty slot."""
    log_p = (target / temperature).log_softmax(dim=1)
    classes = log_p.topk(k, dim=1).indices.sort(dim=1).values
    rest = log_p.scatter(1, classes, NOTHING).logsumexp(dim=1)
    pad = torch.full_like(classes[:, :1], CLASSES)
    log_tail = torch.where(torch.tensor(k == CLASSES), torch.tensor(NOTHING, dtype=target.dtype), rest)
    kept = torch.cat([log_p.gather(1, classes), torch.full_like(log_p[:, :1], NOTHING)], dim=1)
    return torch.cat([classes, pad], dim=1), kept, log_tail


def reference(student: Tensor, target: Tensor, k: int, temperature: float) -> Tensor:
    """The definition, row by row in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, target.double(), strict=True):
        p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
        order = p.argsort(descending=True)
        pairs = [(p[c], q[c]) for c in order[:k]]
        if k < CLASSES:
            pairs.append((p[order[k:]].sum(), q[order[k:]].sum()))
        total = total + sum(((a * (a.log() - b.log())) for a, b in pairs), torch.zeros((), dtype=torch.float64))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_all_classes_it_equals_the_full_divergence(temperature: float) -> None:
    target, student = random_logits(seed=1), random_logits(seed=2).requires_grad_()
    whole = losses.kd(student, target, temperature)
    bucket = kd_tail(student, *top(target, CLASSES, temperature), temperature)
    torch.testing.assert_close(bucket, whole, rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (bucket, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("k", [1, 3, CLASSES - 1, CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_value_and_gradient_against_float64(k: int, temperature: float) -> None:
    target, student = random_logits(seed=3), random_logits(seed=4)
    wide = student.double().requires_grad_()
    expected = reference(wide, target, k, temperature)
    (expected_gradient,) = torch.autograd.grad(expected, wide)
    student.requires_grad_()
    found = kd_tail(student, *top(target, k, temperature), temperature)
    (gradient,) = torch.autograd.grad(found, student)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-7)


def test_gradcheck() -> None:
    target, student = random_logits(4, seed=5).double(), random_logits(4, seed=6).double().requires_grad_()
    parts = top(target, 3, 2.0)
    assert torch.autograd.gradcheck(lambda s: kd_tail(s, *parts, 2.0), student)


@given(
    target=hnp.arrays(np.float32, (4, CLASSES), elements=st.floats(-60, 60, width=32)),
    student=hnp.arrays(np.float32, (4, CLASSES), elements=st.floats(-300, 300, width=32)),
    kept=st.integers(1, CLASSES),
)
@settings(max_examples=200, deadline=None)
def test_never_negative_and_always_finite(target: np.ndarray, student: np.ndarray, kept: int) -> None:
    """For targets as the codec rounds them, also for a student that agrees."""
    codec = TopK(num_classes=CLASSES, max_classes=kept)
    targets = codec.sparse(codec.encode(target))
    for rows in (student, target):
        logits = torch.tensor(rows, requires_grad=True)
        loss = kd_tail(logits, *targets, 1.0)
        loss.backward()
        assert loss.item() >= 0.0
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_of_sampled_targets_is_linear_in_their_counts(temperature: float) -> None:
    """T · (q − counts / draws) / B. Counts have the right mean (tests of the codec), so this gradient has."""
    target, student = random_logits(seed=12), random_logits(seed=13).double().requires_grad_()
    codec = Sampled(num_classes=CLASSES, draws=8, temperature=temperature)
    stored = codec.encode(target.numpy())
    parts = codec.sparse(stored)
    counts = torch.zeros(len(target), CLASSES + 1, dtype=torch.float64)
    counts = counts.scatter_(1, parts.classes, torch.from_numpy(stored[""]).double())[:, :CLASSES]
    assert (counts == 0).any()
    (gradient,) = torch.autograd.grad(kd_tail(student, *parts, temperature), student)
    expected = temperature * ((student / temperature).softmax(dim=1) - counts / 8) / len(target)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_a_student_that_agrees_has_no_gradient() -> None:
    target = random_logits(seed=7)
    student = target.clone().requires_grad_()
    loss = kd_tail(student, *top(target, 4, 1.0), 1.0)
    loss.backward()
    assert 0.0 <= loss.item() < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


def test_only_the_mass_of_the_tail_matters() -> None:
    """Moving a student's probability between classes of the tail changes nothing."""
    target, student = random_logits(seed=8), random_logits(seed=11)
    classes, log_p, log_tail = top(target, 3, 1.0)
    tail = torch.ones(len(target), CLASSES + 1, dtype=torch.bool).scatter_(1, classes, False)[:, :CLASSES]
    places = tail.nonzero()[:, 1].reshape(len(target), -1)
    moved = student.scatter(1, places, student.gather(1, places.flip(1)))
    assert not torch.equal(moved, student)
    first, second = (kd_tail(rows, classes, log_p, log_tail, 1.0) for rows in (student, moved))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


def test_half_precision_is_computed_in_float32() -> None:
    target, student = random_logits(seed=9), random_logits(seed=10)
    parts = top(target, 3, 1.0)
    expected = kd_tail(student.half().float(), *parts, 1.0)
    assert kd_tail(student.half(), *parts, 1.0).dtype == torch.float32
    torch.testing.assert_close(kd_tail(student.half(), *parts, 1.0), expected)
