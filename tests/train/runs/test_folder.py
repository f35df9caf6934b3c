"""The names of run folders."""

from __future__ import annotations

from typing import Any

from train.recipe import TrainRecipe, recipe_digest
from train.runs.folder import run_folder


def test_every_recipe_has_a_folder_with_a_telling_name() -> None:
    recipe = make(student="timm:mobilenetv3_small_050.lamb_in1k")
    folder = run_folder(recipe, recipe_digest({"recipe": recipe.values()}))
    assert folder.parent.name == "runs"
    assert folder.name.startswith("mine-timm_mobilenetv3_small_050.lamb_in1k-kd-")
    assert folder != run_folder(recipe, recipe_digest({"recipe": make(seed=1).values()}))
    assert str(run_folder(make(out="here"), "0" * 64)) == "here"


def make(**changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate({"name": "mine", "cache": "c", "epochs": 10} | changes)
