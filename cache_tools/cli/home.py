"""`cache-tools ls, info, path, rm, prune`: the caches of the cache home. Imports neither torch nor zarr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools import units
from cache_tools.cli.options import AsJson, Cache, LocalCache, Yes
from cache_tools.cli.table import print_table
from cache_tools.console import print_json, print_line, print_next
from cache_tools.errors import StorageError
from cache_tools.home import registry
from cache_tools.home.listing import Filters, RemoteRecord, list_remote
from cache_tools.places import LocalPlace, is_remote, open_place
from cache_tools.units import human_bytes

if TYPE_CHECKING:
    from cache_tools.home.housekeeping import Pruned, PruneRules


def list_command(
    where: Annotated[
        str | None,
        typer.Argument(help="A folder of caches, or its URL (s3://…, gs://…, az://…). Default: the cache home."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Only caches with this in their name; * and ? are wildcards.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Only caches with this in DATASET/SPLIT.")] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Only caches with this in the teacher's name.")
    ] = None,
    complete: Annotated[
        bool | None, typer.Option("--complete/--incomplete", help="Only caches with all views, or only the others.")
    ] = None,
    larger_than: Annotated[
        str | None, typer.Option("--larger-than", help="Only caches larger than this: 500MB, 10GB.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option("--unused-for", help="Only caches not trained from or built for this long: 30d, 12h.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the caches of the cache home, a folder or a bucket.

    The cache home is $TEACHER_CACHE_HOME, or ~/.cache/teacher-cache.
    """
    filters = Filters(
        name=name,
        dataset=dataset,
        teacher=teacher,
        complete=complete,
        larger_than=None if larger_than is None else units.num_bytes(larger_than),
        unused_for_s=None if unused_for is None else units.seconds(unused_for),
    )
    place = LocalPlace(registry.cache_home()) if where is None else open_place(where)
    records: list[registry.CacheRecord] | list[RemoteRecord]
    if isinstance(place, LocalPlace):
        records = filters.apply(registry.list_caches(None if where is None else place.path, indexed=True))
    else:
        records = filters.apply(list_remote(place))
    if as_json:
        print_json([record.to_json() | {"complete": record.complete} for record in records])
    elif records:
        print_table(records)
        _print_next_of_list(records)
    elif filters == Filters():
        print_line(f"No caches in {place}. Run `build-cache` to make one.")
    else:
        print_line(f"No cache in {place} matches.")


def _print_next_of_list(records: Sequence[registry.CacheRecord] | Sequence[RemoteRecord]) -> None:
    """A command for one of the caches, on standard error: scripts read the list line by line."""
    named = [registry.cache_home() / f"{record.name}-{record.fingerprint[:12]}{registry.SUFFIX}" for record in records]
    places = [record.path if isinstance(record, registry.CacheRecord) else record.url for record in records]
    for record, place, usual in zip(records, places, named, strict=True):
        if not record.problem:
            alone = sum(other.name == record.name for other in records) == 1
            print_next("cache-tools", "info", record.name if alone and place == usual else place, file=sys.stderr)
            return
    print_next("cache-tools", "verify", places[0], file=sys.stderr)


def info_command(reference: Cache, as_json: AsJson = False) -> None:
    """Show the recipe, size, progress and provenance of a cache. Of a remote cache, nothing is staged."""
    from cache_tools.cli import describe

    if is_remote(reference):
        details = describe.describe_remote(open_place(reference))
    else:
        details = describe.describe(registry.resolve(reference))
    if as_json:
        print_json(details.model_dump(mode="json"))
    else:
        describe.print_details(details)
        record = details.record
        trainable = details.manifest.recipe.views.made_by is None
        if trainable and (record.complete or not isinstance(record, registry.CacheRecord) or record.origin is not None):
            loss = ("--loss", "bce") if details.manifest.recipe.dataset.multi_label else ()
            print_next("train-student", *loss, "--cache", reference, file=sys.stderr)


def path_command(reference: LocalCache) -> None:
    """Print the folder of a cache."""
    print_line(str(registry.resolve(reference)))


