"""Training recipes: all the settings of a run of `train-student`. Importable without torch."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from cache_tools.config import (
    CHANGES,
    FIELDS,
    Changes,
    Extensible,
    Frozen,
    builtin_names,
    given_settings,
    parse_yaml,
    set_dotted,
    validate,
)
from cache_tools.errors import CacheError, MismatchError, RecipeError
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import Precision
from cache_tools.images.own_folder import is_folder_argument, refuse_second_folder
from cache_tools.images.recipe import FREE_KEYS, DatasetRecipe, changed_dataset, check_location
from cache_tools.refusion import FusionChoice
from cache_tools.views.recipe import ViewRecipe
from train.sources import TrainSource, read_train_source
from train.unused import dotted_keys, refuse_unused
from train.weights.names import files_digest, is_path

# The settings of `--loss NAME`, from the paper or the reference implementation of each method.
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"kind": "ce"},
    "kd": {"kind": "kd"},
    "dkd": {"kind": "dkd", "distill_weight": 1.0, "temperature": 4.0},
    "standardised_kd": {"kind": "standardised_kd", "ce_weight": 0.1, "distill_weight": 9.0, "temperature": 2.0},
    "crd": {"kind": "ce", "feature": "crd"},
    "richkd-l": {"kind": "kd"},
    "richkd-f": {"kind": "ce", "feature": "crd"},
    "richkd": {"kind": "kd", "feature": "crd"},
    "bce": {"kind": "bce", "distill_weight": 1.0, "temperature": 1.0},
    "bce-labels": {"kind": "bce", "distill_weight": 0.0},
}
# Names of losses without targets.
LABELS_ALONE = ("ce", "bce-labels")

DEFAULT_RECIPE = "digits"
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
_NO_EFFECT_ON_RESULT = {
    *("name", "data_dir", "download", "compare_with_labels", "loggers", "device", "out"),
    "checkpoint_every_minutes",
}
# Short names in `--grid` and `--set`, the same as the options of `train-student`.
SETTING_ALIASES = {
    "lr": "optimiser.learning_rate",
    "temperature": "loss.temperature",
    "weight_decay": "optimiser.weight_decay",
    "label_smoothing": "loss.label_smoothing",
    "class_weights": "loss.class_weights",
    "clip_grad_norm": "optimiser.clip_grad_norm",
    "accumulate": "optimiser.accumulate",
    "student.weights": "student_weights",
    "student.weights_key": "student_weights_key",
}
# Settings of the CE term, which a run on labels alone shares with a run with targets.
CE_SETTINGS = ("label_smoothing", "class_weights")

# The names of mdistiller's networks, in its order.
ZOO_NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "ResNet18", "ResNet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19",
    "MobileNetV2", "ShuffleV1", "ShuffleV2",
)  # fmt: skip
STUDENT_ALIASES = {"ShuffleNetV1": "ShuffleV1", "ShuffleNetV2": "ShuffleV2"}
_CANONICAL_NAMES = {name.lower(): name for name in ZOO_NAMES} | {
    alias.lower(): name for alias, name in STUDENT_ALIASES.items()
}


def canonical_student_name(name: str) -> str:
    """A student's name in its published spelling; an unknown name is returned unchanged.

    Case matters only in timm's own names.
    """
    source, separator, rest = name.partition(":")
    if not separator:
        return _CANONICAL_NAMES.get(name.lower(), name)
    if source.lower() == "torchvision":
        return f"torchvision:{rest.lower()}"
    return f"timm:{rest}" if source.lower() == "timm" else name


def _class_weights(value: Any) -> str | tuple[float, ...] | dict[str, float]:
    """Class weights from a recipe or an option: `none`, `balanced`, a list, a mapping, or a file of weights.

    The weights in a file become part of the recipe, so that a change of the file is a change of the run.
    """
    if value is None or value in ("none", "balanced"):
        return value or "none"
    where: object = "loss.class_weights"
    if isinstance(value, str) and (numbers := _numbers(value.split(","))) is not None:
        value = numbers
    elif isinstance(value, str):
        where = Path(value).expanduser()
        value = _weights_in_file(where)
    # YAML reads some class names as numbers.
    named = {str(key): weight for key, weight in value.items()} if isinstance(value, dict) else None
    weights = _numbers(value if named is None else named.values()) if isinstance(value, list | tuple | dict) else None
    if not weights or not all(0.0 <= weight < math.inf for weight in weights):
        expected = "none, balanced, a weight of 0 or more for each class, or a file of such weights"
        raise RecipeError("bad class weights", where=where, expected=expected, found=repr(value)[:80])
    return tuple(weights) if named is None else dict(zip(named, weights, strict=True))


def _weights_in_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        expected = "none, balanced, numbers with commas, or a file of weights (YAML, JSON or plain numbers)"
        raise RecipeError("cannot read class weights", where=path, expected=expected, found=found) from error
    return _numbers(text.split()) or parse_yaml(text, "cannot read class weights", where=path)


def _numbers(values: Iterable[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None


ClassWeights = Annotated[str | tuple[float, ...] | dict[str, float], BeforeValidator(_class_weights)]


class LossRecipe(Extensible):
    """ce_weight · CE + distill_weight · logit term + feature_weight · feature term.

    For images with several labels (`bce`) CE is the binary cross entropy of every class. The defaults are RichKD's
    [CE 1, w_L = 3, T = 3, w_F = 0.8] with the feature term off; `feature: crd` turns it on.

    Attributes:
        kind: the logit term; `ce` for none. `bce`, the sigmoid KD, is for images with several labels, and no other is.
        temperature: T of the logit term.
        dkd_alpha, dkd_beta: weights of DKD's two parts; the reference's beta depends on the pair of networks.
        warmup_epochs: the logit term's weight rises linearly to its full value in this many epochs (20 in the
            reference's DKD), 0 for none.
        feature: the feature term. `mse` and `cosine` learn a linear projector where the widths differ; `crd` learns
            an embedding for the student's features and one for each target's.
        feature_source: what `crd` embeds: `components`, the teacher's and CLIP's own features, mixed behind learned
            embeddings as in the paper; `fused`, the cache's fused features, mixed behind fixed projections; `auto`, the
            components if the cache has them. The other terms compare with the fused features.
        crd_negatives: per sample, from other classes; at most as many as the dataset has.
        crd_dim: width of the embeddings.
        label_smoothing: ε of the CE term: the labelled class has probability 1 − ε + ε/C and each other ε/C.
        class_weights: of the CE term: `none`, `balanced` (N / (C · n_c), for n_c labelled images of the class), or a
            weight per class: a list in class order or a mapping of names, as such or in a file.
    """

    added: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "class_weights"})

    ce_weight: NonNegativeFloat = 1.0
    kind: Literal["ce", "kd", "dkd", "standardised_kd", "standardised_dkd", "bce"] = "kd"
    distill_weight: NonNegativeFloat = 3.0
    temperature: PositiveFloat = 3.0
    dkd_alpha: NonNegativeFloat = 1.0
    dkd_beta: NonNegativeFloat = 8.0
    warmup_epochs: NonNegativeInt = 0
    feature: Literal["none", "mse", "cosine", "rkd", "pkt", "crd"] = "none"
    feature_weight: NonNegativeFloat = 0.8
    feature_source: Literal["auto", "fused", "components"] = "auto"
    rkd_distance_weight: NonNegativeFloat = 25.0
    rkd_angle_weight: NonNegativeFloat = 50.0
    crd_negatives: PositiveInt = 16_384
    crd_dim: PositiveInt = 128
    crd_temperature: PositiveFloat = 0.07
    crd_momentum: float = Field(0.5, ge=0.0, lt=1.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    class_weights: ClassWeights = "none"

    @model_validator(mode="after")
    def _something_to_minimise(self) -> LossRecipe:
        if self.ce_weight == 0.0 and not self.needs_targets:
            raise ValueError("a weight above 0 for at least one of CE, logit term and feature term")
        return self

    @model_validator(mode="after")
    def _smoothing_and_class_weights_are_for_ce(self) -> LossRecipe:
        used = [name for name in CE_SETTINGS if getattr(self, name) not in (0.0, "none")]
        if used and self.ce_weight == 0.0:
            raise ValueError(f"a ce_weight above 0 for {' and '.join(used)}: no other term uses the labels so")
        return self

    @model_validator(mode="after")
    def _several_labels_have_no_class(self) -> LossRecipe:
        if self.kind != "bce":
            return self
        if self.needs_features and self.feature == "crd":
            raise ValueError("another feature than crd with bce: its negatives are of other classes")
        if used := [name for name in CE_SETTINGS if getattr(self, name) not in (0.0, "none")]:
            raise ValueError(f"no {' and '.join(used)} with bce: it is for images with one label")
        return self

    @model_validator(mode="after")
    def _components_are_for_crd(self) -> LossRecipe:
        if self.feature_source == "components" and self.feature not in {"none", "crd"}:
            raise ValueError(f"feature_source fused or auto, because {self.feature} compares with the fused features")
        return self

    def on_labels(self) -> LossRecipe:
        """The loss of the same run on labels alone."""
        if self.multi_label:
            return LossRecipe(kind="bce", distill_weight=0.0)
        return LossRecipe(kind="ce", **{name: getattr(self, name) for name in CE_SETTINGS})

    @property
    def multi_label(self) -> bool:
        """Whether the loss is for images with any number of labels."""
        return self.kind == "bce"

    @property
    def needs_logits(self) -> bool:
        """Whether the loss uses the targets' logits."""
        return self.kind != "ce" and self.distill_weight > 0.0

    @property
    def needs_features(self) -> bool:
        """Whether the loss uses the targets' features, fused or as components."""
        return self.feature != "none" and self.feature_weight > 0.0

    @property
    def needs_components(self) -> bool:
        """Whether the loss requires the teacher's and CLIP's own features."""
        return self.uses_components and self.feature_source == "components"

    @property
    def uses_components(self) -> bool:
        """Whether the loss uses the teacher's and CLIP's own features if the cache has them."""
        return self.needs_features and self.feature == "crd" and self.feature_source != "fused"

    @property
    def needs_targets(self) -> bool:
        """Whether the run needs a cache."""
        return self.needs_logits or self.needs_features


