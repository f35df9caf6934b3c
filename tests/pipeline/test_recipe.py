"""Build recipes with one group of networks: what may be left out, and which settings then make no sense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError
from pipeline.cli import app
from pipeline.recipe import BuildRecipe, load_build_recipe

TEACHER = {"name": "package:digits-teacher.safetensors"}
CLIP = {"name": "local-dir:package:digits-clip"}


def write(folder: Path, **keys: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "dataset": {"name": "digits"}} | keys))
    return str(path)


def groups(recipe: BuildRecipe) -> tuple[int, int, float, float]:
    return len(recipe.teachers), len(recipe.clips), recipe.fusion.teacher_weight, recipe.fusion.feature_weight


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"teacher": TEACHER}, (1, 0, 1.0, 1.0)),
        ({"teacher": TEACHER, "clip": None}, (1, 0, 1.0, 1.0)),
        ({"teacher": TEACHER, "clip": "none"}, (1, 0, 1.0, 1.0)),
        ({"teacher": [TEACHER, TEACHER], "fusion": {"teacher_weight": 1.0}}, (2, 0, 1.0, 1.0)),
        ({"clip": CLIP}, (0, 1, 0.0, 0.0)),
        (
            {"clip": [CLIP, CLIP], "teacher": None, "fusion": {"clip_scale": 30.0, "feature_weight": 0}},
            (0, 2, 0.0, 0.0),
        ),
        ({"teacher": TEACHER, "clip": CLIP}, (1, 1, 0.7, 0.7)),
    ],
    ids=str,
)
def test_a_group_may_be_missing(tmp_path: Path, keys: dict[str, Any], expected: tuple[Any, ...]) -> None:
    recipe = load_build_recipe(write(tmp_path, **keys))
    assert groups(recipe) == expected
    stored = BuildRecipe.model_validate(json.loads(recipe.model_dump_json()))  # as the manifest has it
    assert stored == recipe
    (tmp_path / "shown.yaml").write_text(dump_yaml(recipe))
    assert load_build_recipe(str(tmp_path / "shown.yaml")) == recipe


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "a recipe needs a teacher, a CLIP or both (mine). Add `teacher: {name: …}`, or give --teacher."),
        ({"teacher": None, "clip": None}, "a recipe needs a teacher, a CLIP or both"),
        ({"clip": {"templates": "openai"}}, "missing recipe key 'clip.name'"),
        (
            {"teacher": TEACHER, "fusion": {"teacher_weight": 0.5}},
            "no CLIP, so the teacher has all the weight (fusion.teacher_weight); expected 1; found 0.5",
        ),
        ({"teacher": TEACHER, "fusion": {"feature_weight": 0.7}}, "(fusion.feature_weight); expected 1; found 0.7"),
        (
            {"teacher": TEACHER, "fusion": {"clip_scale": 1.0}},
            "no CLIP, so this setting has no effect (fusion.clip_scale)",
        ),
        ({"teacher": TEACHER, "fusion": {"prompt_ensemble": "logits"}}, "(fusion.prompt_ensemble); found logits"),
        (
            {"clip": CLIP, "fusion": {"teacher_weight": 1.0}},
            "no teacher, so the CLIP has all the weight (fusion.teacher_weight); expected 0; found 1.0",
        ),
        ({"clip": CLIP, "fusion": {"clip_scale": "match"}}, "no teacher whose spread the scale could match"),
    ],
    ids=str,
)
def test_settings_of_a_missing_group_are_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_build_recipe(write(tmp_path, **keys))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def shown(*arguments: str) -> BuildRecipe:
    done = CliRunner().invoke(app, [*arguments, "--show-recipe"])
    assert done.exit_code == 0, done.stderr
    return BuildRecipe.model_validate(yaml.safe_load(done.stdout))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits", "--clip", "none"], (1, 0, 1.0, 1.0)),
        (["digits", "--teacher", "none"], (0, 1, 0.0, 0.0)),
        (["digits", "--teacher", "resnet8"], (1, 1, 0.7, 0.7)),
        (["digits", "--set", "clip=null"], (1, 0, 1.0, 1.0)),
        (["cifar100-vgg13", "--clip", "None"], (1, 0, 1.0, 1.0)),  # its own weights of 0.7 go with its CLIP
        (["cifar100-vgg13", "--teacher", "none", "--prompts", "openai"], (0, 1, 0.0, 0.0)),
        (["digits", "--clip", "none", "--teacher", "resnet8", "--teacher-weight", "1"], (1, 0, 1.0, 1.0)),
    ],
    ids=str,
)
def test_none_leaves_a_network_of_the_recipe_out(arguments: list[str], expected: tuple[Any, ...]) -> None:
    recipe = shown(*arguments)
    assert groups(recipe) == expected
    if "--prompts" in arguments:
        assert recipe.clips[0].templates == "openai"


def test_clip_fills_a_recipe_that_has_none(tmp_path: Path) -> None:
    recipe = shown(write(tmp_path, teacher=TEACHER), "--clip", "ViT-B-32", "--clip-checkpoint", "openai")
    assert groups(recipe) == (1, 1, 0.7, 0.7)
    assert (recipe.clips[0].name, recipe.clips[0].weights) == ("ViT-B-32", "openai")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clip", "none", "--teacher", "none"], "a recipe needs a teacher, a CLIP or both"),
        (["--clip", "none", "--teacher-weight", "0.5"], "expected 1; found 0.5. Leave it out"),
        (["--clip", "none", "--prompts", "openai"], "--prompts is about a network that is left out (--clip none)"),
        (["--clip", "none", "--clip-checkpoint", "a.pth"], "--clip-checkpoint is about a network that is left out"),
        (["--teacher", "none", "--teacher-checkpoint", "a.pth"], "(--teacher none); found a.pth"),
        (["--clip", "none", "--set", "fusion.clip_scale=match"], "no CLIP, so this setting has no effect"),
        (
            ["--set", "clip=null", "--set", "fusion.prompt_ensemble=logits"],
            "(--set fusion.prompt_ensemble=logits); found logits",
        ),
    ],
    ids=str,
)
def test_options_of_a_network_that_is_left_out_are_refused(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["digits", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr
