"""Open, create or grow the cache that a build writes to. One builder at a time does so; the others use its result.

The first builder determines the metadata in an object store. Constants that another machine computes may differ in
their last bits, and blocks computed with different constants must not be mixed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cache_tools.errors import MismatchError, NotFoundError, StorageError
from cache_tools.files import PARTIAL, remove_leftover
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.manifest import Manifest, has_compiled
from cache_tools.format.recipe import CacheRecipe
from cache_tools.home import registry
from cache_tools.home.staging import stage_metadata
from cache_tools.places import LocalPlace, Place
from cache_tools.places.claims import growing
from cache_tools.places.metadata import copy_metadata, manifest_at, refresh_test_split
from cache_tools.places.rolling import record_rolling
from cache_tools.places.transfer import list_committed
from cache_tools.store.group import read_manifest
from cache_tools.store.writer import CacheWriter, check_free
from pipeline.build.destination import Destination
from pipeline.build.output import MirroredOutput, Output


def open_output(
    where: Destination,
    recipe: CacheRecipe,
    num_views: int,
    create: Callable[[Path], CacheWriter],
    grow: Callable[[CacheWriter], CacheWriter],
    check: Callable[[Manifest], object],
) -> Output:
    """Open the cache of a recipe for building, and create or grow it first if necessary.

    Args:
        create: creates the cache in an empty place; may take long.
        grow: adds views to a cache.
        check: raises for a mirror that must not be published.

    Raises:
        MismatchError: the cache of another recipe is there, or the mirror of a URL has blocks with other constants.
        StorageError: the place is taken, full, read-only or unreachable.
        FormatError: the cache is damaged.
    """
    if where.url is not None:
        return _open_mirrored(where.path, where.place, recipe, num_views, create, grow, check)
    writer = _open_folder(where.path, recipe, create)
    if writer.manifest.num_views < num_views:
        with growing(where.place):
            writer = grow(CacheWriter.resume(where.path, recipe.fingerprint))  # another builder may just have grown it
    elif not writer.manifest.array_digests:
        with suppress(StorageError), growing(where.place):  # a complete cache may be read-only
            writer = writer.record_digests()
    return Output(writer)


def _open_folder(path: Path, recipe: CacheRecipe, create: Callable[[Path], CacheWriter]) -> CacheWriter:
    if not registry.is_cache(path):
        check_free(path)  # fail before the preflight
        try:
            return create(path)
        except StorageError:
            if not registry.is_cache(path):
                raise  # otherwise another builder was faster
    if (manifest := read_manifest(path)).fingerprint != recipe.fingerprint:
        raise MismatchError(
            "the cache of another recipe is here",
            where=path,
            expected=f"fingerprint {recipe.fingerprint[:12]}",
            found=_what_differs(manifest, recipe),
            next_step="choose another --out, leave out --out, or remove that cache",
        )
    return CacheWriter.resume(path, recipe.fingerprint)


def _what_differs(manifest: Manifest, recipe: CacheRecipe) -> str:
    """The fingerprint of another cache, and the parts of its recipe that differ from this one."""
    stored = manifest.recipe
    parts = [name for name in CacheRecipe.model_fields if getattr(stored, name) != getattr(recipe, name)]
    if stored.dataset.content_digest != recipe.dataset.content_digest:
        counts = f"{stored.dataset.num_samples:,} there, {recipe.dataset.num_samples:,} here"
        parts = [f"images ({counts})" if part == "dataset" else part for part in parts]
    return f"{manifest.fingerprint[:12]}, built with other {', '.join(parts) or 'versions'}"


def _open_mirrored(
    path: Path,
    place: Place,
    recipe: CacheRecipe,
    num_views: int,
    create: Callable[[Path], CacheWriter],
    grow: Callable[[CacheWriter], CacheWriter],
    check: Callable[[Manifest], object],
) -> MirroredOutput:
    manifest, moved = _manifest_at(place, recipe), 0
    if manifest is None:
        _open_folder(path, recipe, create)  # takes long, so not while other builders wait for the claim
    if manifest is None or manifest.num_views < num_views:
        with growing(place), growing(LocalPlace(path)):  # a build for this machine alone may grow the mirror too
            manifest = _manifest_at(place, recipe)
            if manifest is not None:
                moved += _adopt(place, path, manifest)
                moved += sum(refresh_test_split(LocalPlace(path), manifest))
                _refresh_rolling(path, manifest)
            writer = CacheWriter.resume(path, recipe.fingerprint)
            check(writer.manifest)
            if writer.manifest.num_views < num_views:
                writer = grow(writer)
            manifest = writer.manifest
            moved += sum(copy_metadata(LocalPlace(path), place, manifest))
    else:
        moved += _adopt(place, path, manifest)
        local = read_manifest(path)
        if (local.dataset.test_split, local.rolling) != (manifest.dataset.test_split, manifest.rolling):
            with growing(LocalPlace(path)):
                moved += sum(refresh_test_split(LocalPlace(path), manifest))
                _refresh_rolling(path, manifest)
        writer = CacheWriter.resume(path, recipe.fingerprint)
    return MirroredOutput(writer, place, manifest, moved)


def _manifest_at(place: Place, recipe: CacheRecipe) -> Manifest | None:
    """The manifest of this recipe's cache in an object store; None if there is nothing yet."""
    try:
        manifest = manifest_at(place)
    except NotFoundError:
        names = {"labels", "sample_keys", commits.COMMITS, *constant_shapes(recipe)}
        names |= {spec.name for spec in target_arrays(recipe, 1)}
        if others := [name for name in place.folders() if name not in names]:
            raise StorageError(
                "cannot create a cache: the place is taken",
                where=place,
                found=others[0],
                next_step="choose another",
            ) from None
        return None
    if manifest.fingerprint != recipe.fingerprint:
        raise MismatchError(
            "the cache of another recipe is here",
            where=place,
            expected=f"fingerprint {recipe.fingerprint[:12]}",
            found=_what_differs(manifest, recipe),
            next_step="choose another --out: a URL that does not end in .zarr holds caches of any recipe",
        )
    return manifest


