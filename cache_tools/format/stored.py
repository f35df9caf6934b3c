"""The manifest as stored JSON: attributes of the zarr group, with digests, checked before they are used.

`docs/format.md` describes it well enough to write another reader; `arrays.py` lists the arrays. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from cache_tools.errors import FormatError, UnknownFormatError
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import FORMAT_VERSION, canonical_json, recipe_fingerprint
from cache_tools.format.rolling import ROLLING_KEY, Rolling

MANIFEST_KEY = "teacher_cache"
DIGESTS_KEY = "array_digests"

# Limits of a manifest: beyond them it is damaged or hostile.
MAX_DEPTH = 64
MAX_SAMPLES = 1 << 32
MAX_SIDE = 1 << 14
MAX_WIDTH = 1 << 22
MAX_BLOCK_ROWS = 1 << 22
MAX_BLOCKS = 1 << 21
MAX_CHUNK_BYTES = 1 << 30

_DIGEST = re.compile("[0-9a-f]{32}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def group_attributes(manifest: Manifest) -> dict[str, Any]:
    """The attributes of a cache's group: the manifest and, as far as it has them, digests of arrays and `rolling`."""
    digests = {DIGESTS_KEY: dict(sorted(manifest.array_digests.items()))} if manifest.array_digests else {}
    rolling = {} if manifest.rolling is None else {ROLLING_KEY: manifest.rolling.model_dump(mode="json")}
    return {MANIFEST_KEY: manifest_attribute(manifest), **digests, **rolling}


def parse_group(attributes: Any, *, where: str) -> Manifest:
    """Read the attributes of a group, as `group_attributes` made them. Others are ignored.

    Raises:
        UnknownFormatError, FormatError: as `parse_manifest`; or digests that are not those of the cache's arrays, or
            more dropped views than the cache has.
    """
    if not isinstance(attributes, dict):
        raise FormatError("not a teacher cache", where=where, expected="a zarr v3 group with attributes")
    manifest = parse_manifest(attributes.get(MANIFEST_KEY), where=where)
    if ROLLING_KEY in attributes:
        manifest = manifest.model_copy(update={"rolling": _parse_rolling(attributes[ROLLING_KEY], manifest, where)})
    if DIGESTS_KEY not in attributes:
        return manifest
    digests, names = attributes[DIGESTS_KEY], {"labels", "sample_keys", *constant_shapes(manifest.recipe)}
    if not isinstance(digests, dict) or set(digests) != names:
        raise _damaged_digests(where, f"a digest of each of {', '.join(sorted(names))}")
    for name, digest in digests.items():
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _damaged_digests(where, f"32 hex digits for {name}")
    return manifest.model_copy(update={"array_digests": digests})


