"""`cache-tools`: see what caches there are and what is in them. Runs no model; imports neither torch nor zarr.

Commands that read targets import them when they run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from cache_tools import units
from cache_tools.cli import analysis, codecs, describe, fuse, home, integrity
from cache_tools.console import command
from cache_tools.home import listing, registry
from cache_tools.places import LocalPlace, is_remote, open_place

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="See what caches there are and what is in them; copy, check, prune and fuse them; analyse what teachers said.",
)


@app.command("ls")
@command
def list_command(
    where: Annotated[
        str | None,
        typer.Argument(help="A folder of caches, s3://…, gs://… or az://…. Default: the cache home."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Part of the name; * and ? stand for anything.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="Part of dataset/split.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Part of the teacher's name.")] = None,
    complete: Annotated[
        bool | None, typer.Option("--complete/--incomplete", help="Only those with all views, or those without.")
    ] = None,
    larger_than: Annotated[str | None, typer.Option("--larger-than", help="Only larger ones: 500MB, 10GB.")] = None,
    unused_for: Annotated[
        str | None, typer.Option("--unused-for", help="Last trained from or built longer ago than this: 30d, 12h, 2w.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the caches in the cache home ($TEACHER_CACHE_HOME, or ~/.cache/teacher-cache) or elsewhere."""
    filters = listing.Filters(
        name=name,
        dataset=dataset,
        teacher=teacher,
        complete=complete,
        larger_than=None if larger_than is None else units.num_bytes(larger_than),
        unused_for_s=None if unused_for is None else units.seconds(unused_for),
    )
    place = LocalPlace(registry.cache_home()) if where is None else open_place(where)
    found: Sequence[registry.CacheRecord] | Sequence[listing.RemoteRecord]
    if isinstance(place, LocalPlace):
        found = filters.of(registry.list_caches(None if where is None else place.path))
    else:
        found = filters.of(listing.list_remote(place))
    if as_json:
        _print_json([record.model_dump(mode="json") | {"complete": record.complete} for record in found])
    elif found:
        describe.print_table(found)
    else:
        print(_nothing(str(place), filters))


@app.command("info")
@command
def info_command(
    reference: Annotated[str, typer.Argument(help="A path, a URL, a name, or four or more digits of a fingerprint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, the manifest included.")] = False,
) -> None:
    """Show recipe, geometry, progress and provenance of one cache; of a remote one, too, without staging it."""
    if is_remote(reference):
        details = describe.describe_remote(open_place(reference))
    else:
        details = describe.describe(registry.resolve(reference))
    if as_json:
        _print_json(details.model_dump(mode="json"))
    else:
        describe.print_details(details)


home.add_commands(app)
integrity.add_commands(app)
analysis.add_commands(app)
codecs.add_commands(app)
fuse.add_commands(app)


def main() -> None:
    """Entry point of `cache-tools`."""
    app()


def _nothing(where: str, filters: listing.Filters) -> str:
    if filters != listing.Filters():
        return f"No cache in {where} is like that."
    return f"No caches in {where}. Run `build-cache` to make one."


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
