from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from cache_tools import fusion
from cache_tools.errors import PreflightError
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import PromptEnsemble
from tests.support.golden_cases import FUSED_SCALES, FUSED_WEIGHTS

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"teacher": (6, 5), "cosine": (6, 5), "teacher_features": (6, 24), "clip_features": (6, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ["fusion", "prompts"])
def test_class_embeddings_and_cosine_match_the_golden_data(name: str) -> None:
    data = golden(name)
    embeddings = fusion.class_embeddings(data["text_features"])
    torch.testing.assert_close(embeddings, data["class_embeddings"], rtol=1e-5, atol=1e-7)
    cosine = fusion.cosine(data["image_features"], embeddings)
    torch.testing.assert_close(cosine, data["cosine"], rtol=1e-5, atol=1e-6)
    assert embeddings.dtype == cosine.dtype == torch.float32


@pytest.mark.parametrize("weight", FUSED_WEIGHTS)
@pytest.mark.parametrize("scale", FUSED_SCALES)
def test_fused_logits_match_the_golden_data(weight: float, scale: int) -> None:
    data = golden("fusion")
    fused = fusion.fuse_logits(data["teacher_logits"], data["cosine"], weight, scale)
    torch.testing.assert_close(fused, data[f"fused_w{weight}_scale{scale}"], rtol=1e-5, atol=1e-6)


def test_class_embeddings_are_the_mean_of_unit_vectors_not_of_raw_ones() -> None:
    text = torch.tensor([[[10.0, 0.0]], [[0.0, 1.0]]])
    torch.testing.assert_close(fusion.class_embeddings(text), torch.full((1, 2), 0.5**0.5))


def make_fusion(**changes: Any) -> Fusion:
    """One teacher and one CLIP of weight 1, with changes."""
    plain: dict[str, Any] = {
        "teacher_weight": 0.7,
        "feature_weight": 0.4,
        "teacher_weights": (1.0,),
        "clip_weights": (1.0,),
        "clip_scales": (31.5,),
    }
    return Fusion(**(plain | changes))


def test_one_teacher_and_one_clip_equal_a_float64_reference(batch: dict[str, torch.Tensor]) -> None:
    p_teacher, p_clip = fusion.projection_matrix(24, 8, seed=3), fusion.projection_matrix(16, 8, seed=4)
    logits = fusion.fused_logits([batch["teacher"]], [31.5 * batch["cosine"]], make_fusion())
    features = fusion.fused_features(
        [batch["teacher_features"]],
        [torch.from_numpy(p_teacher)],
        [batch["clip_features"]],
        [torch.from_numpy(p_clip)],
        make_fusion(),
    )
    plain = {name: value.double().numpy() for name, value in batch.items()}
    z = 0.7 * plain["teacher"] + 0.3 * 31.5 * plain["cosine"]
    z -= z.mean(axis=1, keepdims=True)
    f = 0.4 * unit(plain["teacher_features"] @ p_teacher) + 0.6 * unit(plain["clip_features"] @ p_clip)
    np.testing.assert_allclose(logits.numpy(), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features.numpy(), f, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(6), rtol=0, atol=1e-5)


def test_several_networks_equal_a_float64_reference() -> None:
    """Three teachers and two CLIPs of different widths; each weighted group is renormalised."""
    rng = np.random.default_rng(3)
    widths, shares = ((12, 9, 20), (16, 7)), ((0.5, 0.2, 0.3), (0.25, 0.75))
    logits = [[rng.normal(0, 4, (6, 5)).astype(np.float32) for _ in group] for group in widths]
    features = [[rng.normal(size=(6, width)).astype(np.float32) for width in group] for group in widths]
    projections = [[fusion.projection_matrix(width, 8, width) for width in group] for group in widths]
    chosen = make_fusion(teacher_weights=shares[0], clip_weights=shares[1], clip_scales=(1.0, 1.0))

    z = [
        np.sum([w * x.astype(np.float64) for w, x in zip(weights, group, strict=True)], axis=0)
        for weights, group in zip(shares, logits, strict=True)
    ]
    fused = 0.7 * z[0] + 0.3 * z[1]
    fused -= fused.mean(axis=1, keepdims=True)
    groups = []
    for share, feature, projection in zip(shares, features, projections, strict=True):
        units = [unit(x.astype(np.float64) @ p) for x, p in zip(feature, projection, strict=True)]
        groups.append(unit(np.sum([w * each for w, each in zip(share, units, strict=True)], axis=0)))
    f = 0.4 * groups[0] + 0.6 * groups[1]

    teachers, clips = ([torch.from_numpy(x) for x in group] for group in logits)
    np.testing.assert_allclose(fusion.fused_logits(teachers, clips, chosen).numpy(), fused, rtol=1e-5, atol=1e-5)
    tensors = [[torch.from_numpy(x) for x in group] for group in (*features, *projections)]
    found = fusion.fused_features(tensors[0], tensors[2], tensors[1], tensors[3], chosen)
    np.testing.assert_allclose(found.numpy(), f, rtol=1e-5, atol=1e-6)