def manifest_attribute(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON, with a digest over all its fields."""
    fields = manifest.model_dump(mode="json")
    return {"digest": _manifest_digest(fields), **fields}


def parse_manifest(attribute: Any, *, where: str) -> Manifest:
    """Read the `teacher_cache` attribute of a group, as `manifest_attribute` made it.

    Raises:
        UnknownFormatError: another format version, or fields that this version does not know.
        FormatError: no such attribute, a wrong digest or fingerprint, or numbers beyond the limits.
    """
    if not isinstance(attribute, dict):
        raise FormatError(
            "not a teacher cache", where=where, expected=f"a group attribute '{MANIFEST_KEY}'", found="none"
        )
    _check_json(attribute, where=where)
    version = attribute.get("format_version")
    if version != FORMAT_VERSION:
        raise UnknownFormatError(
            "unknown cache format version",
            where=where,
            expected=FORMAT_VERSION,
            found=repr(version)[:40],
            next_step="open it with the teacher-cache version that wrote it, or build it again elsewhere (--out)",
        )
    fields = {key: value for key, value in attribute.items() if key != "digest"}
    if attribute.get("digest") != _manifest_digest(fields):
        raise FormatError(
            "damaged manifest: its digest does not match",
            where=where,
            next_step="restore zarr.json from a copy, or remove the cache and build it again",
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        # The digest matches, so nothing is damaged: another version wrote a field that this one does not know.
        raise UnknownFormatError(
            f"invalid manifest, field '{key}'", where=where, expected=first["msg"], found=repr(first.get("input"))[:80]
        ) from error
    expected = recipe_fingerprint(fields["recipe"])
    if manifest.fingerprint != expected:
        raise FormatError(
            "manifest and fingerprint disagree", where=where, expected=expected[:12], found=manifest.fingerprint[:12]
        )
    check_limits(manifest, where=where)
    return manifest


def text_not_unicode(value: Any, key: str = "") -> tuple[str, str] | None:
    """The dotted key of the first text in plain data that no manifest can hold (half a surrogate pair), and the text.

    Names of files that are not UTF-8 become such text. The text is returned escaped, None if there is none.
    """
    if isinstance(value, str):
        return (key, ascii(value)) if _SURROGATE.search(value) else None
    if isinstance(value, dict):
        names = ((f"{key}.{name}" if key else str(name), inner) for name, inner in value.items())
        return text_not_unicode(list(value), key) or _first_not_unicode(names)
    if isinstance(value, list | tuple):
        return _first_not_unicode((f"{key}.{number}" if key else str(number), v) for number, v in enumerate(value))
    return None


def _first_not_unicode(parts: Iterable[tuple[str, Any]]) -> tuple[str, str] | None:
    return next((found for name, inner in parts if (found := text_not_unicode(inner, name)) is not None), None)


def _parse_rolling(attribute: Any, manifest: Manifest, where: str) -> Rolling:
    try:
        rolling = Rolling.model_validate(attribute)
    except ValidationError as error:
        found = repr(attribute)[:80]
        raise _damaged_rolling(where, error.errors()[0]["msg"], found) from error
    if rolling.dropped > manifest.num_views:
        raise _damaged_rolling(where, f"at most {manifest.num_views} dropped views", rolling.dropped)
    return rolling


def _damaged_rolling(where: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"damaged record of dropped views (attribute '{ROLLING_KEY}')",
        where=where,
        expected=expected,
        found=found,
        next_step="restore zarr.json from a copy, or remove the cache and build it again",
    )


def _damaged_digests(where: str, expected: str) -> FormatError:
    return FormatError(
        f"damaged digests of arrays (attribute '{DIGESTS_KEY}')",
        where=where,
        expected=expected,
        next_step="restore zarr.json from a copy, or remove the cache and build it again",
    )


def check_storable(manifest: Manifest, *, where: object) -> None:
    """Raise FormatError unless `parse_manifest` will read the manifest back, so that no half of a cache is left."""
    attribute = manifest_attribute(manifest)
    if (bad := text_not_unicode(attribute)) is not None:
        key, text = bad
        raise FormatError(
            "text that is not Unicode cannot be stored in a cache", where=f"{key} of the manifest", found=text
        )
    parse_manifest(json.loads(json.dumps(attribute)), where=str(where))


def check_limits(manifest: Manifest, *, where: object) -> None:
    """Raise FormatError unless every number of a manifest is within the limits and its parts fit together."""
    recipe = manifest.recipe
    widths = [recipe.fusion.feature_dim]
    widths += [teacher.feature_dim for teacher in recipe.teachers] + [clip.feature_dim for clip in recipe.clips]
    _check_count("classes", len(recipe.dataset.class_names), MAX_WIDTH, where)
    _check_count("features", max(widths), MAX_WIDTH, where)
    _check_count("samples", manifest.num_samples, MAX_SAMPLES, where)
    _check_count("pixels along a side", max(recipe.dataset.image_size), MAX_SIDE, where)
    _check_count("rows per block", manifest.block_rows, MAX_BLOCK_ROWS, where)
    _check_count("blocks", manifest.num_views * manifest.num_blocks, MAX_BLOCKS, where)
    try:
        arrays = target_arrays(recipe, manifest.block_rows)
    except FormatError as error:  # a codec that cannot store rows of this width
        raise FormatError(error.what, where=where, expected=error.expected, found=error.found) from error
    for array in arrays:
        size = array.chunk_rows * array.stored.row_bytes
        _check_count(f"bytes in a chunk of {array.name}", size, MAX_CHUNK_BYTES, where)
    for name, shape in constant_shapes(recipe).items():
        _check_count(f"bytes in a row of {name}", 4 * math.prod(shape[1:]), MAX_CHUNK_BYTES, where)
    for canary in manifest.canaries:
        if not (0 <= canary.view < manifest.num_views and 0 <= canary.index < manifest.num_samples):
            raise FormatError(
                "a canary is outside the cache", where=where, found=f"view {canary.view} of sample {canary.index}"
            )


def _check_json(value: Any, *, where: str) -> None:
    """Raise FormatError for JSON that is nested too deeply, or text that is not Unicode (half a surrogate pair)."""
    layer, depth = [value], 0
    while layer:
        if depth > MAX_DEPTH:
            raise FormatError("damaged manifest", where=where, expected=f"at most {MAX_DEPTH} levels of nesting")
        texts = [part for part in layer if isinstance(part, str)]
        texts += [key for part in layer if isinstance(part, dict) for key in part]
        if any(_SURROGATE.search(text) for text in texts):
            raise FormatError("damaged manifest", where=where, expected="Unicode text", found="half a surrogate pair")
        layer = [
            inner
            for part in layer
            if isinstance(part, dict | list)
            for inner in (part.values() if isinstance(part, dict) else part)
        ]
        depth += 1


def _check_count(what: str, count: int, most: int, where: object) -> None:
    if not 0 < count <= most:
        found = f"{count:,}" if count < 1 << 64 else "more than 2⁶⁴"
        raise FormatError(f"impossible number of {what}", where=where, expected=f"1 to {most:,}", found=found)


def _manifest_digest(fields: dict[str, Any]) -> str:
    """32 hex digits of blake2b over the canonical JSON; unlike the fingerprint, it covers more than the recipe."""
    return hashlib.blake2b(canonical_json(fields), digest_size=16).hexdigest()
