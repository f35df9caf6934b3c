"""Estimate what a cache costs and when it pays off, from a few timed batches, before anything is built.

It takes seconds, also for large networks on a CPU: batches are as small as the time allows, one prompt stands for all,
and the scale `match` is not measured. The estimate is an extrapolation of the batches, and its error their scatter.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from cache_tools.config import Frozen
from cache_tools.console import Progress, device_name, resolve_device
from cache_tools.decoding.packing import option_size, packed_bytes
from cache_tools.decoding.service import service_for
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare
from cache_tools.refusion import MATCH_SAMPLES
from cache_tools.system.devices import synchronise
from cache_tools.units import counted, duration, human_bytes
from pipeline.build.batch_size import new_batch_size
from pipeline.build.cache import resolve
from pipeline.build.destination import destination
from pipeline.networks.clip import TEXT_BATCH, Clip
from pipeline.networks.ensemble import (
    NetworkPixels,
    TeacherEnsemble,
    finish_pixels,
    load_ensemble,
    start_loading_pixels,
)
from pipeline.recipe import BuildRecipe
from train.report.spread import interval_factor
from train.students import create_student

Loaded = TypeVar("Loaded")

BUDGET_S = 2.0  # for each of the things that are timed
BATCH_S = 0.25  # batches are made smaller until one takes about this long
MIN_BATCHES, MAX_BATCHES = 4, 50
STUDENT_BATCH = 64
VIEWS_OF_ONE_DECODE = 4


class Rate(NamedTuple):
    """Seconds per item: the mean over timed batches, and half its 95 % confidence interval (Student's t)."""

    mean_s: float
    error_s: float = 0.0


NOTHING = Rate(0.0)


class Plan(Frozen):
    """Estimates for a planned cache.

    A GPU computes while the next images are loaded; a CPU does both by turns. So times of loading and computing are
    added up on a CPU, and the longer one counts elsewhere.

    Attributes:
        networks: that compute the targets, such as `teacher and CLIP`.
        bytes: of all arrays at a time, uncompressed; float16 targets hardly compress.
        bytes_free: on the disk of the destination.
        pixel_bytes: of the decoded images, in memory or in a pixel file of `train-student`; None for images in memory.
        loaded_per_s: images per second and view of reading and decoding; None for images in memory.
        computed_per_s: images per second from pixels to targets, through views, teachers and CLIPs.
        targets_per_s: images per second of the build, which loads and computes.
        student_per_s: images per second of training steps of `student`: forward, backward and update.
        prompts: that CLIP embeds before the build.
        prompts_per_s: how many per second; None without CLIP.
        checked: images of the preflight and of the measurement of CLIP's scale.
        setup_s: time of prompts and checked images.
        build_s: setup_s + V · N / targets_per_s.
        build_error_s: half the 95 % confidence interval of build_s, from the scatter of the timed batches.
        speedup: time of an epoch with live teachers over one from the cache.
        epochs_to_break_even: epochs of training, over all students, after which the build has cost no more than live
            teachers would have: build_s over what an epoch saves. None if it saves nothing.
        students_to_break_even: the same in students of `epochs` epochs.
    """

    device: str
    networks: str = "teacher and CLIP"
    samples: int
    views: int
    bytes: int
    bytes_free: int
    pixel_bytes: int | None = None
    loaded_per_s: float | None = None
    computed_per_s: float
    targets_per_s: float
    student: str
    student_per_s: float
    epochs: int
    prompts: int = 0
    prompts_per_s: float | None = None
    checked: int = 0
    setup_s: float = 0.0
    build_s: float
    build_error_s: float = 0.0
    speedup: float
    epochs_to_break_even: int | None
    students_to_break_even: float | None

    def __str__(self) -> str:
        takes = f"{duration(self.build_s)} ± {duration(self.build_error_s)}"
        lines = [
            f"{self.samples:,} images × {counted(self.views, 'view')} on {self.device}: "
            f"{self.targets_per_s:,.1f} images/s through {self.networks}, so building takes {takes}"
        ]
        if self.loaded_per_s is not None:
            lines.append(
                f"loading: {self.loaded_per_s:,.0f} images/s of each view; "
                f"networks: {self.computed_per_s:,.1f} images/s"
            )
        if self.prompts:
            checks = f" and checks on {self.checked:,} images" if self.checked else ""
            lines.append(f"{duration(self.setup_s)} of it for {self.prompts:,} prompts{checks}")
        lines.append(f"{human_bytes(self.bytes)} to store, {human_bytes(self.bytes_free)} free")
        if self.pixel_bytes is not None:
            lines.append(
                f"{human_bytes(self.pixel_bytes)} of memory for the decoded images in training, or of disk with "
                f"train-student --pixel-disk {option_size(self.pixel_bytes)}"
            )
        lines += [
            f"{self.student}: {self.student_per_s:,.1f} images/s of training; an epoch from the cache is "
            f"{self.speedup:.2f} times as fast as with live teachers",
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Whether to build it, in a sentence or two."""
        if self.bytes > self.bytes_free:
            return "The disk is too small: choose fewer --views, --codec float16, or another --out."
        if self.epochs_to_break_even is None or self.students_to_break_even is None:
            return "The cache saves no time: loading the images takes as long as the networks and the student do."
        pays_off = f"The cache pays off after {counted(self.epochs_to_break_even, 'epoch')} of training"
        if self.students_to_break_even > 1.0:
            students = f"{np.ceil(self.students_to_break_even):.0f} students of {self.epochs} epochs"
            return (
                f"{pays_off}, that is {students}. For a single student, train with live teachers or choose at most "
                f"{self.epochs} --views."
            )
        saved = self.build_s * (self.epochs / self.epochs_to_break_even - 1.0)
        first = f"{pays_off}, within the first student of {self.epochs} epochs"
        if self.speedup < 1.05:
            return f"{first}, but saves little: most of the time goes into the student, not the teachers."
        return f"{first}. It saves {duration(saved)} there, and {duration(saved + self.build_s)} for every further one."


def make_plan(recipe: BuildRecipe, student: str, epochs: int) -> Plan:
    """Time a few batches of teachers and of a student on the recipe's own images and device. Nothing is compiled.

    Raises:
        CacheError: images, weights or device are missing, as in a build.
    """
    device = resolve_device(recipe.device)
    images = open_images(recipe.dataset)
    ensemble = load_ensemble(
        recipe.teachers, recipe.clips, recipe.fusion, images, recipe.dataset, device, recipe.precision,
        for_timing=True,
    )  # fmt: skip
    recipe = recipe.model_copy(update={"views": recipe.views.over(len(images))})
    identity = resolve(recipe, images, ensemble)
    batch_size = new_batch_size(recipe, identity, images, ensemble)
    batches = _Batches(images, recipe, device)
    with Progress("plan", 3, "timings") as progress:
        computing = batches.time(lambda pixels, index: _targets(ensemble, recipe, pixels, index), batch_size)
        loading = NOTHING if images.resident else batches.time_loading()
        progress.advance(1)
        step = _student_step(student, recipe, images, device)
        training = batches.time_student(step)
        progress.advance(1)
        prompts, embedding_s = _prompts(ensemble, device)
        progress.advance(1)
    targets = _together(device, loading, computing)
    checked = min(recipe.preflight_samples, len(images))
    if recipe.clips and recipe.teachers and recipe.fusion.clip_scale == "match":
        checked += min(MATCH_SAMPLES, len(images))
    setup_s = embedding_s + checked * targets.mean_s
    rows = recipe.num_views * len(images)
    stored_rows = min(recipe.num_views, recipe.keep_views or recipe.num_views) * len(images)
    build_s = build_seconds(rows, checked, targets.mean_s, embedding_s)
    live_s = _together(device, loading, Rate(computing.mean_s + training.mean_s)).mean_s
    cached_s = _together(device, loading, training).mean_s
    saved_s = len(images) * (live_s - cached_s)
    break_even = math.ceil(build_s / saved_s) if saved_s > 0 else None
    specs = target_arrays(identity, recipe.block_rows or 1)
    row_bytes = sum(spec.stored.row_bytes for spec in specs)
    constants = sum(4 * int(np.prod(shape)) for shape in constant_shapes(identity).values())
    return Plan(
        device=device_name(device),
        networks=" and ".join(
            f"{len(group)} {name}s" if len(group) > 1 else name
            for name, group in (("teacher", recipe.teachers), ("CLIP", recipe.clips))
            if group
        ),
        samples=len(images),
        views=recipe.num_views,
        bytes=stored_rows * row_bytes + constants + 24 * len(images),
        bytes_free=_bytes_free(destination(recipe, identity.fingerprint).path),
        pixel_bytes=packed_bytes(images.decoded_for(recipe.views.needed), canvases=recipe.views.box_op is None)
        if isinstance(images, EncodedImages)
        else None,
        loaded_per_s=1 / loading.mean_s if loading.mean_s else None,
        computed_per_s=1 / computing.mean_s,
        targets_per_s=1 / targets.mean_s,
        student=student,
        student_per_s=1 / training.mean_s,
        epochs=epochs,
        prompts=prompts,
        prompts_per_s=prompts / embedding_s if prompts else None,
        checked=checked,
        setup_s=setup_s,
        build_s=build_s,
        build_error_s=(rows + checked) * targets.error_s,
        speedup=live_s / cached_s,
        epochs_to_break_even=break_even,
        students_to_break_even=None if break_even is None else break_even / epochs,
    )


def build_seconds(rows: int, checked: int, per_image_s: float, prompts_s: float = 0.0) -> float:
    """The time of a build: prompts, the images of the preflight, and every (image, view), through all networks."""
    return prompts_s + (checked + rows) * per_image_s


def computed_seconds(operations: Mapping[str, float], device_flops: float, utilisation: Mapping[str, float]) -> float:
    """Seconds per image on a device that nobody has measured.

    Args:
        operations: kind of network → floating-point operations per image, 2 per multiply-accumulate.
        device_flops: operations per second that the device's data sheet promises.
        utilisation: kind of network → the share of it that such a network reaches.
    """
    return sum(count / (device_flops * utilisation[kind]) for kind, count in operations.items())


def _together(device: torch.device, loading: Rate, computing: Rate) -> Rate:
    """The time of an image that is loaded, and then goes through networks."""
    if device.type != "cpu":
        return max(loading, computing)
    return Rate(loading.mean_s + computing.mean_s, math.hypot(loading.error_s, computing.error_s))


def _targets(ensemble: TeacherEnsemble, recipe: BuildRecipe, pixels: NetworkPixels, index: np.ndarray) -> object:
    views = finish_pixels(pixels, recipe.views, index, 1)
    return ensemble.targets(views.teacher, recipe.store, views.clip)


def _student_step(
    name: str, recipe: BuildRecipe, images: ImageSet, device: torch.device
) -> Callable[[torch.Tensor, np.ndarray], object]:
    """A training step on labels. It costs as much as a cached step without the loss on targets."""
    student = create_student(name, len(images.class_names)).to(device).to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    mean, std = recipe.dataset.normalisation
    labels = torch.from_numpy(images.labels.astype(np.float32 if images.multi_label else np.int64)).to(device)
    criterion = F.binary_cross_entropy_with_logits if images.multi_label else F.cross_entropy

    def step(pixels: torch.Tensor, index: np.ndarray) -> None:
        inputs = prepare(pixels.contiguous(memory_format=torch.channels_last), Preprocessing(mean=mean, std=std))
        loss = criterion(student(inputs), labels[torch.from_numpy(index).to(device)])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


class _Batches:
    """Batches of a recipe's images, from all over the dataset, for timing."""

    def __init__(self, images: ImageSet, recipe: BuildRecipe, device: torch.device) -> None:
        self._images, self._views, self._num_views, self._device = images, recipe.views, recipe.num_views, device
        self._service = service_for(images, recipe.num_views * len(images))

    def time(self, work: Callable[[NetworkPixels, np.ndarray], object], batch_size: int) -> Rate:
        """Time work on loaded pixels; loading is not timed."""

        def load(index: np.ndarray) -> NetworkPixels:
            return self._load(index, [1])[0].to(self._device)

        return self._time(load, work, batch_size)

    def time_student(self, step: Callable[[torch.Tensor, np.ndarray], object]) -> Rate:
        """Time steps on the views that a student sees, at its own size; making the views is not timed."""
        views = self._views.seen_by("student")

        def load(index: np.ndarray) -> torch.Tensor:
            return views.finish(views.load(self._images, index, index, 1).to(self._device), index, 1)

        return self._time(load, step, STUDENT_BATCH)

    def time_loading(self) -> Rate:
        """Time of loading an image for a view, where several views are made of one decode."""
        count = min(VIEWS_OF_ONE_DECODE, self._num_views)
        rate = self._time(
            lambda index: index, lambda _, index: self._load(index, range(1, count + 1)), 2 * STUDENT_BATCH
        )
        return Rate(rate.mean_s / count, rate.error_s / count)

    def _load(self, index: np.ndarray, views: Any) -> list[NetworkPixels]:
        return start_loading_pixels(self._service, self._images, self._views, index, index, list(views), pin=False)()

    def _time(
        self, load: Callable[[np.ndarray], Loaded], work: Callable[[Loaded, np.ndarray], object], batch_size: int
    ) -> Rate:
        """Seconds per image of `work(load(index), index)`, after a warm-up."""

        def elapsed_s(size: int, number: int) -> float:
            index = (np.arange(size) + _place(number) * len(self._images) // MAX_BATCHES) % len(self._images)
            loaded = load(index)
            synchronise(self._device)
            start = time.perf_counter()
            work(loaded, index)
            synchronise(self._device)
            return time.perf_counter() - start

        size = _timed_size(lambda size: elapsed_s(size, 0), min(batch_size, len(self._images)), self._device)
        times = list[float]()
        while len(times) < MIN_BATCHES or (sum(times) < BUDGET_S and len(times) < MAX_BATCHES):
            times.append(elapsed_s(size, len(times)) / size)
        return Rate(statistics.fmean(times), interval_factor(len(times)) * statistics.stdev(times))


def _timed_size(elapsed_s: Callable[[int], float], largest: int, device: torch.device) -> int:
    """The number of items to time together, after a warm-up: on a CPU, where their number hardly matters, few."""
    size = 1 if device.type == "cpu" else largest
    elapsed_s(size)
    while size < largest and min(elapsed_s(size), elapsed_s(size)) < BATCH_S:
        size = min(2 * size, largest)
    return size


def _place(number: int) -> int:
    """The numbers 0 to `MAX_BATCHES` − 1, each once, in an order that goes over the whole range at first."""
    return number * 31 % MAX_BATCHES


def _prompts(ensemble: TeacherEnsemble, device: torch.device) -> tuple[int, float]:
    """The number of prompts of all CLIPs, and the time in which they are embedded."""
    total, total_s = 0, 0.0
    for clip in ensemble.clips:
        count = len(clip.identity.templates) * len(clip.identity.class_names)
        total, total_s = total + count, total_s + count * _prompt_s(clip, min(count, TEXT_BATCH), device)
    return total, total_s


@torch.no_grad()
def _prompt_s(clip: Clip, batch_size: int, device: torch.device) -> float:
    """Seconds per prompt of the text tower; the tokens do not matter."""

    def elapsed_s(size: int) -> float:
        tokens = torch.zeros(size, getattr(clip.network, "context_length", 77), dtype=torch.int64, device=device)
        synchronise(device)
        start = time.perf_counter()
        clip.network.encode_text(tokens)
        synchronise(device)
        return time.perf_counter() - start

    size = _timed_size(elapsed_s, batch_size, device)
    return statistics.median(elapsed_s(size) for _ in range(3)) / size


def _bytes_free(path: Path) -> int:
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(folder).free
