"""`cache-tools verify, repair`: is every stored byte what was committed, and what the teachers say?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_tools.console import command
from cache_tools.home import registry
from cache_tools.home.origin import read_origin
from cache_tools.places import is_remote, open_place
from cache_tools.store.group import read_manifest
from cache_tools.units import human_bytes

if TYPE_CHECKING:
    from cache_tools.integrity.images import ImagesCheck
    from cache_tools.integrity.local import Repair, Verification
    from cache_tools.integrity.replay import Replay

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


def verify_command(
    reference: Reference,
    images: Annotated[
        bool, typer.Option("--images", help="Compare the dataset and the pixels of a few views with the manifest too.")
    ] = False,
    replay: Annotated[
        int | None,
        typer.Option(
            "--replay", min=1, metavar="N", help="Compute N random rows again with the teachers, and compare."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --replay: draws the rows.")] = 0,
    device: Annotated[
        str, typer.Option("--device", help="With --replay: where the teachers run: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where the dataset is, if not where it was for the build.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every stored byte of a cache with its commit; exit code 1 if something is wrong.

    Reads everything: manifest, metadata, labels, keys, constants, and every committed block with its view parameters.
    A remote cache is read through where it is. --images asks whether the dataset still is what the teachers saw,
    --replay (--images included) whether the rows are what they say of it.
    """
    found = _verify(reference)
    checks = _Checks()
    if found.sound and (images or replay is not None):
        checks = _check(reference, replay, seed, device, data_dir)
    sound = found.sound and checks.sound
    if as_json:
        print(
            json.dumps(
                found.model_dump(mode="json") | checks.to_json() | {"sound": sound}, indent=2, ensure_ascii=False
            )
        )
    else:
        _tell(found)
        for check in (checks.images, checks.replay):
            if check is not None:
                print(check)
        if not found.sound and (images or replay is not None):
            print("images and teachers were not asked: repair the cache first")
    if not sound:
        sys.exit(DAMAGED)


def repair_command(
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without this only what would be done is shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop the commits of damaged blocks, so that the command that made the cache computes just those again.

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
    if done.rewritten:
        print("Run this once more: arrays whose metadata was damaged could not be looked into.")
    for problem in done.left:
        print(f"left: {problem.where}: {problem.what}; restore it from a copy (cache-tools pull), or build it again")
    if done.dropped:
        print(_how_to_mend(found))


def _verify(reference: str) -> Verification:
    from cache_tools.integrity import local, remote

    if is_remote(reference):
        return remote.verify(open_place(reference))
    return local.verify(registry.resolve(reference))


def _repair(found: Verification) -> Repair:
    from cache_tools.integrity import local, remote

    if isinstance(found.path, Path):
        return local.repair(found.path, found)
    return remote.repair(open_place(found.path), found)


def _how_to_mend(found: Verification) -> str:
    if not isinstance(found.path, Path):
        return "Push a sound copy of the cache: it brings the dropped blocks again."
    if (origin := read_origin(found.path)) is not None and origin.of_a_mirror:
        return "This is a mirror: the dropped blocks are staged again when they are needed."
    return f"Run the same {read_manifest(found.path).recipe.made_by} command: it computes the dropped blocks again."


@dataclass(frozen=True)
class _Checks:
    """What was asked beyond the stored bytes."""

    images: ImagesCheck | None = None
    replay: Replay | None = None

    @property
    def sound(self) -> bool:
        return all(check is None or check.sound for check in (self.images, self.replay))

    def to_json(self) -> dict[str, Any]:
        images, replay = self.images, self.replay
        return {
            "images": None if images is None else images.model_dump(mode="json") | {"sound": images.sound},
            "replay": None if replay is None else replay.to_json(),
        }


def _check(reference: str, rows: int | None, seed: int, device: str, data_dir: Path | None) -> _Checks:
    from cache_tools import plugins
    from cache_tools.integrity.images import check_images
    from cache_tools.reader import TeacherCache

    cache = TeacherCache.open(reference)
    report, found = check_images(cache, data_dir)
    if rows is None or found is None:
        return _Checks(report)
    return _Checks(report, plugins.load("replay")(cache, found, rows, seed=seed, device=device))


def _tell(found: Verification) -> None:
    for problem in found.problems[:SHOWN]:
        print(f"{problem.where}{_block(problem.view, problem.block)}: {problem.what}")
    if len(found.problems) > SHOWN:
        print(f"… and {len(found.problems) - SHOWN} more (--json lists them all)")
    blocks = f"{found.blocks} of {found.blocks_total} blocks, {human_bytes(found.bytes)} read"
    advice = ". `cache-tools repair` drops what is bad; the command that made the cache then makes it again"
    print(f"{'sound' if found.sound else _count(len(found.problems))}: {blocks}{'' if found.sound else advice}")


def _count(problems: int) -> str:
    return "1 problem" if problems == 1 else f"{problems} problems"


def _block(view: int | None, block: int | None) -> str:
    return "" if view is None else f" view {view}, block {block}"
