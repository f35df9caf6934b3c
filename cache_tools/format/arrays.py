"""The arrays of a cache: their names, shapes, chunks and blocks follow from its recipe."""

from __future__ import annotations

from pydantic import PositiveInt

from cache_tools.codecs import AnyCodec, StoredArray
from cache_tools.config import Frozen
from cache_tools.format.recipe import CacheRecipe

CHUNK_BYTES = 8 << 20
MAX_BLOCK_ROWS = 16_384
MIN_BLOCK_ROWS = 64
SEEDS = "view_seeds"


class ArraySpec(Frozen):
    """One stored array [V, N, width] of a target, chunked (1, chunk_rows, width); its name is target + suffix."""

    target: str
    stored: StoredArray
    chunk_rows: PositiveInt

    @property
    def name(self) -> str:
        return self.target + self.stored.suffix

    @property
    def suffix(self) -> str:
        return self.stored.suffix

    @property
    def width(self) -> int:
        return self.stored.width

    @property
    def dtype(self) -> str:
        return self.stored.dtype


class TargetSpec(Frozen):
    """One target: rows of `width` numbers, and the arrays in which its codec stores them."""

    name: str
    width: PositiveInt
    codec: AnyCodec
    arrays: tuple[ArraySpec, ...]

    @property
    def constants(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the constants that its codec needs."""
        return {self.name + suffix: shape for suffix, shape in self.codec.constant_shapes(self.width).items()}

    def view_to_read(self, view: int, clip_view: int | None) -> int:
        """The view to read for `view`: CLIP's targets come from `clip_view` if a fusion sets one."""
        return clip_view if clip_view is not None and self.name.startswith("clip_features") else view


def array_name(name: str, network: int) -> str:
    """The array `name` of one network of a group, counted from 0: `NAME`, `NAME_2`, `NAME_3`, …"""
    return name if network == 0 else f"{name}_{network + 1}"


def targets(recipe: CacheRecipe, block_rows: int) -> tuple[TargetSpec, ...]:
    """The targets of each (view, sample), in the order in which commits list their arrays.

    Raises:
        FormatError: a codec that cannot store rows of this width.
    """
    specs = []
    for name, width in _widths(recipe).items():
        codec = recipe.codecs.for_target(name).for_width(width)
        arrays = tuple(
            ArraySpec(target=name, stored=stored, chunk_rows=_chunk_rows(stored.row_bytes, block_rows))
            for stored in codec.arrays(width)
        )
        specs.append(TargetSpec(name=name, width=width, codec=codec, arrays=arrays))
    return tuple(specs)


def target_arrays(recipe: CacheRecipe, block_rows: int) -> tuple[ArraySpec, ...]:
    """The arrays of all targets, in the order in which commits list their checksums."""
    arrays = [array for target in targets(recipe, block_rows) for array in target.arrays]
    return (*arrays, *seed_arrays(recipe, block_rows))


def seed_arrays(recipe: CacheRecipe, block_rows: int) -> tuple[ArraySpec, ...]:
    """The array of the seeds from which another tool drew the views, int32 from 0; empty for views of our own."""
    if recipe.views.made_by is None or not recipe.views.made_by.seeds:
        return ()
    stored = StoredArray(width=1, dtype="int32", fill_value=-(1 << 31))
    return (ArraySpec(target=SEEDS, stored=stored, chunk_rows=_chunk_rows(stored.row_bytes, block_rows)),)


def constant_shapes(recipe: CacheRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the constants: float32 arrays that hold for all samples and views.

    Every cache with features has projections and class embeddings. `store: components` adds the heads and text features
    that turn features into logits. Codecs that are fitted to the targets add their parameters (`TargetSpec.constants`).
    """
    classes, width = len(recipe.dataset.class_names), recipe.fusion.feature_dim
    components = recipe.store == "components"
    shapes: dict[str, tuple[int, ...]] = {}
    for number, teacher in enumerate(recipe.teachers if recipe.has_features else ()):
        shapes[array_name("teacher_projection", number)] = (teacher.feature_dim, width)
        if components and teacher.linear_head:
            shapes[array_name("teacher_head_weight", number)] = (classes, teacher.feature_dim)
            shapes[array_name("teacher_head_bias", number)] = (classes,)
    for number, clip in enumerate(recipe.clips):
        shapes[array_name("clip_projection", number)] = (clip.feature_dim, width)
        shapes[array_name("class_embeddings", number)] = (classes, clip.feature_dim)
        if components:
            shapes[array_name("text_features", number)] = (len(clip.templates), classes, clip.feature_dim)
    for target in targets(recipe, 1):
        shapes |= target.constants
    return shapes


def default_block_rows(recipe: CacheRecipe) -> int:
    """Rows per block: the largest power of two up to 16 384 with which the widest array has chunks of at most 8 MiB.

    At least 64, and otherwise no more than the samples need: chunks are stored and decoded at their full size.
    """
    widest = max(spec.stored.row_bytes for spec in target_arrays(recipe, MAX_BLOCK_ROWS))
    largest = max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, CHUNK_BYTES // widest))
    enough = 1 << (recipe.dataset.num_samples - 1).bit_length()
    return max(MIN_BLOCK_ROWS, min(1 << (largest.bit_length() - 1), enough))


def _widths(recipe: CacheRecipe) -> dict[str, int]:
    """Numbers in a row of each target, by name."""
    classes = len(recipe.dataset.class_names)
    if recipe.store == "logits":
        return {"fused_logits": classes}
    if recipe.store == "fused":
        return {"fused_logits": classes, "fused_features": recipe.fusion.feature_dim}
    teachers, clips = list(enumerate(recipe.teachers)), list(enumerate(recipe.clips))
    widths = {array_name("teacher_features", number): teacher.feature_dim for number, teacher in teachers}
    widths |= {array_name("clip_features", number): clip.feature_dim for number, clip in clips}
    widths |= {array_name("teacher_logits", number): classes for number, teacher in teachers if not teacher.linear_head}
    return widths


def _chunk_rows(row_bytes: int, block_rows: int) -> int:
    """Rows per chunk: the block, halved until a chunk has at most 8 MiB."""
    rows = block_rows
    while rows * row_bytes > CHUNK_BYTES and rows % 2 == 0:
        rows //= 2
    return rows
