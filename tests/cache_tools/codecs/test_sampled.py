"""cache_tools/codecs/sampled.py: exact means over the phase, the phase itself, stable bytes, arrays of bad numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_tools.codecs import Sampled, SparseCodec, TopK
from cache_tools.codecs.sampled import systematic_counts
from cache_tools.errors import FormatError
from tests.support.codec_rows import WIDTH, logits, softmax

LOGITS = hnp.arrays(np.float32, (4, WIDTH), elements=st.floats(-60.0, 60.0, width=32))
DRAWS = st.sampled_from([8, 9, 32, 255])


def counts_of(codec: Sampled, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The counts [B, C] that a codec stores."""
    stored = codec.encode(values)
    width = values.shape[1]
    classes = codec.sparse(stored).classes.numpy()
    found = np.zeros((len(values), width + 1))
    np.put_along_axis(found, classes, stored[""].astype(np.float64), axis=1)
    return found[:, :width]


@given(values=LOGITS, draws=DRAWS, temperature=st.sampled_from([0.5, 1.0, 4.0]))
@settings(max_examples=100, deadline=None)
def test_counts_add_up_and_are_next_to_the_expected_number(
    values: npt.NDArray[np.float32], draws: int, temperature: float
) -> None:
    codec = Sampled(num_classes=WIDTH, draws=draws, temperature=temperature)
    stored = codec.encode(values)
    assert (stored[""].sum(axis=1, dtype=int) == draws).all()
    assert (stored[""][:, 0] > 0).all(), "the fill value is no first count"
    assert ((stored[""] > 0) == (stored["_gaps"] > 0)).all()
    counts = counts_of(codec, values)
    assert (np.abs(counts - draws * softmax(values, temperature)) < 1.0 + 1e-9).all()
    errors = np.abs(counts / draws - softmax(values, temperature))
    assert (errors <= codec.error_bound(values)).all()
    targets = codec.sparse(stored)
    ordered = torch.where(targets.classes < WIDTH, targets.classes, torch.arange(1000, 1000 + targets.classes.shape[1]))
    assert (ordered.diff(dim=1) > 0).all(), "ascending"
    torch.testing.assert_close(targets.log_p.exp().sum(dim=1), torch.ones(4), rtol=0, atol=1e-5)
    assert (targets.log_tail == -1e30).all()


@given(values=hnp.arrays(np.float64, WIDTH, elements=st.floats(-30.0, 30.0)), draws=DRAWS)
@settings(max_examples=200, deadline=None)
def test_the_mean_over_the_phase_is_exact(values: npt.NDArray[np.float64], draws: int) -> None:
    """Counts are constant between the phases at which a draw moves to the next class."""
    p = softmax(values[None])[0]
    turning = np.mod(-draws * np.cumsum(p), 1.0)
    edges = np.unique(np.concatenate([[0.0, 1.0], turning]))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    counts = systematic_counts(np.tile(p, (len(middles), 1)), middles, draws)
    assert (counts.sum(axis=1) == draws).all()
    np.testing.assert_allclose(lengths @ counts, draws * p, rtol=0, atol=1e-9)
    below = np.mod(draws * p, 1.0)
    np.testing.assert_allclose(lengths @ (counts - draws * p) ** 2, below * (1 - below), rtol=0, atol=1e-9)


@pytest.mark.parametrize("phase", [0.0, 0.5, 1 - 2.0**-53])
def test_rounding_neither_loses_nor_gains_a_draw(phase: float) -> None:
    p = np.array([[1.0, 0.0, 0.0], [1e-17, 1.0, 1e-17], [1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7]])
    counts = systematic_counts(p, np.full(4, phase), 255)
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) == 255).all()
    assert counts[0].tolist() == [255, 0, 0]


def test_the_phase_is_uniform_over_seeds() -> None:
    values = logits(3).astype(np.float64)
    phases = np.array([Sampled(num_classes=WIDTH, seed=seed)._phases(values) for seed in range(2000)])
    assert ((phases >= 0) & (phases < 1)).all()
    for column in np.sort(phases, axis=0).T:
        distance = np.abs(column - (np.arange(2000) + 0.5) / 2000).max()
        assert distance < 1.95 / np.sqrt(2000), "Kolmogorov-Smirnov at 0.1 %"


def test_the_phase_is_uniform_over_rows_that_differ_little() -> None:
    near = logits(1, 100) + 0.1 * logits(2000, 100, seed=3)
    phases = np.sort(Sampled(num_classes=100)._phases(near.astype(np.float64)))
    assert np.abs(phases - (np.arange(2000) + 0.5) / 2000).max() < 1.95 / np.sqrt(2000)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_stored_counts_are_unbiased_over_seeds(temperature: float) -> None:
    values, draws, seeds = logits(20, 40), 16, 500
    errors = np.zeros((seeds, 20, 40))
    for seed in range(seeds):
        codec = Sampled(num_classes=40, draws=draws, temperature=temperature, seed=seed)
        errors[seed] = counts_of(codec, values) / draws - softmax(values, temperature)
    below = np.mod(draws * softmax(values, temperature), 1.0)
    expected = np.sqrt((below * (1 - below)).sum() / seeds) / draws
    assert 0.9 < np.linalg.norm(errors.mean(axis=0)) / expected < 1.1, "the standard error, and nothing more"
    assert np.sqrt((errors**2).sum(axis=(1, 2)).mean()) == pytest.approx(expected * np.sqrt(seeds), rel=0.02)


