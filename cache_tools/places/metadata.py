"""The metadata of caches at places: read a manifest, compare two, copy everything except blocks."""

from __future__ import annotations

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from cache_tools.console import Progress
from cache_tools.errors import FormatError, MismatchError, NotFoundError, StorageError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.arrays import constant_shapes
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import MANIFEST_KEY, parse_manifest
from cache_tools.places import Place

GROUP = "zarr.json"
WORKERS = 8


def manifest_at(place: Place) -> Manifest:
    """Read the manifest of the cache at a place.

    Raises:
        NotFoundError: no cache there.
        FormatError: a damaged cache, or something that is not a cache.
    """
    try:
        text = place.read(GROUP, MAX_METADATA_BYTES)
    except FileNotFoundError as error:
        raise NotFoundError("no cache here", where=place, next_step="check the path or URL") from error
    try:
        attributes = json.loads(text)["attributes"][MANIFEST_KEY]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("not a teacher cache, or a damaged one", where=f"{place}/{GROUP}") from error
    return parse_manifest(attributes, where=str(place))


def lacks_metadata(target: Place, manifest: Manifest) -> bool:
    """Whether `target` has no cache yet, or one with fewer views in its manifest.

    Raises:
        MismatchError: another cache at `target` (`check_same`).
    """
    existing = _existing(target, manifest)
    return existing is None or existing.num_views < manifest.num_views


def copy_metadata(source: Place, target: Place, manifest: Manifest) -> list[int]:
    """Copy everything except blocks, if the target `lacks_metadata`; the group's zarr.json is written last.

    Returns:
        sizes of the files written.

    Raises:
        MismatchError: another cache at `target`, or the same one in blocks of another size.
        StorageError: something that is no cache at `target`, or storage that is full, read-only or unreachable.
    """
    existing = _existing(target, manifest)
    if existing is not None and existing.num_views >= manifest.num_views:
        return []
    layouts, whole = array_layouts(manifest), ("labels", "sample_keys", *constant_shapes(manifest.recipe))
    if existing is None:
        _check_free(target, layouts)
    keys = {f"{name}/{GROUP}": MAX_METADATA_BYTES for name in layouts if existing is None or name not in whole}
    if existing is None:
        keys |= {
            f"{name}/{chunk}": layouts[name].max_file_bytes for name in whole for chunk in layouts[name].chunk_names
        }
    sizes = []
    with ThreadPoolExecutor(WORKERS) as pool, Progress("metadata", len(keys), "files") as progress:
        for size in pool.map(lambda key: _copy_file(source, target, key, keys[key]), keys):
            sizes.append(size)
            progress.advance(1, f"{sum(sizes) / 1e6:,.1f} MB")
    group = read_file(source, GROUP, MAX_METADATA_BYTES)
    if target.put(GROUP, group, only_new=existing is None):
        return [*sizes, len(group)]
    return sizes + copy_metadata(source, target, manifest)  # another process was faster: is it the same cache?


def check_same(existing: Manifest, manifest: Manifest, target: Place) -> None:
    """Raise MismatchError unless blocks of the two caches may be mixed."""
    if existing.fingerprint != manifest.fingerprint:
        raise MismatchError(
            "another cache is at the target",
            where=target,
            expected=f"nothing, or fingerprint {manifest.fingerprint[:12]}",
            found=existing.fingerprint[:12],
            next_step="choose another target",
        )
    if existing.block_rows != manifest.block_rows:
        raise MismatchError(
            "the same cache is at the target, in blocks of another size",
            where=target,
            expected=f"{manifest.block_rows} rows per block",
            found=existing.block_rows,
            next_step="choose another target, or remove that cache first",
        )
    if _constants(existing) != _constants(manifest):
        raise MismatchError(
            "the same cache is at the target, from another build: its constants or CLIP scales differ in their last "
            "bits, and blocks of both must not be mixed",
            where=target,
            expected=f"constants {_constants(manifest)}",
            found=_constants(existing),
            next_step="use that cache (pull it), choose another target, or remove it first",
        )


def read_file(source: Place, key: str, limit: int) -> bytes:
    """Read a file that a cache must have, of at most `limit` bytes.

    Raises:
        FormatError: missing or larger.
    """
    try:
        return source.read(key, limit)
    except FileNotFoundError as error:
        raise FormatError("missing file", where=f"{source}/{key}", next_step="build the cache again") from error


def _existing(target: Place, manifest: Manifest) -> Manifest | None:
    """The manifest of the cache at `target`, checked to be the same cache; None if there is none."""
    try:
        existing = manifest_at(target)
    except NotFoundError:
        return None
    check_same(existing, manifest, target)
    return existing


def _check_free(target: Place, names: Collection[str]) -> None:
    """Raise StorageError unless `target` is empty or has an interrupted copy of these arrays."""
    try:
        unknown = [name for name in target.folders() if name not in names]
    except FileNotFoundError:
        return
    if unknown:
        raise StorageError(
            "cannot put a cache here: the place is taken",
            where=target,
            found=unknown[0],
            next_step="choose another target",
        )


def _copy_file(source: Place, target: Place, key: str, limit: int) -> int:
    data = read_file(source, key, limit)
    target.put(key, data)
    return len(data)


def _constants(manifest: Manifest) -> str:
    scales = ", ".join(f"{scale:.17g}" for scale in manifest.clip_scales)
    return f"{manifest.constants_digest[:12]}, CLIP scales {scales}"
