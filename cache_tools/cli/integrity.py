"""`cache-tools verify, repair`: check every stored byte, the images and the teachers' targets; drop what is damaged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_tools.cli.options import AsJson, Cache, Yes
from cache_tools.console import print_json, print_line, print_next
from cache_tools.errors import printable
from cache_tools.format.rolling import Rolling
from cache_tools.home import registry
from cache_tools.home.origin import read_origin
from cache_tools.places import is_remote, open_place
from cache_tools.store.group import read_manifest
from cache_tools.units import human_bytes

if TYPE_CHECKING:
    from cache_tools.integrity.images import ImagesCheck
    from cache_tools.integrity.local import Verification
    from cache_tools.integrity.replay import Replay

SHOWN_PROBLEMS = 20
EXIT_DAMAGED = 1
_REMOVE = "remove what is there, then verify again"


def verify_command(
    reference: Cache,
    images: Annotated[
        bool, typer.Option("--images", help="Also compare the dataset and the pixels of a few views with the manifest.")
    ] = False,
    replay: Annotated[
        int | None,
        typer.Option(
            "--replay",
            min=1,
            metavar="N",
            help="Also compute N random rows again with the teachers, and compare; includes --images.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="With --replay: seed that draws the rows.")] = 0,
    device: Annotated[
        str, typer.Option("--device", help="With --replay: where to run the teachers: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where the dataset is, if it was moved since the build.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every stored byte of a cache with its commits. The exit code is 1 if anything is wrong.

    Reads the manifest, metadata, labels, keys and constants, and every committed block with its view parameters. A
    remote cache is read in place. --images checks that the dataset is still what the teachers saw, --replay that the
    stored rows are what the teachers compute from it.
    """
    found = _verify(reference)
    wants_more = images or replay is not None
    images_check: ImagesCheck | None = None
    replayed: Replay | None = None
    if found.sound and wants_more:
        images_check, replayed = _check_images(reference, replay, seed, device, data_dir)
    sound = found.sound and all(check is None or check.sound for check in (images_check, replayed))
    if as_json:
        checks = {
            "images": None if images_check is None else images_check.to_json(),
            "replay": None if replayed is None else replayed.to_json(),
        }
        print_json(found.model_dump(mode="json") | checks | {"sound": sound})
    else:
        _print_verification(found)
        for check in (images_check, replayed):
            if check is not None:
                print(printable(str(check), keep="\n"))
        if not found.sound and wants_more:
            print("images and teachers were not checked: repair the cache first")
        if not found.sound:
            print_next("cache-tools", "repair", reference)
        elif sound and found.blocks == found.blocks_total and _is_for_training(reference):
            print_next("train-student", "--cache", reference)
    if not sound:
        sys.exit(EXIT_DAMAGED)


def repair_command(reference: Cache, yes: Yes = False, as_json: AsJson = False) -> None:
    """Drop the commits of damaged blocks. The command that made the cache then computes only those again.

    Damaged array metadata is rewritten from the manifest. Sound blocks are never touched.
    """
    from cache_tools.integrity import local, remote

    found = _verify(reference)
    if not yes:
        if as_json:
            print_json(found.model_dump(mode="json") | {"sound": found.sound})
        else:
            _print_plan(found)
        return
    if isinstance(found.path, Path):
        done = local.repair(found.path, found)
    else:
        done = remote.repair(open_place(found.path), found)
    if as_json:
        print_json(done.model_dump(mode="json"))
        return
    for view, block in done.dropped:
        print_line(f"dropped view {view}, block {block}")
    for name in done.rewritten:
        print_line(f"rewrote {name}")
    if done.digests_added:
        print("added a digest of each of labels, sample keys and constants")
    if done.rewritten:
        print("Run this command again: arrays with damaged metadata could not be checked.")
    for problem in done.left:
        advice = _REMOVE if problem.cure == "remove" else "pull a sound copy (cache-tools pull), or build it again"
        print_line(f"not repaired: {problem.where}: {problem.what}; {advice}")
    if done.dropped:
        print(_how_to_restore_blocks(found))


def _verify(reference: str) -> Verification:
    from cache_tools.integrity import local, remote

    if is_remote(reference):
        return remote.verify(open_place(reference))
    return local.verify(registry.resolve(reference))


def _is_for_training(reference: str) -> bool:
    """Whether the pixels of the views can be made again."""
    if is_remote(reference):
        return True  # its manifest would have to be read once more, for a hint
    return read_manifest(registry.resolve(reference)).recipe.views.made_by is None


def _check_images(
    reference: str, replay_rows: int | None, seed: int, device: str, data_dir: Path | None
) -> tuple[ImagesCheck, Replay | None]:
    from cache_tools import plugins
    from cache_tools.integrity.images import check_images
    from cache_tools.reader import TeacherCache

    cache = TeacherCache.open(reference)
    check, images = check_images(cache, data_dir)
    if replay_rows is None or images is None:
        return check, None
    return check, plugins.load("replay")(cache, images, replay_rows, seed=seed, device=device)


def _print_verification(found: Verification) -> None:
    for problem in found.problems[:SHOWN_PROBLEMS]:
        block = "" if problem.view is None else f" view {problem.view}, block {problem.block}"
        print_line(f"{problem.where}{block}: {problem.what}")
    count = len(found.problems)
    if count > SHOWN_PROBLEMS:
        print_line(f"… and {count - SHOWN_PROBLEMS} more (--json lists them all)")
    dropped = f" ({Rolling(keep=1, dropped=found.views_dropped)})" if found.views_dropped else ""
    result = "sound" if found.sound else "1 problem" if count == 1 else f"{count} problems"
    advice = ". `cache-tools repair` drops damaged blocks; the command that made the cache then computes them again"
    if found.adds_digests:
        print(
            "note: labels, sample keys and constants have no digest each (an earlier version made this cache); they "
            "are sound, and `cache-tools repair` adds the digests"
        )
    print(
        f"{result}: {found.blocks} of {found.blocks_total} blocks, {human_bytes(found.bytes)} read{dropped}"
        f"{'' if found.sound else advice}"
    )


def _print_plan(found: Verification) -> None:
    blocks, files, unrepairable, foreign = (
        sum(problem.cure == cure for problem in found.problems) for cure in ("block", "metadata", "copy", "remove")
    )
    print(
        f"would drop {blocks} blocks and rewrite {files} metadata files; "
        f"{unrepairable} problems need a copy of the cache or a new build"
    )
    if foreign:
        print(f"{foreign} are links or pipes: {_REMOVE}")
    if found.adds_digests:
        print("would add a digest of each of labels, sample keys and constants")
    print("Nothing was changed: add --yes." if found.problems or found.adds_digests else "There is nothing to repair.")


def _how_to_restore_blocks(found: Verification) -> str:
    if not isinstance(found.path, Path):
        return "Push a sound copy of the cache: it brings the dropped blocks again."
    if (origin := read_origin(found.path)) is not None and origin.is_mirror:
        return "This is a mirror: the dropped blocks are staged again when they are needed."
    return f"Run the same {read_manifest(found.path).recipe.made_by} command: it computes the dropped blocks again."
