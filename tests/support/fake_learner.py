"""A learner and its feed on a pretended GPU, and the kernels that its step launches, by phase."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from cache_tools.codecs import Codec
from cache_tools.format.arrays import TargetSpec
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import Preprocessing
from cache_tools.targets import ComponentView, FusedView
from cache_tools.views import Flip, PadCrop, ViewRecipe
from tests.support.fake_cuda import FakeGpu, Watch, fake_cuda, real
from train.feed import CachedView, Feed, ResidentFeed
from train.feed import base as feed_base
from train.loop import Learner, model_inputs
from train.losses.contrastive import Components
from train.objective import Objective
from train.recipe import TrainRecipe
from train.recipe.loss import LOSSES
from train.students import create_student

PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
VIEWS = ViewRecipe(ops=(PadCrop(), Flip()))
WIDTHS = (256, 768)
PHASES = ("feed", "input", "forward", "loss", "backward", "optimiser", "average", "sums")

# The runs of the table of launches: `benchmarks/launches.py` prints it, a test has their budgets.
RUNS: dict[str, dict[str, Any]] = {
    "KD": {"loss": LOSSES["kd"]},
    "RichKD": {"loss": LOSSES["richkd"], "components": True},
    "KD, bfloat16": {"loss": LOSSES["kd"], "precision": "bfloat16"},
    "KD, EMA": {"loss": LOSSES["kd"], "ema_decay": 0.999},
    "KD, MobileNetV2": {"loss": LOSSES["kd"], "student": "MobileNetV2"},
}


class Images:
    """Random pixels in memory, in place of a dataset."""

    resident, multi_label = True, False

    def __init__(self, count: int, classes: int, side: int) -> None:
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8)
        self.labels = rng.integers(0, classes, count)
        self.image_size = (side, side)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, rows: Any) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[rows])


class Source:
    """Views of targets on the device, as a cache gives them after they are loaded."""

    def __init__(self, recipe: TrainRecipe, count: int, classes: int, width: int, components: bool) -> None:
        self._loss, self._count, self._components = recipe.loss, count, components
        self._classes, self._width = classes, width
        self.codec: Codec | None = None

    def view(self, view: int) -> CachedView:
        loss, rows = self._loss, self._count

        def stored(width: int) -> torch.Tensor:
            return torch.empty(rows, width, dtype=torch.float16).pin_memory().to("cuda:0", non_blocking=True)

        arrays = {"fused_logits": stored(self._classes), "fused_features": stored(self._width)}
        specs: Mapping[str, TargetSpec] = {}
        if not self._components:
            return CachedView(FusedView(view, arrays, {}, specs), loss.needs_logits, loss.needs_features)
        names = ("teacher_features", "clip_features")
        arrays |= {name: stored(width) for name, width in zip(names, WIDTHS, strict=True)}
        fusion = Fusion(
            teacher_weight=0.5, feature_weight=0.5, teacher_weights=(1.0,), clip_weights=(1.0,), clip_scales=(100.0,)
        )
        return CachedView(ComponentView(view, arrays, {}, specs, fusion), loss.needs_logits, False, True)

    def close(self) -> None: ...


def make_recipe(loss: Mapping[str, Any], **settings: Any) -> TrainRecipe:
    data = {"name": "fake", "cache": "none", "loss": loss, "student": "resnet8x4", "batch_size": 64, **settings}
    return TrainRecipe.model_validate(data)


def make(
    gpu: FakeGpu,
    loss: Mapping[str, Any],
    *,
    count: int = 256,
    classes: int = 100,
    width: int = 512,
    components: bool = False,
    kind: type[Feed] = ResidentFeed,
    views: ViewRecipe = VIEWS,
    side: int = 32,
    **settings: Any,
) -> tuple[Learner, Feed]:
    """A learner and the feed of its batches; `settings` are those of a recipe."""
    recipe = make_recipe(loss, **settings)
    images = Images(count, classes, side)
    takes_components = components and recipe.loss.uses_components
    networks = Components(WIDTHS, (0.5, 0.5)) if takes_components else None
    student: Any = create_student(recipe.student, classes)
    objective = real(Objective)(
        recipe.loss, student.num_features, width, classes, count, images.labels, components=networks
    )
    learner = Learner(recipe, student, objective, PREPROCESSING, -(-count // recipe.batch_size), gpu.device)
    feed: Any = kind(
        images,  # type: ignore[arg-type]
        views,
        None,
        Source(recipe, count, classes, width, takes_components),
        batch_size=recipe.batch_size,
        epochs=2,
        seed=0,
        device=gpu.device,
    )
    return learner, feed


@contextlib.contextmanager
def pretended() -> Iterator[FakeGpu]:
    """`fake_cuda`, with the orders of the samples drawn on the host, whose numbers views need."""
    with (
        fake_cuda() as gpu,
        mock.patch.object(feed_base, "epoch_order", real(feed_base.epoch_order)),
        mock.patch.object(feed_base, "pair_order", real(feed_base.pair_order)),
    ):
        yield gpu


class Counted(NamedTuple):
    """The kernels of a step by phase, and what it copied."""

    launches: dict[str, float]
    watch: Watch

    @property
    def total(self) -> float:
        return sum(self.launches.values())


def count_step(gpu: FakeGpu, learner: Learner, feed: Feed, steps: int = 2) -> Counted:
    """The kernels of a step in the middle of an epoch, by phase: a mean over `steps`."""
    learner.begin_epoch(0)
    batches = feed.epoch(0)
    learner.step(batch := next(batches), model_inputs(batch, PREPROCESSING))  # momentum is made in the first one
    with gpu.watch() as watch, _phases(watch, learner):
        for _ in range(steps):
            with watch.during("feed"):
                batch = next(batches)
            with watch.during("input"):
                inputs = model_inputs(batch, PREPROCESSING)
            learner.step(batch, inputs)
    launches = {phase: watch.launches(phase) / steps for phase in PHASES}
    launches["loss"] += watch.launches("step") / steps
    return Counted(launches, watch)


def _phases(watch: Watch, learner: Learner) -> contextlib.ExitStack:
    stack = watch.phases(
        forward=(learner, "_forward"),
        loss=(learner.objective, "forward"),
        backward=(torch.Tensor, "backward"),
        optimiser=(learner, "_update"),
        sums=(learner.means, "add"),
    )
    if learner.average is not None:
        stack.enter_context(watch.phases(average=(learner.average, "update")))
    return stack


def table() -> dict[str, dict[str, float]]:
    """For each of RUNS the kernels of a step by phase, and their total."""
    rows = {}
    for name, settings in RUNS.items():
        with pretended() as gpu:
            learner, feed = make(gpu, **settings)
            counted = count_step(gpu, learner, feed)
            feed.close()
        rows[name] = {**counted.launches, "total": counted.total}
    return rows
