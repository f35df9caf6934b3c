"""Bias and noise of `sampled` targets against their bytes, beside `top-k`, at temperatures 1 and 4: one JSON line.

Targets and student are those of `codec_table.py`: 1000 ImageNet classes on views of photos, a student after 200 steps.
All errors are relative to the KD gradient, in per cent:

* `g`: of the gradient with respect to the student's logits, of one draw, by autograd through `kd_tail`;
* `noise`: the standard deviation of `g`'s error over resamplings (other seeds); `bias`: of their mean; `chance`: the
  standard error of that mean, which is what `bias` is by chance if there is none;
* `g_weights`: of the gradient of a linear layer on the teacher's features, summed over all views. There noise averages
  out and bias does not. It is the root mean square over resamplings.

`tests` are the checks of the bias over `--resamplings` seeds: `bias_to_chance`, about 1 without bias; `squared_bias_z`,
the unbiased estimate of the squared bias in its standard errors over views; `gradient_z`, the mean error along the
gradient in its standard errors; `class_rms_z` and `class_largest_z`, the same for the total error of each class that is
drawn at least 25 times, about 1, and 3.2 for the largest of 1000.

    python benchmarks/sampled_targets.py --saved photos.npz
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from codec_arrays import SavedOutputs, photo_targets, with_students
from codec_table import stored_bytes
from side_by_side import Threads, environment, prepared_device

from cache_tools.analysis import fidelity
from cache_tools.codecs import Sampled, SparseCodec, TopK
from cache_tools.codecs.sparse import class_places
from cache_tools.console import command
from train import losses
from train.losses.tail import kd_tail

TEMPERATURES, DRAWS, STAGE = (1.0, 4.0), (8, 16, 32, 64, 128, 255), 200
TESTED_DRAWS, FEW = 32, 16
TOP_K = {1.0: ({"min_probability": 2e-3}, {"min_probability": 5e-4}), 4.0: ({"max_classes": 32}, {"max_classes": 512})}


class Case(NamedTuple):
    """Logits [N, C], those of a student, and features [N, D] with the mean 0 and a deviation of 1."""

    logits: torch.Tensor
    student: torch.Tensor
    features: torch.Tensor


@command
def main(
    views: Annotated[int, typer.Option("--views", min=32, help="Views of the photos.")] = 1024,
    resamplings: Annotated[int, typer.Option("--resamplings", min=50, help="Seeds that test the bias.")] = 1000,
    tested_views: Annotated[int, typer.Option("--tested-views", min=16, help="Views of that test.")] = 512,
    saved: SavedOutputs = None,
    threads: Threads = 1,
) -> None:
    """Bias, noise and bytes of sampled targets and of top-k."""
    device = prepared_device("cpu", threads)
    photos = photo_targets(views, saved)
    targets = with_students("imagenet-1000", photos.logits, photos.pixels)
    features = torch.from_numpy(photos.features)
    features = (features - features.mean(dim=0)) / (features.std(dim=0) + 1e-6)
    case = Case(targets.logits, targets.students[STAGE], features)
    tested = Case(*(rows[:tested_views] for rows in case))
    result = {
        "views": len(case.logits),
        "student_steps": STAGE,
        "rows": [row for t in TEMPERATURES for row in _rows(case, t)],
        "tests": [_tests(tested, t, resamplings) for t in TEMPERATURES],
    }
    print(json.dumps({"benchmark": "sampled_targets", **result, **environment(device)}), flush=True)


def _rows(case: Case, temperature: float) -> Iterator[dict[str, Any]]:
    for fields in TOP_K[temperature]:
        codec = TopK(num_classes=1000, temperature=temperature, **fields)
        yield _stored(case, codec) | _of_top_k(case, codec)
    for draws in DRAWS:
        sampled = Sampled(num_classes=1000, draws=draws, temperature=temperature)
        seeds = [sampled.model_copy(update={"seed": seed}) for seed in range(FEW)]
        drawn = (_probabilities(case, codec) for codec in seeds)
        yield _stored(case, sampled) | _resampled(case, drawn, temperature)
    yield _independent(case, TESTED_DRAWS, temperature)


def _stored(case: Case, codec: SparseCodec) -> dict[str, Any]:
    stored = codec.encode(case.logits.numpy())
    size = stored_bytes([(array, stored[array.suffix]) for array in codec.arrays(1000)])
    kept = (codec.sparse(stored).classes < 1000).sum(dim=1).double().mean()
    exact, found = _exact(case, codec.temperature), _gradient(case, codec)
    return {
        "codec": codec.model_dump(mode="json"),
        "bytes": round(size, 1),
        "classes": round(float(kept), 1),
        "g": _percent((found - exact).norm() / exact.norm()),
    }


def _of_top_k(case: Case, codec: TopK) -> dict[str, Any]:
    exact, found = _exact(case, codec.temperature), _gradient(case, codec)
    weights = _percent(_in_weights(found - exact, case).norm() / _in_weights(exact, case).norm())
    return {"bias": _percent((found - exact).norm() / exact.norm()), "noise": 0.0, "g_weights": weights}


def _resampled(case: Case, drawn: Iterator[torch.Tensor], temperature: float) -> dict[str, Any]:
    """Bias and noise of probabilities [N, C] of several seeds."""
    p, exact = fidelity.softmax(case.logits, temperature), _exact(case, temperature)
    in_weights: list[float] = []

    def watched() -> Iterator[torch.Tensor]:
        for probabilities in drawn:
            in_weights.append(float(_in_weights(probabilities - p, case).square().sum()))
            yield probabilities

    spread = fidelity.resampled_spread(watched(), p)
    size = fidelity.gradient_norm(case.logits, case.student, temperature)
    in_exact = _in_weights(exact * (len(p) / temperature), case).norm()  # of q − p
    return {
        "bias": _percent(spread.bias / size),
        "chance": _percent(spread.bias_error / size),
        "noise": _percent(spread.noise / size),
        "g_weights": _percent(float(np.mean(in_weights)) ** 0.5 / in_exact),
    }


def _independent(case: Case, draws: int, temperature: float) -> dict[str, Any]:
    """Draws that know nothing of each other, as in random-sampling KD, stored in the same arrays."""
    generator, p = np.random.default_rng(0), fidelity.softmax(case.logits, temperature)
    rows = p.numpy() / p.numpy().sum(axis=1, keepdims=True)
    counts = generator.multinomial(draws, rows)
    gaps, row, column, rank = class_places(counts > 0, draws)
    stored = np.zeros(gaps.shape, np.uint8)
    stored[row, rank] = counts[row, column]
    values, gap_values = Sampled(draws=draws).arrays(1000)
    drawn = (torch.from_numpy(generator.multinomial(draws, rows) / draws) for _ in range(FEW))
    return {
        "rival": "independent draws",
        "codec": {"codec": "sampled", "draws": draws, "temperature": temperature},
        "bytes": round(stored_bytes([(values, stored), (gap_values, gaps)]), 1),
        "classes": round(float((counts > 0).sum(axis=1).mean()), 1),
        **_resampled(case, drawn, temperature),
    }


def _tests(case: Case, temperature: float, resamplings: int) -> dict[str, Any]:
    """Whether the mean error of many seeds is what chance gives."""
    p, exact = fidelity.softmax(case.logits, temperature), _exact(case, temperature)
    along = exact / exact.norm().square()
    total, squares = torch.zeros_like(p), torch.zeros(len(p), dtype=torch.float64)
    projections: list[float] = []
    for seed in range(resamplings):
        codec = Sampled(num_classes=1000, draws=TESTED_DRAWS, temperature=temperature, seed=seed)
        error = _probabilities(case, codec) - p
        total += error
        squares += error.square().sum(dim=1)
        projections.append(float((error * along).sum()) * temperature / len(p))
    mean = total / resamplings
    variance = (squares.sum() - resamplings * mean.square().sum()) / (resamplings - 1)
    # Products of two different resamplings, whose mean is the squared bias of each view.
    pairs = ((total.square().sum(dim=1) - squares) / (resamplings * (resamplings - 1))).numpy()
    scaled = p * TESTED_DRAWS
    below = scaled - scaled.floor()
    deviation = ((below * (1 - below)).sum(dim=0) / resamplings).sqrt() / TESTED_DRAWS
    often = scaled.sum(dim=0) * resamplings >= 25
    z = (mean.sum(dim=0) / deviation)[often]
    return {
        "temperature": temperature,
        "draws": TESTED_DRAWS,
        "views": len(p),
        "resamplings": resamplings,
        "bias_to_chance": round(float(mean.norm() / (variance / resamplings) ** 0.5), 4),
        "squared_bias_z": round(float(pairs.sum() / (pairs.std(ddof=1) * len(pairs) ** 0.5)), 2),
        "classes": int(often.sum()),
        "class_rms_z": round(float(z.square().mean().sqrt()), 3),
        "class_largest_z": round(float(z.abs().max()), 2),
        "gradient_z": round(float(np.mean(projections) / (np.std(projections, ddof=1) / resamplings**0.5)), 2),
    }


def _probabilities(case: Case, codec: SparseCodec) -> torch.Tensor:
    return fidelity.sparse_probabilities(codec.sparse(codec.encode(case.logits.numpy())), case.logits.shape[1])


def _gradient(case: Case, codec: SparseCodec) -> torch.Tensor:
    """∇ of `kd_tail` with respect to the student's logits, [N, C]."""
    student = case.student.double().requires_grad_()
    loss = kd_tail(student, *codec.sparse(codec.encode(case.logits.numpy())), codec.temperature)
    return torch.autograd.grad(loss, student)[0]


def _exact(case: Case, temperature: float) -> torch.Tensor:
    student = case.student.double().requires_grad_()
    return torch.autograd.grad(losses.kd(student, case.logits.double(), temperature), student)[0]


def _in_weights(gradient: torch.Tensor, case: Case) -> torch.Tensor:
    """The gradient [C, D] of the weights of a linear layer that would make the logits from the features."""
    return gradient.float().T @ case.features


def _percent(share: float | torch.Tensor) -> float:
    return round(100 * float(share), 2)


if __name__ == "__main__":
    typer.run(main)
