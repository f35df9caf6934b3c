"""Average precision equals scikit-learn's and a slow definition; errors for logits and splits without figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_tools.analysis.average_precision import average_precisions
from cache_tools.errors import DataError, DivergedError
from train.evaluate.multilabel import multilabel_figures

NAMES = ("cat", "dog", "cow", "emu")


def slow_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Precision at each threshold, weighted by the recall that the threshold adds."""
    total = before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = labels[chosen].sum() / labels.sum()
        total += (recall - before) * labels[chosen].mean()
        before = recall
    return float(total)


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_equals_scikit_learns_and_the_definition(ties: bool) -> None:
    from sklearn.metrics import average_precision_score

    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=(40, 4)), rng.integers(0, 2, (40, 4)).astype(np.uint8)
    scores = np.round(scores * 2) if ties else scores
    found = average_precisions(scores, labels)
    for number in range(4):
        assert found[number] == pytest.approx(slow_average_precision(scores[:, number], labels[:, number]), rel=1e-12)
    assert found == pytest.approx(average_precision_score(labels, scores, average=None), rel=1e-12)


def test_figures_by_hand() -> None:
    """Three images: the cat's ranking is perfect, the dog's is 1/2 and 2/3, no image has the emu."""
    labels = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], np.uint8)
    logits = torch.tensor([[2.0, 3.0, 0.0, 1.0], [1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    figures, by_class = multilabel_figures(logits, labels, NAMES)
    assert by_class == pytest.approx({"cat": 1.0, "dog": (1 / 2 + 2 / 3) / 2, "cow": 1.0})
    assert figures.map == pytest.approx((2 + 7 / 12) / 3)
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    assert figures.bce == pytest.approx(-np.mean(np.where(labels == 1, np.log(p), np.log(1 - p))))
    assert figures.n == 3


def test_what_has_no_figures_is_an_error() -> None:
    labels = np.ones((2, 4), np.uint8)
    with pytest.raises(DivergedError, match="not finite"):
        multilabel_figures(torch.full((2, 4), torch.nan), labels, NAMES)
    with pytest.raises(DataError, match="no image of the split has a label"):
        multilabel_figures(torch.zeros(2, 4), np.zeros((2, 4), np.uint8), NAMES)
