"""The metadata of caches at places: read a manifest, compare two, copy everything except blocks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cache_tools.console import Progress
from cache_tools.errors import FormatError, MismatchError, NotFoundError, StorageError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest, has_compiled
from cache_tools.format.stored import parse_group
from cache_tools.places import Place
from cache_tools.places.arrays import GROUP, WORKERS, check_metadata, read_file, read_metadata, read_whole_arrays


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
    return _parse(text, place)


def lacks_metadata(target: Place, manifest: Manifest) -> bool:
    """Whether `target` has no cache yet, or one with fewer views in its manifest.

    Raises:
        MismatchError: another cache at `target` (`check_same`).
    """
    existing = _existing(target, manifest)
    return existing is None or existing.num_views < manifest.num_views


def copy_metadata(source: Place, target: Place, manifest: Manifest) -> list[int]:
    """Copy everything except blocks, if the target `lacks_metadata`; the group's zarr.json is written last.

    What is copied has been checked: metadata are those that the manifest requires, and labels, sample keys and
    constants have the digests that are stored with them.

    Returns:
        sizes of the files written.

    Raises:
        FormatError: metadata or an array at `source` is missing or damaged; names it.
        MismatchError: another cache at `target`, or the same one in blocks of another size.
        StorageError: something that is no cache at `target`, or storage that is full, read-only or unreachable.
    """
    existing = _existing(target, manifest)
    if existing is not None and existing.num_views >= manifest.num_views:
        return []
    layouts, expected = array_layouts(manifest), _metadata_files(manifest)
    if existing is None:
        _check_free(target, layouts)
    sizes: list[int] = []
    wanted = {key: content for key, content in expected.items() if key != GROUP}
    if existing is not None:  # constants are there
        wanted = {key: content for key, content in wanted.items() if layouts[key.partition("/")[0]].has_views}
    with ThreadPoolExecutor(WORKERS) as pool, Progress("metadata", len(layouts), "arrays") as progress:

        def put(files: Mapping[str, bytes], arrays: int) -> None:
            sizes.extend(pool.map(lambda key: _put(target, key, files[key]), files))
            progress.advance(arrays, f"{sum(sizes) / 1e6:,.1f} MB")

        if existing is None:
            for array in read_whole_arrays(source, manifest):
                put(array.files, 1)
        put(read_metadata(source, wanted), len(layouts) - progress.done)
    group = read_file(source, GROUP, MAX_METADATA_BYTES)
    latest = _parse(group, source)
    if latest != manifest:  # changed meanwhile: the cache has grown, or has another test split
        return sizes + copy_metadata(source, target, latest)
    check_metadata(source, GROUP, group, expected[GROUP])
    if existing is not None and existing.array_digests and manifest.array_digests not in ({}, existing.array_digests):
        raise FormatError(
            "the digests of labels, sample keys or constants differ from those at the target",
            where=f"{source}/{GROUP}",
            next_step="`cache-tools verify` both caches, and `repair` the damaged one",
        )
    if target.put(GROUP, group, only_new=existing is None):
        return [*sizes, len(group)]
    return sizes + copy_metadata(source, target, manifest)  # another process was faster: is it the same cache?


def restore_metadata(source: Place, target: Place, damaged: Collection[str]) -> list[int]:
    """Replace what is damaged of the cache at `target` by what the same cache at `source` has.

    Args:
        damaged: keys of `damaged_metadata` of the target.

    Returns:
        sizes of the files written.

    Raises:
        FormatError: the source is damaged, too; nothing is written then.
        StorageError: storage that is full, read-only or unreachable.
    """
    manifest, existing = manifest_at(source), manifest_at(target)
    check_same(existing, manifest, target)
    arrays = list(read_whole_arrays(source, manifest))
    fitting = existing.model_copy(update={"array_digests": {array.name: array.digest for array in arrays}})
    files: dict[str, bytes] = {}
    for array in arrays:
        files |= array.files if array.name in damaged else {}
    for key, content in _metadata_files(fitting).items():
        if key.removesuffix(f"/{GROUP}") in damaged:
            files[key] = json.dumps(content, indent=2).encode()
    return [_put(target, key, data) for key, data in files.items()]


def refresh_test_split(target: Place, manifest: Manifest) -> list[int]:
    """Give the cache at `target` the test splits of the same cache elsewhere, in which they may have been corrected.

    Call it only while no other process changes the manifest at `target` (`places.claims.growing`).

    Returns:
        sizes of the files written; empty if the test splits are the same.

    Raises:
        StorageError: storage that is full, read-only or unreachable.
    """
    existing = manifest_at(target)
    if existing.dataset.test_split == manifest.dataset.test_split:
        return []
    folders = manifest.provenance.get("folders")
    fitting = existing.with_test_split(manifest.dataset.test_split, manifest.preflight, folders)
    return [_put(target, GROUP, json.dumps(_metadata_files(fitting)[GROUP], indent=2).encode())]


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
    if has_compiled(existing) != has_compiled(manifest):
        raise MismatchError(
            f"the same cache is at the target, but built with {'compiled' if has_compiled(existing) else 'plain'} "
            "networks: blocks of both must not be mixed",
            where=target,
            expected=f"--compile {'model' if has_compiled(manifest) else 'off'}",
            found=f"--compile {'model' if has_compiled(existing) else 'off'}",
            next_step="use that cache (pull it), choose another target, or remove it first",
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


def _put(target: Place, key: str, data: bytes) -> int:
    target.put(key, data)
    return len(data)


def _parse(group: bytes, place: Place) -> Manifest:
    """The manifest in the bytes of a group's zarr.json."""
    try:
        attributes = json.loads(group)["attributes"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError("not a teacher cache, or a damaged one", where=f"{place}/{GROUP}") from error
    return parse_group(attributes, where=str(place))


def _metadata_files(manifest: Manifest) -> dict[str, Any]:
    from cache_tools.store.create import metadata_files  # imports zarr

    return metadata_files(manifest)


def _constants(manifest: Manifest) -> str:
    scales = ", ".join(f"{scale:.17g}" for scale in manifest.clip_scales)
    return f"{manifest.constants_digest[:12]}, CLIP scales {scales}"