def test_networks_of_weight_zero_are_ignored(batch: dict[str, torch.Tensor]) -> None:
    """Bit for bit, even if their values are infinite; and mixing equal networks changes nothing."""
    infinite = torch.full((6, 5), torch.inf)
    assert torch.equal(fusion.mix([infinite, batch["teacher"]], (0.0, 1.0)), batch["teacher"])
    rows = torch.nn.functional.normalize(batch["teacher"], dim=1)
    assert torch.equal(fusion.mix_features([rows, infinite], (1.0, 0.0)), rows)
    torch.testing.assert_close(fusion.mix([batch["teacher"]] * 3, (0.2, 0.3, 0.5)), batch["teacher"])
    torch.testing.assert_close(fusion.mix_features([rows, rows], (0.5, 0.5)), rows)


def test_a_mix_of_features_keeps_its_length(batch: dict[str, torch.Tensor]) -> None:
    first = torch.nn.functional.normalize(batch["teacher_features"], dim=1)
    mixed = fusion.mix_features([first, first.roll(1, dims=1)], (0.5, 0.5))
    torch.testing.assert_close(mixed.norm(dim=1), torch.ones(6))


# Prompts


def prompts_by_hand(image: np.ndarray, text: np.ndarray, scale: float, ensemble: str) -> np.ndarray:
    """[B, C] float64, up to a shift per row, with the cosines of all prompts in memory at once."""
    cosines = np.stack([unit(image) @ unit(prompt).T for prompt in text])
    if ensemble == "embedding":
        return scale * unit(image) @ unit(np.mean([unit(prompt) for prompt in text], axis=0)).T
    if ensemble == "logits":
        return (scale * cosines).mean(axis=0)
    odds = np.exp(scale * cosines - (scale * cosines).max(axis=2, keepdims=True))
    return np.log((odds / odds.sum(axis=2, keepdims=True)).mean(axis=0))


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("ensemble", ["embedding", "logits", "probabilities"])
def test_prompt_ensembles_equal_a_float64_reference(ensemble: PromptEnsemble, scale: float) -> None:
    """On the golden text features, which are not normalised."""
    data = golden("prompts")
    prompts = fusion.prompt_embeddings(data["text_features"], ensemble)
    found = fusion.clip_logits(data["image_features"], prompts, scale)
    image, text = (data[name].double().numpy() for name in ("image_features", "text_features"))
    np.testing.assert_allclose(
        found.numpy(), prompts_by_hand(image, text, scale, ensemble), rtol=1e-5, atol=1e-6 * scale
    )
    assert found.dtype == torch.float32


def test_the_embedding_ensemble_is_the_scaled_golden_cosine() -> None:
    data = golden("prompts")
    prompts = fusion.prompt_embeddings(data["text_features"], "embedding")
    assert torch.equal(prompts, fusion.class_embeddings(data["text_features"]))
    found = fusion.clip_logits(data["image_features"], prompts, 100.0)
    torch.testing.assert_close(found, 100.0 * data["cosine"], rtol=1e-5, atol=1e-4)