class OptimiserRecipe(Extensible):
    """SGD with momentum, or AdamW (whose first beta is `momentum`).

    Attributes:
        clip_grad_norm: largest norm of the gradients of all trained parameters as one vector; None for no limit.
        accumulate: batches per update: their gradients add up to that of a batch as large as all of them.
    """

    added: ClassVar[frozenset[str]] = frozenset({"clip_grad_norm", "accumulate"})

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.05
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 5e-4
    clip_grad_norm: float | None = Field(None, gt=0.0, allow_inf_nan=False)
    accumulate: PositiveInt = 1

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimiserRecipe:
        if self.nesterov and (self.name != "sgd" or self.momentum == 0.0):
            raise RecipeError("nesterov is for sgd with a momentum above 0", where="optimiser", found=self.name)
        return self


class ScheduleRecipe(Frozen):
    """How the learning rate changes, update by update; epochs count from 0."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_epochs: NonNegativeInt = 0
    milestones: tuple[PositiveInt, ...] = ()
    gamma: PositiveFloat = 0.1
    min_learning_rate: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _milestones_rise(self) -> ScheduleRecipe:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise RecipeError("milestones must rise", where="schedule.milestones", found=list(self.milestones))
        if self.name == "multistep" and not self.milestones:
            raise RecipeError(
                "the multistep schedule needs milestones", where="schedule", expected="such as [150, 180]"
            )
        return self


def _changes_or_fields(value: Any) -> str:
    return CHANGES if isinstance(value, Changes) else FIELDS


class TrainRecipe(Extensible):
    """One run: what a student learns from, and how.

    A loss that uses targets takes the dataset and the views of the cache. A loss on labels alone needs no cache and
    takes both from here, or from a cache if it names no dataset.

    Attributes:
        cache: path, URL, recipe name or fingerprint prefix.
        fusion: how to fuse the teacher and CLIP of a component cache, where that differs from its build.
        dataset, views: for a run on labels alone. With a cache they are `Changes`: `split` (a part of the cached
            samples), `test_split`, `data_dir`, `download` and `on_bad_image` (of test images) may be set; anything else
            must be as the cache has it.
        num_views: views to cycle through; None for all views of the cache or, on labels alone, a new one every epoch.
        label_fraction: fraction of each class that keeps its labels, drawn with label_seed. A run with targets still
            learns from the targets of all samples; a run on labels alone leaves unlabelled samples out.
        data_dir: folder of the images, if not the one in the cache or in `dataset`.
        download: fetch missing images, if the source can.
        student: a name for `create_student`; `timm:NAME.TAG` and `timm:hf-hub:ORG/NAME` start from their weights.
        student_weights: what the student starts from instead of random weights: a checkpoint file, a run folder, or a
            pretrained tag of timm or torchvision (`pretrained` for the default one). A classifier for other classes is
            replaced by a new one.
        student_weights_key: where they are in a checkpoint that holds several, dotted: `state_dict`, `ema.module`.
        ema_decay: of an exponential moving average of the weights, None for none.
        evaluate_every: epochs between evaluations on the test split; the last epoch is always evaluated.
        deterministic: deterministic kernels on CUDA too, which costs some speed. On the CPU a run always repeats
            bit for bit on the same machine with the same number of threads.
        compare_with_labels: then also train the same student in the same way on labels alone.
        loggers: the experiment trackers that follow the run; None for TensorBoard if it is installed.
        device, out: where the run is trained, and the folder where it is stored.
        checkpoint_every_minutes: store a state inside epochs that often, for long epochs; None stores one after each
            epoch only. The result does not depend on it.
    """

    added = frozenset({"student_weights", "student_weights_key", "checkpoint_every_minutes"})

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    cache: str | None = None
    fusion: FusionChoice = FusionChoice()
    dataset: (
        Annotated[
            Annotated[DatasetRecipe, Tag(FIELDS)] | Annotated[Changes, Tag(CHANGES)], Discriminator(_changes_or_fields)
        ]
        | None
    ) = None
    views: (
        Annotated[
            Annotated[ViewRecipe, Tag(FIELDS)] | Annotated[Changes, Tag(CHANGES)], Discriminator(_changes_or_fields)
        ]
        | None
    ) = None
    num_views: PositiveInt | None = None
    label_fraction: float = Field(1.0, gt=0.0, le=1.0)
    label_seed: int = Field(0, ge=0, lt=1 << 63)
    data_dir: Path | None = None
    download: bool = False
    student: Annotated[str, AfterValidator(canonical_student_name)] = "resnet8x4"
    student_weights: str | None = None
    student_weights_key: str | None = None
    loss: LossRecipe = LossRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    epochs: PositiveInt = 240
    batch_size: PositiveInt = 64
    seed: int = Field(0, ge=0, lt=1 << 63)
    precision: Precision = "float32"
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0)
    evaluate_every: PositiveInt = 1
    deterministic: bool = False
    compare_with_labels: bool = False
    loggers: tuple[LoggerName, ...] | None = None
    device: str = "auto"
    out: Path | None = None
    checkpoint_every_minutes: float | None = Field(None, gt=0.0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _student_with_weights(cls, data: Any) -> Any:
        """`student: {name: …, weights: …}` is another spelling of `student` and `student_weights`."""
        if not isinstance(data, dict) or not isinstance(data.get("student"), dict):
            return data
        spelled = {"name": "student", "weights": "student_weights", "weights_key": "student_weights_key"}
        if unknown := sorted(data["student"].keys() - spelled.keys()):
            raise RecipeError(
                f"unknown recipe key 'student.{unknown[0]}'", where="student", expected=f"{', '.join(spelled)}"
            )
        rest = {key: value for key, value in data.items() if key != "student"}
        return rest | {spelled[key]: value for key, value in data["student"].items()}

    @model_validator(mode="after")
    def _weights_have_a_place(self) -> TrainRecipe:
        if self.student_weights_key is not None and self.student_weights is None:
            raise RecipeError(
                "student_weights_key is a place in a checkpoint, and none is named",
                where="student_weights_key",
                next_step="give student_weights too",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _only_changes_with_a_cache(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        dataset, views = data.get("dataset"), data.get("views")
        if _needs_targets(data.get("loss")) or (data.get("cache") is not None and not _has_name(dataset)):
            return {
                **data,
                "dataset": _as_changes(DatasetRecipe, dataset, "dataset"),
                "views": _as_changes(ViewRecipe, views, "views"),
            }
        return {**data, "views": ViewRecipe() if views is None else views}

    @model_validator(mode="after")
    def _has_something_to_learn_from(self) -> TrainRecipe:
        if self.loss.needs_targets and self.cache is None:
            raise RecipeError(
                f"the loss '{self.loss_name}' learns from a cache, and none is named",
                where=self.name,
                next_step="give --cache, or --loss ce to learn from labels alone",
            )
        if not self.loss.needs_targets and self.dataset is None and self.cache is None:
            raise RecipeError(
                "a run on labels alone needs a dataset of its own",
                where=self.name,
                next_step="add `dataset: {name: …}` to the recipe, or --set dataset.name=…",
            )
        if self.schedule.warmup_epochs > self.epochs:
            raise RecipeError(
                "the warm-up is longer than the run",
                where="schedule.warmup_epochs",
                expected=f"at most {self.epochs} epochs",
                found=self.schedule.warmup_epochs,
            )
        return self

    @property
    def loss_name(self) -> str:
        """Short name of the loss for folders and tables: `ce`, `kd`, `kd+crd`, …"""
        alone = "bce-labels" if self.loss.multi_label else "ce"
        kind = self.loss.kind if self.loss.needs_logits else alone
        return f"{kind}+{self.loss.feature}" if self.loss.needs_features else kind

    @property
    def initial_weights(self) -> str | None:
        """What the student starts from: a file, a folder or a pretrained tag; None for random weights."""
        if self.student_weights is not None:
            return self.student_weights
        source, _, model = self.student.partition(":")
        if source != "timm":
            return None
        return "pretrained" if ":" in model else model.partition(".")[2] or None  # of a hub, or of a tag

    @property
    def takes_images_of_cache(self) -> bool:
        """Whether the images and views are those of the cache: with targets, or on labels alone without a dataset."""
        return self.loss.needs_targets or not isinstance(self.dataset, DatasetRecipe)

    def own_dataset(self) -> DatasetRecipe:
        """The dataset of a run without a cache, as the run opens it."""
        assert isinstance(self.dataset, DatasetRecipe), "a run without a cache has a dataset"
        return self.dataset.located(self.data_dir, self.download)

    def own_views(self) -> ViewRecipe:
        """The views of a run without a cache."""
        assert isinstance(self.views, ViewRecipe), "a run without a cache has views"
        return self.views

    def cached_dataset(self, manifest: Manifest) -> DatasetRecipe:
        """The dataset of a cache as this run opens it: with the splits and places that it sets.

        Raises:
            MismatchError: the run sets something that the cache was not built with, in `dataset` or in `views`.
        """
        where = f"cache {manifest.name}-{manifest.fingerprint[:12]}"
        _check_views(self.views, manifest.recipe.views, where)
        changes = self.dataset if isinstance(self.dataset, Changes) else None
        dataset = changed_dataset(manifest.dataset, manifest.recipe.dataset, changes, where=where)
        return dataset.located(self.data_dir, self.download)

    def with_images_of(self, manifest: Manifest) -> TrainRecipe:
        """A run on labels alone that names no dataset, with the images and views of a cache written out."""
        changes = {
            "cache": None,
            "dataset": self.cached_dataset(manifest),
            "views": manifest.recipe.views,
            "num_views": self.num_views or manifest.num_views,
        }
        return self.model_copy(update=changes)

    def stored(self) -> TrainRecipe:
        """The recipe as a run folder keeps it. With a cache: without the settings that the cache determines."""
        if not isinstance(self.dataset, Changes):
            return self.model_copy(update={"views": None}) if isinstance(self.views, Changes) else self
        kept = {key: value for key, value in self.dataset.values.items() if key in FREE_KEYS}
        return self.model_copy(update={"dataset": Changes(**kept) if kept else None, "views": None})

    def on_labels(self, dataset: DatasetRecipe, views: ViewRecipe, num_views: int) -> TrainRecipe:
        """The same run on labels alone: same images, same views, same schedule, same seed.

        If only a fraction of the samples is labelled, it trains for that many times more epochs, to see as many images.
        """
        times = round(1 / self.label_fraction)
        schedule = self.schedule.model_copy(
            update={
                "warmup_epochs": times * self.schedule.warmup_epochs,
                "milestones": tuple(times * milestone for milestone in self.schedule.milestones),
            }
        )
        changes = {
            "cache": None,
            "fusion": FusionChoice(),
            "epochs": times * self.epochs,
            "evaluate_every": times * self.evaluate_every,
            "schedule": schedule,
            "dataset": dataset,
            "views": views,
            "num_views": num_views,
            "loss": self.loss.on_labels(),
            "compare_with_labels": False,
        }
        return self.model_copy(update=changes)

    def values(self) -> dict[str, Any]:
        """Everything that determines the result, as plain data. A resumed run must have the same."""
        data = self.model_dump(mode="json", exclude=_NO_EFFECT_ON_RESULT)
        if self.loss.needs_targets:  # they are the cache's, and its name and path do not matter
            chosen = {key: data["dataset"][key] for key in ("split", "test_split") if key in (data["dataset"] or {})}
            data |= {"dataset": chosen or None, "views": None}
        elif data["dataset"]:
            elsewhere = {"data_dir", "download", "class_order"}  # the digest of the images covers their labels
            data["dataset"] = {key: value for key, value in data["dataset"].items() if key not in elsewhere}
        data["cache"] = None
        if (weights := self.initial_weights) is not None:  # of a file the content matters, not the name
            data["student_weights"] = files_digest(Path(weights).expanduser()) if is_path(weights) else weights
        return data


def _needs_targets(loss: Any) -> bool:
    """Whether a loss, given as a model or plain data, uses targets; True for one that is not valid."""
    try:
        return LossRecipe.model_validate({} if loss is None else loss).needs_targets
    except (ValidationError, RecipeError):
        return True


def _has_name(dataset: Any) -> bool:
    return isinstance(dataset, DatasetRecipe) or (isinstance(dataset, Mapping) and "name" in dataset)


def _as_changes(model: type[BaseModel], given: Any, where: str) -> Any:
    """What is set of a part that the cache has, as `Changes`; None for nothing."""
    if isinstance(given, BaseModel) and not isinstance(given, Changes):
        given = Changes.made_by(given)
    elif isinstance(given, Mapping):
        given = Changes.to(model, given, where)
    return None if isinstance(given, Changes) and not given.values else given


def _check_views(views: ViewRecipe | Changes | None, cached: ViewRecipe, where: str) -> None:
    """Raise MismatchError if a run sets views that a cache was not built with."""
    if not isinstance(views, Changes):
        return
    wanted = views.apply_to(cached, where="views")
    for key in views.values:
        if getattr(wanted, key) != getattr(cached, key):
            raise MismatchError(
                f"the cache was built with other views: views.{key}",
                where=where,
                expected=_as_json(getattr(cached, key)),
                found=_as_json(getattr(wanted, key)),
                next_step=f"leave views.{key} out, or build a cache with these views",
            )


def _as_json(value: Any) -> str:
    """A value of a recipe as it is written in YAML."""
    return json.dumps(TypeAdapter(Any).dump_python(value, mode="json"))


def recipe_digest(values: Mapping[str, Any]) -> str:
    """64 hex digits of sha256 over the canonical JSON of a run's values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_folder(recipe: TrainRecipe, digest: str) -> Path:
    """`out`, or `runs/NAME-STUDENT-LOSS-DIGEST`: every recipe has a folder of its own.

    Earlier versions named a run after the default recipe where only a cache was given. Such a run is continued there.
    """
    if recipe.out is not None:
        return recipe.out
    parts = (recipe.name, recipe.student, recipe.loss_name, digest[:8])
    folder, earlier = (
        Path("runs") / "-".join(re.sub(r"[^A-Za-z0-9._+-]+", "_", part) for part in (name, *parts[1:]))
        for name in (recipe.name, DEFAULT_RECIPE)
    )
    return earlier if earlier.is_dir() and not folder.exists() else folder


