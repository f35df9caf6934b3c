"""Read a view a few blocks at a time, so that a view of any size can be analysed in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from cache_tools.targets import ViewTargets

PIECE_NUMBERS = 1 << 24  # logits of a piece: 64 MB in float32


def view_pieces(
    cache: TeacherCache, view: int, device: torch.device, fusion: Fusion
) -> Iterator[tuple[int, ViewTargets]]:
    """The logits of a view in pieces of whole blocks, each with the number of its first sample.

    A background thread reads the next piece; two are in memory at a time.

    Raises:
        FormatError, IncompleteError: as `TeacherCache.load_view`.
    """
    manifest = cache.manifest
    each = max(1, PIECE_NUMBERS // (manifest.block_rows * manifest.num_classes))
    pieces = [range(first, min(first + each, manifest.num_blocks)) for first in range(0, manifest.num_blocks, each)]
    cache.require_view(view, fusion)  # fail before the work starts

    def load(blocks: range) -> ViewTargets:
        return cache.load_view(view, device, features=False, fusion=fusion, blocks=blocks)

    with ThreadPoolExecutor(1, thread_name_prefix="next-piece") as reader:
        waiting = reader.submit(load, pieces[0])
        for number, blocks in enumerate(pieces):
            targets = waiting.result()
            if number + 1 < len(pieces):
                waiting = reader.submit(load, pieces[number + 1])
            yield manifest.block(blocks.start).start, targets
