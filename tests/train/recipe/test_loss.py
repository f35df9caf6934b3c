"""The losses by name, the settings of the CE term, and class weights in all their spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import RecipeError
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.recipe.loss import LOSSES, LossRecipe, named_loss


def test_losses_by_name() -> None:
    """Weights of CE, logit term and feature term, and the temperature, are those of the papers' code."""
    terms = {}
    for name in LOSSES:
        loss = LossRecipe(**named_loss(name))
        logit = (loss.kind, loss.distill_weight, loss.temperature) if loss.needs_logits else None
        terms[name] = loss.ce_weight, logit, (loss.feature, loss.feature_weight) if loss.needs_features else None
    assert terms == {
        "ce": (1.0, None, None),
        "kd": (1.0, ("kd", 3.0, 3.0), None),
        "dkd": (1.0, ("dkd", 1.0, 4.0), None),
        "standardised_kd": (0.1, ("standardised_kd", 9.0, 2.0), None),
        "crd": (1.0, None, ("crd", 0.8)),
        "richkd-l": (1.0, ("kd", 3.0, 3.0), None),
        "richkd-f": (1.0, None, ("crd", 0.8)),
        "richkd": (1.0, ("kd", 3.0, 3.0), ("crd", 0.8)),
        "bce": (1.0, ("bce", 1.0, 1.0), None),
        "bce-labels": (1.0, None, None),
    }
    with pytest.raises(RecipeError, match="no such loss"):
        named_loss("kdd")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2.5, 0]", (1.0, 2.5, 0.0)),
        ("1\n2.5\n0\n", (1.0, 2.5, 0.0)),
        ("1 2.5 0", (1.0, 2.5, 0.0)),
        ("cat: 1\n7: 2.5\n'no': 0", {"cat": 1.0, "7": 2.5, "no": 0.0}),
        ('{"cat": 1, "dog": 2}', {"cat": 1.0, "dog": 2.0}),
    ],
)
def test_class_weights_from_a_file_become_part_of_the_recipe(tmp_path: Path, text: str, expected: Any) -> None:
    file = tmp_path / "weights.txt"
    file.write_text(text)
    recipe = load_train_recipe("digits", [f"loss.class_weights={file}"])
    assert recipe.loss.class_weights == expected
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert load_train_recipe("digits", options={"loss.class_weights": str(file)}) == recipe


@pytest.mark.parametrize(
    ("given", "expected"),
    [("balanced", "balanced"), ("none", "none"), (None, "none"), ("1,2,0.5", (1.0, 2.0, 0.5)), ([1, 0], (1.0, 0.0))],
)
def test_class_weights_as_options(given: Any, expected: Any) -> None:
    assert LossRecipe(class_weights=given).class_weights == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nosuch.txt", "cannot read class weights.*nosuch.txt.*no such file"),
        ([1, -1], "bad class weights.*0 or more.*-1"),
        ([1, float("nan")], "bad class weights"),
        ({"cat": float("inf")}, "bad class weights"),
        ({"cat": "heavy"}, "bad class weights.*heavy"),
        ([], "bad class weights"),
        (3, "bad class weights"),
    ],
)
def test_impossible_class_weights_are_refused(given: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        TrainRecipe.model_validate({"name": "mine", "cache": "c", "loss": {"class_weights": given}})


@pytest.mark.parametrize("key", ["label_smoothing", "class_weights"])
def test_settings_of_the_ce_term_are_refused_without_one(key: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ncache: c\nloss: {ce_weight: 0}")
    value = {"label_smoothing": "0.1", "class_weights": "balanced"}[key]
    with pytest.raises(RecipeError, match=f"'loss'.*ce_weight above 0 for {key}"):
        load_train_recipe(str(tmp_path / "mine.yaml"), [f"loss.{key}={value}"])
