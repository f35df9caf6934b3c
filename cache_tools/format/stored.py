"""The manifest as it is stored: the attribute of a zarr group, with a digest, checked before it is believed.

`docs/format.md` says the same in prose, enough to write another reader; `arrays.py` says which arrays there are.
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cache_tools.errors import FormatError, UnknownFormatError
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import FORMAT_VERSION, canonical_json, recipe_fingerprint

if TYPE_CHECKING:
    from cache_tools.format.manifest import Manifest


MANIFEST_KEY = "teacher_cache"


def manifest_attribute(manifest: Manifest) -> dict[str, Any]:
    """The manifest as it is stored: plain JSON with a digest over everything else in it."""
    fields = manifest.model_dump(mode="json")
    return {"digest": _manifest_digest(fields), **fields}


def parse_manifest(attribute: Any, *, where: str) -> Manifest:
    """Read the `teacher_cache` attribute of a group, as `manifest_attribute` made it.

    Raises:
        UnknownFormatError: another format version, or fields that this version does not know.
        FormatError: no such attribute, a wrong digest or fingerprint, numbers beyond all limits.
    """
    if not isinstance(attribute, dict):
        raise FormatError(
            "not a teacher cache", where=where, expected=f"a group attribute '{MANIFEST_KEY}'", found="none"
        )
    check_json(attribute, where=where)
    version = attribute.get("format_version")
    if version not in (FORMAT_VERSION, *OLDER_VERSIONS):
        raise UnknownFormatError(
            "unknown cache format version",
            where=where,
            expected=f"{FORMAT_VERSION}, or {' or '.join(map(str, OLDER_VERSIONS))} (read-only)",
            found=repr(version)[:40],
            next_step="open it with the teacher-cache version that wrote it, or build it again elsewhere (--out)",
        )
    fields = {key: value for key, value in attribute.items() if key != "digest"}
    if attribute.get("digest") != _manifest_digest(fields):
        raise FormatError(
            "damaged manifest: it is not what its digest says",
            where=where,
            next_step="restore zarr.json from a copy, or remove the cache and build it again",
        )
    try:
        expected = recipe_fingerprint(version, fields.get("recipe"))
        manifest = Manifest.model_validate(modernised(fields) if version in OLDER_VERSIONS else fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UnknownFormatError(  # its digest is right: what it says is what somebody wrote
            f"damaged manifest, field '{key}'", where=where, expected=first["msg"], found=repr(first.get("input"))[:80]
        ) from error
    if manifest.fingerprint != expected:
        raise FormatError(
            "manifest and fingerprint disagree", where=where, expected=expected[:12], found=manifest.fingerprint[:12]
        )
    check_limits(manifest, where=where)
    return manifest


def _manifest_digest(fields: dict[str, Any]) -> str:
    """32 hex digits of blake2b over the canonical JSON; the fingerprint covers the recipe only."""
    return hashlib.blake2b(canonical_json(fields), digest_size=16).hexdigest()


OLDER_VERSIONS = (1,)


def modernised(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an older manifest under today's names; `format_version` and `fingerprint` stay what they were.

    Fields that are missing or wrong are left for validation to find.
    """
    recipe = fields.get("recipe")
    if not isinstance(recipe, dict) or "dtype" not in recipe or "codecs" in recipe:
        return fields
    codec = {"codec": recipe["dtype"]}
    newer = {key: value for key, value in recipe.items() if key != "dtype"}
    return {**fields, "recipe": {**newer, "codecs": {"logits": codec, "features": codec}}}


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
    from cache_tools.format.arrays import constant_shapes, target_arrays

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
