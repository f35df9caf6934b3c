"""How alike a teacher's answers are: between samples of a class, and between views of a sample.

Both are sums over one pass of the views; neither holds more than one [N, C] array.
"""

from __future__ import annotations

import torch

from cache_tools.sample_figures import entropy


class NonTargetConsistency:
    """Mean pairwise cosine similarity of non-target distributions within a class.

    For a sample i of class y, q_i is its softmax with the class y removed and renormalised:
    q_ic = p_ic / (1 − p_iy) for c ≠ y, which is the softmax of the other logits. Over the n samples of a class

        consistency = 1 / (n (n − 1)) · Σ_{i≠j} cos(q_i, q_j) = (‖Σ_i u_i‖² − Σ_i ‖u_i‖²) / (n (n − 1))

    with u_i = q_i / ‖q_i‖, so that one vector per class is all there is to sum: O(N·C) instead of O(N²·C). A class
    with fewer than two samples has none, and two classes leave a single non-target class, which says nothing.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
        self._squares = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def add(self, logits_NC: torch.Tensor, labels_N: torch.Tensor) -> None:
        """Samples of one view; logits already divided by the temperature."""
        # Masked before the softmax: 1 − p_y of a confident teacher has no digits left to divide by.
        others = logits_NC.double().scatter(1, labels_N[:, None], -torch.inf)
        unit = torch.nn.functional.normalize(others.softmax(dim=1), dim=1)
        self._sums.index_add_(0, labels_N, unit)
        self._squares.index_add_(0, labels_N, (unit * unit).sum(dim=1))
        self._counts.index_add_(0, labels_N, torch.ones_like(labels_N, dtype=torch.float64))

    def compute(self) -> torch.Tensor:
        """[C] float64 on the CPU, NaN where there are fewer than two samples, or only two classes."""
        n = self._counts
        value = ((self._sums**2).sum(dim=1) - self._squares) / (n * (n - 1))
        undefined = (n < 2) | (len(n) < 3)
        return value.masked_fill(undefined, torch.nan).cpu()


class Stability:
    """Whether a sample's answer stays the same over V views.

    `same`: the top-1 class is the same in all views. `divergence`: the Jensen–Shannon divergence of the V
    distributions, which is the mean divergence of a view from the mean m over the views:

        H(m) − 1/V Σ_v H(p_v) = 1/V Σ_v KL(p_v ‖ m),  m = 1/V Σ_v p_v

    in nats, from 0 (all equal) to ln V. m is kept in float32, which leaves an error of about 1e-6.
    """

    def __init__(self, num_samples: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self._views = 0
        self._sum = torch.zeros(num_samples, num_classes, device=device)
        self._entropy = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self._first = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self._same = torch.ones(num_samples, dtype=torch.bool, device=device)

    def add(self, rows: slice, p_NC: torch.Tensor, top1_N: torch.Tensor, entropy_N: torch.Tensor) -> None:
        """Rows of the current view: probabilities (float64), their argmax, their entropies."""
        if self._views == 0:
            self._first[rows] = top1_N
        self._sum[rows] += p_NC.float()
        self._entropy[rows] += entropy_N
        self._same[rows] &= top1_N == self._first[rows]

    def next_view(self) -> None:
        """All rows of a view have been added."""
        self._views += 1

    def compute(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """`same` (bool) and `divergence` (float64) of some rows, on the CPU."""
        mean = self._sum[rows].double() / self._views
        divergence = entropy(mean) - self._entropy[rows] / self._views
        return self._same[rows].cpu(), divergence.clamp_min(0.0).cpu()