def named_after_cache(recipe: TrainRecipe) -> TrainRecipe:
    """The default recipe with the name of its cache, for a run where only a cache is given.

    Nothing changes if the recipe has another name or a cache that cannot be opened: the run itself reports that.
    """
    from cache_tools.home import registry
    from cache_tools.places import is_remote
    from cache_tools.store.group import read_manifest

    if recipe.cache is None or recipe.name != DEFAULT_RECIPE:
        return recipe
    try:
        if is_remote(recipe.cache):
            from cache_tools.reader import TeacherCache

            manifest = TeacherCache.open(recipe.cache).manifest
        else:
            manifest = read_manifest(registry.resolve(recipe.cache))
    except CacheError:
        return recipe
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", manifest.data_name).lstrip("._-")
    return recipe.model_copy(update={"name": name or DEFAULT_RECIPE})


def builtin_recipes() -> Traversable:
    """The folder of built-in training recipes."""
    return files("train") / "recipes"


def load_train_recipe(
    source: str | None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    for_sweep: bool = False,
) -> TrainRecipe:
    """Load a recipe, with options applied on top; see `cache_tools.config.load_recipe`.

    The dataset and views of a built-in recipe are for runs on labels alone: with a cache only those that `options` and
    `overrides` set count.

    Args:
        source: a built-in name, a YAML file of `train-student` or `build-cache`, a folder of images, or None for an
            empty recipe.
        for_sweep: whether other settings are still to come, so that a setting without effect may have one later.

    Raises:
        RecipeError: as `load_recipe`; a setting that has no effect.
    """
    settings = given_settings(map(full_key, overrides), options)
    if source is not None and is_folder_argument(source, builtin_names(builtin_recipes())):
        refuse_second_folder(source, (key for key, _ in settings))
    data, own, of_a_run = TrainSource({}) if source is None else read_train_source(source, builtin_recipes(), settings)
    if of_a_run and _needs_targets(data.get("loss")) and _has_name(data.get("dataset")):
        data = {**data, "dataset": None, "views": None}  # earlier versions stored what the cache replaced
    for key, value in settings:
        set_dotted(data, key, copy.deepcopy(value))
    given = own | {key for key, _ in settings}
    if _needs_targets(data.get("loss")) or ("cache" in given and data.get("cache") is not None):
        for part, model in (("dataset", DatasetRecipe), ("views", ViewRecipe)):
            values = data.get(part)
            if isinstance(values, dict):
                kept = values.keys() if part in given else _keys_below(part, given)
                data[part] = _as_changes(model, {key: values[key] for key in kept if key in values}, part)
    elif data.get("dataset") is not None:
        data["cache"] = None  # named for other losses
    recipe = validate(TrainRecipe, data, where=source or "options")
    if not for_sweep:
        refuse_unused(all_fields(recipe), default_fields(), dotted_keys(settings))
    if isinstance(recipe.dataset, DatasetRecipe):
        recipe.own_dataset()  # refuses a data_dir of a source that has none
        check_location(recipe.dataset.name, recipe.dataset.data_dir, recipe.dataset.download)
    return recipe