def test_the_bytes_of_a_row_stay_the_same() -> None:
    """Caches that were half built continue with the same draws. Raise CODECS_VERSION if these change."""
    peaked = [4.0, -1.0, 2.5, 0.0, 3.75, -6.0, 1.0, 2.0, 0.5, -2.0, 3.0, 1.5]
    flat = [0.0, 0.25, 0.5, 0.25, -0.5, 0.75, 0.0, 1.0, 0.0, -0.25, 0.5, 0.0]
    rows = np.array([peaked, flat], np.float32)
    first, second = (Sampled(num_classes=WIDTH, draws=16, temperature=2.0, seed=seed).encode(rows) for seed in (0, 1))
    assert first[""].tolist() == [[4, 2, 1, 3, 1, 1, 1, 2, 1, 0, 0, 0], [1, 1, 2, 1, 1, 2, 1, 2, 1, 1, 2, 1]]
    assert first["_gaps"].tolist() == [[1, 2, 1, 1, 2, 1, 1, 2, 1, 0, 0, 0], [1] * 12]
    assert second[""][1].tolist() == [2, 1, 1, 2, 1, 1, 2, 2, 1, 1, 1, 1], "another seed, another draw"


def test_bytes_depend_on_the_row_alone() -> None:
    values = logits(64, 100)
    codec = Sampled(num_classes=100, temperature=4.0)
    whole = codec.encode(values)
    for part in (slice(0, 1), slice(7, 20), slice(63, None, -3)):
        for suffix, rows in codec.encode(values[part]).items():
            np.testing.assert_array_equal(rows, whole[suffix][part])
    for suffix, rows in codec.encode(np.asfortranarray(values)).items():
        np.testing.assert_array_equal(rows, whole[suffix])


def test_rounding_errors_seldom_change_a_draw() -> None:
    """Another batch or device computes other last bits, and a replay must find the same rows."""
    values = logits(1000, 100)
    codec = Sampled(num_classes=100, temperature=4.0)
    whole, nearly = (codec.encode(rows) for rows in (values, values + 1e-5 * logits(1000, 100, seed=5) / 3))
    same = np.all([(whole[suffix] == nearly[suffix]).all(axis=1) for suffix in whole], axis=0)
    assert same.mean() > 0.98


def test_dense_logits_share_half_a_draw_among_the_other_classes() -> None:
    values, draws = logits(30, 50), 8
    codec = Sampled(num_classes=50, draws=draws, temperature=2.0)
    counts, decoded = counts_of(codec, values), codec.decode(codec.encode(values)).numpy()
    np.testing.assert_allclose(decoded.mean(axis=1), 0.0, atol=1e-5)
    absent = (counts == 0).sum(axis=1, keepdims=True)
    expected = np.where(counts > 0, counts, 0.5 / absent) / (draws + 0.5)
    np.testing.assert_allclose(softmax(decoded, 2.0), expected, rtol=1e-4)


def test_other_temperatures_and_too_many_classes_are_refused() -> None:
    codec = Sampled(num_classes=WIDTH, temperature=4.0)
    assert Sampled().caution(1.0) is None
    assert "temperature 4: the gradient is unbiased, but" in str(codec.caution(4.0))
    with pytest.raises(FormatError, match=r"sampled targets are for one temperature; expected 4\.0; found 1\.0"):
        codec.sparse(codec.encode(logits()), temperature=1.0)
    with pytest.raises(FormatError, match="too many classes for sampled"):
        Sampled().for_width(40_000)


@pytest.mark.parametrize("codec", [Sampled(num_classes=WIDTH), TopK(num_classes=WIDTH)], ids=lambda codec: codec.codec)
def test_numbers_that_no_class_has_are_no_classes(codec: SparseCodec) -> None:
    """A cache from other people may hold anything that its digests fit."""
    good = codec.encode(logits(8))
    for change in ({"_gaps": 32767}, {"_gaps": -5}, {"_gaps": 0}, {"": 0}, {"": 0, "_gaps": 1}, {"_gaps": 2}):
        stored = {suffix: array.copy() for suffix, array in good.items()}
        for suffix, value in change.items():
            stored[suffix][:, 1:4] = value
        targets = codec.sparse(stored)
        assert ((targets.classes >= 0) & (targets.classes <= WIDTH)).all()
        assert torch.isfinite(targets.log_p).all()
        assert (targets.log_p[targets.classes == WIDTH] == -1e30).all()
        assert torch.isfinite(codec.decode(stored)).all()
