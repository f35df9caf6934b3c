"""The build: what it stores, how it resumes, and which errors it raises before it changes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from cache_tools import fusion
from cache_tools.cli import app
from cache_tools.errors import (
    CacheError,
    DataError,
    DeviceError,
    MismatchError,
    PreflightError,
    StorageError,
    WeightsError,
)
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.build.known import CODE_VERSIONS
from pipeline.build.preflight import Preflight
from pipeline.networks.ensemble import load_ensemble
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build, tiny_run
from tests.support.tiny_build import arrays_of, constant_teacher, files_of

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def built(root: Path) -> TeacherCache:
    build_cache(tiny_build.recipe(root))
    return TeacherCache.open(root / "cache.zarr")


def test_rows_are_the_fused_targets_of_their_view(root: Path, built: TeacherCache):
    recipe = tiny_build.recipe(root)
    images = open_images(recipe.dataset)
    ensemble = load_ensemble(recipe.teacher, recipe.clip, recipe.fusion, images, recipe.dataset, CPU, "float32")
    index = torch.tensor([149, 3, 77])
    for view in range(3):
        pixels = built.recipe.views.apply(torch.from_numpy(images.load(index.numpy())), index, view)
        (teacher,), (clip,) = ensemble.outputs(pixels)
        mixed = 0.7 * teacher.logits.double() + 0.3 * ensemble.clips[0].identity.logit_scale * clip.cosine.double()
        expected = mixed - mixed.mean(1, keepdim=True)
        targets = built.load_view(view)
        torch.testing.assert_close(targets.logits(index).double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(targets.features(index), ensemble.fuse([teacher], [clip])[1], rtol=1e-4, atol=1e-5)


def test_views_differ_and_the_manifest_is_complete(root: Path, built: TeacherCache):
    assert not np.array_equal(
        built.read_array("fused_logits", 0, slice(0, 50)), built.read_array("fused_logits", 1, slice(0, 50))
    )
    manifest = built.manifest
    assert manifest.build_recipe == tiny_build.recipe(root).model_dump(mode="json")
    assert manifest.recipe.teacher.architecture == "resnet8"
    assert manifest.recipe.clip.preprocessing.size == (32, 32)
    assert len(manifest.recipe.clip.templates) == 12
    assert {"torch", "zarr"} <= set(manifest.provenance["versions"])
    assert built.class_names == tiny_run.CLASSES


@pytest.mark.parametrize(
    ("changes", "is_noted"),
    [({"views": {}}, True), ({"views": {}, "num_views": 1}, False), ({}, False)],
    ids=["same views", "one view", "views"],
)
def test_views_that_show_the_same_pixels_are_noted(root: Path, tmp_path: Path, changes: dict, is_noted: bool):
    said: list[str] = []
    build_cache(tiny_build.recipe(root, out=tmp_path / "cache", **changes), said.append)
    noted = [line for line in said if "views show the same pixels, because views.ops is empty" in line]
    assert len(noted) == is_noted
    assert all(line.startswith("note: all 3 views") for line in noted)


def test_components_give_the_fused_targets(root: Path, built: TeacherCache):
    build_cache(tiny_build.recipe(root, store="components", out=root / "components.zarr"))
    components = TeacherCache.open(root / "components.zarr")
    fused, derived = built.load_view(1), components.load_view(1)
    everything = slice(None)
    torch.testing.assert_close(derived.logits(everything), fused.logits(everything), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(derived.features(everything), fused.features(everything), rtol=1e-4, atol=1e-5)


def test_match_brings_clip_to_the_teachers_spread(root: Path):
    path = root / "match.zarr"
    build_cache(tiny_build.recipe(root, fusion={"clip_scale": "match", "feature_dim": 16}, num_views=1, out=path))
    recipe = tiny_build.recipe(root)
    images = open_images(recipe.dataset)
    ensemble = load_ensemble(recipe.teacher, recipe.clip, recipe.fusion, images, recipe.dataset, CPU, "float32")
    (teacher,), (clip,) = ensemble.outputs(torch.from_numpy(images.load(slice(None))))
    spread = teacher.logits.double().std(1).mean() / clip.cosine.double().std(1).mean()
    assert TeacherCache.open(path).manifest.clip_scale == pytest.approx(float(spread), rel=1e-3)


def test_a_repeated_build_does_nothing_and_more_views_are_added(root: Path):
    path = root / "again.zarr"
    first = build_cache(tiny_build.recipe(root, num_views=1, out=path))
    before = files_of(path)
    second = build_cache(tiny_build.recipe(root, num_views=1, out=path))
    grown = build_cache(tiny_build.recipe(root, num_views=3, out=path))
    assert (first.images, second.images, grown.images) == (150, 0, 300)
    after = files_of(path)
    assert all(after[name] == data for name, data in before.items() if not name.endswith("zarr.json"))


def test_batch_and_block_sizes_do_not_change_the_targets(root: Path, built: TeacherCache):
    path = root / "other-sizes.zarr"
    build_cache(tiny_build.recipe(root, batch_size=50, block_rows=128, out=path))
    other = TeacherCache.open(path)
    assert other.manifest.fingerprint == built.manifest.fingerprint
    np.testing.assert_allclose(
        other.read_array("fused_logits", 2), built.read_array("fused_logits", 2), rtol=1e-4, atol=1e-4
    )


def test_a_block_without_commit_is_rebuilt(root: Path):
    path = root / "gap.zarr"
    build_cache(tiny_build.recipe(root, out=path))
    before = arrays_of(path)
    (path / "commits" / "c.1.2.0").unlink()
    assert build_cache(tiny_build.recipe(root, out=path)).images == 150 - 2 * 64
    assert arrays_of(path) == before


def refused(root: Path, **changes: object) -> CacheError:
    with pytest.raises(CacheError) as caught:
        build_cache(tiny_build.recipe(root, **changes))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.medium
@pytest.mark.parametrize("views", [3, 4], ids=["missing blocks", "more views"])
def test_builders_of_code_that_stores_other_rows_do_not_mix_blocks(
    root: Path, built: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
):
    shutil.copytree(built.path, tmp_path / "cache.zarr")
    if views == 3:
        (tmp_path / "cache.zarr" / "commits" / "c.1.1.0").unlink()
    before = files_of(tmp_path / "cache.zarr")
    recipe = tiny_build.recipe(root, out=tmp_path / "cache.zarr", num_views=views)
    with monkeypatch.context() as patch:
        patch.setitem(CODE_VERSIONS, "networks", CODE_VERSIONS["networks"] + 1)
        with pytest.raises(MismatchError, match="another version of teacher-cache") as caught:
            build_cache(recipe)
    assert caught.value.found == f"networks {CODE_VERSIONS['networks']}"
    assert files_of(tmp_path / "cache.zarr") == before
    build_cache(recipe)
    assert TeacherCache.open(tmp_path / "cache.zarr").is_complete


@pytest.mark.medium
def test_a_complete_cache_of_other_code_is_used_as_it_is(
    root: Path, built: TeacherCache, monkeypatch: pytest.MonkeyPatch
):
    before = files_of(built.path)
    monkeypatch.setitem(CODE_VERSIONS, "networks", CODE_VERSIONS["networks"] + 1)
    assert build_cache(tiny_build.recipe(root)).images == 0
    assert files_of(built.path) == before


def test_a_teacher_no_better_than_chance_is_an_error(root: Path, tmp_path):
    """A teacher that gives every image the same logits."""
    error = refused(
        root, preflight_samples=2000, out=tmp_path / "c.zarr", teacher={"name": str(constant_teacher(tmp_path))}
    )
    assert isinstance(error, PreflightError)
    assert "chance" in str(error)
    assert not (tmp_path / "c.zarr").exists()


def test_missing_weights(root: Path, tmp_path):
    error = refused(root, teacher={"name": "resnet8", "weights": str(tmp_path / "no.pth")}, out=tmp_path / "c.zarr")
    assert isinstance(error, WeightsError)
    assert "no.pth" in str(error)


def test_a_teacher_with_another_class_count(root: Path, tmp_path):
    teacher = tiny_build.write_teacher(tmp_path / "t.safetensors", class_names=("a", "b", "c", "d"))
    error = refused(root, teacher={"name": str(teacher)}, out=tmp_path / "c.zarr")
    assert isinstance(error, WeightsError)
    assert "4" in str(error)
    assert "3" in str(error)


def test_a_teacher_with_another_class_order_gives_the_same_targets(root: Path, tmp_path):
    """Its head has the same rows in another order, and the names of its classes say so."""
    names = ("green", "blue", "red")
    path, weights = root / "teacher.safetensors", tmp_path / "t.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"class_names": json.dumps(names)}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    rows = [tiny_run.CLASSES.index(name) for name in names]
    save_file(tensors | {name: tensors[name][rows] for name in ("fc.weight", "fc.bias")}, weights, metadata)
    said: list[str] = []
    turned = build_cache(
        tiny_build.recipe(root, num_views=1, teacher={"name": str(weights)}, out=tmp_path / "turned.zarr"), said.append
    )
    plain = build_cache(tiny_build.recipe(root, num_views=1, out=tmp_path / "plain.zarr"))
    assert any("its classes in another order" in line for line in said)
    assert turned.manifest.fingerprint != plain.manifest.fingerprint
    one, other = (TeacherCache.open(result.path).read_array("fused_logits", 0) for result in (turned, plain))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_cache_of_another_recipe_is_not_touched(root: Path, tmp_path):
    path = tmp_path / "c.zarr"
    build_cache(tiny_build.recipe(root, num_views=1, out=path))
    before = files_of(path)
    error = refused(root, num_views=1, views={"base_seed": 12, "ops": ["flip"]}, out=path)
    assert isinstance(error, MismatchError)
    assert files_of(path) == before


def test_a_folder_with_other_files_is_not_touched(root: Path, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    error = refused(root, out=tmp_path)
    assert isinstance(error, StorageError)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_broken_image_is_named_in_the_error(tmp_path):
    root = tiny_build.prepare(tmp_path, train=60)
    victim = sorted((root / "pictures" / "train" / "red").iterdir())[-1]
    victim.write_bytes(victim.read_bytes()[:60])
    error = refused(root, block_rows=16, batch_size=16)
    assert isinstance(error, DataError)
    assert victim.name in str(error)


def test_cuda_where_there_is_none(root: Path, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert isinstance(refused(root, device="cuda", out=tmp_path / "c.zarr"), DeviceError)


@pytest.mark.cuda
@pytest.mark.parametrize("store", ["fused", "components"])
def test_cuda_gives_the_targets_of_the_cpu(root: Path, tmp_path, store: str):
    build_cache(tiny_build.recipe(root, store=store, out=tmp_path / "cpu.zarr"))
    build_cache(tiny_build.recipe(root, store=store, device="cuda", out=tmp_path / "cuda.zarr"))
    cpu, cuda = (TeacherCache.open(tmp_path / f"{name}.zarr").load_view(2) for name in ("cpu", "cuda"))
    torch.testing.assert_close(cuda.logits(slice(None)), cpu.logits(slice(None)), rtol=2e-2, atol=2e-2)  # TF32
    torch.testing.assert_close(cuda.features(slice(None)), cpu.features(slice(None)), rtol=2e-2, atol=2e-2)


def test_projections_are_those_of_the_recipe(built: TeacherCache):
    seed = built.recipe.fusion.projection_seed
    np.testing.assert_array_equal(built.constant("teacher_projection"), fusion.projection_matrix(64, 16, seed))
    np.testing.assert_array_equal(built.constant("clip_projection"), fusion.projection_matrix(64, 16, seed + 1))


# The test split of a complete cache


def other_test(root: Path, split: str | list[str] | None, **changes: object) -> BuildRecipe:
    dataset = tiny_run.dataset(root / "pictures").model_dump() | {"test_split": split}
    return tiny_build.recipe(root, dataset=dataset, **changes)


@pytest.mark.parametrize("split", ["test[::2]", None, ["test[:5]", "test"]])
def test_building_again_corrects_the_test_split_and_computes_nothing(
    root: Path, built: TeacherCache, tmp_path: Path, split: str | list[str] | None
):
    shutil.copytree(built.path, tmp_path / "c.zarr")
    before = arrays_of(tmp_path / "c.zarr")
    said: list[str] = []
    result = build_cache(other_test(root, split, out=tmp_path / "c.zarr"), said.append)
    assert result.images == 0
    assert arrays_of(tmp_path / "c.zarr") == before
    stored = TeacherCache.open(tmp_path / "c.zarr").manifest
    recorded = tuple(split) if isinstance(split, list) else split
    assert stored.dataset.test_split == recorded
    assert stored.build_recipe["dataset"]["test_split"] == split
    splits = [split] if isinstance(split, str) else split or []
    assert list(stored.provenance["folders"]) == ["train", *splits]
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "c.zarr")], env={"COLUMNS": "300"}).stdout.splitlines()
    (line,) = [line for line in shown if line.startswith("test split:")]
    assert line.partition(":")[2].strip() == (", ".join(splits) or "none: students are not evaluated")
    folders = [line.removeprefix("images of ").rpartition(": ")[0] for line in shown if line.startswith("images of ")]
    assert folders == ["train", *splits]
    assert (stored.fingerprint, stored.recipe) == (built.manifest.fingerprint, built.manifest.recipe)
    assert any("the test split is now" in line and "(it was test)" in line for line in said)
    again: list[str] = []
    build_cache(other_test(root, split, out=tmp_path / "c.zarr"), again.append)
    assert again == [f"{tmp_path / 'c.zarr'} is complete: nothing to do"]


def test_the_networks_are_measured_on_the_new_test_split(root: Path, tmp_path: Path):
    """The teacher is untrained, so the check needs a sample on which it happens to be better than chance."""
    recipe = tiny_build.recipe(root, num_views=1, out=tmp_path / "c.zarr")
    build_cache(recipe)
    measured: list[ImageSet] = []

    def preflight(ensemble: object, images: ImageSet, limit: int, batch_size: int, *tested: object) -> Preflight:
        measured.append(images)
        return Preflight(teacher_top1=0.5, clip_top1=0.4, fusion_top1=0.6, split=images.split, n=len(images))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.build.cache.run_preflight", preflight)
        changed = other_test(root, ["test[1::2]", "test"], num_views=1, out=tmp_path / "c.zarr", preflight_samples=8)
        build_cache(changed)
    assert [(images.split, len(images)) for images in measured] == [("test[1::2]", 10)]
    found = TeacherCache.open(tmp_path / "c.zarr").manifest.preflight
    assert found is not None
    assert (found["split"], found["fusion_top1"]) == ("test[1::2]", 0.6)


def test_a_test_split_that_does_not_open_changes_nothing(root: Path, built: TeacherCache, tmp_path: Path):
    shutil.copytree(built.path, tmp_path / "c.zarr")
    before = files_of(tmp_path / "c.zarr")
    with pytest.raises(DataError, match="nowhere"):
        build_cache(other_test(root, "nowhere", out=tmp_path / "c.zarr"))
    assert files_of(tmp_path / "c.zarr") == before
