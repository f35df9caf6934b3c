"""Training from caches with a teacher alone, several teachers alone, or CLIP alone; random targets, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support import tiny_run
from tests.support.fusion_by_hand import fused_by_hand
from train.data import open_data
from train.losses.contrastive import Components, ContrastiveTerm
from train.recipe.loss import LossRecipe
from train.run import train_student

CPU = torch.device("cpu")
EVERYTHING = slice(None)
GROUPS: dict[str, dict[str, Any]] = {
    "teacher": {"teacher_weights": (1.0,), "clip_weights": ()},
    "teachers": {"teacher_weights": (0.3, 0.7), "clip_weights": ()},
    "clip": {"teacher_weights": (), "clip_weights": (1.0,)},
    "clips": {"teacher_weights": (), "clip_weights": (0.4, 0.6)},
}
STORES = ("fused", "components")
LOSSES: dict[str, dict[str, Any]] = {
    "kd": {"kind": "kd"},
    "dkd": {"kind": "dkd"},
    "standardised_kd": {"kind": "standardised_kd"},
    "crd": {"kind": "ce", "feature": "crd"},
    "richkd": {"kind": "kd", "feature": "crd"},
    "mse": {"kind": "kd", "feature": "mse"},
    "cosine": {"kind": "kd", "feature": "cosine"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one group")
    pictures = tiny_run.write_pictures(root / "pictures", train=30, test=9)
    for kind, weights in GROUPS.items():
        for store in STORES:
            tiny_run.write_cache(
                root / f"{kind}-{store}", pictures, store=store, codec="float32", num_views=2, name=kind, **weights
            )
    return root


@pytest.mark.parametrize("kind", GROUPS)
def test_fused_components_are_the_mix_of_the_group(root: Path, kind: str) -> None:
    cache = TeacherCache.open(root / f"{kind}-components")
    expected, targets = fused_by_hand(cache, 1), cache.load_view(1)
    np.testing.assert_allclose(targets.logits(EVERYTHING), expected.logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(targets.features(EVERYTHING), expected.features, rtol=1e-4, atol=1e-5)
    assert len(targets.component_features([0])) == len(sum(GROUPS[kind].values(), ()))
    missing = targets.clip_logits if kind.startswith("teacher") else targets.teacher_logits
    with pytest.raises(NotFoundError, match="this cache has no"):
        missing([0])


@pytest.mark.medium
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_from_one_group(root: Path, tmp_path: Path, loss: str, store: str) -> None:
    kinds = list(GROUPS)
    kind = kinds[(list(LOSSES).index(loss) + STORES.index(store)) % len(kinds)]
    run = tiny_run.recipe(root / f"{kind}-{store}", tmp_path / "run", epochs=1, loss=LOSSES[loss] | {"crd_dim": 8})
    result = train_student(run)
    assert result.last is not None
    assert np.isfinite(result.last.nll)
    feature = LOSSES[loss].get("feature")
    assert result.loss == {None: loss, "crd": "ce+crd" if loss == "crd" else "kd+crd"}.get(feature, f"kd+{feature}")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("teacher", Components((12,), (1.0,))),
        ("teachers", Components((12, 15), (0.3, 0.7))),
        ("clip", Components((10,), (1.0,))),
        ("clips", Components((10, 12), (0.4, 0.6))),
    ],
)
def test_the_components_of_crd_are_those_of_the_group(root: Path, tmp_path: Path, kind: str, expected: Any) -> None:
    run = tiny_run.recipe(root / f"{kind}-components", tmp_path, loss=LOSSES["richkd"])
    components = open_data(run, CPU).components
    assert components is not None
    assert components.widths == expected.widths
    assert components.weights == pytest.approx(expected.weights)


def test_crd_with_a_single_network_contrasts_with_its_embedding() -> None:
    recipe = LossRecipe(kind="ce", feature="crd", crd_dim=4, crd_negatives=3)
    term = ContrastiveTerm(recipe, 5, Components((6,), (1.0,)), np.arange(8) % 2, seed=0)
    assert (term.mixed, len(term.embed_targets)) == ([0], 1)
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    own = torch.nn.functional.normalize(term.embed_targets[0](features), dim=1)
    before = term.memory.memory_target[:3].clone()
    loss = term(torch.ones(3, 5), [features], torch.arange(3))
    updated = torch.nn.functional.normalize(before.lerp(own, 1.0 - recipe.crd_momentum), dim=1)
    torch.testing.assert_close(term.memory.memory_target[:3], updated.detach())
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)


def test_the_shares_of_a_group_can_still_be_chosen(root: Path) -> None:
    cache = TeacherCache.open(root / "teachers-components")
    fusion = FusionChoice(teacher_weights=(1.0, 0.0)).resolve(cache)
    own = cache.load_view(0).teacher_logits(EVERYTHING, 0)
    found = cache.load_view(0, fusion=fusion).logits(EVERYTHING)
    torch.testing.assert_close(found, own - own.mean(dim=1, keepdim=True))
    scaled = FusionChoice(clip_scale=7.0, prompt_ensemble="logits", prompts=(0,), clip_view=1, clip_weights=(0.5, 0.5))
    clips = TeacherCache.open(root / "clips-components")
    expected = fused_by_hand(
        clips,
        0,
        clip_scales=[7.0, 7.0],
        prompt_ensemble="logits",
        prompts=(0,),
        clip_view=1,
        clip_weights=(0.5, 0.5),
    )
    found = clips.load_view(0, fusion=scaled.resolve(clips)).logits(EVERYTHING)
    np.testing.assert_allclose(found, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("kind", "choice", "words"),
    [
        ("teacher", {"teacher_weight": 0.5}, "no CLIP, so the teacher has all the weight.*expected 1; found 0.5"),
        ("teachers", {"feature_weight": 0.7}, r"fusion.feature_weight\); expected 1; found 0.7"),
        ("teacher", {"clip_scale": "model"}, r"no CLIP, so this setting has no effect \(fusion.clip_scale\)"),
        ("teacher", {"clip_scale": 3.0}, "no CLIP, so this setting has no effect"),
        ("teacher", {"prompts": (0,)}, r"fusion.prompts\); found \[0\]"),
        ("teacher", {"prompt_ensemble": "logits"}, "fusion.prompt_ensemble"),
        ("teachers", {"clip_weights": (0.5, 0.5)}, "fusion.clip_weights"),
        ("teachers", {"clip_view": 0}, "fusion.clip_view"),
        ("clip", {"teacher_weight": 1.0}, "no teacher, so the CLIP has all the weight.*expected 0; found 1"),
        ("clip", {"teacher_weights": (1.0,)}, "no teacher, so this setting has no effect"),
        ("clips", {"clip_scale": "match"}, "no teacher whose spread the scale could match"),
    ],
    ids=str,
)
def test_settings_of_a_missing_group_are_refused(
    root: Path, tmp_path: Path, kind: str, store: str, choice: dict[str, Any], words: str
) -> None:
    run = tiny_run.recipe(root / f"{kind}-{store}", tmp_path / "run", fusion=choice)
    with pytest.raises(RecipeError, match=words):
        open_data(run, CPU)
    assert not (tmp_path / "run").exists()


def test_a_fused_cache_says_what_it_holds(root: Path) -> None:
    for kind, words in (("teachers", "2 teachers, no CLIP"), ("clip", r"CLIP alone, CLIP scale 100 \(model\)")):
        key = "teacher_weights" if kind == "teachers" else "prompts"
        with pytest.raises(NotFoundError, match=f"fused targets only: {words}"):
            FusionChoice.model_validate({key: (1.0, 0.0) if kind == "teachers" else (0,)}).resolve(
                TeacherCache.open(root / f"{kind}-fused")
            )


def test_a_loss_that_needs_components_names_what_it_needs(root: Path, tmp_path: Path) -> None:
    loss = LOSSES["crd"] | {"feature_source": "components"}
    with pytest.raises(RecipeError, match="needs the networks' own features"):
        open_data(tiny_run.recipe(root / "teacher-fused", tmp_path, loss=loss), CPU)
    assert open_data(tiny_run.recipe(root / "teacher-components", tmp_path, loss=loss), CPU).components is not None
