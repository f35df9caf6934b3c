"""Open, make or grow the cache that a build goes to. Whoever does so in one place does it alone, others take it over.

The metadata of an object store are those of the builder that was there first: constants that are computed on another
machine may differ in their last bits, and blocks of both must not be mixed.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from cache_tools.errors import FormatError, MismatchError, NotFoundError, StorageError
from cache_tools.files import PARTIAL
from cache_tools.format import commits
from cache_tools.format.arrays import constant_shapes, target_arrays
from cache_tools.format.layout import array_layouts
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.home import registry
from cache_tools.home.staging import stage_metadata
from cache_tools.places import LocalPlace, Place
from cache_tools.places.claims import growing
from cache_tools.places.metadata import copy_metadata, manifest_at
from cache_tools.places.transfer import list_committed
from cache_tools.store.create import constants_digest
from cache_tools.store.group import open_group, read_manifest, read_whole
from cache_tools.store.writer import CacheWriter, check_free
from pipeline.build.destination import Destination
from pipeline.build.output import MirroredOutput, Output


def open_output(
    where: Destination,
    recipe: CacheRecipe,
    num_views: int,
    create: Callable[[Path], CacheWriter],
    grow: Callable[[CacheWriter], CacheWriter],
) -> Output:
    """Open the cache of a recipe where it is to be built, made or grown first if need be.

    Args:
        create: makes the cache in an empty place; may take its time.
        grow: gives a cache more views.

    Raises:
        MismatchError: the cache of another recipe is there, or the mirror of a URL has blocks with other constants.
        StorageError: the place is taken, full, read-only or unreachable.
        FormatError: a damaged cache.
    """
    if where.url is not None:
        return _open_mirrored(where.path, where.place, recipe, num_views, create, grow)
    writer = _open_folder(where.path, recipe.fingerprint, create)
    if writer.manifest.num_views < num_views:
        with growing(where.place):
            writer = grow(CacheWriter.resume(where.path, recipe.fingerprint))  # as another may just have left it
    return Output(writer)


def _open_folder(path: Path, fingerprint: str, create: Callable[[Path], CacheWriter]) -> CacheWriter:
    if not registry.is_cache(path):
        check_free(path)  # before the preflight, not after it
        try:
            return create(path)
        except StorageError:
            if not registry.is_cache(path):
                raise  # else another builder was faster
    return CacheWriter.resume(path, fingerprint)


def _open_mirrored(
    path: Path,
    place: Place,
    recipe: CacheRecipe,
    num_views: int,
    create: Callable[[Path], CacheWriter],
    grow: Callable[[CacheWriter], CacheWriter],
) -> MirroredOutput:
    there, moved = _manifest_at(place, recipe), 0
    if there is None:
        _open_folder(path, recipe.fingerprint, create)  # before anybody has to wait for it
    if there is None or there.num_views < num_views:
        with growing(place), growing(LocalPlace(path)):  # who builds for this machine alone grows the mirror too
            there = _manifest_at(place, recipe)
            if there is not None:
                moved += _adopt(place, path, there)
            writer = CacheWriter.resume(path, recipe.fingerprint)
            if writer.manifest.num_views < num_views:
                writer = grow(writer)
            moved += sum(copy_metadata(LocalPlace(path), place, writer.manifest))
            there = writer.manifest
    else:
        moved += _adopt(place, path, there)
        writer = CacheWriter.resume(path, recipe.fingerprint)
    return MirroredOutput(writer, place, there, moved)


def _manifest_at(place: Place, recipe: CacheRecipe) -> Manifest | None:
    """The manifest of this recipe's cache at an object store; None where there is nothing yet."""
    try:
        manifest = manifest_at(place)
    except NotFoundError:
        names = {"labels", "sample_keys", commits.COMMITS, *constant_shapes(recipe)}
        names |= {spec.name for spec in target_arrays(recipe, 1)}
        if strange := [name for name in place.folders() if name not in names]:
            raise StorageError(
                "cannot make a cache here: the place is taken",
                where=place,
                found=strange[0],
                next_step="choose another",
            ) from None
        return None
    if manifest.fingerprint != recipe.fingerprint:
        raise MismatchError(
            "the cache of another recipe is here",
            where=place,
            expected=f"fingerprint {recipe.fingerprint[:12]}",
            found=manifest.fingerprint[:12],
            next_step="choose another --out: a URL that does not end in .zarr takes caches of any recipe",
        )
    return manifest


def _adopt(place: Place, path: Path, there: Manifest) -> int:
    """Have the mirror say what the object store says: labels, constants, scales, views. Gives the bytes moved."""
    if registry.is_cache(path):
        here, mirror = read_manifest(path), LocalPlace(path)
        if not _mixable(here, there) and list_committed(mirror):
            raise MismatchError(
                "this machine has blocks of the same cache, but with other constants: they must not be mixed",
                where=place,
                expected=f"constants {there.constants_digest[:12]} in blocks of {there.block_rows}",
                found=f"{here.constants_digest[:12]} in blocks of {here.block_rows} in {path}",
                next_step="remove that of this machine (`cache-tools rm`) or push it elsewhere, then run this again",
            )
        if not _mixable(here, there):
            _set_aside(path)
    moved = sum(stage_metadata(place, path, there))
    _check_constants(path, place, there)
    return moved


def _mixable(here: Manifest, there: Manifest) -> bool:
    return (here.block_rows, here.clip_scales, here.constants_digest) == (
        there.block_rows,
        there.clip_scales,
        there.constants_digest,
    )


def _check_constants(path: Path, place: Place, manifest: Manifest) -> None:
    """That the manifest and the constants come from the same builder."""
    layouts = array_layouts(manifest)
    group = open_group(path, layouts)
    constants = {name: read_whole(group, path, name, layouts) for name in constant_shapes(manifest.recipe)}
    if constants_digest(constants) != manifest.constants_digest:
        raise FormatError(
            "constants are damaged, or not those that the cache was made with",
            where=place,
            next_step="remove the cache there and build it again",
        )


def _set_aside(path: Path) -> None:
    """Remove a cache without blocks in one step."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        path.rename(hidden)
    except FileNotFoundError:  # another builder on this machine does the same
        return
    shutil.rmtree(hidden, ignore_errors=True)
