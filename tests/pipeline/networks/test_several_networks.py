"""Caches of two teachers and two CLIPs, compared with fusion by hand and with live networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import PreflightError, RecipeError
from cache_tools.fusion import projection_matrix
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from pipeline.build.cache import build_cache, resolve
from pipeline.build.preflight import run_preflight
from pipeline.networks.clip import load_clip
from pipeline.networks.ensemble import TeacherEnsemble, load_ensemble
from pipeline.networks.teachers import load_teacher
from pipeline.online import LiveTeachers
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build, tiny_run
from tests.support.fusion_by_hand import clip_row, fused_by_hand, mean, unit
from tests.support.tiny_build import arrays_of, constant_teacher
from tests.support.tiny_clip import make_folder
from tests.support.turns import some
from train.data import open_data
from train.run import train_student

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
EVERYTHING = slice(None)
SAMPLES = 96
SHARES = ((0.3, 0.7), (0.6, 0.4))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("several"), train=SAMPLES)
    tiny_build.write_teacher(root / "wide.safetensors", architecture="wrn_16_2")
    make_folder(root / "tiny-clip")
    return root


def recipe(root: Path, **changes: Any) -> BuildRecipe:
    """An untrained resnet8 and a wider network, the CLIP of the package and a random one with another prompt."""
    words = ("zero", "one", "two")
    data: dict[str, Any] = {
        "teacher": [
            {"name": str(root / "teacher.safetensors"), "weight": 0.3},
            {"name": str(root / "wide.safetensors"), "weight": 0.7},
        ],
        "clip": [
            {"name": "local-dir:package:digits-clip", "class_names": words, "weight": 0.6},
            {"name": f"local-dir:{root / 'tiny-clip'}", "templates": "siglip", "weight": 0.4},
        ],
        "out": root / "several.zarr",
    }
    return tiny_build.recipe(root, **(data | changes))


def loaded(recipe: BuildRecipe) -> tuple[ImageSet, TeacherEnsemble]:
    images = open_images(recipe.dataset)
    return images, load_ensemble(recipe.teacher, recipe.clip, recipe.fusion, images, recipe.dataset, CPU, "float32")


def with_ensemble(ensemble: str) -> dict[str, Any]:
    return {"feature_dim": 16, "prompt_ensemble": ensemble}


@pytest.fixture(scope="module")
def caches(root: Path) -> dict[str, TeacherCache]:
    """Two fused caches, one per prompt ensemble, and a component cache, all float32."""
    kinds: dict[str, dict[str, Any]] = {
        "embedding": {},
        "probabilities": {"fusion": with_ensemble("probabilities")},
        "components": {"store": "components"},
    }
    paths = {name: build_cache(recipe(root, out=root / name, **kind)).path for name, kind in kinds.items()}
    return {name: TeacherCache.open(path) for name, path in paths.items()}


@pytest.mark.parametrize("ensemble", some(["embedding", "probabilities"], 1))
def test_rows_equal_the_outputs_of_four_networks_fused_by_hand(
    root: Path, caches: dict[str, TeacherCache], ensemble: str
) -> None:
    """Each network is loaded alone, and everything after its forward pass is computed in float64."""
    plan, cache = recipe(root), caches[ensemble]
    images, names = open_images(plan.dataset), tiny_run.CLASSES
    index = np.array([95, 3, 77, 20])
    for view in range(3):
        pixels = cache.recipe.views.apply(torch.from_numpy(images.load(index)), index, view)
        z: list[Any] = []
        f: list[Any] = []
        for seed, spec in zip((0, 2), plan.teachers, strict=True):
            output = load_teacher(spec, names, CPU, images.image_size, plan.dataset.normalisation)(pixels)
            z.append(output.logits.double().numpy())
            f.append(unit(output.features.double().numpy() @ projection_matrix(output.features.shape[1], 16, seed)))
        for seed, clip_spec in zip((1, 3), plan.clips, strict=True):
            clip = load_clip(clip_spec, names, CPU)
            features, text = clip(pixels).features.double().numpy(), clip.text_features.double().numpy()
            scale = clip.identity.logit_scale
            z.append(np.stack([clip_row(row, text, None, scale, ensemble) for row in features]))
            f.append(unit(features @ projection_matrix(features.shape[1], 16, seed)))
        logits = 0.7 * mean(z[:2], SHARES[0]) + 0.3 * mean(z[2:], SHARES[1])
        logits -= logits.mean(axis=1, keepdims=True)
        features = 0.7 * unit(mean(f[:2], SHARES[0])) + 0.3 * unit(mean(f[2:], SHARES[1]))
        targets = cache.load_view(view)
        np.testing.assert_allclose(targets.logits(index), logits, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(targets.features(index), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt_ensemble", ["embedding", "probabilities"])
def test_live_networks_give_the_rows_of_a_float32_cache_bit_for_bit(
    root: Path, caches: dict[str, TeacherCache], prompt_ensemble: str
) -> None:
    images, ensemble = loaded(recipe(root, fusion=with_ensemble(prompt_ensemble)))
    live, cache = LiveTeachers(ensemble), caches[prompt_ensemble]
    for view in range(3):
        index = torch.from_numpy(np.random.default_rng(view).permutation(SAMPLES)[:48])
        pixels = cache.recipe.views.apply(torch.from_numpy(images.load(index.numpy())), index, view)
        batch, targets = live.view(view).batch(index, pixels), cache.load_view(view)
        assert isinstance(batch.logits, torch.Tensor)
        assert batch.features is not None
        assert batch.components is not None
        assert torch.equal(batch.logits, targets.logits(index))
        assert torch.equal(batch.features, targets.features(index))
        own = caches["components"].load_view(view).component_features(index)
        assert all(torch.equal(live, stored) for live, stored in zip(batch.components, own, strict=True))


@pytest.mark.parametrize(
    "choice",
    [
        {"prompts": (0,)},
        {"prompts": (0,), "prompt_ensemble": "probabilities", "clip_scale": "match", "teacher_weights": (1.0, 0.0)},
    ],
    ids=str,
)
def test_live_networks_with_another_fusion_equal_a_component_cache_with_that_fusion(
    root: Path, caches: dict[str, TeacherCache], choice: dict[str, Any]
) -> None:
    plan, components = recipe(root), caches["components"]
    fusion, images = FusionChoice(**choice).resolve(components), open_images(plan.dataset)
    ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, images, plan.dataset, CPU, "float32", fusion=fusion)
    pixels = components.recipe.views.apply(torch.from_numpy(images.load(slice(48))), range(48), 2)
    batch, targets = LiveTeachers(ensemble).batch(torch.arange(48), pixels), components.load_view(2, fusion=fusion)
    torch.testing.assert_close(batch.logits, targets.logits(slice(48)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.features, targets.features(slice(48)), rtol=1e-5, atol=1e-6)


def test_components_agree_with_fused_caches_and_with_the_equations(caches: dict[str, TeacherCache]) -> None:
    components = caches["components"]
    assert {"teacher_features_2", "clip_features_2"} <= {file.parent.name for file in components.path.glob("*/c.*")}
    for ensemble in ("embedding", "probabilities"):
        fusion = FusionChoice(prompt_ensemble=ensemble).resolve(components)
        for view in range(3):
            derived, fused = components.load_view(view, fusion=fusion), caches[ensemble].load_view(view)
            torch.testing.assert_close(derived.logits(EVERYTHING), fused.logits(EVERYTHING), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(derived.features(EVERYTHING), fused.features(EVERYTHING), rtol=1e-5, atol=1e-6)
            expected = fused_by_hand(components, view, prompt_ensemble=ensemble)
            np.testing.assert_allclose(fused.logits(EVERYTHING), expected.logits, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(fused.features(EVERYTHING), expected.features, rtol=1e-4, atol=1e-5)


def test_the_manifest_names_every_network(root: Path, caches: dict[str, TeacherCache]) -> None:
    manifest = caches["embedding"].manifest
    assert [teacher.architecture for teacher in manifest.recipe.teachers] == ["resnet8", "wrn_16_2"]
    assert [clip.architecture for clip in manifest.recipe.clips] == ["local-dir:digits-clip", "local-dir:tiny-clip"]
    assert (manifest.recipe.teacher_weights, manifest.recipe.clip_weights) == SHARES
    assert [len(clip.templates) for clip in manifest.recipe.clips] == [12, 1]
    assert manifest.recipe.clips[0].class_names == ("zero", "one", "two")
    assert manifest.recipe.clips[1].class_names == tiny_run.CLASSES
    assert manifest.clip_scales == pytest.approx((14.104365, 37.0))
    assert BuildRecipe.model_validate(manifest.build_recipe) == recipe(root, out=root / "embedding")


def test_match_scales_every_clip_to_the_spread_of_the_mixed_teachers(root: Path, tmp_path: Path) -> None:
    plan = recipe(root, fusion={"clip_scale": "match", "feature_dim": 16}, num_views=1, out=tmp_path / "match")
    scales = TeacherCache.open(build_cache(plan).path).manifest.clip_scales
    images, ensemble = loaded(recipe(root))
    teachers, clips = ensemble.outputs(torch.from_numpy(images.load(EVERYTHING)))
    mixed = 0.3 * teachers[0].logits.double() + 0.7 * teachers[1].logits.double()
    spread = mixed.std(1, correction=0).mean()
    for scale, clip in zip(scales, clips, strict=True):
        assert scale * clip.cosine.double().std(1, correction=0).mean() == pytest.approx(float(spread), rel=1e-3)
    grown = TeacherCache.open(build_cache(plan.model_copy(update={"num_views": 2})).path)
    assert (grown.num_views, grown.manifest.clip_scales) == (2, scales)


def test_a_build_resumes_and_grows_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    whole = build_cache(recipe(root, store="components", out=tmp_path / "whole")).path
    part = build_cache(recipe(root, store="components", num_views=2, out=tmp_path / "part")).path
    (part / "commits" / "c.1.1.0").unlink()
    (part / "teacher_features_2" / "c.1.1.0").write_bytes(b"half written")
    again = build_cache(recipe(root, store="components", num_views=3, out=tmp_path / "part"))
    assert again.images == SAMPLES + 32
    resized = {"commits", "teacher_features", "teacher_features_2", "clip_features", "clip_features_2"}
    ours, theirs = arrays_of(part), arrays_of(whole)
    for name in resized:  # the same number of views now, as text that is laid out alike
        assert ours[f"{name}/zarr.json"] == theirs[f"{name}/zarr.json"]
    assert ours == theirs


def test_a_list_of_one_network_gives_the_same_cache(root: Path, tmp_path: Path) -> None:
    single = tiny_build.recipe(root, num_views=1, out=tmp_path / "single")
    listed = single.model_copy(update={"teacher": (single.teacher,), "clip": (single.clip,), "out": tmp_path / "list"})
    one, other = (TeacherCache.open(build_cache(plan).path) for plan in (single, listed))
    assert one.manifest.fingerprint == other.manifest.fingerprint
    assert arrays_of(one.path) == arrays_of(other.path)


def test_equal_shares_are_the_default_and_weights_are_part_of_the_identity(root: Path) -> None:
    def fingerprint(*weights: float | None) -> str:
        names = [str(root / f"{name}.safetensors") for name in ("teacher", "wide")]
        teachers = [{"name": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
        plan = tiny_build.recipe(root, teacher=teachers)
        return resolve(plan, *loaded(plan)).fingerprint

    assert fingerprint(None, None) == fingerprint(0.5, 0.5) != fingerprint(0.25, 0.75)


def test_a_run_trains_from_several_networks(root: Path, caches: dict[str, TeacherCache], tmp_path: Path) -> None:
    loss = {"kind": "kd", "feature": "crd", "crd_dim": 8}
    run = tiny_run.recipe(caches["components"].path, tmp_path / "run", loss=loss, epochs=1)
    widths, weights = (64, 128, 64, 32), (0.7 * 0.3, 0.7 * 0.7, 0.3 * 0.6, 0.3 * 0.4)
    components = open_data(run, CPU).components
    assert components is not None
    assert components.widths == widths
    assert components.weights == pytest.approx(weights)
    assert train_student(run).loss == "kd+crd"


# The preflight


def test_the_preflight_measures_every_network_the_groups_and_the_fusion(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are chosen so that each untrained teacher gets every other one right."""
    monkeypatch.setattr("pipeline.build.preflight.judge_networks", lambda *arguments: [])  # they would be refused
    images, ensemble = loaded(recipe(root))
    teachers, clips = ensemble.outputs(torch.from_numpy(images.load(EVERYTHING)))
    z = [output.logits for output in teachers] + [
        clip.identity.logit_scale * output.cosine for clip, output in zip(ensemble.clips, clips, strict=True)
    ]
    z += [0.3 * z[0] + 0.7 * z[1], 0.6 * z[2] + 0.4 * z[3]]
    z += [0.7 * z[4] + 0.3 * z[5]]
    images.labels[0::2], images.labels[1::2] = z[0].argmax(1)[0::2], z[1].argmax(1)[1::2]
    top1 = [float((each.argmax(1).numpy() == images.labels).mean()) for each in z]
    result = run_preflight(ensemble, images, SAMPLES, 32)
    assert list(result.networks) == ["teacher", "teacher_2", "clip", "clip_2"]
    assert list(result.networks.values()) == pytest.approx(top1[:4])
    assert (result.teacher_top1, result.clip_top1, result.fusion_top1) == pytest.approx(tuple(top1[4:]))
    assert f"teacher {top1[4]:.2%} ({top1[0]:.2%}, {top1[1]:.2%}), CLIP {top1[5]:.2%} (" in str(result)


