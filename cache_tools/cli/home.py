"""`cache-tools path, rm, prune, push, pull, copy`: the shared home and other places. Imports neither torch nor zarr."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cache_tools import units
from cache_tools.console import command
from cache_tools.errors import FormatError, NotFoundError, StorageError, UnknownFormatError
from cache_tools.files import find_leftovers
from cache_tools.home import housekeeping, registry
from cache_tools.home.sizes import size_and_time
from cache_tools.places import LocalPlace, Place, is_remote, local_folder, open_place
from cache_tools.units import human_bytes

Reference = Annotated[str, typer.Argument(metavar="CACHE", help="A path, a name, or 4+ digits of a fingerprint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it. Without this only what would be done is shown.")]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `cache-tools`."""
    commands: dict[str, Callable[..., None]] = {
        "path": path_command,
        "rm": rm_command,
        "prune": prune_command,
        "push": push_command,
        "pull": pull_command,
        "copy": copy_command,
    }
    for name, function in commands.items():
        app.command(name)(command(function))


def path_command(reference: Reference) -> None:
    """Print the folder of a cache."""
    print(registry.resolve(reference))


def rm_command(
    references: Annotated[list[str], typer.Argument(metavar="CACHE…", help="Paths, names or fingerprints.")],
    yes: Yes = False,
) -> None:
    """Remove caches. Shows what would go; --yes removes it."""
    for reference in references:
        if is_remote(reference):
            raise StorageError(
                "only caches on a local disk are removed",
                where=reference,
                next_step="remove it with the tools of the object store, such as `aws s3 rm --recursive`",
            )
    records = [registry.record(registry.resolve(reference)) for reference in references]
    for record in records:
        print(f"{'removing' if yes else 'would remove'} {_what_goes(record)}")
        if yes:
            housekeeping.remove(record.path)
    if not yes:
        print("Nothing was removed: add --yes.")


def prune_command(
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Last written longer ago than this: 30d, 12h, 2w.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option("--unused-for", help="Last trained from or built longer ago than this.")
    ] = None,
    keep_size: Annotated[
        str | None, typer.Option("--keep-size", help="Least recently used ones, until the rest is no larger: 100GB.")
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Half-built, damaged and partly staged ones.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove caches of the home by age, use, size or state. Shows what would go; --yes removes it."""
    rules = housekeeping.PruneRules(
        older_than_s=None if older_than is None else units.seconds(older_than),
        unused_for_s=None if unused_for is None else units.seconds(unused_for),
        keep_bytes=None if keep_size is None else units.num_bytes(keep_size),
        incomplete=incomplete,
    )
    records = registry.list_caches()
    found = housekeeping.candidates(records, rules)
    going = [candidate for candidate in found if candidate.kept_because is None]
    left = {path: size_and_time(path)[0] for path in find_leftovers(registry.cache_home())} if incomplete else {}
    if yes:
        for candidate in going:
            housekeeping.remove(candidate.record.path)
        housekeeping.remove_leftovers(left)
    freed = sum(candidate.record.size_bytes for candidate in going) + sum(left.values())
    if as_json:
        caches = [candidate.model_dump(mode="json") for candidate in found]
        _print_json({"removed": yes, "bytes": freed, "caches": caches, "leftovers": [str(path) for path in left]})
        return
    for candidate in found:
        kept = candidate.kept_because
        verb = f"keeping ({kept})" if kept else "removed" if yes else "would remove"
        size = human_bytes(candidate.record.size_bytes)
        print(f"{verb} {candidate.record.path} ({size}; {candidate.reason})")
    for path, size_bytes in left.items():
        print(f"{'removed' if yes else 'would remove'} {path} ({human_bytes(size_bytes)}; left by a killed command)")
    if rules == housekeeping.PruneRules():
        print("No rule given, so nothing goes: --older-than, --unused-for, --keep-size, --incomplete.")
    else:
        print(
            f"{len(going)} caches, {human_bytes(freed)}"
            + ("" if yes or not (going or left) else ". Add --yes to remove them.")
        )
    staying = housekeeping.bytes_left(records, {candidate.record.path for candidate in going})
    if rules.keep_bytes is not None and staying > rules.keep_bytes:
        print(f"The home is still larger than --keep-size: what is kept takes {human_bytes(staying)}.")


def push_command(
    reference: Reference,
    target: Annotated[str, typer.Argument(help="s3://…, gs://…, az://…, or a folder: of caches, or ending in .zarr.")],
    as_json: AsJson = False,
) -> None:
    """Copy a cache to another place: only what is missing there, checked.

    Interrupt it at any time: the same command goes on, and brings a copy up to date later.
    """
    source = registry.resolve(reference)
    _copy(LocalPlace(source), _target(target, source.name), "push", as_json)


def pull_command(
    source: Annotated[str, typer.Argument(help="URL or folder of the cache.")],
    out: Annotated[
        str | None, typer.Option("--out", help="A folder: of caches, or ending in .zarr. Default: the cache home.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a cache from another place into the cache home: only what is missing, checked."""
    from cache_tools.places.metadata import manifest_at

    place = open_place(source)
    manifest = manifest_at(place)
    target = local_folder(out)
    if target is None or not _is_one(LocalPlace(target)):
        home = registry.cache_path(manifest.name, manifest.fingerprint)
        target = home if target is None else target / home.name
    _copy(place, LocalPlace(target), "pull", as_json)


def copy_command(
    source: Annotated[str, typer.Argument(help="URL or folder of the cache.")],
    target: Annotated[str, typer.Argument(help="URL or folder: of caches, or ending in .zarr.")],
    as_json: AsJson = False,
) -> None:
    """Copy a cache between any two places: only what is missing, checked."""
    place = open_place(source) if is_remote(source) else LocalPlace(registry.resolve(source))
    _copy(place, _target(target, place.name), "copy", as_json)


def _target(target: str, name: str) -> Place:
    """The place itself if it is one for a single cache, else a cache of this name inside it."""
    place = open_place(target)
    return place if _is_one(place) else place.child(name)


def _is_one(place: Place) -> bool:
    """Whether a place is named as a cache, or is one; other zarr groups are folders as any."""
    from cache_tools.places.metadata import manifest_at

    if place.name.endswith(registry.SUFFIX):
        return True
    try:
        manifest_at(place)
    except (NotFoundError, FormatError) as error:
        return isinstance(error, UnknownFormatError)
    return True


def _copy(source: Place, target: Place, title: str, as_json: bool) -> None:
    from cache_tools.places.transfer import copy_cache

    moved = copy_cache(source, target, title=title)
    if as_json:
        _print_json(moved.model_dump(mode="json"))
        return
    print(f"{moved.source} → {moved.target}")
    print(f"{moved.blocks} blocks copied, {moved.blocks_there} were there, {human_bytes(moved.bytes)} moved")
    if moved.blocks_missing:
        print(f"{moved.blocks_missing} blocks are not built yet: run this again when they are")


def _what_goes(record: registry.CacheRecord) -> str:
    if record.path.is_symlink():
        return f"the link {record.path} (the cache stays where it is, in {record.path.resolve()})"
    return f"{record.path} ({human_bytes(record.size_bytes)})"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
