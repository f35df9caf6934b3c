"""What a cache is: the recipe that determines its values, its fingerprint, its manifest and its arrays.

`docs/format.md` says the same in prose, enough to write another reader. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from cache_tools.config import Frozen
from cache_tools.errors import FormatError
from cache_tools.images import DatasetRecipe
from cache_tools.views import ViewRecipe

FORMAT_VERSION = 1
MANIFEST_KEY = "teacher_cache"
DTYPES = {"float16": 2, "float32": 4}
CHUNK_BYTES = 8 << 20
MAX_BLOCK_ROWS = 16_384
MIN_BLOCK_ROWS = 64

Store = Literal["fused", "components"]
FloatType = Literal["float16", "float32"]
Precision = Literal["float32", "bfloat16", "float16"]


class DatasetIdentity(Frozen):
    """Which samples, in which order, with which labels. `content_digest` covers keys, labels and class names."""

    name: str
    split: str
    num_samples: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    content_digest: str


class Preprocessing(Frozen):
    """What a network does to the uint8 view canvas: resize (or not), scale to [0, 1], normalise.

    `size` is (height, width) in pixels, None for the canvas as it is. Mean and std are per RGB channel on [0, 1].
    """

    size: tuple[PositiveInt, PositiveInt] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TeacherIdentity(Frozen):
    """The conventional teacher. With `linear_head` logits are features · weightᵀ + bias, both stored."""

    architecture: str
    weights_digest: str
    feature_dim: PositiveInt
    linear_head: bool
    preprocessing: Preprocessing


class ClipIdentity(Frozen):
    """The CLIP model; `logit_scale` is its own exp(log-scale), `templates` have one `{}` each."""

    architecture: str
    config_digest: str
    weights_digest: str
    feature_dim: PositiveInt
    logit_scale: float
    preprocessing: Preprocessing
    templates: tuple[str, ...] = Field(min_length=1)


class FusionRecipe(Frozen):
    """How teacher and CLIP become one target (RichKD, equations for z_F and f_F).

    logits: teacher_weight · teacher + (1 − teacher_weight) · scale · cosine [α]
    features: feature_weight · teacher + (1 − feature_weight) · CLIP, both projected to `feature_dim`, L2-normalised [λ]
    clip_scale: `model` (CLIP's own logit scale), `match` (brought to the teacher's spread) or a number (official: 1.0).
    """

    teacher_weight: float = Field(0.7, ge=0.0, le=1.0)
    feature_weight: float = Field(0.7, ge=0.0, le=1.0)
    clip_scale: Literal["model", "match"] | float = "model"
    feature_dim: PositiveInt = 128
    projection_seed: int = Field(0, ge=0)


class CacheRecipe(Frozen):
    """Everything that determines the cached values; its digest is the fingerprint."""

    dataset: DatasetIdentity
    views: ViewRecipe
    teacher: TeacherIdentity
    clip: ClipIdentity
    fusion: FusionRecipe
    store: Store = "fused"
    dtype: FloatType = "float16"
    precision: Precision = "float32"

    @property
    def fingerprint(self) -> str:
        """64 hex digits of sha256 over the canonical JSON of this recipe and the format version."""
        text = json.dumps(
            {"format_version": FORMAT_VERSION, "recipe": self.model_dump(mode="json")},
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=True,
        )
        return hashlib.sha256(text.encode()).hexdigest()


class Canary(Frozen):
    """Digest of one view's pixels, replayed before training: a drift in image decoding or view code stops the run."""

    view: int
    index: int
    pixel_digest: str


