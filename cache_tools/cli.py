"""`cache-tools`: see what caches there are and what is in them. Runs no model; imports neither torch nor zarr.

Commands that read targets import them when they run.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cache_tools import analysis_cli, describe, home_cli, integrity_cli, registry
from cache_tools.console import command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="See what caches there are and what is in them, copy, check and prune them, analyse what the teachers said.",
)


@app.command("ls")
@command
def list_command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False) -> None:
    """List the caches in the cache home ($TEACHER_CACHE_HOME, or ~/.cache/teacher-cache)."""
    records = registry.list_caches()
    if as_json:
        _print_json([record.model_dump(mode="json") | {"complete": record.complete} for record in records])
    elif records:
        describe.print_table(records)
    else:
        print(f"No caches in {registry.cache_home()}. Run `build-cache` to make one.")


@app.command("info")
@command
def info_command(
    reference: Annotated[str, typer.Argument(help="A path, a name, or four or more digits of a fingerprint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, the manifest included.")] = False,
) -> None:
    """Show recipe, geometry, progress and provenance of one cache."""
    details = describe.describe(registry.resolve(reference))
    if as_json:
        _print_json(details.model_dump(mode="json"))
    else:
        describe.print_details(details)


home_cli.add_commands(app)
integrity_cli.add_commands(app)
analysis_cli.add_commands(app)


def main() -> None:
    """Entry point of `cache-tools`."""
    app()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
