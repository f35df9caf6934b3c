"""The recipe of `build-cache`: one frozen model per cache, from a built-in name or a YAML file."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from cache_tools.codecs.presets import PresetName, TargetCodecs, resolve_codecs
from cache_tools.config import (
    FIELDS,
    NAME,
    ONE,
    SEVERAL,
    Extensible,
    Frozen,
    builtin_names,
    given_settings,
    load_recipe,
    name_or_fields,
    one_or_several,
    set_dotted,
    typed_settings,
    validate,
)
from cache_tools.config.fields import Count, CountOrAuto, CountOrZero, Name, Number, Positive, Share, ViewCount
from cache_tools.errors import RecipeError
from cache_tools.format.recipe import FusionRecipe, Precision, check_codec, with_canvas
from cache_tools.images.class_names import IMAGENETS, ORDERS, read_names
from cache_tools.images.own_folder import is_folder_argument, read_own_folder, refuse_second_folder
from cache_tools.images.recipe import DatasetRecipe, check_location
from cache_tools.places import is_url
from cache_tools.places.leases import LEASE_S
from cache_tools.refusion import check_clip_scale, check_groups, check_shares
from cache_tools.views.ops import MAX_SIDE
from cache_tools.views.recipe import ViewRecipe
from train.recipe.evaluation import EvaluationRecipe
from train.recipe.loading import OPTION_NAMES

OutputNames = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
    BeforeValidator(partial(read_names, where="teacher.classes", orders=(*ORDERS, *IMAGENETS))),
]


MAX_VIEWS_AT_ONCE = 16


class TeacherSpec(Extensible):
    """A conventional teacher and its weights.

    Attributes:
        name: a CIFAR-zoo name (`resnet32x4`), `timm:NAME`, `torchvision:NAME`, `package.module:function` for a network
            of one's own, or what names its own architecture: a run folder or `.safetensors` file of `train-student`, or
            `local-dir:FOLDER` with the `config.json` of timm or export-student.
        weights: a checkpoint file, a folder with one, `package:FILE` (shipped), or a pretrained tag of timm or
            torchvision.
        weights_key: where the weights are in a checkpoint that holds several, dotted: `state_dict`, `ema.module`.
        classes: the names of its outputs in order, if these are not the dataset's classes in their order. A list; a
            file with one name per line (read when the recipe is loaded); `sorted`, `natural`, `case-blind` or
            `reversed` for the dataset's classes in that order; or `imagenet-1k`, `imagenet-12k`, `imagenet-22k`. It may
            have more classes than the dataset.
        size, interpolation, mean, std: override the preprocessing of the library or checkpoint.
        weight: its share among several teachers; equal shares by default.
    """

    added = frozenset({"weights_key", "classes"})

    name: str
    weights: str | None = None
    weights_key: str | None = None
    classes: OutputNames | None = None
    size: Annotated[Count, Field(le=MAX_SIDE)] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    mean: tuple[Number, Number, Number] | None = None
    std: tuple[Number, Number, Number] | None = None
    weight: Share | None = None


Templates = Annotated[
    Annotated[str, Tag(ONE)] | Annotated[tuple[str, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
]


class ClipSpec(Frozen):
    """An open_clip model and its prompts.

    Attributes:
        name: an open_clip model name, `hf-hub:ORG/MODEL` or `local-dir:FOLDER` (`local-dir:package:FOLDER` is shipped).
        weights: a pretrained tag of open_clip or a checkpoint file; only with a plain model name.
        templates: `richkd` (the 12 of the paper's code), `openai` (80), `siglip` (1), a file with one per line, or a
            list.
        class_names: words for the prompts that replace the dataset's class names, in the same order. A file with one
            per line is read when the recipe is loaded.
        weight: its share among several CLIPs; equal shares by default.
    """

    name: str
    weights: str | None = None
    templates: Templates = "richkd"
    class_names: Annotated[tuple[str, ...] | None, BeforeValidator(partial(read_names, where="clip.class_names"))] = (
        None
    )
    weight: Share | None = None


def is_none(name: Any) -> bool:
    """Whether a name means no network: `--clip none`, and `clip: none`, which YAML reads as text."""
    return isinstance(name, str) and name.lower() == "none"


def _none_as_null(value: Any) -> Any:
    return None if is_none(value) else value


Teachers = Annotated[
    Annotated[TeacherSpec | None, Tag(ONE)] | Annotated[tuple[TeacherSpec, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
    BeforeValidator(_none_as_null),
]
Clips = Annotated[
    Annotated[ClipSpec | None, Tag(ONE)] | Annotated[tuple[ClipSpec, ...], Field(min_length=1), Tag(SEVERAL)],
    Discriminator(one_or_several),
    BeforeValidator(_none_as_null),
]


def _folder_or_url(value: Any) -> Any:
    """Turn a string that is not a URL into a path."""
    if not isinstance(value, str):
        return value
    return value if is_url(value) and not value.startswith("file://") else Path(value.removeprefix("file://"))


CodecChoice = Annotated[
    Annotated[PresetName, Tag(NAME)] | Annotated[TargetCodecs, Tag(FIELDS)], Discriminator(name_or_fields)
]


class BuildRecipe(Extensible):
    """One cache: its images, their views, the networks, their fusion, and how targets are stored.

    `teacher` and `clip` are one network, a list of them, or None; one of the two may be missing. `teachers` and `clips`
    are always tuples. Without a CLIP the weights in `fusion` become 1, without a teacher 0.
    `codec` is a preset (`cache_tools.codecs.presets.resolve_codecs`), or a codec for the logits and one for the
    features.
    `batch_size`, `compile`, `block_rows`, `views_at_once`, `max_minutes`, `device` and `out` (a folder, or the URL of
    an object store) determine how and where the work is done. `batch_size: auto` is that with which the cache was
    begun; for a new one it is the largest that fits into the memory of a CUDA device, and 256 on any other
    (`pipeline/build/batch_size.py`). `compile` is `off`, `model` (all networks are compiled by torch.compile) or
    `auto`: as the cache was begun, and off for a new one. With `keep_views` at most so many views are in the cache at
    a time; a student that follows the build and does not renew its lease is waited for `lease_minutes`. `evaluation` is
    the transform of test images for the preflight, and for `train-student` if it is given this recipe: the networks see
    the part of each image that it takes, at their own sizes. All other fields determine the values.
    """

    added = frozenset({"evaluation", "views_at_once", "max_minutes", "keep_views", "lease_minutes", "compile"})

    name: Name
    dataset: DatasetRecipe
    views: ViewRecipe = ViewRecipe()
    num_views: ViewCount = 8
    teacher: Teachers = None
    clip: Clips = None
    fusion: FusionRecipe = FusionRecipe()
    store: Literal["fused", "components"] = "fused"
    codec: CodecChoice = "float16"
    precision: Precision = "float32"
    batch_size: CountOrAuto = 256
    compile: Literal["auto", "off", "model"] = "auto"
    block_rows: Count | None = None
    views_at_once: Annotated[Count, Field(le=MAX_VIEWS_AT_ONCE)] | None = None
    max_minutes: Positive | None = None
    keep_views: ViewCount | None = None
    lease_minutes: Positive = LEASE_S / 60.0
    preflight_samples: CountOrZero = 2000
    evaluation: EvaluationRecipe = EvaluationRecipe()
    device: str = "auto"
    out: Annotated[Path | str | None, BeforeValidator(_folder_or_url)] = None

    @model_validator(mode="after")
    def _canvas_follows_the_views(self) -> BuildRecipe:
        self.__dict__["dataset"] = with_canvas(self.dataset, self.views)  # the model is frozen, but not yet in use
        return self

    @model_validator(mode="after")
    def _networks_can_be_fused(self) -> BuildRecipe:
        if not self.teachers and not self.clips:
            raise RecipeError(
                "a recipe needs a teacher, a CLIP or both",
                where=self.name,
                next_step="add `teacher: {name: …}`, or give --teacher",
            )
        if self.dataset.labels is not None:
            self._check_several_labels()
        shares(self.teachers, where="teacher")
        shares(self.clips, where="clip")
        check_clip_scale(self.fusion.clip_scale, where="fusion.clip_scale")
        groups = {"teachers": bool(self.teachers), "clips": bool(self.clips)}
        check_groups(_chosen(self.fusion), **groups, who="the recipe")
        self.__dict__["fusion"] = self.fusion.for_groups(**groups)  # the model is frozen, but not yet in use
        return self

    @model_validator(mode="after")
    def _old_views_can_be_dropped(self) -> BuildRecipe:
        if self.keep_views is not None and self.views_at_once is not None and self.views_at_once > self.keep_views:
            raise RecipeError(
                "more views are built together than are kept",
                where="views_at_once",
                expected=f"at most {self.keep_views} (keep_views)",
                found=self.views_at_once,
                next_step="choose fewer, or leave it out",
            )
        if self.keep_views is None and self.lease_minutes != LEASE_S / 60.0:
            raise RecipeError(
                "students that follow a build are waited for where old views are dropped behind them",
                where=f"lease_minutes: {self.lease_minutes:g}",
                next_step="give --keep-views, or leave it out",
            )
        return self

    def _check_several_labels(self) -> None:
        """Images with any number of labels need logits that a sigmoid can read, stored with their level."""
        if self.clips:
            raise RecipeError(
                "CLIP cannot teach images with any number of labels: its cosines rank the classes of an image, but "
                "have no level above which a class is in it",
                where="clip",
                found="dataset.labels",
                next_step="leave CLIP out: --clip none, or `clip: null`",
            )
        if self.views.mix is not None:
            raise RecipeError(
                "views cannot mix images with any number of labels",
                where="views.mix",
                found="dataset.labels",
                next_step="leave views.mix out",
            )
        check_codec(resolve_codecs(self.codec, 2), multi_label=True)

    @property
    def teachers(self) -> tuple[TeacherSpec, ...]:
        return listed(self.teacher)

    @property
    def clips(self) -> tuple[ClipSpec, ...]:
        return listed(self.clip)


Spec = TypeVar("Spec", TeacherSpec, ClipSpec)


def listed(specs: Spec | Sequence[Spec] | None) -> tuple[Spec, ...]:
    """The networks of a group as a tuple, which may be empty."""
    if specs is None:
        return ()
    return (specs,) if isinstance(specs, TeacherSpec | ClipSpec) else tuple(specs)


def _chosen(fusion: FusionRecipe) -> dict[str, Any]:
    """The settings that the user has made. Names that equal the default are left out: stored recipes have them all."""
    fields = FusionRecipe.model_fields
    return {
        name: value
        for name in fusion.model_fields_set
        if not isinstance(value := getattr(fusion, name), str) or value != fields[name].default
    }


def shares(specs: Sequence[TeacherSpec] | Sequence[ClipSpec], *, where: str) -> tuple[float, ...]:
    """The weight of each network in its group: as given, or equal.

    Raises:
        RecipeError: only some networks have a weight, or the weights do not sum to 1.
    """
    weights = [spec.weight for spec in specs if spec.weight is not None]
    if not weights:
        return tuple(1.0 / len(specs) for _ in specs)
    if len(weights) < len(specs):
        raise RecipeError(
            "some networks of a group have a weight and some have none",
            where=where,
            expected="a weight for every network, or for none (equal shares)",
            found=", ".join(f"{spec.name}: {spec.weight}" for spec in specs),
        )
    check_shares(weights, where=f"{where} weights")
    return tuple(weights)


def builtin_recipes() -> Traversable:
    """The folder of built-in build recipes."""
    return files("pipeline") / "recipes"


def load_build_recipe(
    source: str | None, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> BuildRecipe:
    """Load a recipe and apply options to it; see `cache_tools.config.load_recipe`.

    Args:
        source: a built-in name, a YAML file, a folder of images, or None for an empty recipe.

    Raises:
        RecipeError: as `load_recipe`; a place for a dataset that has none.
    """
    if source is None or not is_folder_argument(source, builtin_names(builtin_recipes())):
        recipe = load_recipe(BuildRecipe, source, builtin_recipes(), overrides, options, OPTION_NAMES)
    else:
        overrides = list(overrides)
        settings = given_settings(overrides, options)
        refuse_second_folder(source, (key for key, _ in settings))
        data = _folder_recipe(source, settings)
        for key, value in settings:
            set_dotted(data, key, value)
        if not data.get("teacher") and not data.get("clip"):
            raise RecipeError(
                "a cache of this folder needs a teacher, a CLIP or both",
                where=source,
                next_step=f"train a teacher with train-student {shlex.quote(source)} --loss ce --out runs/teacher, and "
                "give it here: --teacher runs/teacher",
            )
        recipe = validate(BuildRecipe, data, where=source, typed=typed_settings(overrides, options, OPTION_NAMES))
    check_location(recipe.dataset.name, recipe.dataset.data_dir, recipe.dataset.download)
    return recipe


def _folder_recipe(source: str, settings: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The recipe of a folder of images as plain data, without a teacher or CLIP."""
    folder = read_own_folder(Path(source), settings)
    return {"name": folder.name, "dataset": folder.dataset, "views": folder.views}
