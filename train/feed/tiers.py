"""Where the pixels of a run are: in device memory, in host memory, in a pixel file, or decoded in every epoch.

The first of these that has room serves them. Batches are the same, bit for bit, whichever it is.
"""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.decoding.packing import NoRoomError, find_packed, make_packed, option_size, packed_bytes
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.system.memory import free_memory
from cache_tools.system.ranks import ALONE, Rank
from cache_tools.units import human_bytes
from cache_tools.views.recipe import ViewRecipe
from train.feed.base import Feed
from train.feed.batch import TargetSource
from train.feed.resident import HostFeed, ResidentFeed
from train.feed.streaming import StreamingFeed
from train.feed.windows import target_memory
from train.labelled import PartialLabels
from train.recipe.pixels import PixelRecipe

MEMORY_SHARE = 0.6
CPU = torch.device("cpu")
_DEFAULTS = PixelRecipe()


class Tier(NamedTuple):
    """What serves the pixels of a run.

    Attributes:
        images: the same images, from where they are read.
        reason: one line for users: where the pixels are, how large they are, and what would be faster.
    """

    name: Literal["device", "host", "disk", "decode"]
    feed: type[Feed]
    images: ImageSet
    reason: str


def open_feed(
    images: ImageSet,
    views: ViewRecipe,
    num_views: int | None,
    targets: TargetSource,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    device: torch.device,
    known: PartialLabels | None = None,
    samples: npt.NDArray[np.int64] | None = None,
    pixels: PixelRecipe = _DEFAULTS,
    window: int | None = None,
    rank: Rank = ALONE,
) -> Feed:
    """The feed of the first tier that has room for the pixels, beside the targets; see `choose_tier`.

    Args:
        rank: of several that train together; those of one machine share its memory.

    Raises:
        OutOfMemoryError: the targets of a view, or of a window of blocks, do not fit into memory.
        DataError, StorageError: as `choose_tier`.
    """
    needed = target_memory(targets, window, device, views=num_views, epochs=epochs, rank=rank)
    pixels = memory_shares(pixels, device, rank.local_count, 1)
    tier = choose_tier(images, views, device, pixels, reserved=needed.num_bytes, epochs=epochs)
    feed = tier.feed(
        tier.images,
        views,
        num_views,
        targets,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        device=device,
        known=known,
        samples=samples,
        window=window,
        read_ahead=needed.read_ahead,
        rank=rank,
    )
    feed.served = tier.reason
    return feed


def choose_tier(
    images: ImageSet,
    views: ViewRecipe,
    device: torch.device,
    pixels: PixelRecipe,
    *,
    reserved: int = 0,
    epochs: int | None = None,
) -> Tier:
    """The first tier that has room for the pixels. To make a pixel file takes as long as to decode all images once.

    Device memory holds the canvases and one view of them, host memory the canvases. Views that crop the original
    pictures of files need these, at their own sizes, which host memory or a pixel file holds.

    Args:
        reserved: bytes of the device that other tensors, such as the targets, will take.
        epochs: of the run; for a single one pictures are not decoded before it begins. None for many.

    Raises:
        DataError, StorageError: as `make_packed`.
    """
    images = images.decoded_for(views.needed)
    encoded = images if isinstance(images, EncodedImages) else None
    canvases = images.resident or views.box_op is None
    packed = None if encoded is None or pixels.disk == 0 else find_packed(encoded, canvases=canvases)
    if canvases and (tier := _in_memory(images, packed or images, views, device, pixels, reserved)) is not None:
        return tier
    if encoded is None:
        return Tier("decode", StreamingFeed, images, "pixels: loaded again in every epoch")
    if packed is None and not canvases and epochs != 1 and hasattr(os, "memfd_create"):
        size = packed_bytes(encoded, canvases=False)
        if size <= _budget(pixels.host_memory, CPU, reserved if device.type == "cpu" else 0):
            where = "memory" if device.type == "cpu" else "host memory"
            text = f"pixels: in {where}, cropped batch by batch (about {human_bytes(size)})"
            return Tier("host", HostFeed, images, text)
    try:
        if packed is None and pixels.disk:
            packed = make_packed(encoded, canvases=canvases, budget=pixels.disk)
        reason = ""
    except NoRoomError as error:
        reason = f"{error}"
    if packed is not None:
        text = f"pixels: from {packed.file.path} ({human_bytes(packed.file.size_bytes)})"
        return Tier("disk", StreamingFeed, packed, text)
    size = packed_bytes(encoded, canvases=canvases)
    reason = reason or f"--pixel-disk {option_size(size)} would keep them"
    about = "" if canvases else "about "
    return Tier(
        "decode", StreamingFeed, images, f"pixels: decoded in every epoch ({about}{human_bytes(size)}; {reason})"
    )


def memory_shares(pixels: PixelRecipe, device: torch.device, on_host: int, on_device: int) -> PixelRecipe:
    """The same settings for each of several processes on a machine and on a device, which share its memory."""
    if on_host == on_device == 1:
        return pixels
    on_device = on_host if device.type == "cpu" else on_device
    return pixels.model_copy(
        update={
            "device_memory": _budget(pixels.device_memory, device) // on_device,
            "host_memory": _budget(pixels.host_memory, CPU) // on_host,
        }
    )


def _in_memory(
    images: ImageSet, source: ImageSet, views: ViewRecipe, device: torch.device, pixels: PixelRecipe, reserved: int
) -> Tier | None:
    """A tier in memory; None if neither has room.

    Args:
        source: the same images, from where they are read.
    """
    (height, width), size = images.image_size, views.output_size(images.image_size)
    canvases, view = 3 * len(images) * height * width, 3 * len(images) * size[0] * size[1]
    is_shared = images.resident and device.type == "cpu"  # then the feed uses the source's own memory
    needed, budget = view + (0 if is_shared else canvases), _budget(pixels.device_memory, device, reserved)
    where = "memory" if device.type == "cpu" else "device memory"
    if needed <= budget:
        return Tier(
            "device", ResidentFeed, source, f"pixels: in {where} ({human_bytes(needed)}, with one view of them)"
        )
    if not images.resident and canvases > _budget(pixels.host_memory, CPU, reserved if device.type == "cpu" else 0):
        return None
    why = f"with one view of them {human_bytes(needed)}, where {where} may hold {human_bytes(budget)}"
    host = "memory" if device.type == "cpu" else "host memory"
    return Tier("host", HostFeed, source, f"pixels: in {host}, viewed batch by batch ({human_bytes(canvases)}; {why})")


def _budget(given: int | None, device: torch.device, reserved: int = 0) -> int:
    return int(MEMORY_SHARE * max(free_memory(device) - reserved, 0)) if given is None else given
