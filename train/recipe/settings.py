"""Training recipes: all the settings of a run of `train-student`. Importable without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag, TypeAdapter, model_validator

from cache_tools.config import CHANGES, FIELDS, Changes, Extensible
from cache_tools.config.fields import MAX_COUNT, Count, Name, NumBytes, PlacePath, Positive, Seed, ViewCount
from cache_tools.console import resolve_device
from cache_tools.errors import MismatchError, RecipeError
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import Precision, with_canvas
from cache_tools.home.origin import budget_is_refused
from cache_tools.images.recipe import FREE_KEYS, DatasetRecipe, changed_dataset
from cache_tools.places import is_remote
from cache_tools.refusion import FusionChoice
from cache_tools.system.arguments import expand_user
from cache_tools.views.recipe import ViewRecipe
from train.recipe.evaluation import EvaluationRecipe
from train.recipe.loss import LossRecipe, needs_targets
from train.recipe.mixed import check_mixed_views
from train.recipe.optim import OptimiserRecipe, ScheduleRecipe
from train.recipe.pixels import PixelRecipe
from train.recipe.student_names import canonical_student_name
from train.weights.names import files_digest, is_path

Compile = Literal["auto", "off", "model", "step"]
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
_NO_EFFECT_ON_RESULT = {
    *("name", "data_dir", "download", "compare_with_labels", "loggers", "device", "out"),
    *("checkpoint_every_minutes", "max_minutes", "pixels", "compile", "follow", "sync_batchnorm", "stage_budget"),
}


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
        shuffle_window: blocks of the cache whose targets are in memory together: each epoch shuffles the blocks, then
            the samples inside each window of so many blocks. None shuffles all samples, and needs memory for a view.
        evaluation: how test images are resized and cropped; by default for the size of the views.
        precision: of the forward pass, by automatic mixed precision; losses, weights and their updates are float32.
            `auto` is bfloat16 on a CUDA device that computes in it and float32 on any other, and is recorded as that.
        ema_decay: of an exponential moving average of the weights, None for none.
        evaluate_every: epochs between evaluations on the test split; the last epoch is always evaluated.
        deterministic: deterministic kernels on CUDA too, which costs some speed. On the CPU a run always repeats
            bit for bit on the same machine with the same number of threads.
        compile: how a step is run: `off`, operation by operation; `model`, student and loss compiled by torch.compile;
            `step`, whole updates recorded as CUDA graphs; `auto` is `off`. A setting of the machine: a run of another
            one is resumed, and results differ by rounding. The result's `environment` has it.
        sync_batchnorm: of several ranks: batch norms take the statistics of the whole batch, as one process does, and
            not of each rank's part. A setting of the machine, like `compile`; in one process it changes nothing.
        compare_with_labels: then also train the same student in the same way on labels alone.
        loggers: the experiment trackers that follow the run; None for TensorBoard if it is installed.
        device, out: where the run is trained, and the folder where it is stored.
        checkpoint_every_minutes: store a state inside epochs that often, for long epochs; None stores one after each
            epoch only. The result does not depend on it.
        max_minutes: end after so many minutes, with a checkpoint; None for no limit.
        pixels: where the pixels of the training images are kept. The result does not depend on it.
        follow: train from a cache that is still being built: each epoch waits for its view. The result does not depend
            on it.
        stage_budget: of a cache in an object store: bytes of the disk of this machine that its views may take. Each
            view is staged shortly before its epoch, and dropped when the room is needed. None keeps all views.
    """

    added = frozenset(
        {
            *("student_weights", "student_weights_key", "checkpoint_every_minutes", "evaluation", "pixels"),
            *("shuffle_window", "compile", "follow", "sync_batchnorm", "max_minutes", "stage_budget"),
        }
    )

    name: Name
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
    num_views: ViewCount | None = None
    label_fraction: Annotated[Positive, Field(le=1.0)] = 1.0
    label_seed: Seed = 0
    data_dir: PlacePath | None = None
    download: bool = False
    student: Annotated[str, AfterValidator(canonical_student_name)] = "resnet8x4"
    student_weights: str | None = None
    student_weights_key: str | None = None
    loss: LossRecipe = LossRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    epochs: Count = 240
    batch_size: Count = 64
    seed: Seed = 0
    shuffle_window: Count | None = None
    precision: Precision = "float32"
    ema_decay: Annotated[Positive, Field(lt=1.0)] | None = None
    evaluate_every: Count = 1
    evaluation: EvaluationRecipe = EvaluationRecipe()
    deterministic: bool = False
    compile: Compile = "auto"
    follow: bool = False
    stage_budget: NumBytes | None = None
    sync_batchnorm: bool = False
    compare_with_labels: bool = False
    loggers: tuple[LoggerName, ...] | None = None
    device: str = "auto"
    out: PlacePath | None = None
    checkpoint_every_minutes: Positive | None = None
    max_minutes: Positive | None = None
    pixels: PixelRecipe = PixelRecipe()

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

    @model_validator(mode="before")
    @classmethod
    def _precision_of_the_device(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("precision") == "auto":
            return {**data, "precision": _precision_for(data.get("device") or "auto")}
        return data

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
        if needs_targets(data.get("loss")) or (data.get("cache") is not None and not has_name(dataset)):
            return {
                **data,
                "dataset": as_changes(DatasetRecipe, dataset, "dataset"),
                "views": as_changes(ViewRecipe, views, "views"),
            }
        return {**data, "views": ViewRecipe() if views is None else views}

    def _check_follows(self) -> None:
        if not self.loss.needs_targets:
            raise RecipeError("a run on labels alone has no cache to follow", where="follow", next_step="leave it out")
        if self.label_fraction < 1.0:
            raise RecipeError(
                "a fraction of the labels needs the predictions of a complete cache for the others",
                where=f"follow, label_fraction: {self.label_fraction:g}",
                next_step="wait for the build, or use all labels",
            )

    def _check_stage(self) -> None:
        where = f"stage_budget: {self.stage_budget}"
        if not self.loss.needs_targets:
            raise RecipeError("a run on labels alone stages no targets", where=where, next_step="leave it out")
        if self.cache is not None and not is_remote(self.cache):
            raise budget_is_refused(where, self.cache)
        if self.follow:
            raise RecipeError(
                "a run that follows a build keeps the views that it has read",
                where=f"follow, {where}",
                next_step="leave out one of them; --keep-views of the build limits the views in the store",
            )

    @model_validator(mode="after")
    def _has_something_to_learn_from(self) -> TrainRecipe:
        if self.loss.needs_targets and self.cache is None:
            on_labels = "bce-labels" if self.loss.kind == "bce" else "ce"
            raise RecipeError(
                f"the loss '{self.loss_name}' learns from a cache, and none is named",
                where=self.name,
                next_step=f"give --cache, or --loss {on_labels} to learn from labels alone",
            )
        if not self.loss.needs_targets and self.dataset is None and self.cache is None:
            raise RecipeError(
                "a run on labels alone needs a dataset of its own",
                where=self.name,
                next_step="add `dataset: {name: …}` to the recipe, or --set dataset.name=…",
            )
        if self.follow:
            self._check_follows()
        if self.stage_budget is not None:
            self._check_stage()
        if self.epochs > MAX_COUNT * self.label_fraction:
            raise RecipeError(
                "so small a part of the labels needs too many epochs on labels alone",
                where="label_fraction",
                expected=f"at most {MAX_COUNT:,} epochs, for as many images as with all labels",
                found=f"{self.epochs:,} epochs with {self.label_fraction:g} of the labels",
            )
        if self.schedule.warmup_epochs > self.epochs:
            raise RecipeError(
                "the warm-up is longer than the run",
                where="schedule.warmup_epochs",
                expected=f"at most {self.epochs} epochs",
                found=self.schedule.warmup_epochs,
            )
        return self

    @model_validator(mode="after")
    def _settings_fit_mixed_views(self) -> TrainRecipe:
        if isinstance(self.views, ViewRecipe):
            self.check_mixed_views(self.views, self.num_views, self.name)
        return self

    def check_mixed_views(self, views: ViewRecipe, num_views: int | None, where: object) -> None:
        """Raise RecipeError if these views mix images, and a setting of the run needs images of one class."""
        check_mixed_views(
            views,
            num_views,
            where,
            loss=self.loss,
            label_fraction=self.label_fraction,
            batch_size=self.batch_size,
            shuffle_window=self.shuffle_window,
        )

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
        return with_canvas(self.dataset, self.own_views()).located(self.data_dir, self.download)

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
        dataset = changed_dataset(
            manifest.dataset, manifest.recipe.dataset, changes, where=where, data_dir=self.data_dir
        )
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
            "shuffle_window": None,
            "follow": False,
            "stage_budget": None,
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
            data["student_weights"] = files_digest(expand_user(weights)) if is_path(weights) else weights
        return data


def _precision_for(device: str) -> Precision:
    """bfloat16 where a CUDA device computes in it, and float32 on any other.

    Raises:
        DeviceError: no such device.
    """
    import torch

    found = resolve_device(device)
    if found.type != "cuda":
        return "float32"
    computes_in_it = torch.version.hip is not None or torch.cuda.get_device_capability(found) >= (8, 0)
    return "bfloat16" if computes_in_it else "float32"


def has_name(dataset: Any) -> bool:
    """Whether a dataset, given as a model or plain data, has a name; `Changes` have none."""
    return isinstance(dataset, DatasetRecipe) or (isinstance(dataset, Mapping) and "name" in dataset)


def as_changes(model: type[BaseModel], given: Any, where: str) -> Any:
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


def all_fields(recipe: TrainRecipe) -> dict[str, Any]:
    """A recipe as plain data, with the fields that digests leave out."""
    return recipe.model_dump(mode="json", context={"all_fields": True})


def default_fields() -> dict[str, Any]:
    """The default values of a recipe, as plain data."""
    return all_fields(TrainRecipe(name="defaults", cache="none"))
