"""A complete cache is recognised by what its networks would be read from: nothing is loaded, and nothing mistaken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cache_tools.config import dump_yaml
from cache_tools.errors import MismatchError, StorageError
from cache_tools.images import open_images
from cache_tools.store.group import read_manifest
from pipeline.build import known
from pipeline.build.cache import build_cache
from pipeline.build.known import find_finished, inputs_digest
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "open_clip", "torchvision", "timm", "sklearn", "zarr", "polars", "obstore"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "root").mkdir()
    return tiny_build.prepare(tmp_path / "root", train=40)


def recipe(root: Path, **changes: object) -> BuildRecipe:
    return tiny_build.recipe(root, **({"num_views": 1, "out": None} | changes))


def found(wanted: BuildRecipe) -> bool:
    return find_finished(wanted, open_images(wanted.dataset)) is not None


def test_the_second_time_no_network_is_loaded(root: Path):
    build_cache(recipe(root))
    (root / "tiny.yaml").write_text(dump_yaml(recipe(root)))
    again = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline.cli", str(root / "tiny.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "complete: nothing to do" in again.stdout, again.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in again.stderr.splitlines() if "import time" in line}
    assert not imported & HEAVY


def test_an_unreadable_cache_of_the_same_name_stops_nobody(root: Path):
    build_cache(recipe(root))
    other = root.parent / "home" / "tiny-000000000000.zarr"
    other.mkdir()
    (other / "zarr.json").symlink_to("zarr.json")  # not even root can read it
    with pytest.raises(StorageError, match=r"Put it right or choose another --out"):
        read_manifest(other)
    assert found(recipe(root))


def test_only_what_values_come_from_counts(root: Path):
    build_cache(recipe(root))
    same = {"batch_size": 7, "device": "cuda", "preflight_samples": 99, "num_views": 1, "block_rows": 128}
    assert found(recipe(root, **same))
    other: list[dict[str, object]] = [
        {"name": "another"},
        {"num_views": 2},
        {"store": "components"},
        {"codec": "float16"},
        {"precision": "bfloat16"},
        {"views": {"base_seed": 12, "ops": ["pad-crop", "flip"]}},
        {"fusion": {"feature_dim": 16, "teacher_weight": 0.5}},
        {"clip": {"name": "local-dir:package:digits-clip", "class_names": ("zero", "one", "three")}},
        {"out": root / "elsewhere.zarr"},
    ]
    assert [changes for changes in other if found(recipe(root, **changes))] == []


def test_one_changed_weight_is_another_cache(root: Path):
    path = root / "cache.zarr"
    first = build_cache(recipe(root))
    build_cache(recipe(root, out=path))
    data = bytearray((root / "teacher.safetensors").read_bytes())
    data[-1] ^= 1  # a bit of the last weight
    (root / "teacher.safetensors").write_bytes(data)
    assert not found(recipe(root))
    assert build_cache(recipe(root)).path != first.path
    with pytest.raises(MismatchError, match="another recipe"):
        build_cache(recipe(root, out=path))


def test_other_images_are_another_cache(root: Path):
    build_cache(recipe(root))
    picture = next((root / "pictures" / "train" / "red").iterdir())
    picture.rename(picture.with_name("zzz.png"))
    assert not found(recipe(root)), "the order of the samples has changed"


def test_a_block_that_is_gone_is_built_again(root: Path):
    first = build_cache(recipe(root))
    (first.path / "commits" / "c.0.0.0").unlink()
    assert not found(recipe(root))
    assert build_cache(recipe(root)).images == 40
    assert found(recipe(root))


def test_templates_are_read_not_their_name(root: Path):
    templates = root / "templates.txt"
    clip = {"name": "local-dir:package:digits-clip", "templates": str(templates)}
    templates.write_text("a photo of a {}\n")
    before = inputs_digest(recipe(root, clip=clip))
    assert before is not None
    templates.write_text("a drawing of a {}\n")
    assert inputs_digest(recipe(root, clip=clip)) != before
    templates.unlink()
    assert inputs_digest(recipe(root, clip=clip)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"name": "timm:resnet10t", "weights": "c3_in1k"}},
        {"clip": {"name": "ViT-B-32", "weights": "laion2b_s34b_b79k"}},
        {"clip": {"name": "hf-hub:org/model"}},
        {"teacher": {"name": "resnet8"}},
        {"teacher": {"name": "resnet8", "weights": "nowhere.pth"}},
    ],
)
def test_what_a_library_looks_after_cannot_be_told_from_files(root: Path, changes: dict[str, object]):
    assert inputs_digest(recipe(root, **changes)) is None


def test_other_code_may_read_the_same_files_in_another_way(root: Path, monkeypatch: pytest.MonkeyPatch):
    build_cache(recipe(root))
    assert found(recipe(root))
    (root / "changed.py").write_text("")
    monkeypatch.setattr(known, "_code", lambda: [root / "changed.py"])
    assert not found(recipe(root))
    assert build_cache(recipe(root)).images == 0, "the networks decide then: they are the same"


def test_a_damaged_cache_is_left_to_the_build(root: Path):
    result = build_cache(recipe(root))
    (result.path / "zarr.json").write_text("{}")
    assert not found(recipe(root))
