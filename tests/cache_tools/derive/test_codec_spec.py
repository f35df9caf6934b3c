"""Codec specs as users type them, and the codecs they give each cache."""

from __future__ import annotations

import pytest

from cache_tools.codecs import Companded, FeatureSteps, FixedStep, Float16, Float32, RowStep, Sampled, TopK
from cache_tools.codecs.presets import PRESETS, TargetCodecs, resolve_codecs
from cache_tools.derive.codec_spec import choose, codecs_for, kinds
from cache_tools.errors import RecipeError
from cache_tools.format.recipe import CacheRecipe
from tests.support.cache_factory import tiny_images, tiny_manifest

IMAGES = tiny_images()
FUSED = tiny_manifest(IMAGES, codec="float32", canaries=False).recipe
COMPONENTS = tiny_manifest(IMAGES, codec="float32", store="components", canaries=False).recipe
MIXED = tiny_manifest(IMAGES, codec="float32", store="components", linear_head=False, canaries=False).recipe


def test_kinds_of_targets_that_caches_store() -> None:
    assert kinds(FUSED) == ("logits", "features")
    assert kinds(COMPONENTS) == ("features",)
    assert kinds(MIXED) == ("logits", "features")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", [FUSED, COMPONENTS, MIXED], ids=["fused", "components", "mixed"])
def test_presets_are_those_of_a_build(preset: str, recipe: CacheRecipe) -> None:
    assert codecs_for(preset, recipe) == resolve_codecs(preset, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "logits", "features"),
    [
        ("row-step", RowStep(), RowStep()),
        (
            "fixed-step:step=1/48,pack=pcodec",
            FixedStep(step=1 / 48, pack="pcodec"),
            FixedStep(step=1 / 48, pack="pcodec"),
        ),
        ("companded", Companded(), Float32()),
        (
            "companded:reference=mean,spread=12,step=1/32",
            Companded(reference="mean", spread=12.0, step=1 / 32),
            Float32(),
        ),
        ("top-k:min_probability=1e-3,max_classes=3", TopK(min_probability=1e-3, max_classes=3), Float32()),
        ("sampled:draws=64,temperature=4,seed=3", Sampled(draws=64, temperature=4.0, seed=3), Float32()),
        ("feature-steps:resolution=8", Float32(), FeatureSteps(resolution=8.0)),
        ("fixed-step+", FixedStep(), Float32()),
        ("+feature-steps:spread=column", Float32(), FeatureSteps(spread="column")),
        (" companded:spread=6 + float16 ", Companded(spread=6.0), Float16()),
    ],
)
def test_a_codec_is_used_for_the_targets_it_fits(spec: str, logits: object, features: object) -> None:
    assert codecs_for(spec, FUSED) == TargetCodecs(logits=logits, features=features)


def test_codecs_of_targets_that_are_not_stored_stay() -> None:
    assert codecs_for("fixed-step", COMPONENTS) == TargetCodecs(logits=Float32(), features=FixedStep())
    assert codecs_for("companded", MIXED) == TargetCodecs(logits=Companded(), features=Float32())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("float8", r"no such codec \(float8\); expected one of float16, .*companded"),
        ("", "no such codec"),
        ("+", "does not store"),
        ("fixed-step:stride=1", "did you mean 'step'|stride"),
        ("fixed-step:step", "NAME:KEY=VALUE"),
        ("fixed-step:step=1/0", "step"),
        ("fixed-step:step=[", "step"),
        ("fixed-step:step=2020-13-45", "step"),
        ("fixed-step:step=-1", "greater than 0"),
        ("companded:spread=100", "spread/step must be"),
        ("sampled:draws=4", "greater than or equal to 8"),
        ("float16+sampled", "sampled is for logits"),
        ("companded+companded", "companded is for logits"),
        ("feature-steps+float16", "feature-steps are for features"),
        ("float16+float16+float16", "no such codec"),
    ],
)
def test_bad_specs_give_clear_errors(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        codecs_for(spec, FUSED)


@pytest.mark.parametrize("spec", ["companded", "top-k:max_classes=3", "companded+"])
def test_codecs_of_logits_that_are_not_stored_are_refused(spec: str) -> None:
    with pytest.raises(RecipeError, match="made from its features"):
        codecs_for(spec, COMPONENTS)


def test_single_specs_override_the_common_one_and_make_the_label() -> None:
    assert choose(FUSED, "compact", None, None) == (resolve_codecs("compact", 5), "compact")
    codecs, label = choose(FUSED, "float16", "companded:spread=6", None)
    assert codecs == TargetCodecs(logits=Companded(spread=6.0), features=Float16())
    assert label == "float16-companded"
    codecs, label = choose(FUSED, None, None, "feature-steps:resolution=8")
    assert codecs == TargetCodecs(logits=Float32(), features=FeatureSteps(resolution=8.0))
    assert label == "feature-steps"
    assert choose(FUSED, "fixed-step+row-step", None, None)[1] == "fixed-step-row-step"
    with pytest.raises(RecipeError, match="no codec is given"):
        choose(FUSED, None, None, None)