def rm_command(
    references: Annotated[list[str], typer.Argument(metavar="CACHE…", help="Paths, names or fingerprints.")],
    yes: Yes = False,
) -> None:
    """Remove caches. Without --yes, only show what would be removed."""
    from cache_tools.home import housekeeping

    for reference in references:
        if is_remote(reference):
            raise StorageError(
                "only caches on a local disk are removed",
                where=reference,
                next_step="remove it with the tools of the object store, such as `aws s3 rm --recursive`",
            )
    for record in [registry.read_record(registry.resolve(reference)) for reference in references]:
        if record.path.is_symlink():
            what = f"the link {record.path} (the cache stays where it is, in {record.path.resolve()})"
        else:
            what = f"{record.path} ({human_bytes(record.size_bytes)})"
        print_line(f"{'removing' if yes else 'would remove'} {what}")
        if yes:
            housekeeping.remove(record.path)
    if yes:
        print_next("cache-tools", "ls")
    else:
        print("Nothing was removed: add --yes.")
        print_next("cache-tools", "rm", *references, "--yes")


def prune_command(
    older_than: Annotated[
        str | None, typer.Option("--older-than", help="Caches last written longer ago than this: 30d, 12h, 2w.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option("--unused-for", help="Caches last trained from or built longer ago than this.")
    ] = None,
    keep_size: Annotated[
        str | None,
        typer.Option("--keep-size", help="The least recently used caches, until the rest is no larger: 100GB."),
    ] = None,
    incomplete: Annotated[
        bool, typer.Option("--incomplete", help="Half-built, damaged and partly staged caches.")
    ] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Remove caches of the cache home by age, use, size or state. Without --yes, only show what would be removed.

    --older-than and --unused-for also remove copies of images that no command has read for that long: images unpacked
    from Parquet files, tar shards of object stores, and decoded pixels. They are made again when they are needed.
    """
    from cache_tools.home import housekeeping

    rules = housekeeping.PruneRules(
        older_than_s=None if older_than is None else units.seconds(older_than),
        unused_for_s=None if unused_for is None else units.seconds(unused_for),
        keep_bytes=None if keep_size is None else units.num_bytes(keep_size),
        incomplete=incomplete,
    )
    pruned = housekeeping.prune(rules, dry_run=not yes)
    if as_json:
        caches = [candidate.model_dump(mode="json") for candidate in pruned.candidates]
        leftovers = [str(path) for path in pruned.leftovers]
        copies = [str(path) for path in pruned.image_copies]
        print_json(
            {
                "removed": yes,
                "bytes": pruned.bytes_freed,
                "caches": caches,
                "leftovers": leftovers,
                "image_copies": copies,
            }
        )
        return
    _print_pruned(pruned, rules, dry_run=not yes)
    given = {"--older-than": older_than, "--unused-for": unused_for, "--keep-size": keep_size}
    words = [word for option, value in given.items() if value is not None for word in (option, value)]
    words += ["--incomplete"] if incomplete else []
    if not words:
        print_next("cache-tools", "prune", "--unused-for", "60d")
    elif yes or not (pruned.removed or pruned.leftovers or pruned.image_copies):
        print_next("cache-tools", "ls")
    else:
        print_next("cache-tools", "prune", *words, "--yes")


def _print_pruned(pruned: Pruned, rules: PruneRules, *, dry_run: bool) -> None:
    removed = "would remove" if dry_run else "removed"
    for candidate in pruned.candidates:
        verb = removed if candidate.kept_because is None else f"keeping ({candidate.kept_because})"
        print_line(f"{verb} {candidate.record.path} ({human_bytes(candidate.record.size_bytes)}; {candidate.reason})")
    for path, size_bytes in pruned.leftovers.items():
        print_line(f"{removed} {path} ({human_bytes(size_bytes)}; left by a killed command)")
    for path, size_bytes in pruned.image_copies.items():
        print_line(f"{removed} {path} ({human_bytes(size_bytes)}; a copy of images, not read for that long)")
    if rules == type(rules)():
        print("No rule given: add --older-than, --unused-for, --keep-size or --incomplete.")
    else:
        found = pruned.removed or pruned.leftovers or pruned.image_copies
        hint = ". Add --yes to remove them." if dry_run and found else ""
        plural = "" if len(pruned.removed) == 1 else "s"
        print_line(f"{len(pruned.removed)} cache{plural}, {human_bytes(pruned.bytes_freed)}{hint}")
    if rules.keep_bytes is not None and pruned.bytes_left > rules.keep_bytes:
        kept = human_bytes(pruned.bytes_left)
        print_line(f"The cache home is still larger than --keep-size: the caches that were kept take {kept}.")