def test_a_preflight_of_one_teacher_and_one_clip_lists_no_members(root: Path) -> None:
    images, ensemble = loaded(tiny_build.recipe(root))
    images.labels[:] = ensemble.outputs(torch.from_numpy(images.load(EVERYTHING))).teachers[0].logits.argmax(1)
    assert "teacher 100.00%, CLIP " in str(run_preflight(ensemble, images, SAMPLES, 32))


def test_each_teacher_alone_must_beat_chance(root: Path, tmp_path: Path) -> None:
    """A constant teacher is found even beside a good one."""
    plain = tiny_run.recipe(
        tmp_path / "no cache",
        tmp_path / "good",
        loss={"kind": "ce"},
        epochs=4,
        dataset=tiny_run.dataset(root / "pictures"),
    )
    train_student(plain.model_copy(update={"cache": None}))
    teachers = [{"name": str(tmp_path / "good")}, {"name": str(constant_teacher(tmp_path))}]
    plan = tiny_build.recipe(root, teacher=teachers, preflight_samples=SAMPLES, out=tmp_path / "cache")
    with pytest.raises(PreflightError, match=r"no better than chance.*\(resnet8, teacher 2 of 2\)"):
        build_cache(plan)
    assert not (tmp_path / "cache").exists()


# Recipes that make no sense