def all_fields(recipe: TrainRecipe) -> dict[str, Any]:
    """A recipe as plain data, with the fields that digests leave out."""
    return recipe.model_dump(mode="json", context={"all_fields": True})


def default_fields() -> dict[str, Any]:
    """The default values of a recipe, as plain data."""
    return all_fields(TrainRecipe(name="defaults", cache="none"))


def _keys_below(part: str, given: Iterable[str]) -> set[str]:
    """The keys of a part of a recipe that dotted keys set: `split` of `dataset.split`."""
    return {key.split(".")[1] for key in given if key.startswith(f"{part}.")}


def full_key(item: str) -> str:
    """A `--set` item with the full key in place of a short name such as `lr`."""
    key, separator, value = item.partition("=")
    return f"{SETTING_ALIASES.get(key.strip(), key)}{separator}{value}"


def named_loss(name: str) -> dict[str, Any]:
    """The settings of `--loss NAME`, as plain data.

    Raises:
        RecipeError: no such loss.
    """
    if name not in LOSSES:
        raise RecipeError(
            "no such loss",
            where=f"--loss {name}",
            expected=f"one of {', '.join(LOSSES)}",
            next_step="choose any other combination with --set loss.kind=…, --set loss.feature=…",
        )
    return dict(LOSSES[name])
