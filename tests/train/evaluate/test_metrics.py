"""Evaluation equals plain float64 formulas, on logits and on real images, and does not change the network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache_tools.errors import DataError, DivergedError
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.preprocess import prepare
from train.evaluate.metrics import CALIBRATION_BINS, Evaluation, evaluate, evaluate_logits, predict

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(mean=(0.3, 0.3, 0.3), std=(0.3, 0.3, 0.3))


def slow_evaluation(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Sample by sample in float64; ECE from (lower, upper] bins of the confidence."""
    top1 = top5 = nll = brier = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(CALIBRATION_BINS)]
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        powers = np.exp(row - row.max())
        p = powers / powers.sum()
        order = np.argsort(-p)
        top1 += order[0] == label
        top5 += label in order[:5]
        nll -= math.log(p[label])
        brier += sum((probability - (c == label)) ** 2 for c, probability in enumerate(p))
        confidence = p[order[0]]
        bins[min(max(math.ceil(confidence * CALIBRATION_BINS) - 1, 0), CALIBRATION_BINS - 1)].append(
            (confidence, order[0] == label)
        )
    n = len(labels)
    ece = sum(abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) * len(b) / n for b in bins if b)
    return {"n": n, "top1": top1 / n, "top5": top5 / n, "nll": nll / n, "ece": float(ece), "brier": brier / n}


def assert_equals_slow(found: Evaluation, logits: Tensor, labels: np.ndarray) -> None:
    expected = slow_evaluation(logits.numpy(), labels)
    if logits.shape[1] <= 5:
        del expected["top5"]
    # confidences are computed in float32
    assert found.model_dump(exclude_none=True) == pytest.approx(expected, rel=2e-6, abs=2e-6)
    assert found.nll == pytest.approx(expected["nll"], rel=1e-12)


def assert_equals_torchmetrics(found: Evaluation, logits: Tensor, labels: Tensor) -> None:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )  # takes seconds

    classes, probabilities = logits.shape[1], logits.softmax(1).clamp_max(1.0)
    assert found.top1 == pytest.approx(float(multiclass_accuracy(logits, labels, classes, average="micro")), rel=1e-6)
    if found.top5 is not None:
        top5 = multiclass_accuracy(logits, labels, classes, average="micro", top_k=5)
        assert found.top5 == pytest.approx(float(top5), rel=1e-6)
    error = multiclass_calibration_error(probabilities, labels, classes, n_bins=CALIBRATION_BINS)
    assert found.ece == pytest.approx(float(error), abs=1e-6)


@pytest.mark.parametrize("classes", [2, 5, 6, 37])
def test_logits_equal_slow_formulas(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 500)
    logits = rng.normal(0, 2, (500, classes)).astype(np.float32)
    logits[np.arange(500), labels] += 1.5
    found = evaluate_logits(torch.from_numpy(logits), torch.from_numpy(labels))
    assert (found.top5 is None) == (classes <= 5)
    assert_equals_slow(found, torch.from_numpy(logits), labels)
    assert_equals_torchmetrics(found, torch.from_numpy(logits), torch.from_numpy(labels))


def test_many_rows_are_evaluated_in_batches() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (20_001, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 20_001)
    assert_equals_slow(
        evaluate_logits(torch.from_numpy(logits), torch.from_numpy(labels)), torch.from_numpy(logits), labels
    )


def test_confident_right_answers_are_perfect() -> None:
    labels = torch.arange(30) % 10
    logits = 1e4 * torch.nn.functional.one_hot(labels, 10).half()
    found = evaluate_logits(logits, labels)
    assert_equals_torchmetrics(found, logits.float(), labels)
    assert found == Evaluation(n=30, top1=1.0, top5=1.0, nll=0.0, ece=0.0, brier=0.0)


