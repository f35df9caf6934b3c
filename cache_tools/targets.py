"""One view's targets, resident on a device: index there, never in the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from cache_tools import fusion
from cache_tools.codecs import SparseTargets, TopK
from cache_tools.errors import NotFoundError
from cache_tools.format.arrays import TargetSpec, array_name, constant_shapes
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe

# Rows fused at once when a component cache is loaded: keeps the float32 temporaries small.
FUSE_ROWS = 8192

Index = torch.Tensor | npt.NDArray[np.integer] | Sequence[int] | range | slice


@dataclass(frozen=True, eq=False)
class ViewTargets:
    """Everything the teachers said about one view. Made by `TeacherCache.load_view`.

    Every method takes an index of samples (a slice, or numbers in a tensor on any device, an array or a list), and
    gives new float32 rows on `device`, in the order of the index. `network` counts the networks of a group from 0;
    None mixes them all.

    Attributes:
        view: the augmentation seed.
        arrays: [N, width] tensors as the cache stores them; the fused ones of a component cache are float32.
        constants: float32 tensors: what codecs take, and what turns features into targets (see `constants_for`).
        fusion: how a component cache's parts are put together; None for a fused cache.
        stored: how the arrays of each target are decoded; a target that is not here is an array of plain numbers.
    """

    view: int
    arrays: Mapping[str, torch.Tensor]
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fusion: Fusion | None = None
    stored: Mapping[str, TargetSpec] = field(default_factory=dict)

    def logits(self, index: Index) -> torch.Tensor:
        """Fused logits [B, C], rows mean-centred."""
        return self._rows("fused_logits", index)

    def sparse_logits(self, index: Index, temperature: float) -> SparseTargets:
        """What a top-k cache knows of the fused distribution, for `train.losses.tail.kd_tail`.

        Raises:
            NotFoundError: fused logits that are not stored as top-k.
            FormatError: top-k targets of another temperature.
        """
        codec = self.stored["fused_logits"].codec if "fused_logits" in self.stored else None
        if not isinstance(codec, TopK):
            raise NotFoundError("these targets are not sparse", where=f"view {self.view}", expected="a top-k codec")
        return codec.sparse(self._parts("fused_logits"), index, temperature=temperature)

    def features(self, index: Index) -> torch.Tensor:
        """Fused features [B, D]."""
        return self._rows("fused_features", index)

    def teacher_features(self, index: Index, network: int = 0) -> torch.Tensor:
        """A teacher's features [B, Dt]; component caches only."""
        return self._rows(array_name("teacher_features", network), index)

    def clip_features(self, index: Index, network: int = 0) -> torch.Tensor:
        """A CLIP's image features [B, Dc], of any length; component caches only."""
        return self._rows(array_name("clip_features", network), index)

    def component_features(self, index: Index) -> tuple[torch.Tensor, ...]:
        """Features of every network by itself, teachers before CLIPs; component caches only."""
        how = self._how("teacher_features")
        teachers = [self.teacher_features(index, number) for number in range(len(how.teacher_weights))]
        return (*teachers, *(self.clip_features(index, number) for number in range(len(how.clip_weights))))

    def teacher_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        """The teachers' logits [B, C], mixed or of one: stored, or a linear head on features; component caches only."""
        if network is None:
            weights = self._how("teacher_features").teacher_weights
            return fusion.mix([self.teacher_logits(index, number) for number in range(len(weights))], weights)
        stored = array_name("teacher_logits", network)
        if stored in self.arrays:
            return self._rows(stored, index)
        features = self.teacher_features(index, network)
        weight, bias = (self.constants[array_name(f"teacher_head_{part}", network)] for part in ("weight", "bias"))
        return fusion.linear_logits(features, weight, bias)

    def clip_logits(self, index: Index, network: int | None = None) -> torch.Tensor:
        """The CLIPs' scaled logits [B, C], mixed or of one, over prompts as `fusion` says; component caches only."""
        how = self._how("clip_features")
        if network is None:
            parts = [self.clip_logits(index, number) for number in range(len(how.clip_weights))]
            return fusion.mix(parts, how.clip_weights)
        features = self.clip_features(index, network)
        embeddings = self.constants[array_name("class_embeddings", network)]
        prompts = self.constants.get(array_name("prompts", network), embeddings)
        return fusion.clip_logits(features, prompts, how.clip_scales[network])

    def cosine(self, index: Index, network: int = 0) -> torch.Tensor:
        """Raw cosines [B, C] of a CLIP's image features with the class embeddings; component caches only."""
        features = self.clip_features(index, network)
        return fusion.cosine(features, self.constants[array_name("class_embeddings", network)])

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
            self.fusion,
            self.stored,
        )

    def _how(self, needed: str) -> Fusion:
        self._array(needed)
        assert self.fusion is not None, "a view with components says how they are fused"
        return self.fusion

    def _rows(self, target: str, index: Index) -> torch.Tensor:
        spec = self.stored.get(target)
        if spec is None:
            return take(self._array(target), index)
        constants = {name.removeprefix(target): self.constants[name] for name in spec.constants}
        return spec.codec.decode(self._parts(target), constants, index)

    def _parts(self, target: str) -> dict[str, torch.Tensor]:
        return {array.suffix: self._array(array.name) for array in self.stored[target].arrays}

    def _array(self, name: str) -> torch.Tensor:
        if name not in self.arrays:
            raise NotFoundError(
                f"{name.replace('_', ' ')} are not loaded",
                where=f"view {self.view}",
                expected=", ".join(self.arrays),
                next_step="load the view with them, or build the cache with --store components",
            )
        return self.arrays[name]


