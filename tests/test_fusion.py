from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools import fusion
from cache_tools.errors import PreflightError

GOLDEN = Path(__file__).parent / "golden"
FUSED_WEIGHTS, FUSED_SCALES = (0, 0.3, 0.7, 1), (1, 100)


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


def test_fuse_targets_equals_a_float64_reference(batch: dict[str, torch.Tensor]) -> None:
    p_teacher, p_clip = fusion.projection_matrix(24, 8, seed=3), fusion.projection_matrix(16, 8, seed=4)
    logits, features = fusion.fuse_targets(
        batch["teacher"],
        batch["teacher_features"],
        batch["cosine"],
        batch["clip_features"],
        teacher_weight=0.7,
        feature_weight=0.4,
        clip_scale=31.5,
        teacher_projection=torch.from_numpy(p_teacher),
        clip_projection=torch.from_numpy(p_clip),
    )
    plain = {name: value.double().numpy() for name, value in batch.items()}
    z = 0.7 * plain["teacher"] + 0.3 * 31.5 * plain["cosine"]
    z -= z.mean(axis=1, keepdims=True)
    f = 0.4 * unit(plain["teacher_features"] @ p_teacher) + 0.6 * unit(plain["clip_features"] @ p_clip)
    np.testing.assert_allclose(logits.numpy(), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features.numpy(), f, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.mean(dim=1), torch.zeros(6), rtol=0, atol=1e-5)


def test_autocast_around_the_call_changes_nothing(batch: dict[str, torch.Tensor]) -> None:
    projection, head = torch.from_numpy(fusion.projection_matrix(24, 8, 0)), torch.randn(5, 24)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)

    def numbers() -> list[torch.Tensor]:
        return [
            fusion.project(batch["teacher_features"], projection),
            fusion.cosine(batch["clip_features"], embeddings),
            fusion.linear_logits(batch["teacher_features"], head, torch.zeros(5)),
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


def test_match_refuses_a_clip_without_an_opinion() -> None:
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
    """Caches store their matrices, but a rebuild of one must make the same: these numbers may not move."""
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
