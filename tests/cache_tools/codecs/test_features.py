"""cache_tools/codecs/features.py: fitted steps, and rounding that keeps the logits of a linear head."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from cache_tools.codecs import FeatureSteps
from cache_tools.codecs.features import FEEDBACK
from cache_tools.errors import FormatError
from tests.support.codec_rows import WIDTH, centred, constants, logits


def test_steps_follow_the_spread() -> None:
    sample = logits(2000) * np.linspace(1, 12, WIDTH, dtype=np.float32)
    by_column = FeatureSteps(spread="column", resolution=10.0).fit(sample)["_steps"]
    np.testing.assert_allclose(by_column, sample.std(axis=0) / 10, rtol=1e-4)
    common = FeatureSteps(resolution=10.0).fit(sample)["_steps"]
    np.testing.assert_allclose(common, np.exp(np.log(sample.std(axis=0)).mean()) / 10, rtol=1e-4)


def test_a_column_at_rest_gets_a_step() -> None:
    sample = logits(100)
    sample[:, 3] = 0.0
    assert (FeatureSteps(spread="column").fit(sample)["_steps"] > 0).all()


def test_a_sample_without_spread_is_refused() -> None:
    with pytest.raises(FormatError, match="no spread"):
        FeatureSteps().fit(np.ones((10, WIDTH), np.float32))


def test_missing_constants_are_named() -> None:
    with pytest.raises(FormatError, match="'_steps'"):
        FeatureSteps().encode(logits())


@pytest.mark.parametrize("width", [40, 300])  # more than one block of columns
def test_feedback_keeps_the_logits_of_the_head(width: int) -> None:
    generator = np.random.default_rng(3)
    features = np.maximum(generator.standard_normal((200, width)), 0).astype(np.float32)
    head = generator.standard_normal((width // 4, width)).astype(np.float32)
    codec = FeatureSteps(resolution=4.0)
    plain = codec.fit(features)
    aware = plain | codec.head_feedback(head)

    def errors(fitted: dict[str, npt.NDArray[np.float32]]) -> tuple[float, float]:
        decoded = codec.decode(codec.encode(features, fitted), plain).numpy()
        difference = decoded - features
        assert (np.abs(difference) <= codec.error_bound(features, fitted)).all()
        return float(np.linalg.norm(centred(difference @ head.T))), float(np.linalg.norm(difference))

    plain_logits, plain_features = errors(plain)
    aware_logits, aware_features = errors(aware)
    assert aware_logits < 0.7 * plain_logits
    assert aware_features < 1.5 * plain_features


def test_feedback_is_one_column_after_the_other() -> None:
    """Against the plain loop over columns, in float64."""
    features, head = logits(20, 150, seed=5), logits(30, 150, seed=6)
    codec = FeatureSteps(resolution=3.0)
    fitted = codec.fit(features) | codec.head_feedback(head)
    pending, steps = features.astype(np.float64), fitted["_steps"].astype(np.float64)
    expected = np.empty_like(pending)
    for column in range(150):
        expected[:, column] = np.rint(pending[:, column] / steps[column])
        error = pending[:, column] - expected[:, column] * steps[column]
        pending[:, column + 1 :] -= error[:, None] * fitted[FEEDBACK][column, column + 1 :]
    different = (codec.encode(features, fitted)[""] != expected).any(axis=1)
    assert different.mean() < 0.2  # a tie decided the other way changes the rest of its row


def test_without_a_direction_to_hide_in_it_is_rounding_to_nearest() -> None:
    codec = FeatureSteps(damping=1e9)
    fitted = constants(codec)
    aware = fitted | codec.head_feedback(logits(5))
    np.testing.assert_array_equal(codec.encode(logits(), fitted)[""], codec.encode(logits(), aware)[""])