def _adopt(place: Place, path: Path, manifest: Manifest) -> int:
    """Copy the object store's metadata (labels, constants, scales, views) to the mirror; return the bytes moved.

    A mirror without blocks whose constants differ is removed first.
    """
    if registry.is_cache(path):
        local, mirror = read_manifest(path), LocalPlace(path)
        if not _can_mix(local, manifest) and list_committed(mirror):
            raise MismatchError(
                "this machine has blocks of the same cache, but with other constants: they must not be mixed"
                if has_compiled(local) == has_compiled(manifest)
                else f"this machine has blocks of the same cache, but from {_kind(local)} networks, and those of the "
                f"store are from {_kind(manifest)} ones: they must not be mixed",
                where=place,
                expected=_described(manifest),
                found=f"{_described(local)} in {path}",
                next_step="remove the local cache (`cache-tools rm`) or push it elsewhere, then run this again",
            )
        if not _can_mix(local, manifest):
            _remove(path)
    moved = sum(stage_metadata(place, path, manifest))
    return moved


def _refresh_rolling(path: Path, manifest: Manifest) -> None:
    """Give a mirror the record of dropped views of the cache in the store, where other builders drop them too."""
    if manifest.rolling is not None and read_manifest(path).rolling != manifest.rolling:
        record_rolling(LocalPlace(path), manifest.rolling)


def _can_mix(one: Manifest, other: Manifest) -> bool:
    """Whether blocks of two caches of the same recipe may be mixed."""
    return _shared(one) == _shared(other)


def _kind(manifest: Manifest) -> str:
    return "compiled" if has_compiled(manifest) else "plain"


def _described(manifest: Manifest) -> str:
    compiled = " by compiled networks" if has_compiled(manifest) else ""
    return f"constants {manifest.constants_digest[:12]} in blocks of {manifest.block_rows}{compiled}"


def _shared(manifest: Manifest) -> tuple[object, ...]:
    """What all blocks of a cache have in common, beside its recipe."""
    return manifest.block_rows, manifest.clip_scales, manifest.constants_digest, has_compiled(manifest)


def _remove(path: Path) -> None:
    """Remove a cache without blocks, atomically."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.rename(hidden)
    except FileNotFoundError:  # another builder on this machine has removed it
        return
    with suppress(OSError):
        remove_leftover(hidden)
