"""`cache-tools push, pull, copy`: copy caches between folders and object stores. Imports neither torch nor zarr."""

from __future__ import annotations

from typing import Annotated

import typer

from cache_tools.cli.options import AsJson, LocalCache, SourcePlace, TargetPlace
from cache_tools.console import print_json, print_line, print_next
from cache_tools.errors import FormatError, NotFoundError, UnknownFormatError
from cache_tools.home import registry
from cache_tools.places import LocalPlace, Place, is_remote, local_folder, open_place
from cache_tools.units import human_bytes


def push_command(reference: LocalCache, target: TargetPlace, as_json: AsJson = False) -> None:
    """Copy a cache to another place: only what is missing there. What is copied is checked on the way.

    You can interrupt it: the same command continues. Run it again to bring a copy up to date.
    """
    source = registry.resolve(reference)
    _copy(LocalPlace(source), _cache_place(target, source.name), "push", as_json)


def pull_command(
    source: SourcePlace,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Folder. If it ends in .zarr it becomes the copy, else the copy goes inside. Default: the cache home.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a cache from another place into the cache home. Only what is missing here is copied, checked on the way."""
    from cache_tools.places.metadata import manifest_at

    place = open_place(source)
    manifest = manifest_at(place)
    target = local_folder(out)
    if target is None or not _is_one_cache(LocalPlace(target)):
        home = registry.cache_path(manifest.name, manifest.fingerprint)
        target = home if target is None else target / home.name
    _copy(place, LocalPlace(target), "pull", as_json)


def copy_command(source: SourcePlace, target: TargetPlace, as_json: AsJson = False) -> None:
    """Copy a cache between any two places. Only what is missing at the target is copied, checked on the way."""
    place = open_place(source) if is_remote(source) else LocalPlace(registry.resolve(source))
    _copy(place, _cache_place(target, place.name), "copy", as_json)


def _copy(source: Place, target: Place, title: str, as_json: bool) -> None:
    from cache_tools.places.transfer import copy_cache

    done = copy_cache(source, target, title=title)
    if as_json:
        print_json(done.model_dump(mode="json"))
        return
    print_line(f"{done.source} → {done.target}")
    print_line(f"{done.blocks} blocks copied, {done.blocks_there} already there, {human_bytes(done.bytes)} written")
    if done.restored:
        print_line(f"damaged at the target, replaced: {', '.join(done.restored)}")
    if done.blocks_missing:
        print_line(f"{done.blocks_missing} blocks are not built yet: run this again when they are")
    elif title == "pull":
        print_next("train-student", "--cache", done.target)
    else:
        print_next("cache-tools", "verify", done.target)


def _cache_place(target: str, name: str) -> Place:
    """The target itself if it is to be one cache, else the cache `name` inside it."""
    place = open_place(target)
    return place if _is_one_cache(place) else place.child(name)


def _is_one_cache(place: Place) -> bool:
    """Whether a place is a cache or is named like one; any other zarr group counts as a folder of caches."""
    from cache_tools.places.metadata import manifest_at

    if place.name.endswith(registry.SUFFIX):
        return True
    try:
        manifest_at(place)
    except (NotFoundError, FormatError) as error:
        return isinstance(error, UnknownFormatError)
    return True