def fused(parts: ViewTargets, *, logits: bool = True, features: bool = True) -> ViewTargets:
    """The targets of a component cache with its teachers and CLIPs fused once for the whole view, in float32."""
    how = parts.fusion
    assert how is not None, "only components can be fused"
    pieces = [slice(start, start + FUSE_ROWS) for start in range(0, len(parts), FUSE_ROWS)]
    arrays = {}
    if logits:
        arrays["fused_logits"] = torch.cat([_fused_logits(parts, rows, how) for rows in pieces])
    if features:
        arrays["fused_features"] = torch.cat([_fused_features(parts, rows, how) for rows in pieces])
    return replace(parts, arrays={**arrays, **parts.arrays})


def constants_for(how: Fusion, recipe: CacheRecipe, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What fusing a component cache takes beside its target arrays, float32, by name.

    All of `arrays.constant_shapes` but the text features. Where `how` leaves prompts out, the class embeddings are
    those of the rest; where it averages something else than embeddings, `prompts` is the text side of that
    (`fusion.prompt_embeddings`).
    """
    names = constant_shapes(recipe)
    constants = {name: read(name) for name in names if not name.startswith("text_features")}
    if how.prompts is None and how.prompt_ensemble == "embedding":
        return constants
    for number in range(len(recipe.clips)):
        text_features_PCD = read(array_name("text_features", number))
        if how.prompts is not None:
            text_features_PCD = text_features_PCD[list(how.prompts)]
            constants[array_name("class_embeddings", number)] = fusion.class_embeddings(text_features_PCD)
        if how.prompt_ensemble != "embedding":
            prompts = fusion.prompt_embeddings(text_features_PCD, how.prompt_ensemble)
            constants[array_name("prompts", number)] = prompts
    return constants


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


def _fused_logits(parts: ViewTargets, rows: slice, how: Fusion) -> torch.Tensor:
    teachers = [parts.teacher_logits(rows, number) for number in range(len(how.teacher_weights))]
    clips = [parts.clip_logits(rows, number) for number in range(len(how.clip_weights))]
    return fusion.fused_logits(teachers, clips, how)


def _fused_features(parts: ViewTargets, rows: slice, how: Fusion) -> torch.Tensor:
    teachers, clips = range(len(how.teacher_weights)), range(len(how.clip_weights))
    return fusion.fused_features(
        [parts.teacher_features(rows, number) for number in teachers],
        [parts.constants[array_name("teacher_projection", number)] for number in teachers],
        [parts.clip_features(rows, number) for number in clips],
        [parts.constants[array_name("clip_projection", number)] for number in clips],
        how,
    )