@pytest.mark.parametrize("group", ["teacher", "clip"])
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((0.5, 0.4), r"do not sum to 1 \({group} weights\).*0.5, 0.4 with the sum 0.9"),
        ((0.5, None), r"some networks of a group have a weight and some have none \({group}\).*a: 0.5, b: None"),
        ((1.5, -0.5), r"{group}.0.weight.*less than or equal to 1"),
        ((0.0, 0.0), "do not sum to 1"),
        ((0.5, 0.5 + 2e-6), "do not sum to 1"),
    ],
)
def test_bad_weights(root: Path, group: str, weights: tuple[float | None, ...], words: str) -> None:
    from cache_tools.config import validate

    specs = [{"name": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    plain = tiny_build.recipe(root).model_dump(mode="json")
    with pytest.raises(RecipeError, match=words.format(group=group)) as caught:
        validate(BuildRecipe, plain | {group: specs}, where="a test")
    assert "\n" not in str(caught.value)


def test_a_single_network_has_weight_one(root: Path) -> None:
    assert tiny_build.recipe(root, teacher={"name": "a", "weight": 1.0}).teachers[0].weight == 1.0
    with pytest.raises(RecipeError, match="do not sum to 1"):
        tiny_build.recipe(root, teacher={"name": "a", "weight": 0.5})
    with pytest.raises(ValueError, match="at least 1"):
        tiny_build.recipe(root, clip=[])


def test_weights_that_nearly_sum_to_one_are_accepted(root: Path) -> None:
    specs = [{"name": name, "weight": 0.333333} for name in "abc"]
    with pytest.raises(RecipeError, match="do not sum to 1"):
        tiny_build.recipe(root, teacher=[{"name": "a", "weight": 0.33333}] * 3)
    specs[0]["weight"] = 0.3333335
    assert tiny_build.recipe(root, teacher=specs).teachers[2].weight == 0.333333
