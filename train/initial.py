"""The weights that a student starts from: random ones, published ones, or those of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from cache_tools.errors import RecipeError
from cache_tools.system.arguments import expand_user
from train.own import find_function, is_own
from train.pretrained import download, find_published
from train.recipe import TrainRecipe
from train.students import create_student
from train.weights.files import open_weights
from train.weights.load import load_into
from train.weights.names import files_digest, hub_names, is_path, remember


def first_student(recipe: TrainRecipe, num_classes: int) -> tuple[Any, tuple[str, ...]]:
    """The student of a run before its first step, and what a user should know about its weights, one sentence each.

    Its random weights are drawn on the CPU from torch's default generator, whose state afterwards does not depend on
    other weights that replace them.

    Raises:
        RecipeError, WeightsError: no such student, or weights that are missing or do not fit it.
    """
    remember(hub_names(recipe.student))
    student: Any = create_student(recipe.student, num_classes)
    weights = recipe.initial_weights
    if weights is None:
        return student, ()
    if is_path(weights):
        path = expand_user(weights)
        where, checkpoint = str(path), open_weights(path, recipe.student).checkpoint
    else:
        published = find_published(recipe.student, weights)
        where = published.tag
        with torch.random.fork_rng(devices=[]):
            checkpoint = download(published).state_dict()
    loaded = load_into(
        student,
        checkpoint,
        where=f"{recipe.student}, {where}",
        num_classes=num_classes,
        key=recipe.student_weights_key,
        key_name="student_weights_key",
        new_head=True,
        without_auxiliary=recipe.student.startswith("torchvision:"),
    )
    return student, (f"starts from the weights {where}", *loaded.notes)


def check_names(recipe: TrainRecipe) -> None:
    """Check that a student and the weights that it starts from exist, without reading or downloading them.

    Raises:
        RecipeError, WeightsError: they do not.
    """
    if is_own(recipe.student):
        find_function(recipe.student)
    else:
        with torch.device("meta"):
            create_student(recipe.student, 10)
    weights = recipe.initial_weights
    if weights is None:
        return
    if is_path(weights):
        files_digest(expand_user(weights))
    else:
        find_published(recipe.student, weights)


def check_outputs(student: Any, recipe: TrainRecipe, num_classes: int, image_size: tuple[int, int]) -> None:
    """Check what a network of one's own returns, by a forward pass in eval mode that changes nothing.

    Raises:
        RecipeError: logits or features do not have the shapes that training needs.
    """
    if not is_own(recipe.student):
        return
    with torch.inference_mode():
        features = student.forward_head(student.forward_features(torch.zeros(2, 3, *image_size)), pre_logits=True)
        logits = student(torch.zeros(2, 3, *image_size))
    expected = [(2, num_classes), (2, student.num_features)]
    found = [tuple(getattr(value, "shape", ())) for value in (logits, features)]
    if found != expected:
        raise RecipeError(
            "the network's outputs do not have the shapes of a classifier's",
            where=recipe.student,
            expected=f"logits {list(expected[0])} and features {list(expected[1])} for two images",
            found=f"{list(found[0])} and {list(found[1])}",
        )
