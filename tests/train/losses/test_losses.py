"""Losses and gradients equal the references' and slow float64 formulas, and are finite for extreme input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_tools.errors import RecipeError
from tests.support.golden_cases import BATCHES, FEATURE_CASES, LOGIT_CASES, TOTAL_CASES, Data
from train import losses
from train.losses import contrastive
from train.recipe.loss import LossRecipe

GOLDEN = Path(__file__).parents[2] / "golden"


def load(name: str) -> Data:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest expected value."""
    scale = max(float(expected.abs().max()), 1e-12)
    assert float((actual.double() - expected.double()).abs().max()) <= tolerance * scale


def value_and_grad(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = loss(student)
    (grad,) = torch.autograd.grad(value, student)
    return value.detach(), grad


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", [*LOGIT_CASES, *FEATURE_CASES])
def test_golden(batch: str, name: str) -> None:
    data = load(f"losses_{batch}")
    case, student = (
        (LOGIT_CASES[name], "student_logits") if name in LOGIT_CASES else (FEATURE_CASES[name], "student_features")
    )
    value, grad = value_and_grad(lambda s: case(data, s), data[student])
    assert_near(value, data[f"{name}.loss"], 1e-5)
    assert_near(grad, data[f"{name}.grad"], 1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", list(TOTAL_CASES))
def test_golden_totals(batch: str, name: str) -> None:
    data = load(f"more_losses_{batch}")
    value, grad = value_and_grad(lambda s: TOTAL_CASES[name](data, s), data["student_logits"])
    assert_near(value, data[f"{name}.loss"], 1e-5)
    assert_near(grad, data[f"{name}.grad"], 1e-5)


def softmax64(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def slow_kd(student: np.ndarray, target: np.ndarray, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student, target, strict=True):
        q, p = softmax64(s / temperature), softmax64(t / temperature)
        total += sum(pc * (math.log(pc) - math.log(qc)) for pc, qc in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


def slow_dkd(
    student: np.ndarray, target: np.ndarray, labels: np.ndarray, alpha: float, beta: float, temperature: float
) -> float:
    total = 0.0
    for s, t, label in zip(student, target, labels, strict=True):
        q, p = softmax64(s / temperature), softmax64(t / temperature)
        tckd = p[label] * math.log(p[label] / q[label]) + (1 - p[label]) * math.log((1 - p[label]) / (1 - q[label]))
        q_rest, p_rest = (np.delete(x, label) / (1 - x[label]) for x in (q, p))
        nckd = sum(pc * math.log(pc / qc) for pc, qc in zip(p_rest, q_rest, strict=True))
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


def slow_rkd(student: np.ndarray, target: np.ndarray, distance_weight: float, angle_weight: float) -> float:
    def smooth_l1(a: float, b: float) -> float:
        return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5

    def relations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(x)
        distance = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(count)] for i in range(count)])
        unit = np.zeros((count, count, x.shape[1]))
        for i in range(count):
            for j in range(count):
                if i != j:
                    unit[i, j] = (x[j] - x[i]) / distance[i, j]
        angle = np.array(
            [[[unit[i, j] @ unit[i, k] for k in range(count)] for j in range(count)] for i in range(count)]
        )
        return distance / distance[distance > 0].mean(), angle

    (sd, sa), (td, ta) = relations(student), relations(target)
    distance = np.mean([smooth_l1(a, b) for a, b in zip(sd.flat, td.flat, strict=True)])
    angle = np.mean([smooth_l1(a, b) for a, b in zip(sa.flat, ta.flat, strict=True)])
    return distance_weight * float(distance) + angle_weight * float(angle)


def slow_pkt(student: np.ndarray, target: np.ndarray) -> float:
    def affinity(x: np.ndarray) -> np.ndarray:
        unit = x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-7)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(axis=1, keepdims=True)

    s, t = affinity(student), affinity(target)
    return float(np.mean(t * np.log((t + 1e-7) / (s + 1e-7))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_losses_equal_slow_formulas(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, target, labels = rng.normal(0, 3, (6, 7)), rng.normal(0, 3, (6, 7)), rng.integers(0, 7, 6)
    s, t, y = map(torch.from_numpy, (student, target, labels))
    assert float(losses.kd(s, t, temperature)) == pytest.approx(slow_kd(student, target, temperature), rel=1e-12)
    assert float(losses.dkd(s, t, y, 1.5, 4.0, temperature)) == pytest.approx(
        slow_dkd(student, target, labels, 1.5, 4.0, temperature), rel=1e-11
    )
    first, second = (
        (x - x.mean(1, keepdims=True)) / (1e-7 + x.std(1, ddof=1, keepdims=True)) for x in (student, target)
    )
    expected = slow_kd(first, second, temperature)
    assert float(losses.standardised_kd(s, t, temperature)) == pytest.approx(expected, rel=1e-11)
    picked = [-math.log(softmax64(row)[label]) for row, label in zip(student, labels, strict=True)]
    assert float(losses.cross_entropy(s, y)) == pytest.approx(np.mean(picked), rel=1e-12)


def test_relational_losses_equal_slow_formulas_for_different_widths() -> None:
    rng = np.random.default_rng(1)
    student, target = rng.normal(size=(6, 3)), rng.normal(size=(6, 5))
    s, t = torch.from_numpy(student), torch.from_numpy(target)
    assert float(losses.rkd(s, t, 25.0, 50.0)) == pytest.approx(slow_rkd(student, target, 25.0, 50.0), rel=1e-11)
    assert float(losses.pkt(s, t)) == pytest.approx(slow_pkt(student, target), rel=1e-10)


def test_losses_of_several_labels_equal_slow_formulas() -> None:
    rng = np.random.default_rng(7)
    student, target = rng.normal(size=(5, 4)) * 3, rng.normal(size=(5, 4)) * 3
    labels = rng.integers(0, 2, (5, 4))
    s, t, y = torch.from_numpy(student), torch.from_numpy(target), torch.from_numpy(labels)
    q = 1 / (1 + np.exp(-student))
    slow = -np.mean([math.log(p if y else 1 - p) for p, y in zip(q.flat, labels.flat, strict=True)])
    for kind in (torch.uint8, torch.int64, torch.float32):
        assert float(losses.binary_cross_entropy(s, y.to(kind))) == pytest.approx(slow, rel=1e-12)
    for temperature in (1.0, 2.5):
        q, p = (1 / (1 + np.exp(-logits / temperature)) for logits in (student, target))
        slow = temperature**2 * np.mean(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
        value, grad = value_and_grad(lambda s, at=temperature: losses.sigmoid_kd(s, t, at), s)
        assert float(value) == pytest.approx(slow, rel=1e-10)
        _, torchs = value_and_grad(
            lambda s, at=temperature: at**2 * F.binary_cross_entropy_with_logits(s / at, (t / at).sigmoid()), s
        )
        torch.testing.assert_close(grad, torchs)
    assert float(losses.sigmoid_kd(t, t, 2.0)) == 0.0
    assert losses.sigmoid_kd(s.bfloat16(), t.bfloat16(), 2.0).dtype is torch.float32


WEIGHTS, MASK = np.array([0.5, 3.0, 0.0, 1.0]), np.array([True, False, True, True, True, False])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("mask", [None, MASK])
def test_smoothed_and_weighted_cross_entropy_equals_a_slow_formula(
    smoothing: float, weights: np.ndarray | None, mask: np.ndarray | None
) -> None:
    """Also with a mean weight of its own; and equal to torch's where torch has the same."""
    rng = np.random.default_rng(4)
    student, labels = rng.normal(size=(6, 4)) * 3, np.array([0, 1, 2, 3, 1, 1])
    total = of_labels = 0.0
    for row, label, real in zip(student, labels, np.ones(6, bool) if mask is None else mask, strict=True):
        of_labels += 1.0 if weights is None else weights[label]
        for number, q in enumerate(softmax64(row)):
            p = smoothing / 4 + (1 - smoothing) * (number == label)
            total -= real * p * (1.0 if weights is None else weights[number]) * math.log(q)
    z, y = torch.from_numpy(student), torch.from_numpy(labels)
    settings = {
        "labelled": None if mask is None else torch.from_numpy(mask),
        "label_smoothing": smoothing,
        "class_weights": None if weights is None else torch.from_numpy(weights).float(),
    }
    value = float(losses.cross_entropy(z, y, **settings))  # type: ignore[arg-type]
    assert value == pytest.approx(total / of_labels, rel=1e-12)
    if weights is not None:
        other = float(losses.cross_entropy(z, y, mean_weight=torch.tensor(2.5), **settings))  # type: ignore[arg-type]
        assert other == pytest.approx(total / 6 / 2.5, rel=1e-12)
    if mask is None:
        weight = None if weights is None else torch.from_numpy(weights)
        torchs = F.cross_entropy(z, y, weight, label_smoothing=smoothing)
        assert value == pytest.approx(float(torchs), rel=1e-12)


def test_a_batch_of_classes_of_weight_0_has_no_loss_and_no_gradient() -> None:
    student = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    labels, weights = torch.tensor([2, 2, 2]), torch.from_numpy(WEIGHTS)
    value, grad = value_and_grad(lambda s: losses.cross_entropy(s, labels, class_weights=weights), student)
    assert float(value) == 0.0
    assert not grad.any()


def test_gradients_are_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    labels = torch.tensor([0, 4, 2, 2])
    for loss in (
        lambda s: losses.kd(s, target, 3.0),
        lambda s: losses.dkd(s, target, labels, 1.0, 8.0, 4.0),
        lambda s: losses.standardised_kd(s, target, 2.0),
        lambda s: losses.sigmoid_kd(s, target, 2.0),
        lambda s: losses.feature_cosine(s, target),
        lambda s: losses.rkd(s, target),
        lambda s: losses.pkt(s, target),
        lambda s: losses.cross_entropy(
            s, labels, label_smoothing=0.1, class_weights=labels.new_tensor([1, 2, 3, 0, 5])
        ),
    ):
        assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(size: float) -> None:
    student = torch.tensor([[size, -size, 0.0], [0.0, 0.0, size]])
    target = torch.tensor([[-size, size, 0.0], [size, 1.0, -1.0]])
    labels = torch.tensor([2, 0])
    for loss in (
        lambda s: losses.cross_entropy(s, labels),
        lambda s: losses.kd(s, target, 1.0),
        lambda s: losses.dkd(s, target, labels, 1.0, 8.0, 4.0),
        lambda s: losses.sigmoid_kd(s, target, 1.0),
        lambda s: losses.binary_cross_entropy(s, target > 0),
    ):
        value, grad = value_and_grad(loss, student)
        assert value.isfinite()
        assert grad.isfinite().all()


def test_dkd_is_right_where_a_mask_of_minus_1000_fails() -> None:
    student = torch.tensor([[4000.0, 1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[4000.0, 0.0, 1.0]], dtype=torch.float64)
    expected = slow_kd(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), 1.0)
    value = losses.dkd(student, target, torch.tensor([0]), 0.0, 1.0, 1.0)
    assert float(value) == pytest.approx(expected, rel=1e-12)


def test_degenerate_rows_give_gradients_of_ordinary_size() -> None:
    flat, target = torch.zeros(4, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    flat[2] = 3.0
    for loss in (losses.feature_cosine, losses.rkd, lambda s, t: losses.standardised_kd(s, t, 2.0)):
        value, grad = value_and_grad(lambda s, loss=loss: loss(s, target), flat)
        assert value.isfinite()
        assert grad.isfinite().all()
        assert grad.abs().max() < 1e3
    _, grad = value_and_grad(lambda s: losses.pkt(s, target), flat)
    assert grad.isfinite().all()
    same = torch.ones(3, 4)  # all samples are one point: every distance is 0
    assert value_and_grad(lambda s: losses.rkd(s, same), same)[1].isfinite().all()


def test_half_precision_input_is_computed_in_float32() -> None:
    data = load("losses_b16_c20")
    for name in ("kd_T4", "rkd_d25_a50", "pkt"):
        case = {**LOGIT_CASES, **FEATURE_CASES}[name]
        key = "student_logits" if name in LOGIT_CASES else "student_features"
        half = data[key].half()
        plain = case(data, half.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = case(data, half)
        assert mixed.dtype is torch.float32
        assert torch.equal(mixed, plain)


# Contrastive distillation


def memory_of(data: Data, negatives: int) -> losses.ContrastiveMemory:
    samples, dim = data["memory_student.0"].shape
    memory = losses.ContrastiveMemory(samples, dim, negatives, 0.07, 0.5)
    memory.memory_student.copy_(data["memory_student.0"])
    memory.memory_target.copy_(data["memory_target.0"])
    return memory


def embed(data: Data, name: str, features: Tensor) -> Tensor:
    return losses.unit_rows(F.linear(features, data[f"embed_{name}.weight"], data[f"embed_{name}.bias"]))


@pytest.mark.parametrize("dense_ratio", [0, 1000])
def test_crd_golden(dense_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "DENSE_RATIO", dense_ratio)  # by gathering rows, or by one product with the memory
    data = load("crd")
    memory = memory_of(data, negatives=40)
    for k in range(2):
        target = embed(data, "target", data[f"step{k}.target_features"])
        value, grad = value_and_grad(
            lambda s, target=target, k=k: memory(
                embed(data, "student", s), target, data[f"step{k}.index"], data[f"step{k}.contrast_index"]
            ),
            data[f"step{k}.student_features"],
        )
        assert_near(value, data[f"step{k}.loss"], 1e-5)
        assert_near(grad, data[f"step{k}.grad_student_features"], 1e-4)
        assert_near(memory.log_normaliser.exp(), data[f"step{k}.Z"], 1e-5)
        assert_near(memory.memory_student, data[f"step{k}.memory_student"], 1e-5)
        assert_near(memory.memory_target, data[f"step{k}.memory_target"], 1e-5)


def test_richkd_golden_whole_objective() -> None:
    data = load("richkd_b16")
    alpha = float(data["alpha"])
    memory = memory_of(data, negatives=24)
    embedding_names = [f"embed_{who}.{part}" for who in ("student", "teacher", "clip") for part in ("weight", "bias")]
    for name in embedding_names:
        data[name].requires_grad_()
    for k in range(2):
        step = {key.removeprefix(f"step{k}."): value for key, value in data.items() if key.startswith(f"step{k}.")}
        logits, features = step["student_logits"].requires_grad_(), step["student_features"].requires_grad_()
        teacher, clip = embed(data, "teacher", step["teacher_features"]), embed(data, "clip", step["clip_features"])
        fused = losses.unit_rows(alpha * teacher + (1 - alpha) * clip)
        target = alpha * step["teacher_logits"] + (1 - alpha) * step["clip_cosine"]
        terms = {
            "loss_ce": losses.cross_entropy(logits, step["labels"]),
            "loss_logit": 3 * losses.kd(logits, target, 3.0),
            "loss_feature": 0.8
            * memory(embed(data, "student", features), fused, step["index"], step["contrast_index"]),
        }
        total = sum(terms.values(), torch.zeros(()))
        inputs = [logits, features, *(data[name] for name in embedding_names)]
        grads = torch.autograd.grad(total, inputs)
        for name, value in {**terms, "loss": total}.items():
            assert_near(value.detach(), step[name], 1e-5)
        for name, grad in zip(["student_logits", "student_features", *embedding_names], grads, strict=True):
            assert_near(grad, step[f"grad_{name}"], 1e-4)
        assert_near(memory.log_normaliser.exp(), step["Z"], 1e-5)
        assert_near(memory.memory_student, step["memory_student"], 1e-5)
        assert_near(memory.memory_target, step["memory_target"], 1e-5)


def unit64(*shape: int, seed: int) -> Tensor:
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(vectors, dim=-1)


def test_crd_equals_slow_formula_and_its_gradient_is_its_derivative() -> None:
    n, k, batch, dim, temperature = 30, 9, 4, 3, 0.1
    memory = losses.ContrastiveMemory(n, dim, k, temperature, 0.5, seed=5).double().eval()
    labels = torch.arange(n) % 3
    index = torch.tensor([3, 29, 0, 14])
    contrast = losses.NegativeSampler(labels, k)(index, torch.tensor(0))
    student, target = unit64(batch, dim, seed=1), unit64(batch, dim, seed=2)

    expected, chance = 0.0, k / n
    for bank, unit in ((memory.memory_target, student), (memory.memory_student, target)):
        out = np.array([[math.exp(float(bank[j] @ unit[b]) / temperature) for j in contrast[b]] for b in range(batch)])
        p = out / (out.mean() * n)
        positive = np.log(p[:, 0] / (p[:, 0] + chance + 1e-7)).sum()
        negative = np.log(chance / (p[:, 1:] + chance + 1e-7)).sum()
        expected -= (positive + negative) / batch
    assert float(memory(student, target, index, contrast)) == pytest.approx(expected, rel=1e-10)
    assert memory.log_normaliser.isnan().all(), "eval mode changes nothing"

    memory.log_normaliser.copy_(torch.tensor([3.0, 4.0]))  # constant for finite differences too
    both = (student.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda s, t: memory(s, t, index, contrast), both)


@pytest.mark.parametrize("dense_ratio", [0, 1000])
def test_the_gradient_of_crd_is_that_of_its_formula(dense_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own derivatives of the formula, in the first step and later; no copy of a memory is made for it."""
    monkeypatch.setattr(contrastive, "DENSE_RATIO", dense_ratio)
    n, k, temperature, weight = 30, 9, 0.1, 0.7
    memory = losses.ContrastiveMemory(n, 3, k, temperature, 0.5, weight=weight, seed=5).double()
    sampler = losses.NegativeSampler(torch.arange(n) % 3, k)
    for step in range(3):
        index = torch.arange(4) + 4 * step
        contrast = sampler(index, torch.tensor(step))
        units = [unit64(4, 3, seed=10 * step + side).requires_grad_() for side in range(2)]
        sides = []
        for bank, unit in zip((memory.memory_target.clone(), memory.memory_student.clone()), units, strict=True):
            scores = torch.einsum("bkd,bd->bk", bank[contrast], unit) / temperature
            sides.append(scores)
        first = torch.stack([scores.logsumexp((0, 1)) + math.log(n / scores.numel()) for scores in sides]).detach()
        log_z = first if step == 0 else memory.log_normaliser.clone()
        expected = torch.zeros((), dtype=torch.float64)
        for scores, normaliser in zip(sides, log_z, strict=True):
            p, chance = (scores - normaliser).exp(), k / n
            right = (p[:, 0] / (p[:, 0] + chance + 1e-7)).log().sum()
            expected = expected - weight * (right + (chance / (p[:, 1:] + chance + 1e-7)).log().sum()) / 4
        wanted = torch.autograd.grad(expected, units)
        loss = memory(*units, index, contrast)
        assert_near(loss.detach(), expected.detach(), 1e-7)  # the weight is a float32
        for ours, theirs in zip(torch.autograd.grad(3.0 * loss, units), wanted, strict=True):
            assert_near(ours, 3.0 * theirs, 1e-6)
    with torch.no_grad():
        assert not memory(*units, index, contrast).requires_grad


@pytest.mark.parametrize("weights", [(1.0,), (0.3, 0.0, 0.7)])
def test_the_gradient_through_the_embeddings_of_crd_is_that_of_autograd(weights: tuple[float, ...]) -> None:
    """Both in the first step, and by finite differences once Z is constant."""
    recipe = LossRecipe(kind="ce", feature="crd", crd_dim=4, crd_negatives=9, crd_temperature=0.1, feature_weight=0.8)
    widths = (6, 3, 2)[: len(weights)]
    term = contrastive.ContrastiveTerm(recipe, 5, contrastive.Components(widths, weights), torch.arange(30) % 3, seed=3)
    term.double()
    plain = copy.deepcopy(term)
    features = [unit64(4, width, seed=width) for width in widths]
    student, index = unit64(4, 5, seed=0).requires_grad_(), torch.tensor([3, 29, 0, 14])

    loss = term(student, features, index)
    inputs = [student, *term.parameters()]
    ours = torch.autograd.grad(3.0 * loss, inputs)

    parts = [
        weights[number] * losses.unit_rows(embed(features[number]))
        for number, embed in zip(plain.mixed, plain.embed_targets, strict=True)
    ]
    mix = torch.stack(parts).sum(0)
    units = losses.unit_rows(plain.embed_student(student)), losses.unit_rows(mix)
    expected = plain.memory(*units, index, plain.sampler(index, plain.step))
    theirs = torch.autograd.grad(3.0 * expected, [student, *plain.parameters()])
    torch.testing.assert_close(loss, expected)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(term.state_dict(), plain.state_dict() | {"_extra_state": torch.tensor(1)})

    def of(*values: Tensor) -> Tensor:
        named = dict(zip((name for name, _ in term.named_parameters()), values[1:], strict=True))
        return torch.func.functional_call(term.eval(), named, (values[0], features, index))

    assert torch.autograd.gradcheck(of, inputs)


def test_crd_is_finite_where_exp_overflows() -> None:
    memory = losses.ContrastiveMemory(20, 4, 6, temperature=1e-3)
    unit = unit64(3, 4, seed=0).float()
    contrast = torch.arange(21).reshape(3, 7) % 20
    for _ in range(2):
        value, grad = value_and_grad(lambda s: memory(s, unit, contrast[:, 0], contrast), unit)
        assert value.isfinite()
        assert grad.isfinite().all()


def test_crd_state_resumes_exactly() -> None:
    labels = torch.arange(40) % 4
    sampler = losses.NegativeSampler(labels, 10)
    index = torch.arange(0, 40, 5)
    contrast = sampler(index, torch.tensor(0))
    units = [(unit64(8, 6, seed=k).float(), unit64(8, 6, seed=9 + k).float()) for k in range(4)]
    straight = losses.ContrastiveMemory(40, 6, 10, seed=1)
    outputs = [straight(s, t, index, contrast) for s, t in units]
    first = losses.ContrastiveMemory(40, 6, 10, seed=1)
    for s, t in units[:2]:
        first(s, t, index, contrast)
    resumed = losses.ContrastiveMemory(40, 6, 10, seed=2)
    resumed.load_state_dict(first.state_dict())
    for (s, t), expected in zip(units[2:], outputs[2:], strict=True):
        assert torch.equal(resumed(s, t, index, contrast), expected)
    assert torch.equal(resumed.memory_student, straight.memory_student)


# Negatives


def draws(labels: Tensor, negatives: int, index: Tensor, times: int) -> Tensor:
    sampler = losses.NegativeSampler(labels, negatives, seed=7)
    return torch.stack([sampler(index, torch.tensor(step)) for step in range(times)])


def test_negatives_are_distinct_samples_of_other_classes() -> None:
    labels = torch.randint(0, 5, (203,), generator=torch.Generator().manual_seed(0))
    index = torch.arange(203)
    fewest = 203 - int(torch.bincount(labels).max())
    for contrast in draws(labels, fewest, index, times=5):
        assert torch.equal(contrast[:, 0], index)
        assert (labels[contrast[:, 1:]] != labels[:, None]).all()
        assert all(len(row.unique()) == len(row) for row in contrast)


def test_every_sample_of_another_class_is_equally_likely() -> None:
    labels = torch.tensor([0] * 5 + [1] * 9 + [2] * 3 + [3] * 6)
    index = torch.tensor([0, 6, 15, 22])
    times, k = 6000, 5
    contrast = draws(labels, k, index, times)
    for row, sample in enumerate(index):
        counts = torch.bincount(contrast[:, row, 1:].flatten(), minlength=len(labels)).double()
        others = labels != labels[sample]
        share = k / int(others.sum())
        spread = math.sqrt(times * share * (1 - share))
        assert ((counts[others] - times * share).abs() < 4.5 * spread).all()


def test_negatives_equal_a_slow_formula_sample_by_sample() -> None:
    """In Python's whole numbers, one sample at a time: they depend on (seed, step, sample), not on the batch."""
    labels = torch.tensor([1, 0, 2, 1, 1, 0, 2, 3, 3, 1, 0, 2, 2, 2, 1])
    k, seed, n = 7, 5, len(labels)
    starts = [int(start) for start in np.random.SeedSequence(seed).generate_state(k + n)]
    by_class = sorted(range(n), key=lambda sample: int(labels[sample]))  # stable

    def bits(start: int, step: int) -> int:
        x = (start + step * 0x9E3779B1) % 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x >> 1

    sampler = losses.NegativeSampler(labels, k, seed)
    for step in (0, 1, 70_000):
        for sample in range(n):
            place = max(number for number, each in enumerate(by_class) if labels[each] == labels[sample]) + 1
            others = [each for each in by_class[place:] + by_class[:place] if labels[each] != labels[sample]]
            turn = (bits(starts[k + sample], step) * len(others)) >> 31
            expected = [sample]
            for stratum in range(k):
                low, high = stratum * len(others) // k, (stratum + 1) * len(others) // k
                drawn = low + (bits(starts[stratum], step) * max(high - low, 1) >> 31)
                expected.append(others[(drawn + turn) % len(others)])
            index = torch.tensor([(sample + 1) % n, sample])
            assert sampler(index, torch.tensor(step))[1].tolist() == expected


def test_too_few_other_samples_repeat_evenly() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    for contrast in draws(labels, 6, torch.tensor([0]), times=20):
        assert contrast[0, 1:].sort().values.tolist() == [3, 3, 3, 4, 4, 4]


def test_one_class_has_no_negatives() -> None:
    with pytest.raises(RecipeError, match="at least two classes"):
        losses.NegativeSampler(torch.zeros(9, dtype=torch.int64), 4)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_cuda_equal_the_cpu_and_never_wait() -> None:
    data = load("losses_b16_c20")
    on_gpu = {key: value.cuda() for key, value in data.items()}
    memory = memory_of(load("crd"), negatives=40).cuda()
    sampler = losses.NegativeSampler(torch.arange(120) % 5, 40).cuda()
    unit, index = unit64(8, 16, seed=0).float().cuda(), torch.arange(8).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = {name: case(on_gpu, on_gpu["student_logits"]) for name, case in LOGIT_CASES.items()}
        values |= {name: case(on_gpu, on_gpu["student_features"]) for name, case in FEATURE_CASES.items()}
        contrast = sampler(index, torch.tensor(3, device="cuda"))
        memory(unit, unit, index, contrast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(contrast.cpu(), sampler.cpu()(index.cpu(), torch.tensor(3))), "other negatives on CUDA"
    for name, value in values.items():
        assert_near(value.cpu(), data[f"{name}.loss"], 1e-5)
