"""The commands that `system/faults.py` kills: how to prepare and run them, and how to check their results."""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

VIEWS, BLOCK_ROWS = 3, 16
POLL_S = 0.01
InChild = Callable[..., Any]


@dataclass(frozen=True)
class Found:
    """State of a target: committed blocks, expected blocks, rows compared, reads refused, problems."""

    committed: int
    blocks: int
    rows: int
    refused: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A command that writes a cache to a target, which is a folder or URL.

    Args:
        root: folder of this case; `root/clean.zarr` is the cache of an undisturbed run.
        command: target → program and arguments.
        places: the folder or URL that holds the targets.
        start: the cache that each target is a copy of at first; None if targets are new.
    """

    name: str
    root: Path
    command: Callable[[str], Sequence[str]]
    places: str
    start: Path | None = None

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    def run(self, target: str) -> None:
        """Run the command in this process."""
        os.environ["TEACHER_CACHE_HOME"] = str(self.root / "homes" / target.rpartition("/")[2])  # for its mirror
        program, *arguments = self.command(target)
        module = {"build-cache": "pipeline.cli", "cache-tools": "cache_tools.cli"}[program]
        importlib.import_module(module).app(arguments, standalone_mode=False)

    def new_target(self, number: int | None) -> str:
        """Prepare a target; None is for the undisturbed run."""
        target = f"{self.places}/{'clean' if number is None else f'target-{number}'}.zarr"
        if self.start is not None:
            shutil.copytree(self.start, target)
        return target

    def remove(self, target: str) -> None:
        if not _is_url(target):
            shutil.rmtree(target)

    def keep_clean(self, target: str) -> None:
        """Copy the cache of an undisturbed run to `root/clean.zarr`."""
        if Path(target) != self._clean:
            _copy(target, self._clean)

    def watch(self, target: str, stop: int) -> list[tuple[int, int]]:
        """Poll the target until a byte arrives at `stop`: newly committed rows must equal those of the clean run.

        Gives the blocks that were seen as committed.
        """
        from cache_tools.places import open_place
        from cache_tools.places.transfer import list_committed
        from cache_tools.reader import TeacherCache

        seen: set[tuple[int, int]] = set()
        clean, place = TeacherCache.open(self._clean), open_place(target)
        while not select.select([stop], [], [], POLL_S)[0]:
            new = list_committed(place) - seen if _is_there(target) else set()
            if new and not _is_url(target):
                found = _compare(TeacherCache(Path(target)), clean, sorted(new))
                assert not found.problems, found.problems
                assert not found.refused, "a reader saw a commit and could not read its rows"
            seen |= new
        return sorted(seen)

    def look(self, target: str, seen: Sequence[tuple[int, int]], *, finished: bool = False) -> Found:
        """Compare a target with the clean run; if `finished`, everything must be equal."""
        from cache_tools.integrity.local import verify
        from cache_tools.reader import TeacherCache

        with tempfile.TemporaryDirectory() as folder:
            if not _is_there(target):
                lost = [f"there is no cache, and {len(seen)} blocks were seen"] if seen or finished else []
                return Found(committed=0, blocks=0, rows=0, refused=0, problems=lost)
            path = _copy(target, Path(folder) / "pulled") if _is_url(target) else Path(target)
            cache = TeacherCache(path)  # without staging
            clean = TeacherCache.open(self._clean)
            blocks = list(np.ndindex(cache.num_views, cache.manifest.num_blocks))
            found = _compare(cache, clean, blocks)
            missing = {(view, block) for view, block in seen} - set(_readable(cache, blocks))
            problems = [*found.problems, *(f"view {view}, block {block}: lost" for view, block in sorted(missing))]
            problems += [f"{problem.where}: {problem.what}" for problem in verify(path).problems]
            if finished:
                problems += _differences(path, self._clean)
        return Found(found.committed, found.blocks, found.rows, found.refused, problems)

    @property
    def _clean(self) -> Path:
        return self.root / "clean.zarr"


class Staging(Case):
    """Reads every view of a remote cache. The target is its mirror; each run has a cache home of its own."""

    def run(self, target: str) -> None:
        from cache_tools.reader import TeacherCache

        (url,) = self.command(target)
        os.environ["TEACHER_CACHE_HOME"] = str(Path(target).parent)
        cache = TeacherCache.open(url)
        assert str(cache.path) == target
        for view in range(cache.num_views):
            cache.load_view(view)

    def new_target(self, number: int | None) -> str:
        from cache_tools.store.group import read_manifest

        manifest = read_manifest(self.root / "source.zarr")
        home = f"{self.places}/home-{'clean' if number is None else number}"
        return f"{home}/{manifest.name}-{manifest.fingerprint[:12]}.zarr"


def _compare(cache: Any, clean: Any, blocks: Sequence[tuple[int, int]]) -> Found:
    """Compare blocks of two caches, array by array."""
    from cache_tools.errors import IncompleteError

    committed = rows = refused = 0
    problems = []
    for view, block in blocks:
        readable = []
        for name in cache.targets:
            selected = cache.manifest.block(block)
            try:
                found = cache.read_array(name, view, selected)
            except IncompleteError:
                refused += 1
                continue
            readable.append(name)
            rows += len(found)
            if found.tobytes() != clean.read_array(name, view, selected).tobytes():
                problems.append(f"{name}, view {view}, block {block}: rows differ from those of the clean run")
        if 0 < len(readable) < len(cache.targets):
            problems.append(f"view {view}, block {block}: only {', '.join(readable)} can be read")
        committed += bool(readable)
    return Found(committed, len(blocks), rows, refused, problems)


def _readable(cache: Any, blocks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    from cache_tools.errors import IncompleteError

    for view, block in blocks:
        try:
            cache.read_array(next(iter(cache.targets)), view, cache.manifest.block(block))
        except IncompleteError:
            continue
        yield view, block


def _differences(path: Path, clean: Path) -> list[str]:
    """Arrays, commits and file names that differ from those of the clean run."""
    import zarr

    problems = []
    names = [
        {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file() and file.suffix != ".partial"}
        for root in (path, clean)
    ]
    if names[0] != names[1]:
        problems.append(f"other files: {sorted(names[0] ^ names[1])}")
    ours, theirs = (dict(zarr.open_group(root, mode="r").arrays()) for root in (path, clean))
    different = (
        name
        for name in sorted({*ours, *theirs})
        if name not in ours or name not in theirs or ours[name][...].tobytes() != theirs[name][...].tobytes()
    )
    return problems + [f"{name}: differs from the array of the clean run" for name in different]


def _copy(source: str | Path, target: Path) -> Path:
    from cache_tools.places import LocalPlace, open_place
    from cache_tools.places.transfer import copy_cache

    copy_cache(open_place(str(source)), LocalPlace(target))
    return target


def _is_there(target: str) -> bool:
    """Whether the target has a manifest: it is written last, and atomically."""
    from cache_tools.errors import NotFoundError
    from cache_tools.places import open_place
    from cache_tools.places.metadata import manifest_at

    try:
        manifest_at(open_place(target))
    except NotFoundError:
        return False
    return True


def _is_url(target: str) -> bool:
    return "://" in target


# The cases


@contextmanager
def _build(root: Path, in_child: InChild) -> Iterator[Case]:
    recipe = _build_recipe(root, in_child)
    yield Case("build", root, lambda target: ["build-cache", recipe, "--out", target], str(root))


@contextmanager
def _grow(root: Path, in_child: InChild) -> Iterator[Case]:
    recipe, start = _build_recipe(root, in_child), root / "start.zarr"
    first = Case("first", root, lambda target: ["build-cache", recipe, "--out", target, "--views", "1"], str(root))
    in_child(lambda: first.run(str(start)), first.log)
    yield Case("grow", root, lambda target: ["build-cache", recipe, "--out", target], str(root), start)


@contextmanager
def _push(root: Path, in_child: InChild) -> Iterator[Case]:
    source = in_child(lambda: _source(root))
    yield Case("push", root, lambda target: ["cache-tools", "push", source, target], str(root))


@contextmanager
def _push_to_s3(root: Path, in_child: InChild) -> Iterator[Case]:
    with _server_beside() as places:
        source = in_child(lambda: _source(root))
        yield Case("push-s3", root, lambda target: ["cache-tools", "push", source, target], places)


@contextmanager
def _recode(root: Path, in_child: InChild) -> Iterator[Case]:
    source = in_child(lambda: _source(root))
    options = ("--codec", "compact", "--out")
    yield Case("recode", root, lambda target: ["cache-tools", "recode", source, *options, target], str(root))


@contextmanager
def _build_to_s3(root: Path, in_child: InChild) -> Iterator[Case]:
    with _server_beside() as places:
        recipe = _build_recipe(root, in_child)
        yield Case("build-s3", root, lambda target: ["build-cache", recipe, "--out", target], places)


@contextmanager
def _fuse(root: Path, in_child: InChild) -> Iterator[Case]:
    source = in_child(lambda: _source(root, store="components"))
    options = ["--teacher-weight", "0.4", "--prompts", "1"]
    yield Case("fuse", root, lambda target: ["cache-tools", "fuse", source, *options, "--out", target], str(root))


@contextmanager
def _pull_from_s3(root: Path, in_child: InChild) -> Iterator[Case]:
    with _pushed(root, in_child) as url:
        yield Case("pull-s3", root, lambda target: ["cache-tools", "pull", url, "--out", target], str(root))


@contextmanager
def _stage(root: Path, in_child: InChild) -> Iterator[Case]:
    with _pushed(root, in_child) as url:
        yield Staging("stage", root, lambda target: [url], str(root))


@contextmanager
def _sweep(root: Path, in_child: InChild) -> Iterator[Case]:
    from tests.support.sweep_case import sweep

    with sweep(root, in_child) as case:
        yield case


@contextmanager
def _pushed(root: Path, in_child: InChild) -> Iterator[str]:
    """Push a small complete cache; yields its URL."""
    from cache_tools.places import LocalPlace, open_place
    from cache_tools.places.transfer import copy_cache

    with _server_beside() as places:
        source = in_child(lambda: _source(root))
        in_child(lambda: copy_cache(LocalPlace(Path(source)), open_place(f"{places}/source.zarr")).bytes)
        yield f"{places}/source.zarr"


CASES: dict[str, Callable[[Path, InChild], Any]] = {
    "build": _build,
    "grow": _grow,
    "push": _push,
    "push-s3": _push_to_s3,
    "recode": _recode,
    "build-s3": _build_to_s3,
    "fuse": _fuse,
    "pull-s3": _pull_from_s3,
    "stage": _stage,
    "sweep": _sweep,
}


@contextmanager
def prepared(name: str, folder: Path, in_child: InChild, *, places: Path | None = None) -> Iterator[Case]:
    """Prepare a case in `folder/name`; its targets are in `places`, by default there too."""
    root = folder / name
    root.mkdir()
    with CASES[name](root, in_child) as case:
        yield case if places is None else replace(case, places=str(places))


# What commands import, also late in a run.
_FOR_CACHES = (
    "obstore",
    "torch",
    "zarr",
    "cache_tools.cli",
    "cache_tools.derive.fuse",
    "cache_tools.derive.recode",
    "cache_tools.integrity.local",
    "cache_tools.places.transfer",
    "tests.support.cache_factory",
)
_FOR_BUILDS = ("open_clip", "timm", "pipeline.build.cache", "pipeline.cli", "tests.support.tiny_build")
_FOR_STUDENTS = (
    "matplotlib.figure",
    "timm",
    "torch._dynamo",
    "tests.support.shortcuts",
    "tests.support.tiny_run",
    "train.report.html",
    "train.sweep.cli",
    "train.sweep.run",
)


def import_modules(*, builds: bool, students: bool) -> None:
    """Import what commands on caches import, without opening files or starting threads.

    Args:
        builds, students: also what builds import, and what commands on students import, which takes seconds.
    """
    for module in (*_FOR_CACHES, *(_FOR_BUILDS if builds else ()), *(_FOR_STUDENTS if students else ())):
        importlib.import_module(module)
    sys.modules["torch"].set_num_threads(1)


def import_for(names: Iterable[str]) -> None:
    """Import what some of `CASES` need."""
    chosen = set(names)
    import_modules(builds=bool(chosen & {"build", "grow", "build-s3"}), students="sweep" in chosen)


def _build_recipe(root: Path, in_child: InChild) -> str:
    from cache_tools.config import dump_yaml
    from tests.support import tiny_build

    in_child(lambda: str(tiny_build.prepare(root, train=5 * BLOCK_ROWS - 5)))
    recipe = tiny_build.recipe(root, num_views=VIEWS, block_rows=BLOCK_ROWS, out=None)
    (root / "tiny.yaml").write_text(dump_yaml(recipe))
    return str(root / "tiny.yaml")


def _source(root: Path, **recipe: Any) -> str:
    """Write a small complete cache with random targets; gives its path."""
    from tests.support.cache_factory import build, tiny_images, tiny_manifest

    images = tiny_images()
    manifest = tiny_manifest(images, num_views=VIEWS, block_rows=BLOCK_ROWS, canaries=False, **recipe)
    build(root / "source.zarr", manifest, images)
    return str(root / "source.zarr")


@contextmanager
def _server_beside() -> Iterator[str]:
    """Run an S3 server in a process of its own, point the environment to it, and yield the URL of a bucket."""
    from tests.support.s3_server import environment, new_bucket, s3_server

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)  # it logs every request
        with s3_server() as variables:
            os.write(writing, json.dumps(variables).encode() + b"\n")
            signal.pause()
        os._exit(0)
    try:
        with os.fdopen(reading, "rb") as pipe:
            variables = json.loads(pipe.readline())
        with environment(variables):
            yield f"s3://{new_bucket()}"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
