"""cache_tools/codecs/top_k.py: probabilities within the stated bound, the tail, and temperatures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_tools.codecs import TopK
from cache_tools.errors import FormatError
from tests.support.codec_rows import WIDTH, logits, softmax

LOGITS = hnp.arrays(np.float32, (5, WIDTH), elements=st.floats(-18.0, 18.0, width=32))


@pytest.mark.parametrize("kept", [WIDTH, 3])
@given(values=LOGITS)
@settings(max_examples=100, deadline=None)
def test_probabilities_are_within_the_stated_bound(kept: int, values: npt.NDArray[np.float32]) -> None:
    codec = TopK(num_classes=WIDTH, max_classes=kept, min_probability=1e-3)
    targets = codec.sparse(codec.encode(values))
    p = np.zeros((len(values), WIDTH + 1))
    np.put_along_axis(p, targets.classes.numpy(), targets.log_p.double().exp().numpy(), axis=1)
    true, stored = softmax(values), p[:, :WIDTH]
    assert (np.abs(stored - true) <= codec.error_bound(values) + 1e-12).all()
    counts = (targets.classes < WIDTH).sum(dim=1).numpy()
    assert (counts >= 1).all()
    assert (counts <= kept).all()
    known = np.zeros((len(values), WIDTH + 1), bool)
    np.put_along_axis(known, targets.classes.numpy(), True, axis=1)
    rest = np.where(known[:, :WIDTH], 0.0, true).sum(axis=1)
    np.testing.assert_allclose(targets.log_tail.double().exp().numpy(), rest, rtol=1e-5, atol=1e-30)


def test_decoding_gives_an_even_tail_of_the_right_mass() -> None:
    values = logits(30)
    codec = TopK(num_classes=WIDTH, max_classes=4, min_probability=0.02)
    decoded = codec.decode(codec.encode(values)).numpy()
    p, true = softmax(decoded), softmax(values)
    largest = np.argsort(-true, axis=1)[:, :1]
    np.testing.assert_allclose(np.take_along_axis(p, largest, 1), np.take_along_axis(true, largest, 1), atol=0.01)
    np.testing.assert_allclose(decoded.mean(axis=1), 0.0, atol=1e-5)
    tails = [np.unique(row[np.argsort(row)][: WIDTH - 4].round(5)).size for row in p]
    assert max(tails) == 1


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_caution_above_temperature_1_and_refusal_of_other_temperatures(temperature: float) -> None:
    codec = TopK(num_classes=WIDTH, temperature=temperature)
    stored = codec.encode(logits())
    assert f"temperature {temperature:g}" in str(codec.caution(temperature))
    assert codec.sparse(stored, temperature=temperature).classes.shape == (40, WIDTH)
    with pytest.raises(FormatError, match="one temperature"):
        codec.sparse(stored, temperature=1.0)
    assert TopK().caution(1.0) is None


def test_every_class_is_kept_without_a_threshold() -> None:
    codec = TopK(num_classes=WIDTH, min_probability=0.0)
    targets = codec.sparse(codec.encode(logits()))
    assert (targets.classes.numpy() == np.arange(WIDTH)).all()
    assert (targets.log_tail == -1e30).all()
