"""Fused caches made from component caches, against the reader's own fusing and against caches that were built fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.codecs import TopK
from cache_tools.codecs.presets import resolve_codecs
from cache_tools.derive.fuse import Fused, fuse
from cache_tools.errors import (
    CacheError,
    FormatError,
    IncompleteError,
    MismatchError,
    NotFoundError,
    PreflightError,
    RecipeError,
    StorageError,
    WeightsError,
)
from cache_tools.format.recipe import FusionRecipe
from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.images import open_images
from cache_tools.integrity.local import verify
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.store.writer import CacheWriter
from pipeline.build.cache import build_cache
from tests.support import cache_factory, tiny_build
from tests.support.tiny_clip import make_folder
from tests.support.turns import slow, some

pytestmark = pytest.mark.medium

EVERYTHING = slice(None)
IMAGES = cache_factory.tiny_images()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("fuse"))
    make_folder(root / "tiny-clip")
    return root


def recipe(root: Path, **changes: Any) -> Any:
    """A CLIP with random weights and the twelve templates."""
    clip = {"name": f"local-dir:{root / 'tiny-clip'}"} | changes.pop("clip", {})
    return tiny_build.recipe(root, clip=clip, **changes)


@pytest.fixture(scope="module")
def built(root: Path) -> TeacherCache:
    """Components of real networks, float32."""
    return TeacherCache(build_cache(recipe(root, store="components", out=root / "components.zarr")).path)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """Random components of two teachers and three CLIPs with two, three and four prompts."""
    path = tmp_path_factory.mktemp("several") / "several.zarr"
    shares: dict[str, Any] = {"teacher_weights": (0.5, 0.5), "clip_weights": (0.2, 0.3, 0.5)}
    cache_factory.build(
        path, cache_factory.tiny_manifest(IMAGES, store="components", codec="float32", **shares), IMAGES
    )
    return TeacherCache(path)


def fused(cache: TeacherCache, out: Path, templates: tuple[str, ...] | None = None, **choice: Any) -> TeacherCache:
    return TeacherCache(fuse(cache, FusionChoice(**choice), templates=templates, out=out, device="cpu").path)


CHOICES: list[dict[str, Any]] = [
    {},
    {"teacher_weight": 0.2, "feature_weight": 0.9},
    {"clip_scale": 3.0},
    {"clip_scale": "match", "teacher_weights": (0.9, 0.1)},
    {"teacher_weights": (0.0, 1.0), "clip_weights": (0.0, 1.0, 0.0)},
    {"prompt_ensemble": "logits"},
    {"prompt_ensemble": "probabilities", "clip_weights": (0.5, 0.25, 0.25)},
    {"prompts": (1,), "clip_scale": "match"},
    {"prompts": (1, 0), "prompt_ensemble": "probabilities"},
]


@pytest.mark.parametrize("choice", some(CHOICES, 2), ids=str)
def test_rows_equal_those_that_training_on_the_components_sees(
    several: TeacherCache, tmp_path: Path, choice: dict[str, Any]
) -> None:
    made = fused(several, tmp_path / "made", **choice)
    fusion = FusionChoice(**choice).resolve(several)
    for view in range(several.num_views):
        expected, found = several.load_view(view, fusion=fusion), made.load_view(view)
        torch.testing.assert_close(found.logits(EVERYTHING), expected.logits(EVERYTHING), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.features(EVERYTHING), expected.features(EVERYTHING), rtol=1e-6, atol=1e-7)
    assert made.manifest.clip_scales == pytest.approx(fusion.clip_scales)
    assert verify(made.path).sound


@pytest.mark.parametrize(
    "fusion",
    [
        {"teacher_weight": 0.3, "feature_weight": 0.1, "clip_scale": 5.0},
        slow({"prompt_ensemble": "probabilities"}),
    ],
    ids=str,
)
def test_equals_a_cache_that_was_built_fused(
    root: Path, built: TeacherCache, tmp_path: Path, fusion: dict[str, Any]
) -> None:
    direct = TeacherCache(build_cache(recipe(root, fusion=fusion | {"feature_dim": 16}, out=tmp_path / "direct")).path)
    made = fused(built, tmp_path / "made", **fusion)
    check_same(made, direct)
    assert made.recipe.model_copy(update={"derived_from": None}) == direct.recipe
    assert made.recipe.derived_from == built.manifest.fingerprint
    assert made.manifest.fingerprint != direct.manifest.fingerprint


@pytest.mark.parametrize("ensemble", ["embedding", "logits"])
def test_other_prompts_through_the_same_clip_equal_a_build_with_them(
    root: Path, built: TeacherCache, tmp_path: Path, ensemble: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a scan of {}\na photo of a {}\n{}, tinted\n")
    settings = {"prompt_ensemble": ensemble, "feature_dim": 16}
    direct = TeacherCache(
        build_cache(recipe(root, clip={"templates": str(file)}, fusion=settings, out=tmp_path / "direct")).path
    )
    templates = ("a scan of {}", "a photo of a {}", "{}, tinted")
    made = fused(built, tmp_path / "made", templates, prompt_ensemble=ensemble)
    check_same(made, direct)
    assert made.recipe.clip.templates == templates
    assert made.recipe.model_copy(update={"derived_from": None}) == direct.recipe
    plain = fused(built, tmp_path / "plain", prompt_ensemble=ensemble).load_view(1).logits(EVERYTHING)
    assert (plain - made.load_view(1).logits(EVERYTHING)).abs().max() > 1e-3, "the prompts matter"


def check_same(made: TeacherCache, direct: TeacherCache) -> None:
    assert made.num_views == direct.num_views
    for view in range(direct.num_views):
        one, two = made.load_view(view), direct.load_view(view)
        torch.testing.assert_close(one.logits(EVERYTHING), two.logits(EVERYTHING), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.features(EVERYTHING), two.features(EVERYTHING), rtol=1e-4, atol=1e-5)
    assert made.manifest.clip_scales == pytest.approx(direct.manifest.clip_scales, rel=1e-5)
    for name in ("class_embeddings", "teacher_projection", "clip_projection"):
        np.testing.assert_allclose(made.constant(name), direct.constant(name), atol=1e-6)


def test_stored_templates_need_no_clip(built: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache_tools.plugins.load", None)
    stored = built.recipe.clip.templates
    by_name = fused(built, tmp_path / "name", (stored[4], stored[0]))
    by_number = fused(built, tmp_path / "number", prompts=(4, 0))
    assert by_name.manifest.fingerprint == by_number.manifest.fingerprint
    assert contents(by_name.path) == contents(by_number.path)


def test_the_rest_of_the_manifest_is_the_sources(built: TeacherCache, root: Path, tmp_path: Path) -> None:
    made = fused(built, tmp_path / "made", teacher_weight=0.4)
    manifest = made.manifest
    for key in ("dataset", "num_views", "block_rows", "canaries", "build_recipe"):
        assert getattr(manifest, key) == getattr(built.manifest, key)
    assert np.array_equal(made.labels, built.labels)
    assert np.array_equal(made.sample_keys, built.sample_keys)
    images = open_images(recipe(root).dataset)
    made.check_dataset(images)
    made.check_canaries(images)
    assert manifest.name == "tiny-fused"
    source = manifest.provenance["source"]
    assert (source["name"], source["fingerprint"], source["path"]) == (
        "tiny", built.manifest.fingerprint, str(built.path)
    )  # fmt: skip
    assert manifest.provenance["device"] == "cpu", "where the networks ran"
    assert manifest.provenance["preflight"] == built.manifest.provenance["preflight"]


def test_a_build_does_not_reuse_a_derived_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    plan = recipe(root, store="components", num_views=1, out=None)
    first = build_cache(plan)
    made = fuse(TeacherCache(first.path), FusionChoice())
    assert made.path.parent == first.path.parent
    shutil.rmtree(first.path)
    again = build_cache(plan)
    assert (again.path, again.images) == (first.path, 150)
    assert "inputs" in TeacherCache(again.path).manifest.provenance
    assert "inputs" not in made.manifest.provenance


def test_a_dense_codec_keeps_its_error_bound(built: TeacherCache, tmp_path: Path) -> None:
    exact = fused(built, tmp_path / "exact")
    coded = TeacherCache(fuse(built, FusionChoice(), codec="compact", out=tmp_path / "coded", device="cpu").path)
    assert coded.recipe.codecs == resolve_codecs("compact", 3)
    for name, spec in coded.targets.items():
        constants = {key.removeprefix(name): coded.constant(key) for key in spec.constants}
        for view in range(3):
            true = exact.read_array(name, view)
            error = np.abs(coded.read_array(name, view).astype(np.float64) - true)
            assert (error <= spec.codec.error_bound(true, constants)).all()
    assert not np.array_equal(coded.read_array("fused_features", 0), exact.read_array("fused_features", 0))


def test_match_on_a_clean_view_0_equals_a_build(root: Path, tmp_path: Path) -> None:
    views = {"base_seed": 11, "clean_first": True, "ops": ["pad-crop", "flip"]}
    settings = {"clip_scale": "match", "feature_dim": 16}
    source = build_cache(recipe(root, views=views, store="components", out=tmp_path / "source"))
    direct = build_cache(recipe(root, views=views, fusion=settings, out=tmp_path / "direct"))
    check_same(fused(TeacherCache(source.path), tmp_path / "made", clip_scale="match"), TeacherCache(direct.path))


def test_match_keeps_the_sources_scale_if_nothing_it_depends_on_changed(root: Path, tmp_path: Path) -> None:
    """Its build used clean images for the scale; view 0 is not clean here."""
    settings = {"clip_scale": "match", "feature_dim": 16}
    source = build_cache(recipe(root, store="components", fusion=settings, num_views=1, out=tmp_path / "source"))
    cache = TeacherCache(source.path)
    same = fused(cache, tmp_path / "same", teacher_weight=0.1, clip_scale="match")
    assert same.manifest.clip_scales == cache.manifest.clip_scales
    again = fused(cache, tmp_path / "again", prompts=(1,))
    expected = FusionChoice(prompts=(1,), clip_scale="match").resolve(cache).clip_scales
    assert again.manifest.clip_scales == pytest.approx(expected)
    assert again.manifest.clip_scales != cache.manifest.clip_scales


def test_accuracies_of_another_fusion_are_dropped(tmp_path: Path) -> None:
    manifest = cache_factory.tiny_manifest(IMAGES, store="components")
    measured = {"teacher_top1": 0.9, "clip_top1": 0.6, "fusion_top1": 0.95, "networks": {}, "split": "test", "n": 64}
    manifest = manifest.model_copy(update={"provenance": manifest.provenance | {"preflight": measured}})
    cache_factory.build(tmp_path / "source", manifest, IMAGES)
    source, left = TeacherCache(tmp_path / "source"), {"split", "n"}
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, set(measured)),
        ({"feature_weight": 0.1}, set(measured)),
        ({"teacher_weight": 0.1}, {"teacher_top1", "clip_top1", "networks"} | left),
        ({"prompts": (1,)}, {"teacher_top1"} | left),
        ({"clip_scale": 4.0}, {"teacher_top1"} | left),
    ]
    for number, (choice, kept) in enumerate(cases):
        made = fused(source, tmp_path / str(number), **choice)
        assert set(made.manifest.provenance["preflight"]) == kept
    assert source.manifest.provenance["preflight"] == measured


# Continuing


def contents(path: Path) -> dict[str, bytes]:
    """All files except the manifest, which has a date."""
    files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name != "zarr.json"}


def counts(done: Fused) -> tuple[int, int, int]:
    return done.blocks, done.blocks_there, done.blocks_missing


def test_the_second_run_does_nothing(built: TeacherCache, tmp_path: Path) -> None:
    first = fuse(built, FusionChoice(teacher_weight=0.5), out=tmp_path / "made")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}
    again = fuse(built, FusionChoice(teacher_weight=0.5), out=tmp_path / "made")
    assert counts(first) == (9, 0, 0)
    assert counts(again) == (0, 9, 0)
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "made").rglob("*")}


def components(path: Path, blocks: int | None = None, num_views: int = 3) -> CacheWriter:
    manifest = cache_factory.tiny_manifest(IMAGES, store="components", codec="float32", num_views=num_views)
    writer = cache_factory.create(path, manifest, IMAGES)
    more = cache_factory.tiny_targets(manifest.model_copy(update={"num_views": 3}))
    cache_factory.write(writer, more, writer.missing_blocks()[:blocks])
    return writer


def test_the_blocks_of_a_half_built_source_are_fused(tmp_path: Path) -> None:
    writer = components(tmp_path / "source", blocks=7)
    first = fuse(TeacherCache(writer.path), FusionChoice(clip_scale="match"), out=tmp_path / "made")
    assert counts(first) == (7, 0, 8)
    assert TeacherCache(first.path).complete_views == (0,)
    cache_factory.write(writer, cache_factory.tiny_targets(writer.manifest))
    second = fuse(TeacherCache(writer.path), FusionChoice(clip_scale="match"), out=tmp_path / "made")
    assert counts(second) == (8, 7, 0)
    whole = fuse(TeacherCache(writer.path), FusionChoice(clip_scale="match"), out=tmp_path / "whole")
    assert contents(second.path) == contents(whole.path)


def test_new_views_of_a_grown_source_are_added(tmp_path: Path) -> None:
    writer = components(tmp_path / "source", num_views=1)
    first = fuse(TeacherCache(writer.path), FusionChoice(prompts=(1,)), out=tmp_path / "made")
    assert counts(first) == (5, 0, 0)
    before = contents(first.path)
    writer = writer.grow(3)
    full = cache_factory.tiny_targets(writer.manifest)
    cache_factory.write(writer, full)
    second = fuse(TeacherCache(writer.path), FusionChoice(prompts=(1,)), out=tmp_path / "made")
    assert counts(second) == (10, 5, 0)
    assert second.manifest.num_views == 3
    after = contents(second.path)
    assert all(after[name] == data for name, data in before.items() if not name.endswith("zarr.json"))
    fusion = FusionChoice(prompts=(1,)).resolve(TeacherCache(writer.path))
    expected = TeacherCache(writer.path).load_view(2, fusion=fusion).logits(EVERYTHING)
    torch.testing.assert_close(TeacherCache(second.path).load_view(2).logits(EVERYTHING), expected)


# Errors


def test_a_fused_source_has_no_components(built: TeacherCache, tmp_path: Path) -> None:
    made = fused(built, tmp_path / "made")
    with pytest.raises(NotFoundError, match=r"a fused cache has no components to fuse.*--store components"):
        fuse(made, FusionChoice(), out=tmp_path / "again")


@pytest.mark.parametrize(
    ("choice", "error", "words"),
    [
        ({"prompts": (0, 9)}, NotFoundError, "no such prompt template.*expected 0 to 1; found 9"),
        ({"clip_weights": (0.5, 0.5)}, RecipeError, "not one weight for each network"),
        ({"clip_view": 0}, RecipeError, r"cannot take CLIP's targets from another view.*fusion\.clip_view"),
    ],
)
def test_choices_that_do_not_fit_the_cache_are_refused(
    several: TeacherCache, tmp_path: Path, choice: dict[str, Any], error: type[CacheError], words: str
) -> None:
    with pytest.raises(error, match=words):
        fuse(several, FusionChoice(**choice), out=tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_another_cache_in_the_same_place_is_left_alone(built: TeacherCache, tmp_path: Path) -> None:
    made = fused(built, tmp_path / "made", teacher_weight=0.5)
    before = contents(made.path)
    with pytest.raises(MismatchError, match="the cache of another recipe is here"):
        fuse(built, FusionChoice(teacher_weight=0.6), out=made.path)
    with pytest.raises(MismatchError, match="the cache of another recipe is here"):
        fuse(built, FusionChoice(), out=built.path)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "draft.txt").write_text("precious")
    with pytest.raises(StorageError, match="the place is taken"):
        fuse(built, FusionChoice(), out=tmp_path / "papers")
    assert contents(made.path) == before


def test_a_clip_with_other_weights_is_refused(root: Path, built: TeacherCache, tmp_path: Path) -> None:
    file = root / "tiny-clip" / "open_clip_model.safetensors"
    good = file.read_bytes()
    try:
        tensors = load_file(file)
        tensors["text_projection"] = tensors["text_projection"] + 0.01
        save_file(tensors, file)
        with pytest.raises(
            WeightsError, match=r"not the weights that the cache was built with \(local-dir:tiny-clip\)"
        ):
            fused(built, tmp_path / "made", ("the {}",))
        file.unlink()
        with pytest.raises(WeightsError, match="no CLIP weights in that folder"):
            fused(built, tmp_path / "made", ("the {}",))
    finally:
        file.write_bytes(good)
    assert not (tmp_path / "made").exists()


def test_new_prompts_need_the_build_recipe(several: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not record how its teachers were loaded"):
        fused(several, tmp_path / "made", ("another {}",))


def test_fitting_needs_a_complete_view_0(tmp_path: Path) -> None:
    source = TeacherCache(components(tmp_path / "source", blocks=3).path)
    with pytest.raises(IncompleteError, match="view 0 is not completely built"):
        fuse(source, FusionChoice(clip_scale="match"), out=tmp_path / "made")
    assert fuse(source, FusionChoice(clip_scale=2.0), out=tmp_path / "made").blocks == 3


def test_match_with_equal_clip_logits_for_every_class(tmp_path: Path) -> None:
    manifest = cache_factory.tiny_manifest(IMAGES, store="components", codec="float32")
    constants = cache_factory.tiny_constants(manifest)
    constants["text_features"][:] = constants["text_features"][:1, :1]
    writer = CacheWriter.create(
        tmp_path / "source", manifest, labels=IMAGES.labels, sample_keys=IMAGES.keys, constants=constants
    )
    cache_factory.write(writer, cache_factory.tiny_targets(manifest))
    with pytest.raises(PreflightError, match="cannot match the spread"):
        fuse(TeacherCache(writer.path), FusionChoice(clip_scale="match", prompts=(0,)), out=tmp_path / "made")


def test_a_damaged_block_is_not_fused(tmp_path: Path) -> None:
    source = components(tmp_path / "source").path
    chunks = source / "clip_features"
    shutil.copy(chunks / "c.1.3.0", chunks / "c.1.2.0")  # intact, but of another block
    with pytest.raises(FormatError, match=r"not those that were committed \(.*clip_features, view 1, block 2\)"):
        fuse(TeacherCache(source), FusionChoice(), out=tmp_path / "made")
    made = TeacherCache(tmp_path / "made")
    assert verify(made.path).sound
    assert made.complete_views == (0,)


# The command


def run(*arguments: object, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["fuse", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def test_the_command_makes_a_cache_that_is_found_by_name(
    built: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    options = ["--teacher-weight", "0.4", "--clip-scale", "match", "--prompts", "siglip", "--name", "mine"]
    done = json.loads(run(built.path, *options, "--json").stdout)
    assert (done["blocks"], done["blocks_there"], done["blocks_missing"]) == (9, 0, 0)
    made = TeacherCache.open("mine")
    assert str(made.path) == done["path"]
    assert done["fingerprint"] == made.manifest.fingerprint
    assert made.recipe.fusion == FusionRecipe(teacher_weight=0.4, clip_scale="match", feature_dim=16)
    assert made.recipe.clip.templates == ("a photo of a {}.",)
    printed = run(built.path, *options).stdout
    assert f"0 blocks fused, 9 already there: {made.path}" in printed
    assert f"train-student --cache {made.path}" in printed


def test_the_command_parses_shares_and_prompt_numbers(several: TeacherCache, tmp_path: Path) -> None:
    shares = ["--teacher-weights", "0.25,0.75", "--clip-weights", "1, 0, 0", "--feature-weight", "0.5"]
    printed = run(
        several.path, *shares, "--prompts", "1", "--prompt-ensemble", "logits", "--out", tmp_path / "made"
    ).stdout
    assert "prompt ensemble logits, 1, 1, 1 prompt templates" in printed
    made = TeacherCache(tmp_path / "made").recipe
    assert (made.teacher_weights, made.clip_weights) == ((0.25, 0.75), (1.0, 0.0, 0.0))
    assert made.fusion.feature_weight == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--teacher-weights", "half"), "bad --teacher-weights; expected numbers with commas"),
        (("--teacher-weights", "0.5,0.6"), "do not sum to 1"),
        (("--teacher-weight", "1.5"), "bad value for 'teacher_weight'"),
        (("--clip-scale", "-1"), "bad --clip-scale"),
        (("--prompts", "richkid"), "no such prompt templates (richkid)"),
        (("--prompts", "7"), "no such prompt template"),
        (("--prompt-ensemble", "mean"), "bad value for 'prompt_ensemble'"),
        (("--codec", "zip"), "no such codec"),
        (("--device", "tpu"), "no such device"),
        (("--name", "a/b"), "bad cache name"),
        (("--out", "s3://bucket/caches"), "writes to a folder, not to an object store (s3://bucket/caches)"),
    ],
)
def test_bad_options_are_one_clear_error(several: TeacherCache, options: tuple[str, ...], words: str) -> None:
    error = run(several.path, *options, code=2).stderr
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_the_temperature_warning_of_a_codec_is_printed_once(several: TeacherCache, tmp_path: Path) -> None:
    done = run(several.path, "--codec", "top-k:temperature=2+float16", "--out", tmp_path / "made")
    assert done.stderr.count("warning: top-k targets at temperature 2") == 1
    logits = TeacherCache(tmp_path / "made").recipe.codecs.logits
    assert isinstance(logits, TopK)
    assert logits.temperature == 2.0


def test_missing_blocks_of_the_source_are_printed(tmp_path: Path) -> None:
    source = components(tmp_path / "source", blocks=7).path
    printed = run(source, "--out", tmp_path / "made").stdout
    assert "7 blocks fused:" in printed
    assert f"8 blocks are not in {source} yet" in printed
