"""Choose the feed of a run from the memory that is free."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.images.image_set import ImageSet
from cache_tools.views.recipe import ViewRecipe
from train.feed.base import Feed
from train.feed.batch import TargetSource
from train.feed.resident import ResidentFeed
from train.feed.streaming import StreamingFeed
from train.labelled import PartialLabels

RESIDENT_SHARE = 0.6


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
) -> Feed:
    """A resident feed if the split and one view of it fit into 60 % of the free memory, else a streaming one.

    Views that crop the original pictures of files are streamed: pictures of several sizes are not kept.
    """
    size = views.output_size(images.image_size)
    needed = 3 * len(images) * (size[0] * size[1])
    if not (images.resident and device.type == "cpu"):  # else the feed uses the source's own memory
        needed += 3 * len(images) * images.image_size[0] * images.image_size[1]
    keeps_canvases = images.resident or views.box_op is None
    kind = ResidentFeed if keeps_canvases and needed <= RESIDENT_SHARE * free_memory(device) else StreamingFeed
    return kind(
        images,
        views,
        num_views,
        targets,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        device=device,
        known=known,
        samples=samples,
    )


def free_memory(device: torch.device) -> int:
    """Free memory of a device, in bytes; on the CPU at most what the control group leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (text := (group / "memory.max").read_text().strip()) != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(
            stat["inactive_file"]
        )  # without the page cache, which shrinks on demand
        available = min(available, int(text) - used)
    return max(available, 0)
