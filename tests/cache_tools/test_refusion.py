from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cache_tools import fusion
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.format.arrays import constant_shapes
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import build, tiny_constants, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.fusion_by_hand import fused_by_hand

IMAGES = tiny_images()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("refusion") / "components"
    build(path, tiny_manifest(IMAGES, store="components", codec="float32"), IMAGES)
    return TeacherCache.open(path)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """Two teachers, three CLIPs with two, three and four prompts."""
    path = tmp_path_factory.mktemp("refusion") / "several"
    shares: dict[str, Any] = {"teacher_weights": (0.5, 0.5), "clip_weights": (0.2, 0.3, 0.5)}
    build(path, tiny_manifest(IMAGES, store="components", codec="float32", **shares), IMAGES)
    return TeacherCache.open(path)


def logits_with(cache: TeacherCache, view: int, **choice: Any) -> np.ndarray:
    resolved = FusionChoice(**choice).resolve(cache)
    return cache.load_view(view, fusion=resolved).logits(slice(None)).double().numpy()


def by_hand(cache: TeacherCache, view: int, weight: float, scale: float, clip_view: int | None = None) -> np.ndarray:
    changes = {"teacher_weight": weight, "clip_scales": [scale], "clip_view": view if clip_view is None else clip_view}
    return fused_by_hand(cache, view, **changes).logits


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 42.0])
def test_weight_and_scale_are_applied(cache: TeacherCache, weight: float, scale: float) -> None:
    found = logits_with(cache, 1, teacher_weight=weight, clip_scale=scale)
    np.testing.assert_allclose(found, by_hand(cache, 1, weight, scale), rtol=1e-4, atol=1e-4)


def test_without_a_choice_the_recipe_applies(cache: TeacherCache) -> None:
    assert np.array_equal(logits_with(cache, 2), cache.load_view(2).logits(slice(None)).double().numpy())
    expected = by_hand(cache, 2, cache.recipe.fusion.teacher_weight, 100.0)
    np.testing.assert_allclose(logits_with(cache, 2), expected, rtol=1e-4, atol=1e-4)


def test_clip_view_is_used_for_all_views(cache: TeacherCache) -> None:
    found = logits_with(cache, 2, clip_view=0)
    np.testing.assert_allclose(found, by_hand(cache, 2, 0.7, 100.0, clip_view=0), rtol=1e-4, atol=1e-4)
    assert np.array_equal(logits_with(cache, 0, clip_view=0), logits_with(cache, 0))
    assert np.abs(found - logits_with(cache, 2)).max() > 1.0


def test_match_gives_clip_the_spread_of_the_teacher(cache: TeacherCache) -> None:
    targets = cache.load_view(0)
    teacher, cosine = targets.teacher_logits(slice(None)).double(), targets.cosine(slice(None)).double()
    scale = FusionChoice(clip_scale="match").resolve(cache).clip_scale
    assert (scale * cosine).std(dim=1, correction=0).mean() == pytest.approx(
        teacher.std(dim=1, correction=0).mean().item(), rel=1e-5
    )


def test_the_feature_weight_mixes_the_projections(cache: TeacherCache) -> None:
    targets = cache.load_view(0, fusion=FusionChoice(feature_weight=1.0).resolve(cache))
    projection = torch.from_numpy(cache.constant("teacher_projection"))
    expected = fusion.project(targets.teacher_features(slice(None)), projection)
    torch.testing.assert_close(targets.features(slice(None)), expected)


def test_a_fused_cache_cannot_be_fused_differently(tmp_path: Path) -> None:
    build(tmp_path / "fused", tiny_manifest(IMAGES), IMAGES)
    cache = TeacherCache.open(tmp_path / "fused")
    assert FusionChoice().resolve(cache).teacher_weight == 0.7
    for choice in (FusionChoice(teacher_weight=0.5), FusionChoice(prompts=(0,)), FusionChoice(clip_scale="match")):
        (changed,) = (name for name, value in choice if value is not None)
        with pytest.raises(NotFoundError, match=rf"to change {changed};.*fused targets only.*store=components"):
            choice.resolve(cache)


def test_the_fusion_that_a_fused_cache_has_is_accepted(tmp_path: Path) -> None:
    build(tmp_path / "fused", tiny_manifest(IMAGES), IMAGES)
    cache = TeacherCache.open(tmp_path / "fused")
    stored = FusionChoice().resolve(cache)
    for same in ({"teacher_weight": 0.7, "feature_weight": 0.7}, {"clip_scale": "model"}, {"clip_scale": 100.0}):
        assert FusionChoice.model_validate(same).resolve(cache) == stored
    assert FusionChoice(teacher_weights=(1.0,), prompt_ensemble="embedding").resolve(cache) == stored


def test_a_missing_clip_view_is_refused(cache: TeacherCache) -> None:
    with pytest.raises(NotFoundError, match="no such view"):
        FusionChoice(clip_view=3).resolve(cache)


