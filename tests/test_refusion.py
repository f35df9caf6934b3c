from pathlib import Path

import numpy as np
import pytest
import torch
from cache_factory import build, tiny_images, tiny_manifest

from cache_tools import fusion
from cache_tools.errors import NotFoundError
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice

IMAGES = tiny_images()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("refusion") / "components"
    build(path, tiny_manifest(IMAGES, store="components", dtype="float32"), IMAGES)
    return TeacherCache.open(path)


def refused_logits(cache: TeacherCache, view: int, **choice: object) -> np.ndarray:
    resolved = FusionChoice(**choice).resolve(cache)  # type: ignore[arg-type]
    return cache.load_view(view, fusion=resolved).logits(slice(None)).double().numpy()


def by_hand(cache: TeacherCache, view: int, weight: float, scale: float, clip_view: int | None = None) -> np.ndarray:
    """z_F = α z_T + (1−α) s cos, rows centred, in float64 from the arrays as stored."""
    head = cache.constant("teacher_head_weight").astype(np.float64), cache.constant("teacher_head_bias")
    teacher = cache.read_array("teacher_features", view).astype(np.float64) @ head[0].T + head[1]
    clip = cache.read_array("clip_features", view if clip_view is None else clip_view).astype(np.float64)
    cosine = clip / np.linalg.norm(clip, axis=1, keepdims=True) @ cache.constant("class_embeddings").T
    fused = weight * teacher + (1 - weight) * scale * cosine
    return fused - fused.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [1.0, 42.0])
def test_weight_and_scale_are_those_asked_for(cache: TeacherCache, weight: float, scale: float) -> None:
    found = refused_logits(cache, 1, teacher_weight=weight, clip_scale=scale)
    np.testing.assert_allclose(found, by_hand(cache, 1, weight, scale), rtol=1e-4, atol=1e-4)


def test_no_choice_is_the_fusion_of_the_recipe(cache: TeacherCache) -> None:
    assert np.array_equal(refused_logits(cache, 2), cache.load_view(2).logits(slice(None)).double().numpy())
    expected = by_hand(cache, 2, cache.recipe.fusion.teacher_weight, 100.0)
    np.testing.assert_allclose(refused_logits(cache, 2), expected, rtol=1e-4, atol=1e-4)


def test_clip_targets_of_one_view_stand_for_all(cache: TeacherCache) -> None:
    found = refused_logits(cache, 2, clip_view=0)
    np.testing.assert_allclose(found, by_hand(cache, 2, 0.7, 100.0, clip_view=0), rtol=1e-4, atol=1e-4)
    assert np.array_equal(refused_logits(cache, 0, clip_view=0), refused_logits(cache, 0))
    assert np.abs(found - refused_logits(cache, 2)).max() > 1.0


def test_match_brings_clip_to_the_teachers_spread(cache: TeacherCache) -> None:
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


def test_a_fused_cache_says_that_it_cannot_be_fused_anew(tmp_path: Path) -> None:
    build(tmp_path / "fused", tiny_manifest(IMAGES), IMAGES)
    cache = TeacherCache.open(tmp_path / "fused")
    assert FusionChoice().resolve(cache).teacher_weight == 0.7
    with pytest.raises(NotFoundError, match=r"teacher_weight.*fused targets only.*store=components"):
        FusionChoice(teacher_weight=0.5).resolve(cache)


def test_a_clip_view_that_is_not_there_is_refused(cache: TeacherCache) -> None:
    with pytest.raises(NotFoundError, match="no such view"):
        FusionChoice(clip_view=3).resolve(cache)
