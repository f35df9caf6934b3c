"""One view's targets, resident on a device: index there, never in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from cache_tools import fusion
from cache_tools.errors import NotFoundError
from cache_tools.refusion import Fusion

# Rows fused at once when a component cache is loaded: keeps the float32 temporaries small.
FUSE_ROWS = 8192

Index = torch.Tensor | npt.NDArray[np.integer] | Sequence[int] | range | slice


@dataclass(frozen=True, eq=False)
class ViewTargets:
    """Everything the teachers said about one view. Made by `TeacherCache.load_view`.

    Every method takes an index of samples (a slice, or numbers in a tensor on any device, an array or a list), and
    gives new float32 rows on `device`, in the order of the index.

    Attributes:
        view: the augmentation seed.
        arrays: [N, width] tensors in the dtype of the cache; the fused ones of a component cache are float32.
        constants: float32 tensors of a component cache (see `format.constant_shapes`).
    """

    view: int
    arrays: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def logits(self, index: Index) -> torch.Tensor:
        """Fused logits [B, C], rows mean-centred."""
        return take(self._array("fused_logits"), index)

    def features(self, index: Index) -> torch.Tensor:
        """Fused features [B, D]."""
        return take(self._array("fused_features"), index)

    def teacher_features(self, index: Index) -> torch.Tensor:
        """The teacher's features [B, Dt]; component caches only."""
        return take(self._array("teacher_features"), index)

    def clip_features(self, index: Index) -> torch.Tensor:
        """CLIP's image features [B, Dc], of any length; component caches only."""
        return take(self._array("clip_features"), index)

    def teacher_logits(self, index: Index) -> torch.Tensor:
        """The teacher's own logits [B, C]: stored, or its linear head on its features; component caches only."""
        if "teacher_logits" in self.arrays:
            return take(self.arrays["teacher_logits"], index)
        return _head(self.teacher_features(index), self.constants)

    def cosine(self, index: Index) -> torch.Tensor:
        """Raw cosines [B, C] of CLIP's image features with the class embeddings; component caches only."""
        return fusion.cosine(self.clip_features(index), self.constants["class_embeddings"])

    @property
    def device(self) -> torch.device:
        return next(iter(self.arrays.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes resident on the device."""
        return sum(tensor.nbytes for tensor in (*self.arrays.values(), *self.constants.values()))

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def to(self, device: torch.device | str) -> ViewTargets:
        """The same targets on another device."""
        return ViewTargets(
            self.view,
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.arrays.items()},
            {name: tensor.to(device, non_blocking=True) for name, tensor in self.constants.items()},
        )

    def _array(self, name: str) -> torch.Tensor:
        if name not in self.arrays:
            raise NotFoundError(
                f"{name.replace('_', ' ')} are not loaded",
                where=f"view {self.view}",
                expected=", ".join(self.arrays),
                next_step="load the view with them, or build the cache with --store components",
            )
        return self.arrays[name]


def fused(
    view: int, arrays: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor], choice: Fusion
) -> ViewTargets:
    """The targets of a component cache, with teacher and CLIP fused once for the whole view, in float32."""
    logits, features = [], []
    for start in range(0, len(arrays["clip_features"]), FUSE_ROWS):
        rows = {name: tensor[start : start + FUSE_ROWS].float() for name, tensor in arrays.items()}
        teacher_logits = (
            rows["teacher_logits"] if "teacher_logits" in rows else _head(rows["teacher_features"], constants)
        )
        batch_logits, batch_features = fusion.fuse_targets(
            teacher_logits,
            rows["teacher_features"],
            fusion.cosine(rows["clip_features"], constants["class_embeddings"]),
            rows["clip_features"],
            teacher_weight=choice.teacher_weight,
            feature_weight=choice.feature_weight,
            clip_scale=choice.clip_scale,
            teacher_projection=constants["teacher_projection"],
            clip_projection=constants["clip_projection"],
        )
        logits.append(batch_logits)
        features.append(batch_features)
    both = {"fused_logits": torch.cat(logits), "fused_features": torch.cat(features)}
    return ViewTargets(view, {**both, **arrays}, constants)


def take(rows: torch.Tensor, index: Index) -> torch.Tensor:
    """New float32 rows of `rows` at `index`."""
    if isinstance(index, slice):
        return rows[index].to(torch.float32, copy=True)
    if not isinstance(index, torch.Tensor):
        numbers = np.asarray(index)
        index = torch.from_numpy(numbers if numbers.dtype == bool else numbers.astype(np.int64))
    index = index.to(rows.device, non_blocking=True)
    if index.dtype == torch.bool:
        return rows[index].float()
    return rows.index_select(0, index.long()).float()  # on the CPU a tenth of the time of rows[index]


def _head(features_NE: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return fusion.linear_logits(features_NE, constants["teacher_head_weight"], constants["teacher_head_bias"])
