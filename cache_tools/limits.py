"""What a manifest may promise: more than any cache needs, and little enough to be looped over and counted.

A manifest comes from whoever shared the cache, with a digest that anybody can compute. What it promises is not believed
until files are there (`store.check_chunks`), but it must not make `cache-tools ls` count to 10¹² either.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from cache_tools.errors import FormatError

if TYPE_CHECKING:
    from cache_tools.manifest import Manifest

MAX_DEPTH = 64
MAX_SAMPLES = 1 << 32
MAX_SIDE = 1 << 14
MAX_WIDTH = 1 << 22
MAX_BLOCK_ROWS = 1 << 22
MAX_BLOCKS = 1 << 21
MAX_CHUNK_BYTES = 1 << 30

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_json(value: Any, *, where: str) -> None:
    """Raise FormatError for JSON that is nested too deeply, or has text that is not Unicode (half a surrogate pair)."""
    layer, depth = [value], 0
    while layer:
        if depth > MAX_DEPTH:
            raise FormatError("damaged manifest", where=where, expected=f"at most {MAX_DEPTH} levels of nesting")
        texts = [part for part in layer if isinstance(part, str)]
        texts += [key for part in layer if isinstance(part, dict) for key in part]
        if any(_SURROGATE.search(text) for text in texts):
            raise FormatError("damaged manifest", where=where, expected="Unicode text", found="half a character")
        layer = [
            inner
            for part in layer
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
        depth += 1


def check_limits(manifest: Manifest, *, where: object) -> None:
    """Raise FormatError unless every number of a manifest is one that a cache can have, and its parts fit together."""
    from cache_tools.arrays import constant_shapes, target_arrays

    recipe = manifest.recipe
    dims = [recipe.fusion.feature_dim]
    dims += [teacher.feature_dim for teacher in recipe.teachers] + [clip.feature_dim for clip in recipe.clips]
    _check(
        where,
        ("classes", len(recipe.dataset.class_names), MAX_WIDTH),
        ("features", max(dims), MAX_WIDTH),
        ("samples", manifest.num_samples, MAX_SAMPLES),
        ("pixels along a side", max(recipe.dataset.image_size), MAX_SIDE),
        ("rows per block", manifest.block_rows, MAX_BLOCK_ROWS),
        ("blocks", manifest.num_views * manifest.num_blocks, MAX_BLOCKS),
    )
    try:
        arrays = target_arrays(recipe, manifest.block_rows)
    except FormatError as error:  # a codec that is not for such rows
        raise FormatError(error.what, where=where, expected=error.expected, found=error.found) from error
    _check(
        where, *((f"bytes in a chunk of {a.name}", a.chunk_rows * a.stored.row_bytes, MAX_CHUNK_BYTES) for a in arrays)
    )
    rows = {name: 4 * math.prod(shape[1:]) for name, shape in constant_shapes(recipe).items()}
    _check(where, *((f"bytes in a row of {name}", count, MAX_CHUNK_BYTES) for name, count in rows.items()))
    for canary in manifest.canaries:
        if not (0 <= canary.view < manifest.num_views and 0 <= canary.index < manifest.num_samples):
            raise FormatError(
                "a canary is outside the cache", where=where, found=f"view {canary.view} of {canary.index}"
            )


def _check(where: object, *counts: tuple[str, int, int]) -> None:
    """Each is (what, how many, the most)."""
    for what, count, most in counts:
        if not 0 < count <= most:
            found = f"{count:,}" if count < 1 << 64 else "far more"
            raise FormatError(f"a cache with so many {what}", where=where, expected=f"1 to {most:,}", found=found)
