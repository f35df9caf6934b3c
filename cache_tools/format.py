"""What a cache is: the recipe that determines its values, its fingerprint and its manifest.

`docs/format.md` says the same in prose, enough to write another reader; `arrays.py` says which arrays there are.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, ValidationError, model_validator

from cache_tools.config import Frozen
from cache_tools.errors import FormatError
from cache_tools.format_history import OLDER_VERSIONS, modernised
from cache_tools.images import DatasetRecipe
from cache_tools.limits import check_json, check_limits
from cache_tools.target_codecs import TargetCodecs
from cache_tools.views import ViewRecipe

FORMAT_VERSION: Literal[2] = 2
MANIFEST_KEY = "teacher_cache"

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Store = Literal["fused", "components"]
Precision = Literal["float32", "bfloat16", "float16"]
PromptEnsemble = Literal["embedding", "logits", "probabilities"]


class Finite(Frozen):
    """A value whose numbers are numbers: JSON as Python reads it knows NaN and Infinity."""

    model_config = ConfigDict(allow_inf_nan=False)


class DatasetIdentity(Frozen):
    """Which samples, in which order, with which labels. `content_digest` covers keys, labels and class names."""

    name: str
    split: str
    num_samples: PositiveInt
    image_size: tuple[PositiveInt, PositiveInt]
    class_names: tuple[str, ...]
    content_digest: str


class Preprocessing(Finite):
    """What a network does to the uint8 view canvas: resize (or not), scale to [0, 1], normalise.

    `size` is (height, width) in pixels, None for the canvas as it is. Mean and std are per RGB channel on [0, 1].
    """

    size: tuple[PositiveInt, PositiveInt] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TeacherIdentity(Finite):
    """A conventional teacher. With `linear_head` logits are features · weightᵀ + bias, both stored.

    `weight` is its share of the teachers' logits and features; the shares of all teachers sum to 1.
    """

    architecture: str
    weights_digest: str
    feature_dim: PositiveInt
    linear_head: bool
    preprocessing: Preprocessing
    weight: Share = 1.0


class ClipIdentity(Finite):
    """A CLIP model with its prompts: every template (one `{}` each) with every class name, as they were rendered.

    `logit_scale` is its own exp(log-scale); `weight` its share among all CLIPs, as for teachers.
    """

    architecture: str
    config_digest: str
    weights_digest: str
    feature_dim: PositiveInt
    logit_scale: float
    preprocessing: Preprocessing
    templates: tuple[str, ...] = Field(min_length=1)
    class_names: tuple[str, ...] = Field(min_length=1)
    weight: Share = 1.0


class FusionRecipe(Finite):
    """How teachers and CLIPs become one target (RichKD, equations for z_F and f_F).

    logits: teacher_weight · teachers + (1 − teacher_weight) · CLIPs, the cosines of each CLIP times its scale [α]
    features: feature_weight · teachers + (1 − feature_weight) · CLIPs, projected to `feature_dim`, L2-normalised [λ]
    clip_scale: `model` (each CLIP's own logit scale), `match` (each brought to the spread of the teachers' mixed
        logits) or a number (official: 1.0). Cosines are those of the embedding ensemble, whatever `prompt_ensemble` is.
    prompt_ensemble: what is averaged over the prompt templates: `embedding` (the text embeddings, as in the paper's
        code), `logits`, or `probabilities`.
    projection_seed: teacher i, from 0, is projected with seed projection_seed + 2i, CLIP i with that seed + 1.
    """

    teacher_weight: Share = 0.7
    feature_weight: Share = 0.7
    clip_scale: Literal["model", "match"] | float = "model"
    prompt_ensemble: PromptEnsemble = "embedding"
    feature_dim: PositiveInt = 128
    projection_seed: int = Field(0, ge=0, lt=1 << 63)


class CacheRecipe(Frozen):
    """Everything that determines the cached values; its digest is the fingerprint.

    `derived_from` is the fingerprint of the cache that this one was converted or fused from, without a teacher pass;
    None for one that teachers filled.
    """

    dataset: DatasetIdentity
    views: ViewRecipe
    teachers: tuple[TeacherIdentity, ...] = Field(min_length=1)
    clips: tuple[ClipIdentity, ...] = Field(min_length=1)
    fusion: FusionRecipe
    store: Store = "fused"
    codecs: TargetCodecs = TargetCodecs()
    precision: Precision = "float32"
    derived_from: str | None = None

    @property
    def teacher(self) -> TeacherIdentity:
        """The first teacher; mostly there is no other."""
        return self.teachers[0]

    @property
    def clip(self) -> ClipIdentity:
        """The first CLIP."""
        return self.clips[0]

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        return tuple(teacher.weight for teacher in self.teachers)

    @property
    def clip_weights(self) -> tuple[float, ...]:
        return tuple(clip.weight for clip in self.clips)

    @property
    def made_by(self) -> str:
        """The command that makes such a cache and goes on with it, for messages."""
        return "build-cache" if self.derived_from is None else "recode or fuse"

    @property
    def fingerprint(self) -> str:
        """64 hex digits of sha256 over the canonical JSON of this recipe and the format version."""
        return recipe_fingerprint(FORMAT_VERSION, self.model_dump(mode="json"))


class Canary(Frozen):
    """Digest of one view's pixels, replayed before training: a drift in image decoding or view code stops the run."""

    view: int
    index: int
    pixel_digest: str


