"""Flip one bit of a cache: `verify` finds it if it changes anything, and no student trains on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_tools.cli import app as cache_tools
from cache_tools.codecs import FeatureSteps, FixedStep, RowStep, Sampled
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.config import dump_yaml
from cache_tools.errors import CacheError
from cache_tools.integrity.local import verify
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.turns import LONG, slow, turns
from train.checkpoints import LAST
from train.cli import app as train_student

pytestmark = pytest.mark.turns

FLIPS, CRASHES = turns(4, 75), turns(1, 8)
IMAGES = tiny_images(14, 4)
CACHES: dict[str, dict[str, Any]] = {
    "fused": {},
    "components": {"store": "components", "linear_head": False},
    "compact": {"codec": "compact"},
    "dense components": {"codec": "dense", "store": "components"},
    "top-k": {"codec": "top-k"},
    "sampled": {"codec": TargetCodecs(logits=Sampled())},
    "steps": {"codec": TargetCodecs(logits=RowStep(), features=FeatureSteps())},
    "fixed": {"codec": TargetCodecs(logits=FixedStep(pack="pcodec"), features=FixedStep())},
}


def random_bits(path: Path, count: int, seed: int = 0) -> Iterator[tuple[Path, int, int]]:
    """Random bits of random bytes; every file is as likely as any other, whatever its size."""
    rng = np.random.default_rng(seed)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    order = rng.permutation(len(files))
    for number in range(count):
        file = files[order[number % len(files)]]
        yield file, int(rng.integers(file.stat().st_size)), 1 << int(rng.integers(8))


def flip(file: Path, offset: int, mask: int) -> bytes:
    """Flip a bit; returns the file's bytes before."""
    before = file.read_bytes()
    file.write_bytes(before[:offset] + bytes([before[offset] ^ mask]) + before[offset + 1 :])
    return before


def all_targets(path: Path) -> list[np.ndarray]:
    """Labels and every target of every view."""
    cache = TeacherCache.open(path)
    cache.require_complete()
    views = [cache.load_view(view) for view in range(cache.num_views)]
    return [
        cache.labels,
        *(rows.numpy() for view in views for rows in (view.logits(slice(None)), view.features(slice(None)))),
    ]


@pytest.mark.parametrize("kind", CACHES)
def test_every_flipped_bit_is_found_or_harmless(tmp_path: Path, kind: str) -> None:
    cache = tmp_path / "cache"
    build(cache, tiny_manifest(IMAGES, num_views=2, block_rows=5, canaries=False, **CACHES[kind]), IMAGES)
    expected = all_targets(cache)
    harmless = 0
    for file, offset, mask in random_bits(cache, FLIPS):
        before = flip(file, offset, mask)
        where = f"{file}, byte {offset}, mask {mask}"
        try:
            damaged = not verify(cache).sound
        except CacheError:
            damaged = True
        try:
            found = all_targets(cache)
        except CacheError:
            assert damaged, f"{where}: reading fails, verify finds nothing"
        else:
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other, err_msg=where)
        if not damaged:
            harmless += 1
            assert json.loads(file.read_bytes()) == json.loads(before), where  # white space
        file.write_bytes(before)
    assert harmless < max(2, FLIPS // 10)
    assert verify(cache).sound


@pytest.mark.skipif(not LONG, reason="the short turn has fewer")
def test_there_are_five_hundred_flips() -> None:
    assert FLIPS * len(CACHES) >= 500


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"), train=20, test=6)


@pytest.mark.parametrize("kind", ["fused", slow("dense components"), slow("top-k"), slow("sampled")])
def test_no_student_trains_on_a_flipped_bit(tmp_path: Path, pictures: Path, kind: str) -> None:
    """Training ends with exit code 2, or with the same weights as on the sound cache if it did not read the bit."""
    cache = tiny_run.write_cache(tmp_path / "cache", pictures, num_views=2, block_rows=8, **CACHES[kind])
    recipe = tiny_run.recipe(cache, tmp_path / "clean", epochs=2, loss={"kind": "kd", "temperature": 1.0})
    expected = (trained(recipe, tmp_path / "clean") / LAST).read_bytes()
    refused = 0
    for number, (file, offset, mask) in enumerate(random_bits(cache, turns(4, 9), seed=1)):
        before = flip(file, offset, mask)
        done = run(recipe, tmp_path / str(number))
        if done.exit_code == 2:
            refused += 1
            assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
            assert not (tmp_path / str(number) / LAST).exists()
        else:
            assert done.exit_code == 0, done.stderr
            assert (tmp_path / str(number) / LAST).read_bytes() == expected, f"{file}, byte {offset}, mask {mask}"
        file.write_bytes(before)
    assert refused >= turns(1, 3)


def run(recipe: Any, out: Path) -> Any:
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".yaml")
    file.write_text(dump_yaml(recipe))
    done = CliRunner().invoke(train_student, [str(file), "--out", str(out)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def trained(recipe: Any, out: Path) -> Path:
    done = run(recipe, out)
    assert done.exit_code == 0, done.stderr
    return out


COMMANDS = (
    ["info", "{}"],
    ["verify", "{}"],
    ["repair", "{}", "--yes"],
    ["stats", "{}", "--json"],
    ["copy", "{}", "{}-copy.zarr"],
    ["recode", "{}", "--codec", "float32", "--out", "{}-recoded.zarr"],
    ["fidelity", "{}"],
    ["tune-fusion", "{}"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_command_crashes(tmp_path: Path, command: list[str]) -> None:
    sound, cache = tmp_path / "sound", tmp_path / "cache"
    build(sound, tiny_manifest(IMAGES, num_views=2, block_rows=5, codec="compact", store="components"), IMAGES)
    for file, offset, mask in random_bits(sound, CRASHES, seed=len(command[0])):
        shutil.copytree(sound, cache)
        flip(cache / file.relative_to(sound), offset, mask)
        done = CliRunner().invoke(cache_tools, [part.replace("{}", str(cache)) for part in command])
        assert done.exception is None or isinstance(done.exception, SystemExit), (file, offset, mask, done.exception)
        assert done.exit_code in (0, 1, 2)
        for left in tmp_path.glob("cache*"):
            shutil.rmtree(left)
