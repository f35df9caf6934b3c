"""`cache-tools verify, repair`: is every stored byte what was committed?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools import registry
from cache_tools.console import command
from cache_tools.describe import human_bytes
from cache_tools.origin import read_origin
from cache_tools.place import is_remote, open_place

if TYPE_CHECKING:
    from cache_tools.integrity import Repair, Verification

SHOWN = 20
DAMAGED = 1

Reference = Annotated[
    str, typer.Argument(metavar="CACHE", help="A path, a URL, a name, or 4+ digits of a fingerprint.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `cache-tools`."""
    app.command("verify")(command(verify_command))
    app.command("repair")(command(repair_command))


def verify_command(reference: Reference, as_json: AsJson = False) -> None:
    """Compare every stored byte of a cache with its commit; exit code 1 if something is damaged.

    Reads everything: manifest, metadata, labels, keys, constants, and every committed block with its view parameters.
    A remote cache is read through where it is.
    """
    found = _verify(reference)
    if as_json:
        print(json.dumps(found.model_dump(mode="json") | {"sound": found.sound}, indent=2, ensure_ascii=False))
    else:
        for problem in found.problems[:SHOWN]:
            print(f"{problem.where}{_block(problem.view, problem.block)}: {problem.what}")
        if len(found.problems) > SHOWN:
            print(f"… and {len(found.problems) - SHOWN} more (--json lists them all)")
        blocks = f"{found.blocks} of {found.blocks_total} blocks, {human_bytes(found.bytes)} read"
        advice = "" if found.sound else ". `cache-tools repair` drops what is bad; `build-cache` then makes it again"
        print(f"{'sound' if found.sound else _count(len(found.problems))}: {blocks}{advice}")
    if not found.sound:
        sys.exit(DAMAGED)


def repair_command(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this only what would be done is shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop the commits of damaged blocks, so that the same build-cache command computes just those again.

    Damaged array metadata is written anew from the manifest. Sound blocks are never touched.
    """
    found = _verify(reference)
    if not yes:
        cures = {
            cure: sum(problem.cure == cure for problem in found.problems) for cure in ("block", "metadata", "copy")
        }
        if as_json:
            print(json.dumps(found.model_dump(mode="json") | {"sound": found.sound}, indent=2, ensure_ascii=False))
        else:
            print(
                f"would drop {cures['block']} blocks and write {cures['metadata']} metadata files anew; "
                f"{cures['copy']} problems need a copy of the cache or a new build"
            )
            print("Nothing was changed: add --yes." if found.problems else "There is nothing to repair.")
        return
    done = _repair(found)
    if as_json:
        print(json.dumps(done.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return
    for view, block in done.dropped:
        print(f"dropped{_block(view, block)}")
    for name in done.rewritten:
        print(f"written anew: {name}")
    for problem in done.left:
        print(f"left: {problem.where}: {problem.what}; restore it from a copy (cache-tools pull), or build it again")
    if done.dropped:
        print(_how_to_mend(found))


def _verify(reference: str) -> Verification:
    from cache_tools import integrity, remote_integrity

    if is_remote(reference):
        return remote_integrity.verify(open_place(reference))
    return integrity.verify(registry.resolve(reference))


def _repair(found: Verification) -> Repair:
    from cache_tools import integrity, remote_integrity

    if isinstance(found.path, Path):
        return integrity.repair(found.path, found)
    return remote_integrity.repair(open_place(found.path), found)


def _how_to_mend(found: Verification) -> str:
    if not isinstance(found.path, Path):
        return "Push a sound copy of the cache: it brings the dropped blocks again."
    if read_origin(found.path) is not None:
        return "This is a mirror: the dropped blocks are staged again when they are needed."
    return "Run the same build-cache command: it computes the dropped blocks again."


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


def _block(view: int | None, block: int | None) -> str:
    return "" if view is None else f" view {view}, block {block}"