class Manifest(Frozen):
    """Recipe, geometry and provenance; stored as the zarr group's attribute `teacher_cache`."""

    format_version: Literal[1] = 1
    fingerprint: str
    name: str
    recipe: CacheRecipe
    dataset: DatasetRecipe
    num_views: PositiveInt
    block_rows: PositiveInt
    clip_scale: float
    canaries: tuple[Canary, ...] = ()
    build_recipe: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return self.recipe.dataset.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.recipe.dataset.class_names)

    @property
    def num_blocks(self) -> int:
        """Blocks per view; the last one may be short."""
        return -(-self.num_samples // self.block_rows)

    def block(self, number: int) -> slice:
        """Rows of block `number`."""
        return slice(number * self.block_rows, min((number + 1) * self.block_rows, self.num_samples))


class ArraySpec(Frozen):
    """One target array [V, N, width] of the cache, chunked (1, chunk_rows, width)."""

    name: str
    width: PositiveInt
    dtype: FloatType
    chunk_rows: PositiveInt


def target_arrays(recipe: CacheRecipe, block_rows: int) -> tuple[ArraySpec, ...]:
    """The per-(view, sample) arrays of a cache, in the order in which commits list their checksums."""
    classes = len(recipe.dataset.class_names)
    if recipe.store == "fused":
        widths = {"fused_logits": classes, "fused_features": recipe.fusion.feature_dim}
    else:
        widths = {"teacher_features": recipe.teacher.feature_dim, "clip_features": recipe.clip.feature_dim}
        if not recipe.teacher.linear_head:
            widths["teacher_logits"] = classes
    return tuple(
        ArraySpec(
            name=name, width=width, dtype=recipe.dtype, chunk_rows=_chunk_rows(width * DTYPES[recipe.dtype], block_rows)
        )
        for name, width in widths.items()
    )


def constant_shapes(recipe: CacheRecipe) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float32 arrays that hold for all samples and views.

    The projections and class embeddings are in every cache; `store: components` adds what turns features into logits.
    """
    classes = len(recipe.dataset.class_names)
    teacher_dim, clip_dim = recipe.teacher.feature_dim, recipe.clip.feature_dim
    shapes: dict[str, tuple[int, ...]] = {
        "teacher_projection": (teacher_dim, recipe.fusion.feature_dim),
        "clip_projection": (clip_dim, recipe.fusion.feature_dim),
        "class_embeddings": (classes, clip_dim),
    }
    if recipe.store == "components":
        shapes["text_features"] = (len(recipe.clip.templates), classes, clip_dim)
        if recipe.teacher.linear_head:
            shapes |= {"teacher_head_weight": (classes, teacher_dim), "teacher_head_bias": (classes,)}
    return shapes


def default_block_rows(recipe: CacheRecipe) -> int:
    """Rows per block: a power of two whose widest array is one chunk of at most 8 MiB, between 64 and 16 384.

    No more than the next power of two of the number of samples: chunks are stored and decoded at their full size.
    """
    widest = max(spec.width * DTYPES[spec.dtype] for spec in target_arrays(recipe, MAX_BLOCK_ROWS))
    largest = max(MIN_BLOCK_ROWS, min(MAX_BLOCK_ROWS, CHUNK_BYTES // widest))
    enough = 1 << (recipe.dataset.num_samples - 1).bit_length()
    return max(MIN_BLOCK_ROWS, min(1 << (largest.bit_length() - 1), enough))


def manifest_attribute(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is stored: plain JSON with a digest over everything else in it."""
    fields = manifest.model_dump(mode="json")
    return {"digest": _manifest_digest(fields), **fields}


def parse_manifest(attribute: Any, *, where: str) -> Manifest:
    """Read the `teacher_cache` attribute of a group, as `manifest_attribute` made it.

    Raises:
        FormatError: no such attribute, another format version, a wrong digest or fingerprint, missing or wrong fields.
    """
    if not isinstance(attribute, dict):
        raise FormatError(
            "not a teacher cache", where=where, expected=f"a group attribute '{MANIFEST_KEY}'", found="none"
        )
    version = attribute.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            "unknown cache format version",
            where=where,
            expected=FORMAT_VERSION,
            found=version,
            next_step="open it with the teacher-cache version that wrote it, or build it again elsewhere (--out)",
        )
    fields = {key: value for key, value in attribute.items() if key != "digest"}
    if attribute.get("digest") != _manifest_digest(fields):
        raise FormatError(
            "damaged manifest: it is not what its digest says",
            where=where,
            next_step="restore zarr.json from a copy, or remove the cache and build it again",
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"damaged manifest, field '{key}'", where=where, expected=first["msg"], found=repr(first.get("input"))[:80]
        ) from error
    if manifest.fingerprint != manifest.recipe.fingerprint:
        raise FormatError(
            "manifest and fingerprint disagree",
            where=where,
            expected=manifest.recipe.fingerprint[:12],
            found=manifest.fingerprint[:12],
        )
    return manifest


def _manifest_digest(fields: dict[str, Any]) -> str:
    """32 hex digits of blake2b over the canonical JSON; the fingerprint covers the recipe only."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _chunk_rows(row_bytes: int, block_rows: int) -> int:
    """Largest divisor of the block, by halving, whose chunk stays within 8 MiB."""
    rows = block_rows
    while rows * row_bytes > CHUNK_BYTES and rows % 2 == 0:
        rows //= 2
    return rows
