"""Estimate what a cache costs and when it pays off, from a few timed batches, before anything is built."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from cache_tools.config import Frozen
from cache_tools.console import device_name, resolve_device
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare
from cache_tools.system.devices import synchronise
from cache_tools.units import duration, human_bytes
from pipeline.build.cache import resolve
from pipeline.build.destination import destination
from pipeline.networks.ensemble import NetworkPixels, TeacherEnsemble, finish_pixels, load_ensemble, load_pixels
from pipeline.recipe import BuildRecipe
from train.students import create_student

Pixels = TypeVar("Pixels")

MIN_S = 2.0
MAX_BATCHES = 50
STUDENT_BATCH = 64


class Plan(Frozen):
    """Estimates for a planned cache.

    Attributes:
        networks: that compute the targets, such as `teacher and CLIP`.
        bytes: of all arrays, uncompressed; float16 targets hardly compress.
        bytes_free: on the disk of the destination.
        targets_per_s: images per second from pixels to targets, through views, teachers and CLIPs.
        student_per_s: images per second of training steps of `student`: forward, backward and update.
        build_s: V · N / targets_per_s.
        speedup: time of an epoch with live teachers over one from the cache, 1 + student_per_s / targets_per_s.
        epochs_to_break_even: epochs of training, over all students, after which the build has cost no more than live
            teachers would have: the number of views.
        students_to_break_even: the same in students of `epochs` epochs.
    """

    device: str
    networks: str = "teacher and CLIP"
    samples: int
    views: int
    bytes: int
    bytes_free: int
    targets_per_s: float
    student: str
    student_per_s: float
    epochs: int
    build_s: float
    speedup: float
    epochs_to_break_even: int
    students_to_break_even: float

    def __str__(self) -> str:
        lines = [
            f"{self.samples:,} images × {self.views} views on {self.device}: {self.targets_per_s:,.0f} images/s "
            f"through {self.networks}, so building takes {duration(self.build_s)}",
            f"{human_bytes(self.bytes)} to store, {human_bytes(self.bytes_free)} free",
            f"{self.student}: {self.student_per_s:,.0f} images/s of training; an epoch from the cache is "
            f"{self.speedup:.2f} times as fast as with live teachers",
        ]
        return "\n".join([*lines, self.verdict])

    @property
    def verdict(self) -> str:
        """Whether to build it, in a sentence or two."""
        if self.bytes > self.bytes_free:
            return "The disk is too small: choose fewer --views, --codec float16, or another --out."
        pays_off = f"The cache pays off after {self.epochs_to_break_even} epochs of training"
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
    """Time a few batches of teachers and of a student on the recipe's own images and device.

    Raises:
        CacheError: images, weights or device are missing, as in a build.
    """
    device = resolve_device(recipe.device)
    images = open_images(recipe.dataset)
    ensemble = load_ensemble(
        recipe.teachers, recipe.clips, recipe.fusion, images, recipe.dataset, device, recipe.precision,
        batch_size=recipe.batch_size,
    )  # fmt: skip
    recipe = recipe.model_copy(update={"views": recipe.views.over(len(images))})
    identity = resolve(recipe, images, ensemble)
    targets_per_s = _rate(
        images,
        recipe.batch_size,
        device,
        lambda index: load_pixels(images, recipe.views, index, index, 1).to(device),
        lambda pixels, index: _targets(ensemble, recipe, pixels, index),
    )
    for_student = recipe.views.seen_by("student")
    student_per_s = _rate(
        images,
        STUDENT_BATCH,
        device,
        lambda index: for_student.load(images, index, index, 1).to(device),
        _student_step(student, recipe, images, device),
    )
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
        bytes=recipe.num_views * len(images) * row_bytes + constants + 24 * len(images),
        bytes_free=_bytes_free(destination(recipe, identity.fingerprint).path),
        targets_per_s=targets_per_s,
        student=student,
        student_per_s=student_per_s,
        epochs=epochs,
        build_s=recipe.num_views * len(images) / targets_per_s,
        speedup=1.0 + student_per_s / targets_per_s,
        epochs_to_break_even=recipe.num_views,
        students_to_break_even=recipe.num_views / epochs,
    )


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


def _rate(
    images: ImageSet,
    batch_size: int,
    device: torch.device,
    load: Callable[[np.ndarray], Pixels],
    work: Callable[[Pixels, np.ndarray], object],
) -> float:
    """Images per second of `work(load(index), index)`, from the median batch; loading images is not timed."""
    durations: list[float] = []
    for index in _batches(len(images), batch_size):
        pixels = load(index)
        synchronise(device)
        start = time.perf_counter()
        work(pixels, index)
        synchronise(device)
        durations.append(time.perf_counter() - start)
        if len(durations) > 3 and sum(durations) > MIN_S:
            break
    timed = durations[2:] or durations  # the first two warm up
    return min(batch_size, len(images)) / float(np.median(timed))


def _batches(count: int, batch_size: int) -> Iterator[np.ndarray]:
    for number in range(MAX_BATCHES):
        yield (np.arange(min(batch_size, count)) + number * batch_size) % count


def _bytes_free(path: Path) -> int:
    folder = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(folder).free
