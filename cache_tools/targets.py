"""The targets of one view in the memory of a device. Index them there: reading single rows from disk is slow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from cache_tools import fusion
from cache_tools.codecs import SparseCodec, SparseTargets
from cache_tools.codecs.base import gather
from cache_tools.errors import NotFoundError
from cache_tools.format.arrays import TargetSpec, array_name, constant_shapes
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe
from cache_tools.system.devices import copy_to

# Rows fused at once when a component cache is loaded: keeps the float32 temporaries small.
FUSE_ROWS = 8192

Index = torch.Tensor | npt.NDArray[np.integer] | Sequence[int] | range | slice


@dataclass(frozen=True, eq=False)
class ViewTargets:
    """The targets of one view: a `FusedView` or a `ComponentView`. `TeacherCache.load_view` makes them.

    Methods take an index of samples (a slice, or numbers in a tensor on any device, an array or a list) and return new
    float32 rows on `device`, in the order of the index. They raise NotFoundError for targets that are not loaded; fused
    caches have no targets of single networks. `network` is the number of a teacher or a CLIP, from 0; None mixes all.

    Attributes:
        view: the augmentation seed.
        arrays: [N, width] tensors, by name.
        constants: float32 tensors that hold for all samples, by name.
        specs: how each target is stored, by name. A target without one is a single array of plain numbers.
    """

    view: int
    arrays: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor]
    specs: Mapping[str, TargetSpec]

    def logits(self, index: Index) -> torch.Tensor:
        """Fused logits [B, C]; rows are mean-centred unless images may have several labels."""
        return self._rows("fused_logits", index)

    def features(self, index: Index) -> torch.Tensor:
        """Fused features [B, D]."""
        return self._rows("fused_features", index)

    def sparse_logits(self, index: Index, temperature: float) -> SparseTargets:
        """The classes of the fused distribution that a sparse codec stores, for `train.losses.tail.kd_tail`.

        Raises:
            NotFoundError: fused logits that are not stored as `top-k` or `sampled`.
            FormatError: sparse targets of another temperature.
        """
        raise NotFoundError(
            "these targets are not sparse", where=f"view {self.view}", expected="top-k or sampled logits"
        )

    def teacher_features(self, index: Index, network: int = 0) -> torch.Tensor:
        """Features [B, Dt] of one teacher; component caches only."""
        raise self._not_loaded("teacher_features")

    def clip_features(self, index: Index, network: int = 0) -> torch.Tensor:
        """Image features [B, Dc] of one CLIP, not normalised; component caches only."""
        raise self._not_loaded("clip_features")

    def component_features(self, index: Index) -> tuple[torch.Tensor, ...]:
        """Features of each network, teachers before CLIPs; component caches only."""
        raise self._not_loaded("component_features")

    def teacher_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        """Logits [B, C] of one teacher or of their mix; component caches only."""
        raise self._not_loaded("teacher_logits")

    def clip_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        """Scaled logits [B, C] of one CLIP or of their mix, over the prompts of the fusion; component caches only."""
        raise self._not_loaded("clip_logits")

    def cosine(self, index: Index, network: int = 0) -> torch.Tensor:
        """Raw cosines [B, C] of a CLIP's image features with the class embeddings; component caches only."""
        raise self._not_loaded("clip_features")

    @property
    def device(self) -> torch.device:
        return next(iter(self.arrays.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes resident on the device."""
        return sum(tensor.nbytes for tensor in (*self.arrays.values(), *self.constants.values()))

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def at(self, index: Index) -> Self:
        """The targets of these samples alone, as stored, renumbered from 0."""
        return replace(self, arrays=gather(self.arrays, index))

    def to(self, device: torch.device | str) -> Self:
        """The same targets on another device."""

        target = torch.device(device)

        def move(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: copy_to(tensor, target) for name, tensor in tensors.items()}

        return replace(self, arrays=move(self.arrays), constants=move(self.constants))

    def _rows(self, target: str, index: Index) -> torch.Tensor:
        spec = self.specs.get(target)
        if spec is None:
            return take(self._array(target), index)
        constants = {name.removeprefix(target): self.constants[name] for name in spec.constants}
        return spec.codec.decode(self._parts(spec), constants, index)

    def _parts(self, spec: TargetSpec) -> dict[str, torch.Tensor]:
        """The arrays of a target, by suffix."""
        return {array.suffix: self._array(array.name) for array in spec.arrays}

    def _array(self, name: str) -> torch.Tensor:
        if name not in self.arrays:
            raise self._not_loaded(name)
        return self.arrays[name]

    def _not_loaded(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"{name.replace('_', ' ')} are not loaded",
            where=f"view {self.view}",
            expected=", ".join(self.arrays),
            next_step="load the view with them, or build the cache with --store components",
        )


@dataclass(frozen=True, eq=False)
class FusedView(ViewTargets):
    """A view of a cache that stores fused targets. Batches are decoded when they are asked for."""

    def sparse_logits(self, index: Index, temperature: float) -> SparseTargets:
        spec = self.specs.get("fused_logits")
        if spec is None or not isinstance(spec.codec, SparseCodec):
            return super().sparse_logits(index, temperature)
        return spec.codec.sparse(self._parts(spec), index, temperature=temperature)


@dataclass(frozen=True, eq=False)
class ComponentView(ViewTargets):
    """A view of a cache that stores features and logits of each network.

    Attributes:
        fusion: how they are fused.
        constants: those of `fusion_constants`.
    """

    fusion: Fusion

    def fuse(self, *, logits: bool = True, features: bool = True, sizes: Sequence[int] | None = None) -> ComponentView:
        """The same view with fused targets, computed once for all samples, in float32.

        Args:
            sizes: of the blocks that the rows come from; None for a single one. Blocks are fused separately, because
                the last bits of a matrix product may depend on its number of rows.
        """
        pieces = _pieces([len(self)] if sizes is None else sizes)
        fused = {}
        if logits:
            fused["fused_logits"] = _filled(len(self), pieces, self._fuse_logits)
        if features:
            fused["fused_features"] = _filled(len(self), pieces, self._fuse_features)
        return replace(self, arrays={**fused, **self.arrays})

    def teacher_features(self, index: Index, network: int = 0) -> torch.Tensor:
        return self._rows(array_name("teacher_features", network), index)

    def clip_features(self, index: Index, network: int = 0) -> torch.Tensor:
        return self._rows(array_name("clip_features", network), index)

    def component_features(self, index: Index) -> tuple[torch.Tensor, ...]:
        teachers = [self.teacher_features(index, number) for number in self._teachers]
        return (*teachers, *(self.clip_features(index, number) for number in self._clips))

    def teacher_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        if network is None:
            if not self._teachers:
                raise NotFoundError("this cache has no teacher", expected=", ".join(self.arrays))
            parts = [self.teacher_logits(index, number) for number in self._teachers]
            return fusion.mix(parts, self.fusion.teacher_weights)
        stored = array_name("teacher_logits", network)
        if stored in self.arrays:
            return self._rows(stored, index)
        features = self.teacher_features(index, network)
        weight, bias = (self._constant(f"teacher_head_{part}", network) for part in ("weight", "bias"))
        return fusion.linear_logits(features, weight, bias)

    def clip_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        if network is None:
            if not self._clips:
                raise NotFoundError("this cache has no CLIP", expected=", ".join(self.arrays))
            return fusion.mix([self.clip_logits(index, number) for number in self._clips], self.fusion.clip_weights)
        features = self.clip_features(index, network)
        embeddings = self._constant("class_embeddings", network)
        prompts = self.constants.get(array_name("prompts", network), embeddings)
        return fusion.clip_logits(features, prompts, self.fusion.clip_scales[network])

    def cosine(self, index: Index, network: int = 0) -> torch.Tensor:
        return fusion.cosine(self.clip_features(index, network), self._constant("class_embeddings", network))

    @property
    def _teachers(self) -> range:
        return range(len(self.fusion.teacher_weights))

    @property
    def _clips(self) -> range:
        return range(len(self.fusion.clip_weights))

    def _constant(self, name: str, network: int) -> torch.Tensor:
        return self.constants[array_name(name, network)]

    def _fuse_logits(self, rows: slice) -> torch.Tensor:
        teachers = [self.teacher_logits(rows, number) for number in self._teachers]
        clips = [self.clip_logits(rows, number) for number in self._clips]
        return fusion.fused_logits(teachers, clips, self.fusion)

    def _fuse_features(self, rows: slice) -> torch.Tensor:
        return fusion.fused_features(
            [self.teacher_features(rows, number) for number in self._teachers],
            [self._constant("teacher_projection", number) for number in self._teachers],
            [self.clip_features(rows, number) for number in self._clips],
            [self._constant("clip_projection", number) for number in self._clips],
            self.fusion,
        )


def fusion_constants(
    resolved: Fusion, recipe: CacheRecipe, read: Callable[[str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The constants of a `ComponentView`, float32, by name.

    These are the constants of the cache (`arrays.constant_shapes`) without the text features. Where the fusion leaves
    prompts out, the class embeddings are those of the remaining prompts. Where it averages logits or probabilities
    over the prompts, `prompts` is what image features are compared with (`fusion.prompt_embeddings`).

    Args:
        resolved: the fusion.
        read: returns a constant of the cache by name.
    """
    constants = {name: read(name) for name in constant_shapes(recipe) if not name.startswith("text_features")}
    if resolved.prompts is None and resolved.prompt_ensemble == "embedding":
        return constants
    for number in range(len(recipe.clips)):
        text_features_PCD = read(array_name("text_features", number))
        if resolved.prompts is not None:
            text_features_PCD = text_features_PCD[list(resolved.prompts)]
            constants[array_name("class_embeddings", number)] = fusion.class_embeddings(text_features_PCD)
        if resolved.prompt_ensemble != "embedding":
            prompts = fusion.prompt_embeddings(text_features_PCD, resolved.prompt_ensemble)
            constants[array_name("prompts", number)] = prompts
    return constants


def joined(parts: Sequence[ViewTargets]) -> ViewTargets:
    """The rows of parts of one view, one part after the other, as stored."""
    arrays = {name: torch.cat([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return replace(parts[0], arrays=arrays)


def _pieces(sizes: Sequence[int]) -> list[slice]:
    """Slices of consecutive blocks of these sizes, each of at most FUSE_ROWS rows of one block."""
    starts = [stop - size for stop, size in zip(accumulate(sizes), sizes, strict=True)]
    return [
        slice(start + first, start + min(first + FUSE_ROWS, size))
        for start, size in zip(starts, sizes, strict=True)
        for first in range(0, size, FUSE_ROWS)
    ]


def _filled(count: int, pieces: Sequence[slice], compute: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """The rows that `compute` gives for each piece, in one tensor."""
    rows: torch.Tensor | None = None
    for piece in pieces:
        part = compute(piece)
        rows = part.new_empty((count, part.shape[1])) if rows is None else rows
        rows[piece] = part
    return torch.empty(0, 0) if rows is None else rows


def take(rows: torch.Tensor, index: Index) -> torch.Tensor:
    """New float32 rows of `rows` at `index`."""
    if isinstance(index, slice):
        return rows[index].to(torch.float32, copy=True)
    return gather({"": rows}, index)[""].float()
