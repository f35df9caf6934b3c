"""The class weights of the CE term, from a recipe and the labels of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cache_tools.errors import RecipeError
from train.recipe.loss import LossRecipe

_SHOWN = 5


def class_weights(recipe: LossRecipe, class_names: Sequence[str], labels: np.ndarray) -> Tensor | None:
    """The weights of a recipe, float32 [C] in the order of `class_names`; None if it has none.

    `balanced` is N / (C · n_c), as in scikit-learn: all classes together have the same share in the loss.

    Args:
        labels: int [N], of the labelled training samples.

    Raises:
        RecipeError: other classes than the data's, a class without samples (`balanced`), or only weights of 0.
    """
    chosen = recipe.class_weights
    if chosen == "none":
        return None
    if chosen == "balanced":
        weights = _balanced(class_names, labels)
    elif isinstance(chosen, Mapping):
        weights = _by_name(chosen, class_names)
    else:
        weights = np.array(chosen)
    if len(weights) != len(class_names):
        raise RecipeError(
            "there must be a weight for each class",
            where="loss.class_weights",
            expected=f"{len(class_names)} weights",
            found=len(weights),
        )
    if not weights.any():
        raise RecipeError("the weights of all classes are 0", where="loss.class_weights")
    return torch.from_numpy(weights.astype(np.float32))


def _balanced(class_names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    count = np.bincount(labels, minlength=len(class_names))
    if not count.all():
        raise RecipeError(
            "a class without labelled images has no balanced weight",
            where="loss.class_weights: balanced",
            found=_listed([name for name, samples in zip(class_names, count, strict=True) if samples == 0]),
            next_step="give the weights as a list, or as CLASS: WEIGHT lines in a file",
        )
    return np.asarray(len(labels) / (len(class_names) * count))


def _by_name(chosen: Mapping[str, float], class_names: Sequence[str]) -> np.ndarray:
    missing = [name for name in class_names if name not in chosen]
    unknown = [name for name in chosen if name not in class_names]
    if missing or unknown:
        raise RecipeError(
            "class weights for other classes than those of the data",
            where="loss.class_weights",
            expected="a weight for each class",
            found=f"none for {_listed(missing)}" if missing else f"no such class: {_listed(unknown)}",
        )
    return np.array([chosen[name] for name in class_names])


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