# Several networks


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"teacher_weights": (0.9, 0.1)},
        {"clip_weights": (0.0, 0.6, 0.4)},
        {"teacher_weights": (0.0, 1.0), "clip_weights": (0.0, 1.0, 0.0), "feature_weight": 0.1},
        {"prompt_ensemble": "logits"},
        {"prompt_ensemble": "probabilities", "clip_weights": (0.5, 0.25, 0.25)},
        {"prompts": (1,)},
        {"prompts": (1, 0), "prompt_ensemble": "logits", "clip_view": 0},
        {"prompts": (0, 1), "prompt_ensemble": "probabilities"},
    ],
    ids=str,
)
def test_every_choice_equals_the_equations(several: TeacherCache, choice: dict[str, Any]) -> None:
    targets = several.load_view(2, fusion=FusionChoice(**choice).resolve(several))
    expected = fused_by_hand(several, 2, **choice)
    np.testing.assert_allclose(targets.logits(slice(None)), expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets.features(slice(None)), expected.features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(targets.clip_logits(slice(None)), expected.clip, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets.to("cpu").clip_logits([5, 2]), expected.clip[[5, 2]], rtol=1e-4, atol=1e-4)


def test_a_number_sets_every_clip_scale_and_model_keeps_each(several: TeacherCache) -> None:
    assert FusionChoice(clip_scale=7.0).resolve(several).clip_scales == (7.0, 7.0, 7.0)
    assert FusionChoice(clip_scale="model").resolve(several).clip_scales == pytest.approx((100.0, 50.0, 100 / 3))
    assert FusionChoice().resolve(several).clip_scales == several.manifest.clip_scales
    found = logits_with(several, 1, clip_scale=7.0)
    np.testing.assert_allclose(found, fused_by_hand(several, 1, clip_scales=[7.0] * 3).logits, rtol=1e-4, atol=1e-4)


def test_match_gives_each_clip_the_spread_of_the_mixed_teachers(several: TeacherCache) -> None:
    """Uses the weights and prompts chosen at the same time, and cosines for every ensemble."""
    choice: dict[str, Any] = {"teacher_weights": (0.2, 0.8), "prompts": (1,), "prompt_ensemble": "probabilities"}
    scales = FusionChoice(clip_scale="match", clip_view=2, **choice).resolve(several).clip_scales
    spread = fused_by_hand(several, 0, **choice).teacher.std(axis=1).mean()
    for number, scale in enumerate(scales):
        alone = tuple(float(other == number) for other in range(3))
        cosines = fused_by_hand(
            several, 0, **choice | {"clip_weights": alone, "clip_scales": [1.0] * 3, "prompt_ensemble": "embedding"}
        ).clip
        assert scale * cosines.std(axis=1).mean() == pytest.approx(spread, rel=1e-5)


def test_networks_of_weight_zero_are_left_out(several: TeacherCache, tmp_path: Path) -> None:
    """The result equals, bit for bit, a cache of the first teacher and the first CLIP."""
    single = tiny_manifest(IMAGES, store="components", codec="float32")
    constants, stored = tiny_constants(several.manifest), tiny_targets(several.manifest)
    writer = CacheWriter.create(
        tmp_path / "single",
        single,
        labels=IMAGES.labels,
        sample_keys=IMAGES.keys,
        constants={name: constants[name] for name in constant_shapes(single.recipe)},
    )
    write(writer, {name: stored[name] for name in ("teacher_features", "clip_features")})
    only = FusionChoice(teacher_weights=(1.0, 0.0), clip_weights=(1.0, 0.0, 0.0)).resolve(several)
    one, two = TeacherCache.open(tmp_path / "single").load_view(1), several.load_view(1, fusion=only)
    assert torch.equal(one.logits(slice(None)), two.logits(slice(None)))
    assert torch.equal(one.features(slice(None)), two.features(slice(None)))


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"teacher_weights": (0.5, 0.4)}, r"do not sum to 1 \(fusion.teacher_weights\).*0.5, 0.4 with the sum 0.9"),
        ({"clip_weights": (1.5, -0.5, 0.0)}, "do not sum to 1"),
        ({"teacher_weights": ()}, "do not sum to 1"),
        ({"clip_weights": (0.5, 0.5)}, r"not one weight for each.*expected 3, for tiny_clip, tiny_clip, tiny_clip"),
        ({"teacher_weights": (1.0,)}, "expected 2, for tiny_teacher, tiny_teacher"),
        ({"prompts": (0, 0)}, "named twice"),
        ({"clip_scale": -1.0}, r"bad CLIP scale \(fusion.clip_scale\); expected model, match or a number above 0"),
    ],
)
def test_invalid_weights_and_prompts_are_refused(several: TeacherCache, choice: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        FusionChoice(**choice).resolve(several)


@pytest.mark.parametrize("choice", [{"clip_weights": (float("nan"), 0.5, 0.5)}, {"clip_scale": float("inf")}])
def test_numbers_are_finite(choice: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        FusionChoice(**choice)


def test_prompts_that_one_clip_lacks_are_refused(several: TeacherCache) -> None:
    with pytest.raises(NotFoundError, match=r"no such prompt template.*expected 0 to 1; found 2.*info --json"):
        FusionChoice(prompts=(0, 2)).resolve(several)


def test_thirds_pass_the_check_of_the_sum(several: TeacherCache) -> None:
    assert FusionChoice(clip_weights=(1 / 3, 1 / 3, 1 / 3)).resolve(several).clip_weights == (1 / 3, 1 / 3, 1 / 3)
