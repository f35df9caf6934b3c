"""Figures per sample, class and source, computed from logits and labels; `stats` and `tune-fusion` share them.

Everything is float64: the softmax of a confident teacher leaves too few float32 digits for the other classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

TOP_K = 5
# Numbers in a [rows, classes] temporary: it fits in a CPU cache and has enough rows to keep a GPU busy.
CHUNK_NUMBERS = 1 << 19


def row_chunks(num_samples: int, num_classes: int, numbers: int = CHUNK_NUMBERS) -> Iterator[slice]:
    """Consecutive slices of rows with about `numbers` logits each."""
    rows = max(1, numbers // num_classes)
    for start in range(0, num_samples, rows):
        yield slice(start, min(start + rows, num_samples))


class OtherClasses:
    """The softmax of each row without its label, from which all figures of a row follow; one exponential per number.

    With label y, e_c = exp(z_c − z_r) for c ≠ y and e_y = 0, where r is the rival, the class with the largest logit but
    y (the lowest number of several). No e is above 1 and e_r is 1, so nothing overflows or vanishes, however confident
    a teacher is. The probabilities of all classes are p_y = exp(g − L) and p_c = e_c · exp(−L), with g = z_y − z_r and
    L = ln(exp(g) + Σ e).

    Args:
        logits_NC: of any floating type, of two classes or more.
        labels_N: int64.

    Attributes:
        labels, rival: int64 [N].
        gap: float64 [N], g.
        e: float64 [N, C].
        below: float64 [N, C], z_c − z_r.
        log_sum: float64 [N], L.
        sums, norms: float64 [N], Σ e and √(Σ e²).
    """

    def __init__(self, logits_NC: torch.Tensor, labels_N: torch.Tensor) -> None:
        label = labels_N[:, None]
        logits = logits_NC.to(torch.float64, copy=True)
        own = logits.gather(1, label)
        largest, self.rival = logits.scatter_(1, label, -torch.inf).max(dim=1)
        self.labels = labels_N
        self.below = logits.scatter_(1, label, own).sub_(largest[:, None])
        self.gap = self.below.gather(1, label)[:, 0]
        self.e = self.below.exp().scatter_(1, label, 0.0)
        self.sums = self.e.sum(dim=1)
        self.norms = torch.linalg.vector_norm(self.e, dim=1)
        self.log_sum = torch.logaddexp(self.gap, self.sums.log())

    def figures(self) -> dict[str, torch.Tensor]:
        """As `sample_figures`."""
        scale = (-self.log_sum).exp()
        nll = torch.logaddexp(torch.zeros_like(self.gap), self.sums.log() - self.gap)
        label_probability, against = (-nll).exp(), scale
        others = self.sums * scale  # 1 − p_y, without its cancellation
        is_top = (self.gap > 0.0) | ((self.gap == 0.0) & (self.labels < self.rival))
        figures = {
            "top1": torch.where(is_top, self.labels, self.rival),
            "right": is_top,
            "confidence": torch.where(is_top, label_probability, against),
            "label_probability": label_probability,
            "nll": nll,
            "brier": (self.norms * scale).square() + others.square(),
            "entropy": label_probability * nll + others * self.log_sum - scale * _row_dots(self.e, self.below),
            "rival": self.rival,
            "against": against,
        }
        if self.e.shape[1] > TOP_K:
            figures["in_top5"] = self._in_top(is_top)
        return figures

    def probabilities(self) -> torch.Tensor:
        """p, float64 [N, C]."""
        p = self.e * (-self.log_sum).exp()[:, None]
        return p.scatter_(1, self.labels[:, None], (self.gap - self.log_sum).exp()[:, None])

    def _in_top(self, is_top: torch.Tensor) -> torch.Tensor:
        """Whether fewer than TOP_K classes have a larger logit than the label; counted only where some do."""
        found, rows = torch.ones_like(is_top), torch.nonzero(~is_top)[:, 0]
        found[rows] = (self.below[rows] > self.gap[rows, None]).sum(dim=1, dtype=torch.int32) < TOP_K
        return found


def sample_figures(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures of each row of p = softmax(logits), for label y; natural logarithms.

    Of classes with the same logit, the one with the lowest number counts as the larger; the label is among the top five
    if fewer than five classes have a larger logit.

    Args:
        logits_NC: of any floating type, already divided by the temperature.
        labels_N: int64.

    Returns:
        [N] each: `top1` (class, int64), `right` and `in_top5` (bool; the latter only with more than five classes),
        `confidence` max p, `label_probability` p_y, `nll` −ln p_y, `brier` Σ_c (p_c − 1[c=y])² (0 to 2),
        `entropy` −Σ p ln p, `rival` (the most probable class other than y, int64) and `against`, its probability.
    """
    return OtherClasses(logits_NC, labels_N).figures()


def _row_dots(a_NC: torch.Tensor, b_NC: torch.Tensor) -> torch.Tensor:
    """Σ_c a_c b_c of each row; on the CPU by numpy, which needs no temporary array."""
    if a_NC.device.type != "cpu":
        return torch.linalg.vecdot(a_NC, b_NC)
    return torch.from_numpy(np.einsum("nc,nc->n", a_NC.numpy(), b_NC.numpy()))


def entropy(p_NC: torch.Tensor) -> torch.Tensor:
    """H(p) = −Σ_c p_c ln p_c per row, in nats; a class of probability 0 adds nothing."""
    terms: torch.Tensor = torch.special.entr(p_NC)
    return terms.sum(dim=1)


def js_divergence(
    p_NC: torch.Tensor, q_NC: torch.Tensor, entropies: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Jensen–Shannon divergence per row, H((p+q)/2) − (H(p) + H(q))/2, in nats: 0 for equal rows, at most ln 2.

    Args:
        entropies: of p and q, where they are known.
    """
    of_p, of_q = (entropy(p_NC), entropy(q_NC)) if entropies is None else entropies
    return (entropy((p_NC + q_NC) / 2) - (of_p + of_q) / 2).clamp_min(0.0)


class NonTargetConsistency:
    """Mean pairwise cosine similarity of non-target distributions within a class.

    For a sample i of class y, q_i is its softmax with the class y removed and renormalised:
    q_ic = p_ic / (1 − p_iy) for c ≠ y, which is the softmax of the other logits. Over the n samples of a class

        consistency = 1 / (n (n − 1)) · Σ_{i≠j} cos(q_i, q_j) = (‖Σ_i u_i‖² − n) / (n (n − 1))

    with u_i = q_i / ‖q_i‖, so one vector sum per class suffices: O(N·C) instead of O(N²·C). It is undefined for a class
    with fewer than two samples, and for two classes, where a single non-target class remains.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, logits_NC: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Add samples of a view; the logits are already divided by the temperature."""
        self.add_rows(OtherClasses(logits_NC, labels_N))

    def add_rows(self, others: OtherClasses) -> None:
        """As `add`. Uses up `others.e`: call it last."""
        # q and e have the same direction. For a confident teacher, 1 − p_y has too few digits to divide by.
        unit, labels = others.e.div_(others.norms[:, None]), others.labels
        self._sums.index_add_(0, labels, unit)
        self._counts += torch.bincount(labels, minlength=len(self._counts))

    def compute(self) -> torch.Tensor:
        """[C] float64 on the CPU, NaN where it is undefined."""
        n = self._counts
        value = ((self._sums**2).sum(dim=1) - n) / (n * (n - 1))
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
