"""Which run on labels alone is the twin of a distilled run."""

from __future__ import annotations

from typing import Any

import pytest

from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views.recipe import ViewRecipe
from train.recipe import TrainRecipe
from train.report.gains import Paired, gains, pairing, twins
from train.runs.folder import flatten


def distilled(**changes: Any) -> TrainRecipe:
    data = {"name": "any", "cache": "photos", "student": "resnet8", "epochs": 10, "loss": {"kind": "kd"}}
    return TrainRecipe.model_validate(data | changes)


def labels(recipe: TrainRecipe, num_views: int = 4) -> TrainRecipe:
    return recipe.on_labels(DatasetRecipe(name="digits"), ViewRecipe(), num_views)


def paired(recipe: TrainRecipe, figure: float | None = 0.5, **data: Any) -> Paired:
    settings = {key: value for key, value in flatten(recipe.values()).items() if key != "seed"}
    on_labels = not recipe.loss.needs_targets
    return pairing(settings, data, seed=recipe.seed, on_labels=on_labels, figure=figure)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"student": "timm:resnet18", "precision": "bfloat16"},
        {"loss": {"kind": "dkd", "temperature": 7.0, "feature": "crd"}, "fusion": {"teacher_weight": 0.2}},
        {"label_fraction": 0.25, "schedule": {"name": "multistep", "milestones": [4, 8], "warmup_epochs": 2}},
        {"label_fraction": 0.3, "evaluate_every": 5},
        {"loss": {"label_smoothing": 0.1, "class_weights": "balanced"}},
    ],
)
def test_the_same_run_on_labels_alone_is_the_twin(changes: dict[str, Any]) -> None:
    own, other = distilled(**changes), distilled(**changes, seed=1)
    runs = [paired(own, 0.7, num_views="4"), paired(labels(other), 0.6), paired(labels(own), 0.75)]
    assert twins(runs) == [2, None, None]
    assert gains(runs) == [pytest.approx(-0.05), None, None]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"student": "resnet20"}, {"epochs": 11}, {"batch_size": 32}, {"optimiser": {"learning_rate": 0.3}},
        {"loss": {"label_smoothing": 0.1}}, {"schedule": {"warmup_epochs": 1}}, {"ema_decay": 0.9},
        {"label_fraction": 0.5},
    ],
)  # fmt: skip
def test_a_run_with_other_settings_is_not(changes: dict[str, Any]) -> None:
    assert gains([paired(distilled(), num_views="4"), paired(labels(distilled(**changes)))]) == [None, None]


def test_the_same_number_of_views_comes_first_and_new_views_in_every_epoch_are_second() -> None:
    own, one, fresh = distilled(), labels(distilled(), 1), labels(distilled()).model_copy(update={"num_views": None})
    first = paired(own, 0.9, num_views="4")
    assert gains([first, paired(one, 0.1)]) == [None, None]
    assert gains([first, paired(one, 0.1), paired(fresh, 0.2)])[0] == pytest.approx(0.7)
    assert gains([first, paired(fresh, 0.2), paired(labels(own), 0.3)])[0] == pytest.approx(0.6)


def test_other_images_and_unfinished_runs_are_no_pair() -> None:
    own, on_labels = distilled(), labels(distilled())
    assert gains([paired(own, num_views="4"), paired(on_labels, None)]) == [None, None]
    assert gains([paired(own, None, num_views="4"), paired(on_labels)]) == [None, None]
    assert gains([paired(own, images="a", num_views="4"), paired(on_labels, images="b")]) == [None, None]
    assert gains([paired(own, images="a", num_views="4"), paired(on_labels, images="a")]) == [0.0, None]
