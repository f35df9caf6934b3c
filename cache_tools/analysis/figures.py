"""Figures per sample, class and source, computed from logits and labels; `stats` and `tune-fusion` share them.

Everything is float64: the softmax of a confident teacher leaves too few float32 digits for the other classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

TOP_K = 5
# Numbers in a [rows, classes] temporary: it fits in a CPU cache and has enough rows to keep a GPU busy.
CHUNK_NUMBERS = 1 << 19


def row_chunks(num_samples: int, num_classes: int, numbers: int = CHUNK_NUMBERS) -> Iterator[slice]:
    """Consecutive slices of rows with about `numbers` logits each."""
    rows = max(1, numbers // num_classes)
    for start in range(0, num_samples, rows):
        yield slice(start, min(start + rows, num_samples))


def sample_figures(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures of each row of p = softmax(logits), for label y; natural logarithms.

    Args:
        logits_NC: of any floating type, already divided by the temperature.
        labels_N: int64.

    Returns:
        [N] each: `top1` (class, int64), `right` and `in_top5` (bool; the latter only with more than five classes),
        `confidence` max p, `label_probability` p_y, `nll` −ln p_y, `brier` Σ_c (p_c − 1[c=y])² (0 to 2),
        `entropy` −Σ p ln p, `rival` (the most probable class other than y, int64) and `against`, its probability.
    """
    log_p = logits_NC.double().log_softmax(dim=1)
    p = log_p.exp()
    label = labels_N[:, None]
    best = log_p.topk(min(TOP_K, p.shape[1]), dim=1).indices
    label_probability = p.gather(1, label)[:, 0]
    against, rival = p.scatter(1, label, -1.0).max(dim=1)
    figures = {
        "top1": best[:, 0],
        "right": best[:, 0] == labels_N,
        "confidence": p.gather(1, best[:, :1])[:, 0],
        "label_probability": label_probability,
        "nll": -log_p.gather(1, label)[:, 0],
        "brier": (p * p).sum(dim=1) + 1.0 - 2.0 * label_probability,
        "entropy": entropy(p),
        "rival": rival,
        "against": against,
    }
    if p.shape[1] > TOP_K:
        figures["in_top5"] = (best == label).any(dim=1)
    return figures


def entropy(p_NC: torch.Tensor) -> torch.Tensor:
    """H(p) = −Σ_c p_c ln p_c per row, in nats; a class of probability 0 adds nothing."""
    terms: torch.Tensor = torch.special.entr(p_NC)
    return terms.sum(dim=1)


def js_divergence(p_NC: torch.Tensor, q_NC: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence per row, H((p+q)/2) − (H(p) + H(q))/2, in nats: 0 for equal rows, at most ln 2."""
    return (entropy((p_NC + q_NC) / 2) - (entropy(p_NC) + entropy(q_NC)) / 2).clamp_min(0.0)


class NonTargetConsistency:
    """Mean pairwise cosine similarity of non-target distributions within a class.

    For a sample i of class y, q_i is its softmax with the class y removed and renormalised:
    q_ic = p_ic / (1 − p_iy) for c ≠ y, which is the softmax of the other logits. Over the n samples of a class

        consistency = 1 / (n (n − 1)) · Σ_{i≠j} cos(q_i, q_j) = (‖Σ_i u_i‖² − Σ_i ‖u_i‖²) / (n (n − 1))

    with u_i = q_i / ‖q_i‖, so one vector sum per class suffices: O(N·C) instead of O(N²·C). It is undefined for a class
    with fewer than two samples, and for two classes, where a single non-target class remains.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
        self._squares = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, logits_NC: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Add samples of a view; the logits are already divided by the temperature."""
        # Mask before the softmax: for a confident teacher, 1 − p_y has too few digits to divide by.
        others = logits_NC.double().scatter(1, labels_N[:, None], -torch.inf)
        unit = torch.nn.functional.normalize(others.softmax(dim=1), dim=1)
        self._sums.index_add_(0, labels_N, unit)
        self._squares.index_add_(0, labels_N, (unit * unit).sum(dim=1))
        self._counts.index_add_(0, labels_N, torch.ones_like(labels_N, dtype=torch.float64))

    def compute(self) -> torch.Tensor:
        """[C] float64 on the CPU, NaN where it is undefined."""
        n = self._counts
        value = ((self._sums**2).sum(dim=1) - self._squares) / (n * (n - 1))
        undefined = (n < 2) | (len(n) < 3)
        return value.masked_fill(undefined, torch.nan).cpu()


class Stability:
    """Whether the prediction for a sample stays the same over V views.

    `same`: the top-1 class is the same in all views. `divergence`: the Jensen–Shannon divergence of the V
    distributions, which is the mean divergence of a view from the mean m over the views:

        H(m) − 1/V Σ_v H(p_v) = 1/V Σ_v KL(p_v ‖ m),  m = 1/V Σ_v p_v

    in nats, from 0 (all equal) to ln V. m is stored in float32, which causes an error of about 1e-6.
    """

    def __init__(self, num_samples: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._views = 0
        self._sum = torch.zeros(num_samples, num_classes, device=device)
        self._entropy = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self._first = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._same = torch.ones(num_samples, dtype=torch.bool, device=device)

    def add(self, rows: slice, p_NC: torch.Tensor, top1_N: torch.Tensor, entropy_N: torch.Tensor) -> None:
        """Add rows of the current view: probabilities (float64), their argmax and their entropies."""
        if self._views == 0:
            self._first[rows] = top1_N
        self._sum[rows] += p_NC.float()
        self._entropy[rows] += entropy_N
        self._same[rows] &= top1_N == self._first[rows]

    def next_view(self) -> None:
        """End the current view: all its rows have been added."""
        self._views += 1

    def compute(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`same` (bool) and `divergence` (float64) of some rows, on the CPU."""
        mean = self._sum[rows].double() / self._views
        divergence = entropy(mean) - self._entropy[rows] / self._views
        return self._same[rows].cpu(), divergence.clamp_min(0.0).cpu()

    def rivals(self, rows: slice, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The class but the label with the highest mean over the views (int64), and this mean (float64), on the CPU."""
        mean = self._sum[rows].double() / self._views
        against, rival = mean.scatter(1, labels_N[:, None], -1.0).max(dim=1)
        return rival.cpu(), against.cpu()
