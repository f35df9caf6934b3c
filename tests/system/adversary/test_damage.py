"""Every kind of byte of a cache is damaged: commands end with an error, or with what the sound cache gives."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_tools.cli import app as cache_tools
from cache_tools.config import dump_yaml
from cache_tools.errors import CacheError, IncompleteError
from cache_tools.integrity import local, remote
from cache_tools.places import LocalPlace, Place, open_place
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from tests.support import cache_factory, tiny_run
from tests.support.s3_server import new_bucket
from tests.support.turns import slow, turns
from train.checkpoints import LAST
from train.cli import app as train_student

pytestmark = [pytest.mark.turns, pytest.mark.medium]

Files = dict[str, bytes]
Damage = Callable[[Files, str, Files], None]
Expected = list[np.ndarray]
VIEWS, BLOCK_ROWS, PARTS = 2, 10, 4


def flip(offset: float) -> Damage:
    """Flip a bit at this part of the file."""

    def damage(files: Files, key: str, other: Files) -> None:
        data = bytearray(files[key])
        data[int(offset * (len(data) - 1))] ^= 4
        files[key] = bytes(data)

    return damage


def truncate(files: Files, key: str, other: Files) -> None:
    files[key] = files[key][: len(files[key]) // 2]


def empty(files: Files, key: str, other: Files) -> None:
    files[key] = b""


def extend(files: Files, key: str, other: Files) -> None:
    files[key] += files[key][-5:]


def remove(files: Files, key: str, other: Files) -> None:
    del files[key]


def swap(files: Files, key: str, other: Files) -> None:
    """Exchange two files of one folder, or two zarr.json; each of them is sound."""
    folder = key.rpartition("/")[0]
    alike = [each for each in files if each != key and _is_metadata(each) == _is_metadata(key)]
    near = [each for each in alike if each.rpartition("/")[0] == folder] or alike
    if near:
        files[key], files[near[0]] = files[near[0]], files[key]


def copy_over(files: Files, key: str, other: Files) -> None:
    """Overwrite a file by the last one of its kind."""
    files[key] = [data for each, data in files.items() if _is_metadata(each) == _is_metadata(key)][-1]


def stale(files: Files, key: str, other: Files) -> None:
    """A sound file of another build of the same recipe."""
    files[key] = other[key]


def _is_metadata(key: str) -> bool:
    return key.endswith("zarr.json")


DAMAGES: dict[str, Damage] = {
    **{f"flip at {part}": flip(part) for part in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)},
    **{each.__name__: each for each in (truncate, empty, extend, remove, swap, copy_over, stale)},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"), train=20, test=6)


@pytest.fixture(scope="module", params=["components", pytest.param("fused", marks=pytest.mark.slow)])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache.zarr"
    return tiny_run.write_cache(path, pictures, num_views=VIEWS, block_rows=BLOCK_ROWS, store=request.param)


@pytest.fixture(scope="module")
def other(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Another build of the same recipe: other constants and other targets."""
    cache = TeacherCache.open(sound)
    manifest = cache.manifest
    path = tmp_path_factory.mktemp("other") / "cache.zarr"
    writer = CacheWriter.create(
        path,
        manifest,
        labels=cache.labels,
        sample_keys=cache.sample_keys,
        constants=cache_factory.tiny_constants(manifest, seed=8),
    )
    cache_factory.write(writer, cache_factory.tiny_targets(manifest, seed=9))
    return contents(LocalPlace(path))


def contents(place: Place) -> Files:
    return {key: place.read(key) for key in sorted(place.keys())}


def damaged(sound: Files, other: Files, count: int, *, seed: int = 0, part: int = 0) -> Iterator[tuple[str, Files]]:
    """Some cases of one part of all: every file with every damage. Those that change nothing are left out."""
    cases = [(key, kind) for key in sound for kind in DAMAGES]
    for number in np.random.default_rng(seed).permutation(len(cases))[part::PARTS][:count]:
        key, kind = cases[number]
        files = dict(sound)
        DAMAGES[kind](files, key, other)
        if files != sound:
            yield f"{kind}: {key}", files


def write(place: Place, files: Files, before: Files) -> None:
    """Turn a place with the files `before` into one with these files."""
    place.delete([key for key in before if key not in files])
    for key, data in files.items():
        if before.get(key) != data:
            place.put(key, data, durable=False)


def everything(cache: TeacherCache) -> Expected:
    """Labels, keys, constants and every target of every view."""
    cache.require_complete()
    views = [cache.load_view(view) for view in range(cache.num_views)]
    targets = [part(slice(None)).numpy() for view in views for part in (view.logits, view.features)]
    constants = [cache.constant(name) for name in cache_factory.tiny_constants(cache.manifest)]
    return [cache.labels, cache.sample_keys, *constants, *targets]


