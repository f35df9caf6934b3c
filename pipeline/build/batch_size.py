"""The batch size of a build with `batch_size: auto`: that of the cache or, for a new one, found up to memory.

A network may compute the last bits of a row differently in a batch of another size. So the size that the first builder
finds is stored in the manifest, in its copy of the build recipe, where a given size is too. Whoever continues the cache
with `auto` takes it from there: a resumed build stores the bytes of an uninterrupted one, and builders that start
together agree, because one manifest wins.

On CUDA the size is measured: batches of this build, views included, go through the networks, each twice as large as the
one before, up to the rows of a block. The largest is taken whose memory, as torch counts it, is at most MEMORY_SHARE of
what was free. Where images are decoded, it stays so small that one decoding serves as many views as with DEFAULT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cache_tools.config.fields import MAX_COUNT
from cache_tools.console import device_name
from cache_tools.errors import OutOfMemoryError
from cache_tools.format.arrays import default_block_rows
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.images.image_set import ImageSet
from cache_tools.system.devices import synchronise
from cache_tools.system.memory import drop_tracebacks, free_memory, is_out_of_memory, release_memory
from cache_tools.units import counted
from pipeline.build.blocks import views_at_once
from pipeline.networks.ensemble import TeacherEnsemble, finish_pixels, load_pixels
from pipeline.recipe import BuildRecipe

DEFAULT = 256
"""On devices other than CUDA, and for caches that do not tell theirs."""
START = 64
MEMORY_SHARE = 0.8
"""Of the free memory. The rest is for batches on their way, and for what other programs take later."""


def stored_batch_size(manifest: Manifest) -> int:
    """The batch size with which a cache was begun; DEFAULT if its manifest has none."""
    stored: Any = manifest.build_recipe.get("batch_size")
    is_count = isinstance(stored, int) and not isinstance(stored, bool) and 0 < stored <= MAX_COUNT
    return stored if is_count else DEFAULT


def new_batch_size(recipe: BuildRecipe, identity: CacheRecipe, images: ImageSet, ensemble: TeacherEnsemble) -> int:
    """The batch size of a cache that is begun here.

    Args:
        identity: the recipe with every name resolved.

    Raises:
        OutOfMemoryError: not even one image fits on the device.
    """
    if recipe.batch_size != "auto":
        return recipe.batch_size
    if not is_measured(ensemble.device):
        return DEFAULT
    most = _most_images(recipe, identity, images)
    return largest_batch(forward_pass(identity, images, ensemble, recipe.num_views), most, ensemble.device)


def require_room(manifest: Manifest, images: ImageSet, ensemble: TeacherEnsemble) -> None:
    """Check on CUDA that batches of a cache fit on this device, where another builder has found their size.

    Raises:
        OutOfMemoryError: they do not; names the size that would.
    """
    size, device = min(stored_batch_size(manifest), manifest.block_rows, len(images)), ensemble.device
    work = forward_pass(manifest.recipe, images, ensemble, manifest.num_views)
    if not is_measured(device) or memory_taken(work, size, device) is not None:
        return
    found = largest_batch(work, size, device)
    raise OutOfMemoryError(
        "the batches of this cache do not fit on this device",
        where=device_name(device),
        expected=f"room for {counted(size, 'image')}, which the builder that began the cache had",
        found=f"room for {counted(found, 'image')}",
        next_step=f"build where there is more memory, or with --batch-size {found}, where targets may differ in their "
        "last bits",
    )


def forward_pass(
    identity: CacheRecipe, images: ImageSet, ensemble: TeacherEnsemble, num_views: int
) -> Callable[[int], object]:
    """What a build does on the device with a batch of the first block, given the number of its images."""
    views, view = identity.views, min(1, num_views - 1)  # view 0 may be the clean images

    def work(size: int) -> object:
        samples = np.arange(size, dtype=np.int64)
        pixels = load_pixels(images, views, slice(0, size), samples, view).to(ensemble.device)
        seen = finish_pixels(pixels, views, samples, view)
        return ensemble.targets(seen.teacher, identity.store, seen.clip)

    return work


def is_measured(device: torch.device) -> bool:
    """Whether the memory that work takes can be measured on a device."""
    return device.type == "cuda"


def largest_batch(work: Callable[[int], object], most: int, device: torch.device) -> int:
    """The largest number of images, START times a power of two or `most`, whose work leaves the margin of memory.

    Raises:
        OutOfMemoryError: not even the work on one image does.
    """

    def fits(size: int) -> bool:
        taken = memory_taken(work, size, device)
        return taken is not None and taken <= MEMORY_SHARE

    size = min(START, most)
    if fits(size):
        while size < most and fits(following := min(2 * size, most)):
            size = following
        return size
    while size > 1:
        size //= 2
        if fits(size):
            return size
    raise OutOfMemoryError(
        "not enough memory for a batch of one image",
        where=device_name(device),
        found=f"{free_memory(device) / 2**20:,.0f} MiB free",
        next_step="end what else uses the device, or build where there is more memory",
    )


def memory_taken(work: Callable[[int], object], size: int, device: torch.device) -> float | None:
    """The memory that work on so many images takes, as a share of what was free; None if that is not enough."""
    meter = MemoryMeter(device)
    try:
        work(size)
        synchronise(device)
        return meter.share()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        drop_tracebacks(error)  # their frames hold the tensors
        return None
    finally:
        release_memory(device)


class MemoryMeter:
    """Measures the largest share of the free memory of a CUDA device that torch takes from now on."""

    def __init__(self, device: torch.device) -> None:
        release_memory(device)
        self._device, self._free = device, max(free_memory(device), 1)
        self._before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    def share(self) -> float:
        # Reserved memory has the workspaces of cuDNN and the gaps between tensors too.
        return (torch.cuda.max_memory_reserved(self._device) - self._before) / self._free


def _most_images(recipe: BuildRecipe, identity: CacheRecipe, images: ImageSet) -> int:
    """The rows of a block, or fewer where larger batches would leave room for fewer views of one decoding."""
    rows = recipe.block_rows or default_block_rows(identity)
    most = min(rows, len(images))
    wanted = recipe.views_at_once or recipe.num_views
    if not images.resident:
        wanted = min(wanted, views_at_once(identity, rows, images, DEFAULT))
        while most > 1 and views_at_once(identity, rows, images, most) < wanted:
            most = (most + 1) // 2
    return most
