"""The likelihood of many fusions at once, without a [fusions, N, C] array, and the grids of weights and scales.

At temperature T, the logits of a fusion are a · teacher + b · CLIP with the factors a = α/T and b = (1 − α)/T, where
CLIP's logits are already scaled. b = 0 is the teacher alone, a = 0 CLIP alone. The negative log-likelihood of the
labels is convex in (a, b).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.analysis.figures import row_chunks
from cache_tools.errors import RecipeError

# Numbers in a [fusions, rows, classes] temporary: it fits in a core's cache, or keeps a GPU busy.
_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 24}
_ROW_NUMBERS = {"cpu": 1 << 13, "cuda": 1 << 20}

Factors = tuple[float, float]


def factors(teacher_weight: float, temperature: float) -> Factors:
    """The factors (a, b) of a fusion."""
    return teacher_weight / temperature, (1.0 - teacher_weight) / temperature


def nll_sums(
    teacher_NC: torch.Tensor, clip_NC: torch.Tensor, labels_N: torch.Tensor, fusions: Sequence[Factors]
) -> torch.Tensor:
    """Σ_n −ln softmax(a · teacher + b · CLIP)_{n, label} for each fusion (a, b): [fusions] float64.

    Args:
        teacher_NC, clip_NC: logits, float32.
        labels_N: int64.
    """
    return mixture_nll_sums((teacher_NC, clip_NC), labels_N, fusions)


def mixture_nll_sums(
    parts_NC: Sequence[torch.Tensor], labels_N: torch.Tensor, fusions: Sequence[Sequence[float]]
) -> torch.Tensor:
    """Σ_n −ln softmax(Σ_k a_k · part_k)_{n, label} for each fusion (a_1, …): [fusions] float64."""
    num_samples, num_classes = parts_NC[0].shape
    device = parts_NC[0].device
    grid = torch.tensor(fusions, dtype=torch.float32, device=device)
    sums = torch.zeros(len(grid), dtype=torch.float64, device=device)
    for rows in row_chunks(num_samples, num_classes, _ROW_NUMBERS[device.type]):
        # With the label's logit at 0, the likelihood is just a logsumexp, and large logits cancel exactly.
        relative = torch.stack([_relative_to_label(part[rows], labels_N[rows]).flatten() for part in parts_NC])
        step = max(1, _NUMBERS[device.type] // relative.shape[1])
        for start in range(0, len(grid), step):
            some = slice(start, start + step)
            fused = (grid[some] @ relative).view(-1, rows.stop - rows.start, num_classes)  # one pass instead of three
            sums[some] += _logsumexp(fused).sum(dim=1, dtype=torch.float64)
    return sums


def stratified_holdout(labels: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Draw the held-out samples: `share` of every class (within one sample) and of all samples.

    Raises:
        RecipeError: one of the two parts would be empty.
    """
    if not 0.0 < share < 1.0:
        raise RecipeError("bad --holdout", expected="a share between 0 and 1", found=share)
    order = np.lexsort((np.random.default_rng(seed).random(len(labels)), labels))
    steps = np.floor(np.arange(len(labels) + 1) * share + 1e-9)
    held = np.zeros(len(labels), dtype=bool)
    held[order] = np.diff(steps) > 0
    if held.all() or not held.any():
        raise RecipeError(
            "too few samples to split",
            where="--holdout",
            expected="at least one sample in each part",
            found=f"{len(labels)} samples, share {share:g}",
        )
    return held


def log_grid(low: float, high: float, count: int) -> list[float]:
    """`count` numbers from `low` to `high` with equal ratios."""
    return [float(value) for value in np.geomspace(low, high, count)]


def parse_weights(text: str) -> list[float]:
    """Parse `0:1:0.05` (first, last, step) or comma-separated numbers into ascending weights without duplicates.

    Raises:
        RecipeError: the text is malformed, or a weight is outside 0 to 1.
    """
    weights: list[float] = []
    for part in _parts(text, "--weights", "0:1:0.05, or 0.3,0.5,0.7"):
        if len(part) == 1:
            weights += part
            continue
        if len(part) != 3 or not part[2] > 0 or part[1] < part[0] or (part[1] - part[0]) / part[2] > 10_000:
            raise RecipeError("bad --weights", expected="FIRST:LAST:STEP, such as 0:1:0.05", found=repr(text))
        count = int(np.floor((part[1] - part[0]) / part[2] + 1e-9)) + 1
        weights += [round(part[0] + number * part[2], 10) for number in range(count)]
    if not all(0.0 <= weight <= 1.0 for weight in weights):
        raise RecipeError("bad --weights", expected="teacher weights from 0 to 1", found=repr(text))
    return sorted(set(weights))


def parse_scales(text: str) -> tuple[list[str], list[float]]:
    """Parse `model,match,1,0.3:300:25` into names and numbers; LOW:HIGH:COUNT is a grid of equal ratios.

    Raises:
        RecipeError: the text is malformed, or a number is not above 0.
    """
    words = [word.strip() for word in text.split(",")]
    names: list[str] = [name for name in ("model", "match") if name in words]
    rest = ",".join(word for word in words if word not in {"model", "match"})
    numbers: list[float] = []
    for part in _parts(rest, "--scales", "model,match,1,0.3:300:25") if rest else ():
        if len(part) == 1:
            numbers += part
            continue
        if len(part) != 3 or not 0 < part[0] < part[1] or part[2] != int(part[2]) or not 2 <= part[2] <= 10_000:
            raise RecipeError("bad --scales", expected="LOW:HIGH:COUNT, such as 0.3:300:25", found=repr(text))
        numbers += log_grid(part[0], part[1], int(part[2]))
    if not (names or numbers) or not all(0.0 < number < np.inf for number in numbers):
        raise RecipeError("bad --scales", expected="model, match, or numbers above 0", found=repr(text))
    return names, sorted(set(numbers))


def _parts(text: str, option: str, example: str) -> Iterator[list[float]]:
    """The colon-separated numbers of each comma-separated part."""
    for part in text.split(","):
        try:
            numbers = [float(number) for number in part.split(":")]
        except ValueError:
            numbers = [math.nan]
        if not all(map(math.isfinite, numbers)):
            raise RecipeError(f"cannot read {option}", expected=example, found=repr(text))
        yield numbers


def _logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the last axis; overwrites its input.

    torch.logsumexp takes ten times as long if many exponents are far below 0, where exp leaves its fast path. The lower
    bound of the exponents adds at most C · e⁻⁶⁰, far below the rounding error of a sum that is 1 or more.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    return logits.sub_(largest).clamp_min_(-60.0).exp_().sum(dim=-1).log_() + largest[..., 0]


def _relative_to_label(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    return logits_NC - logits_NC.gather(1, labels_N[:, None])
