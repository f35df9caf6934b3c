"""Links, pipes and hard links in a received cache, and beside it: nothing outside is read into a result or changed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cache_tools.cli import app as cache_tools
from cache_tools.format.manifest import Manifest
from cache_tools.places.claims import Claims
from cache_tools.store.group import read_manifest
from cache_tools.store.writer import CacheWriter
from pipeline.build.cache import build_cache as build
from pipeline.build.destination import Destination
from pipeline.build.open_output import open_output
from pipeline.cli import app as build_cache
from tests.support import cache_factory, tiny_build
from train.cli import app as train_student

UUID = "0a" * 16
TIME_S = 200
VIEWS = 2


class Place(NamedTuple):
    """A place in the home where a link is planted.

    Args:
        path: from the home; CACHE is the name of the cache.
        is_folder: what lies there, or would.
        stops: commands that cannot give a right result without what lies there.
    """

    path: str
    is_folder: bool
    stops: frozenset[str] = frozenset()


READERS = frozenset({"verify", "copy", "push", "recode", "fuse", "stats", "train"})
PLACES = {
    "chunk": Place("CACHE/teacher_features/c.0.0.0", False, READERS),
    "commit": Place("CACHE/commits/c.0.0.0", False, READERS),
    "labels": Place("CACHE/labels/c.0", False, READERS - {"train"}),
    "keys": Place("CACHE/sample_keys/c.0.0", False, READERS - {"train"}),
    "constant": Place("CACHE/class_embeddings/c.0.0", False, READERS),
    "group": Place("CACHE/zarr.json", False, READERS | {"info", "grow", "build", "copy into", "pull into", "repair"}),
    "array metadata": Place("CACHE/commits/zarr.json", False, READERS | {"grow", "build"}),
    "array": Place("CACHE/clip_features", True, READERS | {"grow", "build", "copy into", "pull into"}),
    "commits": Place("CACHE/commits", True, READERS | {"grow", "build", "copy into", "pull into"}),
    "labels folder": Place("CACHE/labels", True, READERS - {"train"}),
    "new chunk": Place("CACHE/clip_features/c.2.0.0", False, frozenset({"grow", "build", "copy into", "pull into"})),
    "new commit": Place("CACHE/commits/c.2.0.0", False),
    "claims": Place(".CACHE.claims", True, frozenset({"grow", "build"})),
    "claim": Place(".CACHE.claims/0.0.0", False, frozenset({"grow", "build"})),
    "used": Place(".CACHE.used", False, frozenset({"train"})),
    "origin": Place(".CACHE.origin", False, frozenset({"train", "stats", "recode", "fuse"})),
    "sizes": Place(".sizes.json", False, frozenset({"ls"})),
    "partial chunk": Place(f"CACHE/commits/c.0.0.0.{UUID}.partial", False),
    "partial file": Place(f"CACHE/zarr.json.{UUID}.partial", False),
    "partial folder": Place(f"CACHE/commits.{UUID}.partial", True),
    "partial copy": Place(f".CACHE.{UUID}.partial", True),
    "foreign": Place("CACHE/notes", True),
}


def relative(place: Path, target: Path) -> None:
    place.symlink_to(os.path.relpath(target, place.parent))


def through_another(place: Path, target: Path) -> None:
    between = target.with_name("between")
    between.symlink_to(target)
    place.symlink_to(between)


def dangling(place: Path, target: Path) -> None:
    place.symlink_to(target.with_name("absent"))


def loop(place: Path, _: Path) -> None:
    place.symlink_to(place.name)


def pipe(place: Path, _: Path) -> None:
    os.mkfifo(place)


def hard(place: Path, target: Path) -> None:
    if target.is_dir():
        shutil.copytree(target, place, copy_function=os.link)
    else:
        os.link(target, place)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "absolute": lambda place, target: place.symlink_to(target),
    "relative": relative,
    "through another": through_another,
    "dangling": dangling,
    "loop": loop,
    "pipe": pipe,
    "hard": hard,
}


class Case:
    """A home with a hostile cache, a sound cache with one more view, and what lies outside."""

    def __init__(self, root: Path, sound: Path, recipe: Path, manifest: Manifest) -> None:
        self.home, self.outside, self.new, self.sound = root / "home", root / "outside", root / "new", sound
        self.recipe, self.manifest = recipe, manifest
        self.cache = self.home / f"tiny-{manifest.fingerprint[:12]}.zarr"

    def plant(self, place: Place, kind: str) -> None:
        """Move what lies at a place outside, and put a link to it there."""
        self.outside.mkdir()
        path = self.home / place.path.replace("CACHE", self.cache.name)
        target = self.outside / "target"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            path.rename(target)
        elif place.is_folder:
            target.mkdir()
        else:
            target.write_bytes(b"precious")
        folder = target if place.is_folder else self.outside
        (folder / f"precious.{UUID}.partial").write_bytes(b"precious")
        (folder / f"folder.{UUID}.partial").mkdir()
        (folder / f"folder.{UUID}.partial" / "file").write_bytes(b"precious")
        for each in (*self.outside.rglob("*"), self.outside):
            os.utime(each, (1, 1))
        KINDS[kind](path, target)
        if not path.is_symlink():
            os.utime(path, (1, 1))
        os.utime(self.outside, (1, 1))

    def run(self, command: str) -> int:
        """The exit code of a command; tracebacks and hangs are raised."""
        cache, new = str(self.cache), self.new / "new.zarr"
        commands: dict[str, tuple[Any, list[str]]] = {
            "build": (build_cache, [str(self.recipe), "--views", str(VIEWS + 1)]),
            "ls": (cache_tools, ["ls"]),
            "ls folder": (cache_tools, ["ls", str(self.home), "--json"]),
            "info": (cache_tools, ["info", cache]),
            "verify": (cache_tools, ["verify", cache]),
            "repair": (cache_tools, ["repair", cache, "--yes"]),
            "rm": (cache_tools, ["rm", cache, "--yes"]),
            "prune": (cache_tools, ["prune", "--incomplete", "--keep-size", "0B", "--yes"]),
            "copy": (cache_tools, ["copy", cache, str(new)]),
            "copy into": (cache_tools, ["copy", str(self.sound), cache]),
            "push": (cache_tools, ["push", cache, str(new)]),
            "pull": (cache_tools, ["pull", cache, "--out", str(new)]),
            "pull into": (cache_tools, ["pull", str(self.sound)]),
            "recode": (cache_tools, ["recode", cache, "--codec", "float32", "--out", str(new)]),
            "fuse": (cache_tools, ["fuse", cache, "--teacher-weight", "0.3", "--out", str(new)]),
            "stats": (cache_tools, ["stats", cache, "--view", "0"]),
            "train": (train_student, [
                "--cache", cache, "--student", "resnet8", "--epochs", "1", "--device", "cpu", "--batch-size", "25",
                "--no-compare-with-labels", "--out", str(self.new / "run"),
            ]),
        }  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said, _in_time():
            try:
                if command == "grow":
                    self._grow()
                else:
                    app, arguments = commands[command]
                    app(arguments, standalone_mode=False)
                code = 0
            except SystemExit as ending:
                code = int(ending.code or 0)
        assert code in {0, 1, 2}, said.getvalue()
        assert said.getvalue().count("error:") == (code == 2), said.getvalue()
        return code

    def _grow(self) -> None:
        """What `build-cache` does with a cache of fewer views, without its networks."""
        from cache_tools.console import command

        @command
        def grow() -> None:
            recipe = self.manifest.recipe
            output = open_output(
                Destination(self.cache), recipe, VIEWS + 1, _no_cache, lambda writer: writer.grow(VIEWS + 1), print
            )
            targets = cache_factory.tiny_targets(output.manifest)
            with Claims(output.place) as claims, output.building():
                for block in claims.share(output.missing_blocks(), output.committed_blocks, output.is_committed):
                    rows = output.manifest.block(block.block)
                    output.store(block, {name: values[block.view, rows] for name, values in targets.items()}, 1)
                    claims.release(block)

        grow()


COMMANDS = (
    "ls", "ls folder", "info", "verify", "repair", "rm", "prune", "copy", "copy into", "push", "pull", "pull into",
    "recode", "fuse", "stats", "train", "grow", "build",
)  # fmt: skip
ALL = [
    (place, kind, command)
    for place in PLACES
    for kind in KINDS
    for command in COMMANDS
    if command != "train" or "train" in PLACES[place].stops or kind == "absolute"  # it takes longest
]


class Received(NamedTuple):
    """A cache home as it was before links were planted, a sound cache of one view more, and the recipe of both."""

    home: Path
    sound: Path
    recipe: Path


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> Received:
    root = tiny_build.prepare(tmp_path_factory.mktemp("received"), train=50)
    recipe = tiny_build.recipe(root, num_views=VIEWS, store="components", out=None)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_CACHE_HOME", str(root / "home"))
        build(recipe)
        sound = build(recipe.model_copy(update={"num_views": VIEWS + 1, "out": root / "sound.zarr"})).path
    return Received(root / "home", sound, root / "recipe.yaml")


@pytest.fixture
def make_case(tmp_path: Path, received: Received, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Case]:
    def make() -> Case:
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        case = Case(tmp_path, received.sound, received.recipe, read_manifest(received.sound))
        shutil.copytree(received.home, case.home)
        monkeypatch.setenv("TEACHER_CACHE_HOME", str(case.home))
        return case

    return make


def check(case: Case, place: str, kind: str, command: str) -> None:
    """Plant a link, run a command, and look at everything outside."""
    case.plant(PLACES[place], kind)
    before = snapshot(case.outside)
    code = case.run(command)
    assert snapshot(case.outside) == before, "something outside was changed"
    if command in PLACES[place].stops and kind != "hard":
        assert code in {1, 2}, "what lies outside was used"


@pytest.mark.medium
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_links(command: str, make_case: Callable[[], Case]) -> None:
    """A few of the cases below for each command."""
    rng = random.Random(command)
    own = [each for each in ALL if each[2] == command]
    stopped = [(place, kind, _) for place, kind, _ in own if command in PLACES[place].stops and kind != "hard"]
    for case in (
        *rng.sample(stopped, min(1, len(stopped))),
        *rng.sample(own, 0 if command in {"train", "build"} else 1),
    ):
        check(make_case(), *case)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_place_every_link_every_command(place: str, kind: str, make_case: Callable[[], Case]) -> None:
    for case in ALL:
        if case[:2] == (place, kind):
            check(make_case(), *case)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_well_without_links(command: str, make_case: Callable[[], Case]) -> None:
    """So what stops it above is the link."""
    case = make_case()
    assert case.run(command) == 0
    if command not in {"rm", "prune"}:
        assert read_manifest(case.cache).fingerprint == case.manifest.fingerprint


def snapshot(folder: Path) -> dict[str, Any]:
    """Names, kinds, contents, times and permissions of everything in a folder."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def _no_cache(path: Path) -> CacheWriter:
    raise AssertionError(f"{path} was taken for a free place")


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {TIME_S} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
