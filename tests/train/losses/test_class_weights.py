"""Class weights: balanced ones as in scikit-learn, by order or by name, and errors that name the class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import RecipeError
from train.losses.class_weights import class_weights
from train.recipe.loss import LossRecipe

NAMES = ("cat", "dog", "7")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 0, 1, 0])


def weights(chosen: Any, labels: np.ndarray = LABELS) -> list[float] | None:
    found = class_weights(LossRecipe(class_weights=chosen), NAMES, labels)
    assert found is None or found.dtype is torch.float32
    return None if found is None else found.tolist()


def test_balanced_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    expected = [10 / (3 * 6), 10 / (3 * 3), 10 / (3 * 1)]
    assert weights("balanced") == pytest.approx(expected)
    assert compute_class_weight("balanced", classes=np.arange(3), y=LABELS) == pytest.approx(expected)


def test_weights_by_order_and_by_name() -> None:
    assert weights("none") is None
    assert weights([1, 2, 0.5]) == [1.0, 2.0, 0.5]
    assert weights({"7": 0.5, "cat": 1, "dog": 2}) == [1.0, 2.0, 0.5]
    assert weights({7: 0.5, "cat": 1, "dog": 2}) == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([1, 2], "expected 3 weights.*found 2"),
        ({"cat": 1, "dog": 2}, "found none for 7"),
        ({"cat": 1, "dog": 2, "7": 1, "cow": 3}, "no such class: cow"),
        ([0, 0, 0], "all classes are 0"),
    ],
)
def test_weights_of_other_classes_are_refused(chosen: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        weights(chosen)


def test_a_class_without_images_has_no_balanced_weight() -> None:
    with pytest.raises(RecipeError, match=r"without labelled images.*found dog.*list"):
        weights("balanced", LABELS[LABELS != 1])