def test_confident_wrong_answers_cost_their_full_margin() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    logits = torch.tensor([[0.0, 1000.0, -5.0]]).repeat(4, 1)
    assert evaluate_logits(logits, labels) == Evaluation(n=4, top1=0.0, top5=None, nll=1000.0, ece=1.0, brier=2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = torch.zeros(8, 6)
    logits[3, 2] = bad
    with pytest.raises(DivergedError, match="not finite"):
        evaluate_logits(logits, torch.zeros(8, dtype=torch.int64))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no images"):
        evaluate_logits(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_images(DatasetRecipe(name="digits"), "test")


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(10)
    )


@pytest.mark.parametrize("batch_size", [64, 101, 10_000])
def test_real_images_equal_one_plain_forward_pass(digits: ImageSet, batch_size: int) -> None:
    model = small_network()
    pixels = prepare(torch.from_numpy(digits.load(slice(None))), PREPROCESSING)
    with torch.no_grad():
        model.train()(pixels)  # creates the lazy layer and changes the running statistics
        logits = model.eval()(pixels)
    model.train()
    found = evaluate(model, digits, PREPROCESSING, CPU, batch_size)
    assert found.n == len(digits)
    expected = slow_evaluation(logits.numpy(), digits.labels)
    assert found.top1 == pytest.approx(expected["top1"], abs=1e-6)
    assert found.nll == pytest.approx(expected["nll"], rel=1e-5)
    assert found.ece == pytest.approx(expected["ece"], abs=1e-4)


def test_evaluation_does_not_change_the_network(digits: ImageSet) -> None:
    model = small_network()
    model(torch.zeros(2, 3, 32, 32))
    model.train()
    model[1].eval()  # a frozen batch norm
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, digits, PREPROCESSING, CPU, 256)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()  # works only if no tensor is left from inference mode


def test_modes_are_restored_after_an_error(digits: ImageSet) -> None:
    class Broken(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.full((len(pixels), 10), math.nan)

    model = Broken()
    with pytest.raises(DivergedError):
        evaluate(model, digits, PREPROCESSING, CPU)
    assert model.training


def test_predicted_logits_are_those_that_are_evaluated(digits: ImageSet) -> None:
    model = small_network()
    model(torch.zeros(2, 3, 32, 32))
    seen: list[int] = []
    logits = predict(model, digits, PREPROCESSING, CPU, 100, advance=seen.append)
    assert (logits.dtype, logits.shape, seen) == (torch.float32, (len(digits), 10), [100, 100, 100, 59])
    labels = torch.from_numpy(digits.labels)
    whole, by_batch = evaluate_logits(logits, labels), evaluate(model, digits, PREPROCESSING, CPU, 100)
    # The sums of the likelihood are added up in other groups, so their last bits may differ.
    assert whole.model_dump() == pytest.approx(by_batch.model_dump(), rel=1e-12)
    assert model.training
    with pytest.raises(DataError, match="no images"):
        predict(model, digits.subset(slice(0, 0)), PREPROCESSING, CPU)


def test_half_precision_logits_are_evaluated_in_float32(digits: ImageSet) -> None:
    model = small_network()
    model(torch.zeros(2, 3, 32, 32))
    logits = predict(model, digits, PREPROCESSING, CPU, 64, "bfloat16")
    assert logits.dtype == torch.float32
    full = predict(model, digits, PREPROCESSING, CPU, 64)
    assert 0 < (logits - full).abs().max() < 0.05 * full.abs().max()


def test_results_without_a_brier_score_can_be_read() -> None:
    assert Evaluation.model_validate_json('{"n": 3, "top1": 0.5, "top5": null, "nll": 1.0, "ece": 0.1}').brier is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(digits: ImageSet) -> None:
    model = small_network()
    model(torch.zeros(2, 3, 32, 32))
    on_cpu = evaluate(model, digits, PREPROCESSING, CPU)
    on_gpu = evaluate(model.cuda(), digits, PREPROCESSING, torch.device("cuda"))
    assert on_gpu.model_dump() == pytest.approx(on_cpu.model_dump(), abs=2e-3)