class Manifest(Finite):
    """Recipe, geometry and provenance; stored as the zarr group's attribute `teacher_cache`.

    `constants_digest` covers the arrays that hold for all samples and views. Computed on another machine they may
    differ in their last bits: blocks of caches whose constants differ must not be mixed. Empty in older caches.
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    fingerprint: str
    name: str
    recipe: CacheRecipe
    dataset: DatasetRecipe
    num_views: PositiveInt
    block_rows: PositiveInt
    clip_scales: tuple[float, ...]
    constants_digest: str = ""
    canaries: tuple[Canary, ...] = ()
    build_recipe: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_scale_per_clip(self) -> Manifest:
        if len(self.clip_scales) != len(self.recipe.clips):
            raise ValueError(f"{len(self.recipe.clips)} CLIPs have {len(self.clip_scales)} scales")
        return self

    @property
    def clip_scale(self) -> float:
        """What the cosines of the first CLIP are multiplied with."""
        return self.clip_scales[0]

    @property
    def preflight(self) -> dict[str, Any] | None:
        """Accuracies that the build measured first, if it did."""
        found = self.provenance.get("preflight")
        return found if isinstance(found, dict) else None

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
    check_json(attribute, where=where)
    version = attribute.get("format_version")
    if version not in (FORMAT_VERSION, *OLDER_VERSIONS):
        raise FormatError(
            "unknown cache format version",
            where=where,
            expected=f"{FORMAT_VERSION}, or {' or '.join(map(str, OLDER_VERSIONS))} (read-only)",
            found=repr(version)[:40],
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
        expected = recipe_fingerprint(version, fields.get("recipe"))
        manifest = Manifest.model_validate(modernised(fields) if version in OLDER_VERSIONS else fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FormatError(
            f"damaged manifest, field '{key}'", where=where, expected=first["msg"], found=repr(first.get("input"))[:80]
        ) from error
    if manifest.fingerprint != expected:
        raise FormatError(
            "manifest and fingerprint disagree", where=where, expected=expected[:12], found=manifest.fingerprint[:12]
        )
    check_limits(manifest, where=where)
    return manifest


def recipe_fingerprint(format_version: int, recipe: Any) -> str:
    """`CacheRecipe.fingerprint` from a recipe as plain JSON: 64 hex digits of sha256."""
    return hashlib.sha256(_canonical({"format_version": format_version, "recipe": recipe})).hexdigest()


def _manifest_digest(fields: dict[str, Any]) -> str:
    """32 hex digits of blake2b over the canonical JSON; the fingerprint covers the recipe only."""
    return hashlib.blake2b(_canonical(fields), digest_size=16).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
