"""One pass over the views of a cache, one view in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from cache_tools import view_tables
from cache_tools.consistency import NonTargetConsistency, Stability
from cache_tools.console import Progress
from cache_tools.reader import TeacherCache
from cache_tools.resolved_fusion import Fusion
from cache_tools.sample_figures import js_divergence, row_chunks, sample_figures
from cache_tools.targets import ViewTargets

SOURCES = ("teacher", "clip", "fusion")


class ViewStream:
    """Reads views; carries from view to view what stability needs.

    Attributes:
        sources: `teacher`, `clip`, `fusion`; the fusion alone of a fused cache.
    """

    def __init__(
        self, cache: TeacherCache, fusion: Fusion, temperature: float, device: torch.device, *, several: bool
    ) -> None:
        self._cache, self._fusion, self._temperature, self._device = cache, fusion, temperature, device
        self.sources = SOURCES if cache.recipe.store == "components" else ("fusion",)
        self._labels = torch.from_numpy(cache.labels).to(device)
        followed = self.sources if several else ()
        self._stability = {name: Stability(cache.num_samples, cache.num_classes, device) for name in followed}

    def read(self, view: int, progress: Progress) -> tuple[pl.DataFrame, Mapping[str, npt.NDArray[np.float64]]]:
        """The table of a view (`view_tables.sample_table`), and the consistency [C] of each source."""
        targets = self._cache.load_view(view, self._device, features=False, fusion=self._fusion)
        consistency = {name: NonTargetConsistency(self._cache.num_classes, self._device) for name in self.sources}
        pieces = []
        for rows in self._chunks():
            pieces.append(self._rows(targets, rows, consistency))
            progress.advance(rows.stop - rows.start, f"view {view}")
        for stability in self._stability.values():
            stability.next_view()
        return pl.concat(pieces), {name: value.compute().numpy() for name, value in consistency.items()}

    def stability(self) -> dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """Source → (same top-1 in all views, divergence) per sample [N]; empty when there is one view only."""
        found = {}
        for name, stability in self._stability.items():
            parts = [stability.compute(rows) for rows in self._chunks()]
            same, divergence = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            found[name] = (same, divergence)
        return found

    def _rows(self, targets: ViewTargets, rows: slice, consistency: Mapping[str, NonTargetConsistency]) -> pl.DataFrame:
        labels, figures, p = self._labels[rows], {}, {}
        for name in self.sources:
            logits = source_logits(targets, name, rows).double() / self._temperature
            p[name] = logits.softmax(dim=1)
            figures[name] = sample_figures(logits, labels)
            consistency[name].add(logits, labels)
            if name in self._stability:
                self._stability[name].add(rows, p[name], figures[name]["top1"], figures[name]["entropy"])
        divergence = js_divergence(p["teacher"], p["clip"]) if "clip" in p else None
        return view_tables.sample_table(rows, labels, figures, divergence)

    def _chunks(self) -> list[slice]:
        return list(row_chunks(self._cache.num_samples, self._cache.num_classes))


def source_logits(targets: ViewTargets, source: str, rows: slice) -> torch.Tensor:
    """Logits [B, C] of `teacher`, `clip` (scaled) or `fusion`; of several networks the mix."""
    if source == "teacher":
        return targets.teacher_logits(rows)
    if source == "clip":
        return targets.clip_logits(rows)
    return targets.logits(rows)
