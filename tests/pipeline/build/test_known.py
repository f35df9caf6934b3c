"""A complete cache is recognised from files, recipe and code versions, without loading a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.config import dump_yaml
from cache_tools.errors import MismatchError, UnsafeFileError
from cache_tools.images import open_images
from cache_tools.store.group import read_manifest
from pipeline.build import known
from pipeline.build.cache import build_cache
from pipeline.build.known import find_finished, inputs_digest
from pipeline.networks import ensemble
from pipeline.networks.ensemble import load_ensemble, view_pixels
from pipeline.recipe import BuildRecipe, load_build_recipe
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


def test_a_complete_cache_is_recognised_without_loading_a_network(root: Path):
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


def test_an_unreadable_cache_of_the_same_name_is_ignored(root: Path):
    build_cache(recipe(root))
    other = root.parent / "home" / "tiny-000000000000.zarr"
    other.mkdir()
    (other / "zarr.json").symlink_to("zarr.json")
    with pytest.raises(UnsafeFileError, match="links inside a cache or a run are not followed"):
        read_manifest(other)
    assert found(recipe(root))


def test_only_fields_that_determine_values_count(root: Path):
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
    picture = min((root / "pictures" / "train" / "red").iterdir())
    picture.rename(picture.with_name("zzz.png"))
    assert not found(recipe(root)), "the order of the samples has changed"


def test_a_block_that_is_gone_is_built_again(root: Path):
    first = build_cache(recipe(root))
    (first.path / "commits" / "c.0.0.0").unlink()
    assert not found(recipe(root))
    assert build_cache(recipe(root)).images == 40
    assert found(recipe(root))


def test_weights_replaced_during_the_build_are_not_recorded(root: Path, monkeypatch: pytest.MonkeyPatch):
    load = ensemble.load_ensemble

    def load_and_replace(*arguments: Any, **options: Any) -> ensemble.TeacherEnsemble:
        loaded = load(*arguments, **options)
        path = root / "teacher.safetensors"
        path.write_bytes(path.read_bytes() + b" ")
        return loaded

    monkeypatch.setattr(ensemble, "load_ensemble", load_and_replace)
    result = build_cache(recipe(root))
    assert result.manifest.provenance["inputs"] is None


def test_a_tokenizer_of_the_hub_is_not_determined_by_files(root: Path):
    folder = root / "clip"
    shutil.copytree(ROOT / "pipeline/assets/digits-clip", folder)
    clip = {"name": f"local-dir:{folder}"}
    assert inputs_digest(recipe(root, clip=clip)) is not None
    config = folder / "open_clip_config.json"
    config.write_text(
        config.read_text().replace('"text_cfg": {', '"text_cfg": {"hf_tokenizer_name": "bert-base-uncased", ')
    )
    assert inputs_digest(recipe(root, clip=clip)) is None


def test_the_content_of_a_template_file_counts_not_its_name(root: Path):
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
def test_weights_managed_by_a_library_have_no_digest(root: Path, changes: dict[str, object]):
    assert inputs_digest(recipe(root, **changes)) is None


@pytest.mark.parametrize("part", known.CODE_VERSIONS)
def test_every_code_version_is_part_of_the_digest(root: Path, monkeypatch: pytest.MonkeyPatch, part: str):
    before = inputs_digest(recipe(root))
    monkeypatch.setitem(known.CODE_VERSIONS, part, known.CODE_VERSIONS[part] + 1)
    assert inputs_digest(recipe(root)) != before


def test_a_cache_of_another_code_version_is_found_by_its_fingerprint(root: Path, monkeypatch: pytest.MonkeyPatch):
    build_cache(recipe(root))
    assert found(recipe(root))
    monkeypatch.setitem(known.CODE_VERSIONS, "networks", known.CODE_VERSIONS["networks"] + 1)
    assert not found(recipe(root))
    assert build_cache(recipe(root)).images == 0, "the loaded networks have the same fingerprint"


def test_a_docstring_keeps_the_digest_and_a_raised_version_changes_it(root: Path, tmp_path: Path):
    """In a copy of the packages, whose sources are edited on disk."""
    copy, file = tmp_path / "copy", root / "tiny.yaml"
    for package in ("cache_tools", "train", "pipeline"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    file.write_text(dump_yaml(recipe(root)))
    before = digest_in(copy, file)
    assert before == inputs_digest(recipe(root))
    ensemble, networks = (copy / "pipeline" / "networks" / name for name in ("ensemble.py", "__init__.py"))
    ensemble.write_text(ensemble.read_text().replace('"""All teachers', '"""Every teacher, all teachers', 1))
    assert digest_in(copy, file) == before
    networks.write_text(networks.read_text().replace("NETWORKS_VERSION = ", "NETWORKS_VERSION = 1", 1))
    assert digest_in(copy, file) != before


def digest_in(packages: Path, recipe_file: Path) -> str:
    """`inputs_digest` of a recipe file, computed by the packages in a folder."""
    code = "import sys; from pipeline.build.known import inputs_digest; from pipeline.recipe import load_build_recipe; "
    code += "print(inputs_digest(load_build_recipe(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(recipe_file)]
    return subprocess.run(
        command, cwd=packages, capture_output=True, text=True, check=True, env=isolated()
    ).stdout.strip()


def isolated() -> dict[str, str]:
    """The environment without PYTHONPATH: packages are found in the working folder."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_shipped_networks_have_their_pinned_identities_and_targets():
    """If this fails, the same files give another cache: raise the version constant of the code that changed."""
    digits = load_build_recipe("digits")
    images = open_images(digits.dataset)
    ensemble = load_ensemble(
        digits.teachers, digits.clips, digits.fusion, images, digits.dataset, torch.device("cpu"), digits.precision
    )
    (teacher,), (clip,) = ensemble.teachers, ensemble.clips
    preprocessing = {"interpolation": "bicubic", "mean": (0.3058,) * 3, "std": (0.3241,) * 3}
    assert teacher.identity.model_dump() == {
        "architecture": "resnet20",
        "weights_digest": "1a6fa80d0469a6a0679b2e947f2e5803ee2f89d7bbfcdd92d396d1da67369fd5",
        "feature_dim": 64,
        "linear_head": True,
        "preprocessing": {"size": None, **preprocessing},
        "weight": 1.0,
    }
    assert clip.identity.model_dump(exclude={"templates", "class_names"}) == {
        "architecture": "local-dir:digits-clip",
        "config_digest": "6713823914a6e704a83c0aa863b66c69cbf518c973e27293a25572d5470ece00",
        "weights_digest": "900a542c0554a3d37aac3106127f80fa4bf0ce849794fc3d4e81898bd5e2fa1a",
        "feature_dim": 64,
        "logit_scale": pytest.approx(14.104365, rel=1e-6),
        "preprocessing": {"size": (32, 32), **preprocessing},
        "weight": 1.0,
    }
    index = np.array([0])
    targets = ensemble.targets(view_pixels(images, digits.views, index, 1, ensemble.device).teacher, "fused")
    assert targets["fused_logits"][0].tolist() == pytest.approx(
        [13.81, -8.33, -0.04, -7.7, 1.39, -1.09, 1.77, -1.87, 1.5, 0.56], abs=0.02
    )
    assert targets["fused_features"][0, :6].tolist() == pytest.approx(
        [0.2092, 0.0323, -0.0155, -0.1254, -0.0098, 0.2004], abs=1e-3
    )


def test_a_damaged_cache_is_not_recognised(root: Path):
    result = build_cache(recipe(root))
    (result.path / "zarr.json").write_text("{}")
    assert not found(recipe(root))