def test_ensembles_of_one_prompt_agree() -> None:
    data = golden("prompts")
    first = data["text_features"][:1]
    found = {
        name: fusion.clip_logits(data["image_features"], fusion.prompt_embeddings(first, name), 30.0).log_softmax(1)
        for name in ("embedding", "logits", "probabilities")
    }
    torch.testing.assert_close(found["logits"], found["embedding"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["probabilities"], found["embedding"], rtol=1e-5, atol=1e-4)


def test_the_ensembles_differ_and_probabilities_sum_to_one() -> None:
    data = golden("prompts")
    embedding, logits, probabilities = (
        fusion.clip_logits(data["image_features"], fusion.prompt_embeddings(data["text_features"], name), 100.0)
        for name in ("embedding", "logits", "probabilities")
    )
    torch.testing.assert_close(probabilities.exp().sum(1), torch.ones(len(probabilities)))
    for one, other in ((embedding, logits), (logits, probabilities), (embedding, probabilities)):
        assert (one.log_softmax(1) - other.log_softmax(1)).abs().max() > 0.1


def test_probabilities_do_not_underflow() -> None:
    """At a scale of 10 000, float32 probabilities of the other classes are 0, but their logarithms are finite."""
    text, image = torch.eye(3).expand(4, 3, 3), torch.tensor([[1.0, 0.0, 0.0]])
    found = fusion.clip_logits(image, fusion.prompt_embeddings(text, "probabilities"), 10_000.0)
    torch.testing.assert_close(found, torch.tensor([[0.0, -10_000.0, -10_000.0]]))


def test_probabilities_never_hold_all_prompts_at_once() -> None:
    """40 prompts, 500 classes: only a few [B, C] tensors are alive at any time."""
    rows, classes, count = 256, 500, 40
    image, text = torch.randn(rows, 16), torch.randn(count, classes, 16)
    prompts = fusion.prompt_embeddings(text, "probabilities")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fusion.clip_logits(image, prompts, 10.0)
    alive = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert rows * classes * 4 <= peak < 12 * rows * classes * 4


def test_autocast_around_the_call_changes_nothing(batch: dict[str, torch.Tensor]) -> None:
    projection, head = torch.from_numpy(fusion.projection_matrix(24, 8, 0)), torch.randn(5, 24)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)

    def numbers() -> list[torch.Tensor]:
        return [
            fusion.project(batch["teacher_features"], projection),
            fusion.cosine(batch["clip_features"], embeddings),
            fusion.linear_logits(batch["teacher_features"], head, torch.zeros(5)),
            fusion.clip_logits(batch["clip_features"], torch.stack([embeddings, embeddings.flip(0)]), 20.0),
        ]

    plain = numbers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = numbers()
    for ours, theirs in zip(plain, mixed, strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_inputs_are_widened_first(batch: dict[str, torch.Tensor]) -> None:
    half = batch["teacher"].half()
    assert torch.equal(fusion.centre_rows(half), fusion.centre_rows(half.float()))
    assert fusion.fuse_logits(half, half, 0.5, 100.0).dtype == torch.float32
    assert fusion.fuse_features(half, half, 0.5).dtype == torch.float32


def test_centring_does_not_change_the_softmax(batch: dict[str, torch.Tensor]) -> None:
    shifted = batch["teacher"] + 40.0
    torch.testing.assert_close(fusion.centre_rows(shifted).softmax(1), shifted.softmax(1), rtol=1e-4, atol=1e-6)


def test_clip_scale_choices(batch: dict[str, torch.Tensor]) -> None:
    assert fusion.resolve_clip_scale("model", 100.0) == 100.0
    assert fusion.resolve_clip_scale(1.0, 100.0) == 1.0
    scale = fusion.resolve_clip_scale("match", 100.0, batch["teacher"] * 5 + 3, batch["cosine"] * 0.02)
    spreads = [x.double().numpy().std(axis=1).mean() for x in (batch["teacher"] * 5, scale * batch["cosine"] * 0.02)]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-6)


def test_match_refuses_constant_cosines() -> None:
    with pytest.raises(PreflightError, match="cannot match the spread"):
        fusion.resolve_clip_scale("match", 100.0, torch.randn(4, 3), torch.full((4, 3), 0.25))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 60), cols=st.integers(1, 60), seed=st.integers(0, 2**64 - 1))
def test_projection_is_orthonormal_fixed_and_float32(rows: int, cols: int, seed: int) -> None:
    matrix = fusion.projection_matrix(rows, cols, seed)
    assert matrix.shape == (rows, cols)
    assert matrix.dtype == np.float32
    assert matrix.flags.c_contiguous
    wide = matrix.astype(np.float64)
    gram = wide.T @ wide if cols <= rows else wide @ wide.T
    np.testing.assert_allclose(gram, np.eye(min(rows, cols)), atol=1e-5)
    assert np.array_equal(matrix, fusion.projection_matrix(rows, cols, seed))


def test_projection_is_pinned() -> None:
    """A rebuilt cache must have the same projections, so these numbers must not change."""
    matrix = fusion.projection_matrix(4, 2, seed=0)
    expected = [
        [0.4974341, -0.34093633],
        [-0.07086602, 0.77927786],
        [0.37113062, 0.52439773],
        [-0.78089654, -0.03867048],
    ]
    np.testing.assert_allclose(matrix, expected, rtol=1e-5)


def test_projections_of_different_seeds_are_unrelated_and_keep_angles() -> None:
    first, second = fusion.projection_matrix(256, 128, 0), fusion.projection_matrix(256, 128, 1)
    assert abs((first * second).sum()) / np.linalg.norm(first) / np.linalg.norm(second) < 0.05
    assert abs(first.mean()) < 3 / np.sqrt(first.size * 256)
    assert first.std() == pytest.approx(1 / 16, rel=0.01)
    a = np.random.default_rng(0).normal(size=256)
    b = a + 0.5 * np.random.default_rng(1).normal(size=256)
    cosines = [float(unit(x) @ unit(y)) for x, y in ((a, b), (a @ first, b @ first))]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.1)
