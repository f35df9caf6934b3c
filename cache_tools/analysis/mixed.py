"""What mixing labels linearly would have cost, against the targets of the mixed pictures (MixUp, CutMix).

A student without a teacher learns from the labels mixed as the pictures are: y = share · own label + (1 − share) ·
partner's label. The targets p of a mixed picture say what the teachers see in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
import torch

from cache_tools.views import ViewRecipe

FIGURES = ("kl", "distance", "top1", "in_pair", "label_mass")


class MixedSums:
    """Sums of the figures of mixed rows, by source and view.

    Args:
        image_size: (height, width) of the cache's images.
    """

    def __init__(self, views: ViewRecipe, image_size: tuple[int, int], labels_N: torch.Tensor) -> None:
        self._views, self._image_size, self._labels = views, image_size, labels_N
        self._sums: dict[tuple[str, int], torch.Tensor] = {}

    def add(self, view: int, rows: slice, logits_NC: Mapping[str, torch.Tensor]) -> None:
        """Add rows of a view, if it mixes: source → logits, already divided by the temperature."""
        mixing = self._views.mixing(range(rows.start, rows.stop), view, self._image_size)
        if mixing is None:
            return
        device = self._labels.device
        share = torch.from_numpy(mixing.share).to(device)
        partner, mixed = self._labels[torch.from_numpy(mixing.partner).to(device)], share < 1.0
        for source, logits in logits_NC.items():
            figures = mixed_figures(logits, self._labels[rows], partner, share)
            sums = torch.stack([torch.ones_like(share), *(figures[name] for name in FIGURES)])[:, mixed].sum(dim=1)
            before = self._sums.get((source, view))
            self._sums[source, view] = sums if before is None else before + sums

    def table(self, sources: Sequence[str]) -> pl.DataFrame:
        """Means over the mixed rows, per source and view, then over all views (`view` null); empty without any."""
        rows = []
        for source in sources:
            by_view: dict[int | None, torch.Tensor] = {
                v: sums for (name, v), sums in self._sums.items() if name == source
            }
            if by_view:
                by_view[None] = torch.stack(list(by_view.values())).sum(dim=0)
            for view, sums in by_view.items():
                count, *values = sums.tolist()
                means = {name: value / count if count else None for name, value in zip(FIGURES, values, strict=True)}
                rows.append({"source": source, "view": view, "n": int(count), **means})
        kinds = {"source": pl.String, "view": pl.Int32, "n": pl.Int64, **dict.fromkeys(FIGURES, pl.Float64)}
        return pl.DataFrame(rows, schema=kinds)


def mixed_figures(
    logits_NC: torch.Tensor, own_N: torch.Tensor, partner_N: torch.Tensor, share_N: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far linearly mixed labels y are from p = softmax(logits), each float64 [N].

    Args:
        own_N, partner_N: int64, the two labels.
        share_N: float64, of the own label.

    Returns:
        `kl` Σ_c y_c ln(y_c / p_c), in nats; `distance` ½ Σ_c |y_c − p_c|, from 0 to 1; `top1`, whether the largest
        class of p is that of y (the own label at equal shares); `in_pair`, whether it is one of the two; `label_mass`,
        what p gives the two.
    """
    log_p = logits_NC.double().log_softmax(dim=1)
    p, y = log_p.exp(), torch.zeros_like(log_p)
    y.scatter_add_(1, own_N[:, None], share_N[:, None])
    y.scatter_add_(1, partner_N[:, None], 1.0 - share_N[:, None])
    best = log_p.argmax(dim=1)
    return {
        "kl": (torch.special.xlogy(y, y) - y * log_p).sum(dim=1),
        "distance": (y - p).abs().sum(dim=1) / 2,
        "top1": (best == torch.where(share_N >= 0.5, own_N, partner_N)).double(),
        "in_pair": ((best == own_N) | (best == partner_N)).double(),
        "label_mass": (p * (y > 0)).sum(dim=1),
    }
