"""The recipe, everything that determines the values of a cache, and its digest, the fingerprint."""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from cache_tools.codecs import Companded, SparseCodec
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.config import Extensible, Frozen
from cache_tools.config.fields import Number, Seed, Share, Width
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.images.recipe import DatasetIdentity, DatasetRecipe
from cache_tools.views.recipe import ViewRecipe

FORMAT_VERSION: Literal[2] = 2
# Raise these when the values that cache_tools/preprocess.py or cache_tools/fusion.py compute change; see
# pipeline/build/known.py. They are defined here because those modules import torch.
PREPROCESSING_VERSION = 1
FUSION_VERSION = 1

Store = Literal["fused", "components", "logits"]
Precision = Literal["float32", "bfloat16", "float16"]
PromptEnsemble = Literal["embedding", "logits", "probabilities"]


class Finite(Frozen):
    """A model without NaN and infinity, which Python's JSON would accept."""

    model_config = ConfigDict(allow_inf_nan=False)


class Preprocessing(Finite, Extensible):
    """How a network turns the uint8 view canvas into its input: resize, crop, scale to [0, 1], normalise.

    `size` is (height, width) in pixels; None keeps the canvas. `crop` is the part of the resized canvas that the centre
    crop of this size keeps; 1 keeps the whole shorter side. Mean and std are per RGB channel, on [0, 1].
    """

    added: ClassVar[frozenset[str]] = frozenset({"crop"})

    size: tuple[PositiveInt, PositiveInt] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    crop: float = Field(1.0, gt=0.0, le=1.0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TeacherIdentity(Extensible, Finite):
    """A conventional teacher. With `linear_head`, logits are features · weightᵀ + bias; weight and bias are stored.

    The field `weight` is its share of the teachers' logits and features; the shares of all teachers sum to 1.
    `outputs` has the teacher's own output for each class of the dataset; None if its outputs are these classes.
    """

    added = frozenset({"outputs"})

    architecture: str
    weights_digest: str
    feature_dim: PositiveInt
    linear_head: bool
    preprocessing: Preprocessing
    weight: Share = 1.0
    outputs: tuple[NonNegativeInt, ...] | None = None


class ClipIdentity(Finite):
    """A CLIP model with its prompts: each template (with one `{}`) filled with each class name.

    `class_names` are spelled as in the prompts. `logit_scale` is the model's exp(log-scale). `weight` is its share of
    the CLIPs, as for teachers.
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
    """How teachers and CLIPs are fused into one target (RichKD, equations for z_F and f_F).

    logits: teacher_weight · teachers + (1 − teacher_weight) · CLIPs, the cosines of each CLIP times its scale [α]
    features: feature_weight · teachers + (1 − feature_weight) · CLIPs, projected to `feature_dim`, L2-normalised [λ]
    clip_scale: `model` (each CLIP's own logit scale), `match` (each brought to the spread of the teachers' mixed
        logits) or a number above 0 (official: 1.0). `match` uses cosines with the class embeddings for every
        `prompt_ensemble`.
    prompt_ensemble: what is averaged over the prompt templates: `embedding` (the text embeddings, as in the paper's
        code), `logits`, or `probabilities`.
    projection_seed: the projection of teacher i, from 0, has seed projection_seed + 2i, that of CLIP i the seed after.

    Without CLIPs both weights are 1, without teachers both are 0 (`for_groups`).
    """

    teacher_weight: Share = 0.7
    feature_weight: Share = 0.7
    clip_scale: Literal["model", "match"] | Number = "model"
    prompt_ensemble: PromptEnsemble = "embedding"
    feature_dim: Width = 128
    projection_seed: Seed = 0

    def for_groups(self, *, teachers: bool, clips: bool) -> FusionRecipe:
        """This fusion with the whole weight on the only group, if teachers or CLIPs are missing."""
        if teachers and clips:
            return self
        weight = 1.0 if teachers else 0.0
        return self.model_copy(update={"teacher_weight": weight, "feature_weight": weight})


class Imported(Finite):
    """Targets that other tools computed (`cache-tools import`).

    Attributes:
        kind: of the files, as `cache-tools import` names it.
        digest: of everything in the files that determines the targets.
        averaged: the views of another tool whose mean is the target of view 0; None if nothing was averaged.
    """

    kind: Literal["logits", "tinyvit", "ml-dr"]
    digest: str
    averaged: PositiveInt | None = None


class CacheRecipe(Extensible):
    """Everything that determines the cached values; its digest is the fingerprint.

    A cache may have teachers without a CLIP, or CLIPs without a teacher; the fusion then gives that group all the
    weight.
    `derived_from` is the fingerprint of the cache that this one was recoded or fused from without its teachers; None
    for a cache built with teachers.
    `imported` says where the targets come from if no network ran for this cache. It then has one teacher of which only
    the name is known, and `store: logits`: fused logits, and no features.
    """

    added: ClassVar[frozenset[str]] = frozenset({"imported"})

    dataset: DatasetIdentity
    views: ViewRecipe
    teachers: tuple[TeacherIdentity, ...]
    clips: tuple[ClipIdentity, ...]
    fusion: FusionRecipe
    store: Store = "fused"
    codecs: TargetCodecs = Field(default_factory=TargetCodecs)
    precision: Precision = "float32"
    derived_from: str | None = None
    imported: Imported | None = None

    @model_validator(mode="after")
    def _views_are_of_the_samples(self) -> CacheRecipe:
        self.__dict__["views"] = self.views.over(self.dataset.num_samples)  # frozen, but not yet in use
        return self

    @model_validator(mode="after")
    def _weights_fit_the_groups(self) -> CacheRecipe:
        if not self.teachers and not self.clips:
            raise ValueError("a cache needs a teacher or a CLIP")
        if self.fusion != self.fusion.for_groups(teachers=bool(self.teachers), clips=bool(self.clips)):
            group, weight = ("teachers", 1) if self.teachers else ("CLIPs", 0)
            raise ValueError(f"a cache with {group} alone has teacher_weight and feature_weight {weight}")
        return self

    @model_validator(mode="after")
    def _several_labels_need_whole_logits(self) -> CacheRecipe:
        check_codec(self.codecs, multi_label=self.dataset.multi_label)
        return self

    @model_validator(mode="after")
    def _imported_targets_are_logits(self) -> CacheRecipe:
        if (self.imported is None) != (self.store != "logits"):
            raise ValueError("store: logits is for imported targets, and they have no other")
        if self.imported is not None and (len(self.teachers) != 1 or self.clips):
            raise ValueError("imported targets have one teacher and no CLIP")
        if self.imported is None and self.views.made_by is not None:
            raise ValueError("only imported targets have views of another tool")
        return self

    @property
    def teacher(self) -> TeacherIdentity:
        """The first teacher, usually the only one; NotFoundError without one."""
        if not self.teachers:
            raise NotFoundError("this cache has no teacher", expected="CLIPs alone: see `clips`")
        return self.teachers[0]

    @property
    def clip(self) -> ClipIdentity:
        """The first CLIP; NotFoundError without one."""
        if not self.clips:
            raise NotFoundError("this cache has no CLIP", expected="teachers alone: see `teachers`")
        return self.clips[0]

    @property
    def only_group(self) -> Literal["teacher", "clip"] | None:
        """The group that the targets come from, if teachers or CLIPs are missing; None for a fusion of both."""
        if self.teachers and self.clips:
            return None
        return "teacher" if self.teachers else "clip"

    @property
    def teacher_weights(self) -> tuple[float, ...]:
        return tuple(teacher.weight for teacher in self.teachers)

    @property
    def clip_weights(self) -> tuple[float, ...]:
        return tuple(clip.weight for clip in self.clips)

    @property
    def made_by(self) -> str:
        """The command that makes such a cache and continues it, for messages."""
        if self.derived_from is not None:
            return "recode or fuse"
        return "build-cache" if self.imported is None else "cache-tools import"

    @property
    def has_features(self) -> bool:
        """Whether the cache has fused features, or those of its networks."""
        return self.store != "logits"

    @property
    def fingerprint(self) -> str:
        """64 hex digits of sha256 over the canonical JSON of this recipe and the format version."""
        return recipe_fingerprint(self.model_dump(mode="json"))


def with_canvas(dataset: DatasetRecipe, views: ViewRecipe) -> DatasetRecipe:
    """Image files without a size of their own, on the canvas from which test images of these views are cut."""
    if not dataset.has_image_files or dataset.image_size is not None or views.canvas_side is None:
        return dataset
    return dataset.model_copy(update={"image_size": views.canvas_side})


def check_codec(codecs: TargetCodecs, *, multi_label: bool) -> None:
    """Raise RecipeError if a codec drops what a sigmoid sees of the logits: the shift of a row, or small logits."""
    if multi_label and isinstance(codecs.logits, Companded | SparseCodec):
        raise RecipeError(
            "this codec keeps only what a softmax sees of the logits, not their level",
            where=f"codec {codecs.logits.codec}",
            expected="float16, float32, fixed-step or row-step, for images with any number of labels",
            next_step="--codec float16",
        )


def recipe_fingerprint(recipe: Any) -> str:
    """`CacheRecipe.fingerprint` of a recipe as plain JSON."""
    return hashlib.sha256(canonical_json({"format_version": FORMAT_VERSION, "recipe": recipe})).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The JSON that digests are computed from: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