def same_or_error(read: Callable[[], Expected], expected: Expected, where: str) -> bool:
    """Whether reading gives what is expected; False if it raises a clear error."""
    try:
        found = read()
    except CacheError:
        return False
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, another, err_msg=where)
    return True


def is_copied(source: Place, target: Path, expected: Expected, where: str) -> bool:
    """Whether a copy succeeds; what it makes is sound, and complete unless commits were missing."""
    try:
        done = copy_cache(source, LocalPlace(target))
    except CacheError:
        if (target / "zarr.json").exists():  # a half copy
            assert local.verify(target).sound, where
        return False
    assert local.verify(target).sound, where
    if done.blocks_missing:
        with pytest.raises(IncompleteError):
            TeacherCache(target).require_complete()
    else:
        assert same_or_error(lambda: everything(TeacherCache(target)), expected, where), where
    return True


def is_verified(verify: Callable[[], local.Verification]) -> bool:
    try:
        found = verify()
    except CacheError:
        return False
    return found.sound and found.blocks == found.blocks_total


@pytest.mark.parametrize("part", [0, *(slow(part) for part in range(1, PARTS))])
def test_a_damaged_cache_gives_an_error_or_the_same(sound: Path, other: Files, tmp_path: Path, part: int) -> None:
    whole, expected = contents(LocalPlace(sound)), everything(TeacherCache(sound))
    path, refused, count = tmp_path / "cache.zarr", 0, 0
    for where, files in damaged(whole, other, turns(4, 1000), part=part):
        shutil.copytree(sound, path)
        write(LocalPlace(path), files, whole)
        readable = same_or_error(lambda: everything(TeacherCache.open(path)), expected, where)
        verified = is_verified(lambda: local.verify(path))
        copied = is_copied(LocalPlace(path), tmp_path / "copy.zarr", expected, where)
        assert verified <= readable, where
        assert verified <= copied, where
        assert contents(LocalPlace(path)) == files, f"{where}: a command changed the cache"
        refused += not copied
        count += 1
        shutil.rmtree(path)
        shutil.rmtree(tmp_path / "copy.zarr", ignore_errors=True)
    assert refused > count // 2


def test_a_damaged_remote_cache_gives_an_error_or_the_same(
    sound: Path, other: Files, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = contents(LocalPlace(sound)), everything(TeacherCache(sound))
    place, before = open_place(f"s3://{new_bucket()}/cache.zarr"), Files()
    write(place, whole, {})
    before = whole
    for number, (where, files) in enumerate(damaged(whole, other, turns(2, 60), seed=1)):
        write(place, files, before)
        before = files
        monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / f"home-{number}"))
        readable = same_or_error(lambda: everything(TeacherCache.open(str(place))), expected, where)
        verified = is_verified(lambda: remote.verify(place))
        copied = is_copied(place, tmp_path / f"copy-{number}.zarr", expected, where)
        assert verified <= readable, where
        assert verified <= copied, where
        assert contents(place) == files, f"{where}: a command changed the cache"


def test_commands_say_what_is_damaged_in_one_line(sound: Path, other: Files, tmp_path: Path) -> None:
    whole = contents(LocalPlace(sound))
    path = tmp_path / "cache.zarr"
    for where, files in damaged(whole, other, turns(2, 60), seed=2):
        shutil.copytree(sound, path)
        write(LocalPlace(path), files, whole)
        for command in (["copy", path, tmp_path / "copy.zarr"], ["pull", path, "--out", tmp_path / "pulled.zarr"]):
            done = CliRunner().invoke(cache_tools, [str(word) for word in command])
            assert done.exception is None or isinstance(done.exception, SystemExit), (where, done.exception)
            lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert (done.exit_code, len(lines)) in ((0, 0), (2, 1)), (where, done.output)
        for left in tmp_path.glob("*.zarr"):
            shutil.rmtree(left)


def test_no_student_trains_on_damage(sound: Path, other: Files, pictures: Path, tmp_path: Path) -> None:
    whole, path = contents(LocalPlace(sound)), tmp_path / "cache.zarr"
    shutil.copytree(sound, path)
    recipe: Any = tiny_run.recipe(path, tmp_path / "clean", epochs=2)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))

    def train(out: Path) -> Any:
        done = CliRunner().invoke(train_student, [str(tmp_path / "recipe.yaml"), "--out", str(out)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done

    assert train(tmp_path / "clean").exit_code == 0
    expected = (tmp_path / "clean" / LAST).read_bytes()
    before = whole
    for number, (where, files) in enumerate(damaged(whole, other, turns(1, 40), seed=3)):
        write(LocalPlace(path), files, before)
        before = files
        done = train(tmp_path / str(number))
        if done.exit_code:
            assert done.exit_code == 2, (where, done.output)
            assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1, where
        else:
            assert (tmp_path / str(number) / LAST).read_bytes() == expected, where
