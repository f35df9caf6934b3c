"""Teachers without a CLIP, and CLIPs without a teacher: the targets are the group's own, from build to replay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.alignment import aligned
from cache_tools.format.recipe import FusionRecipe
from cache_tools.fusion import centre_rows, project, projection_matrix
from cache_tools.images import open_images
from cache_tools.reader import TeacherCache
from pipeline.build import preflight
from pipeline.build.cache import build_cache, resolve
from pipeline.build.preflight import run_preflight
from pipeline.networks.clip import load_clip
from pipeline.networks.ensemble import TeacherEnsemble, load_ensemble
from pipeline.networks.teachers import load_teacher
from pipeline.online import LiveTeachers
from pipeline.replay import replay
from tests.support import one_group, tiny_build, tiny_run
from tests.support.fusion_by_hand import clip_row, fused_by_hand, mean, unit
from tests.support.one_group import KINDS, SHARES, Caches
from tests.support.tiny_build import arrays_of
from tests.support.turns import some

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
EVERYTHING = slice(None)
SAMPLES = 96


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return Caches(one_group.prepare(tmp_path_factory.mktemp("one group"), train=SAMPLES))


def ensemble_of(caches: Caches, kind: str, **changes: Any) -> TeacherEnsemble:
    plan = one_group.recipe(caches.root, kind, **changes)
    images = open_images(plan.dataset)
    return load_ensemble(plan.teacher, plan.clip, plan.fusion, images, plan.dataset, CPU, "float32")


def pixels_of(cache: TeacherCache, view: int, index: np.ndarray) -> torch.Tensor:
    images = open_images(cache.manifest.dataset)
    return cache.recipe.views.apply(torch.from_numpy(images.load(index)), index, view)


# What is stored


def test_the_targets_of_a_teacher_alone_are_its_outputs_bit_for_bit(caches: Caches) -> None:
    """Logits are mean-centred and features projected as always; nothing else happens to them."""
    plan, cache = one_group.recipe(caches.root, "teacher"), caches.open("teacher")
    index = np.arange(SAMPLES)
    projection = torch.from_numpy(projection_matrix(64, 16, 0))
    for view in range(3):
        teacher = load_teacher(
            plan.teachers[0], tiny_run.CLASSES, CPU, (tiny_run.SIDE,) * 2, plan.dataset.normalisation
        )
        output = teacher(pixels_of(cache, view, index))
        targets = cache.load_view(view)
        assert torch.equal(targets.logits(index), centre_rows(output.logits))
        assert torch.equal(targets.features(index), project(output.features, projection))


@pytest.mark.parametrize(
    ("kind", "ensemble"),
    some(
        [
            ("teachers", "embedding"),
            ("clip", "logits"),
            ("clips", "probabilities"),
            ("clip", "embedding"),
            ("clip", "probabilities"),
            ("clips", "embedding"),
        ],
        3,
    ),
)
def test_fused_rows_equal_the_mix_of_the_networks_in_float64(caches: Caches, kind: str, ensemble: str) -> None:
    """Each network is loaded alone, and everything after its forward pass is computed by hand."""
    fusion = {"feature_dim": 16, "prompt_ensemble": ensemble}
    plan = one_group.recipe(caches.root, kind, fusion=fusion)
    live, view = LiveTeachers(ensemble_of(caches, kind, fusion=fusion)), 1
    index = np.array([95, 3, 77, 20])
    pixels = pixels_of(caches.open(kind), view, index)
    z: list[Any] = []
    f: list[Any] = []
    for seed, spec in zip((0, 2), plan.teachers, strict=False):
        output = load_teacher(spec, tiny_run.CLASSES, CPU, (tiny_run.SIDE,) * 2, plan.dataset.normalisation)(pixels)
        z.append(output.logits.double().numpy())
        f.append(unit(output.features.double().numpy() @ projection_matrix(output.features.shape[1], 16, seed)))
    for seed, clip_spec in zip((1, 3), plan.clips, strict=False):
        clip = load_clip(clip_spec, tiny_run.CLASSES, CPU)
        features, text = clip(pixels).features.double().numpy(), clip.text_features.double().numpy()
        z.append(np.stack([clip_row(row, text, None, clip.identity.logit_scale, ensemble) for row in features]))
        f.append(unit(features @ projection_matrix(features.shape[1], 16, seed)))
    shares = SHARES if len(z) == 2 else (1.0,)
    logits = mean(z, shares)
    batch = live.batch(torch.from_numpy(index), pixels)
    assert isinstance(batch.logits, torch.Tensor)
    assert batch.features is not None
    np.testing.assert_allclose(batch.logits, logits - logits.mean(axis=1, keepdims=True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(batch.features, unit(mean(f, shares)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", some(KINDS, 2))
def test_live_networks_give_the_rows_of_both_stores_bit_for_bit(caches: Caches, kind: str) -> None:
    fused, components = caches.open(kind), caches.open(kind, "components")
    live = LiveTeachers(ensemble_of(caches, kind))
    for view in range(3):
        index = np.random.default_rng(view).permutation(SAMPLES)[:48]
        batch = live.view(view).batch(torch.from_numpy(index), pixels_of(fused, view, index))
        targets, parts = fused.load_view(view), components.load_view(view)
        assert isinstance(batch.logits, torch.Tensor)
        assert torch.equal(batch.logits, targets.logits(index))
        assert batch.features is not None
        assert torch.equal(batch.features, targets.features(index))
        torch.testing.assert_close(parts.logits(index), targets.logits(index), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parts.features(index), targets.features(index), rtol=1e-5, atol=1e-6)
        assert batch.components is not None
        own = parts.component_features(index)
        assert len(own) == (2 if kind.endswith("s") else 1)
        assert all(torch.equal(one, other) for one, other in zip(batch.components, own, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_components_agree_with_the_equations_of_the_format(caches: Caches, kind: str) -> None:
    cache = caches.open(kind, "components")
    expected, targets = fused_by_hand(cache, 2), cache.load_view(2)
    np.testing.assert_allclose(targets.logits(EVERYTHING), expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets.features(EVERYTHING), expected.features, rtol=1e-4, atol=1e-5)


def test_half_precision_rows_are_within_the_bound_of_the_codec(caches: Caches, tmp_path: Path) -> None:
    plan = one_group.recipe(caches.root, "teacher", codec="float16", num_views=1, out=tmp_path / "half")
    exact = caches.open("teacher").load_view(0).logits(EVERYTHING)
    half = build_cache(plan).path
    stored = TeacherCache.open(half).load_view(0).logits(EVERYTHING)
    assert ((stored - exact).abs() <= exact.abs() * 2.0**-11 + 2.0**-25).all()


def test_the_manifest_says_that_a_group_is_missing(caches: Caches) -> None:
    teachers, clips = caches.open("teachers").manifest, caches.open("clips", "components").manifest
    assert (len(teachers.recipe.teachers), teachers.recipe.clips, teachers.clip_scales) == (2, (), ())
    assert (clips.recipe.teachers, len(clips.recipe.clips)) == ((), 2)
    assert clips.clip_scales == pytest.approx((14.104365, 37.0))
    for manifest, weight, group in ((teachers, 1.0, "teacher"), (clips, 0.0, "clip")):
        fusion = manifest.recipe.fusion
        assert (fusion.teacher_weight, fusion.feature_weight) == (weight, weight)
        assert manifest.recipe.only_group == group
    arrays = {path.parent.name for path in caches.path("clips", "components").glob("*/zarr.json")}
    assert not [name for name in arrays if name.startswith("teacher")]
    assert {"clip_features", "clip_features_2", "text_features_2"} <= arrays


def test_the_fingerprint_covers_the_missing_group_and_not_how_the_recipe_says_so(caches: Caches) -> None:
    images = open_images(tiny_run.dataset(caches.root / "pictures"))

    def fingerprint(data: dict[str, Any]) -> str:
        plan = tiny_build.recipe(caches.root, **data)
        ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, images, plan.dataset, CPU, "float32")
        return resolve(plan, images, ensemble).fingerprint

    alone = fingerprint({"clip": None})
    explicit = {"feature_dim": 16, "teacher_weight": 1, "feature_weight": 1, "clip_scale": "model"}
    assert alone == fingerprint({"clip": "none"}) == fingerprint({"clip": None, "fusion": explicit})
    both = fingerprint({"fusion": {"feature_dim": 16, "teacher_weight": 1, "feature_weight": 1}})
    assert len({alone, both, fingerprint({"teacher": None})}) == 3


def test_a_build_resumes_and_grows_to_the_same_bytes(caches: Caches, tmp_path: Path) -> None:
    for kind in ("teachers", "clip"):
        part = build_cache(one_group.recipe(caches.root, kind, num_views=2, out=tmp_path / kind)).path
        (part / "commits" / "c.1.1.0").unlink()
        again = build_cache(one_group.recipe(caches.root, kind, num_views=3, out=tmp_path / kind))
        assert again.images == SAMPLES + 32
        assert arrays_of(part) == arrays_of(caches.path(kind))
        assert build_cache(one_group.recipe(caches.root, kind, num_views=3, out=tmp_path / kind)).images == 0


# The preflight


@pytest.mark.parametrize("kind", KINDS)
def test_the_preflight_measures_the_group_alone(caches: Caches, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = one_group.recipe(caches.root, kind)
    images, ensemble = open_images(plan.dataset), ensemble_of(caches, kind)
    outputs = ensemble.outputs(torch.from_numpy(images.load(EVERYTHING)))
    each = [output.logits for output in outputs.teachers] + ensemble.scaled_logits(outputs.clips)
    mixed = sum(share * z for share, z in zip(SHARES if len(each) == 2 else (1.0,), each, strict=True))
    images.labels[0::2], images.labels[1::2] = each[0].argmax(1)[0::2], each[-1].argmax(1)[1::2]
    monkeypatch.setattr(preflight, "judge_networks", lambda *_: iter(()))  # they are untrained
    found = run_preflight(ensemble, images, SAMPLES, 32)
    top1 = float((torch.as_tensor(mixed).argmax(1).numpy() == images.labels).mean())
    group, other = ("teacher", "clip") if kind.startswith("teacher") else ("clip", "teacher")
    data = json.loads(found.model_dump_json())
    assert data[f"{group}_top1"] == pytest.approx(top1)
    assert data[f"{other}_top1"] is None
    assert data["fusion_top1"] is None
    assert list(data["networks"]) == [group, f"{group}_2"][: len(each)]
    label = "teacher" if group == "teacher" else "CLIP"
    assert f"split: {label} {top1:.2%}" in str(found)
    assert "fusion" not in str(found)
    assert ("teacher" in str(found)) == (group == "teacher")


# The replay


@pytest.mark.parametrize("store", ["fused", "components"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_computes_the_stored_rows_again(caches: Caches, kind: str, store: str) -> None:
    cache = caches.open(kind, store)
    found = replay(cache, aligned(cache, open_images(cache.manifest.dataset)), 40, device="cpu")
    assert found.sound
    assert found.rows == 40
    assert {target.target for target in found.targets} == set(cache.targets)


def test_an_ensemble_without_networks_of_a_kind_has_no_logits_of_it(caches: Caches) -> None:
    teachers, clips = ensemble_of(caches, "teacher"), ensemble_of(caches, "clip")
    assert (teachers.sources, clips.sources) == (("teacher",), ("clip",))
    assert (teachers.device, clips.device) == (CPU, CPU)
    assert set(teachers.constants("components")) == {"teacher_projection", "teacher_head_weight", "teacher_head_bias"}
    assert set(clips.constants("fused")) == {"clip_projection", "class_embeddings"}


def test_a_fusion_recipe_gives_the_only_group_all_the_weight(caches: Caches) -> None:
    plan = one_group.recipe(caches.root, "teacher")
    images = open_images(plan.dataset)
    ensemble = load_ensemble(plan.teacher, None, FusionRecipe(), images, plan.dataset, CPU, "float32")
    assert (ensemble.fusion.teacher_weight, ensemble.fusion.feature_weight) == (1.0, 1.0)
    assert replace(ensemble.fusion, teacher_weights=(1.0,)) == ensemble.fusion
