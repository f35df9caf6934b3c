"""Recipes: which of YAML, options and --set wins; errors that name the key and suggest the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cache_tools.config import Extensible, dump_yaml, load_recipe, set_dotted
from cache_tools.errors import CacheError, RecipeError
from pipeline.recipe import BuildRecipe, builtin_recipes, load_build_recipe


def failure(*overrides: str, source: str = "digits") -> str:
    with pytest.raises(RecipeError) as caught:
        load_build_recipe(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "cifar100"])
def test_built_in_recipes_load_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_build_recipe(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(recipe))
    assert load_build_recipe(str(copy)) == recipe


def test_overrides_win_over_options_and_options_over_the_file() -> None:
    recipe = load_build_recipe("digits", ["num_views=3", "views.base_seed=9"], {"num_views": 5, "store": "components"})
    assert (recipe.num_views, recipe.views.base_seed, recipe.store) == (3, 9, "components")


def test_list_items_are_set_by_number() -> None:
    recipe = load_build_recipe("fashion-mnist", ["views.ops.0.padding=3"])
    assert recipe.views.ops[0].model_dump()["padding"] == 3


TWO = ["teacher=[{name: a}, {name: b}]", "clip=[{name: c}, {name: d}]"]


def test_entries_of_a_list_of_teachers_are_set_by_number() -> None:
    recipe = load_build_recipe("digits", [*TWO, "teacher.0.name=x", "clip.1.templates=siglip"])
    assert [teacher.name for teacher in recipe.teachers] == ["x", "b"]
    assert [clip.templates for clip in recipe.clips] == ["richkd", "siglip"]


def test_a_single_teacher_is_dumped_as_one_and_not_as_a_list() -> None:
    recipe = load_build_recipe("digits", ["teacher.name=x", "clip=[{name: c, weight: 1.0}]"])
    assert recipe.teacher == recipe.teachers[0]
    shown = yaml.safe_load(dump_yaml(recipe))
    assert shown["teacher"]["name"] == "x"
    assert shown["clip"][0]["weight"] == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("teacher.name=x", r"whole list (teacher.name); expected the number of an entry, 0 to 1, where 'name' is"),
        ("teacher.name=x", "Name the entry, as in --set teacher.0.name=…"),
        ("clip.2.name=x", "0 to 1"),
        ("clip.1.nme=x", "unknown recipe key 'clip.1.nme' (--set clip.1.nme=x). Did you mean 'name'?"),
        ("teacher.1.weight=2", "'teacher.1.weight'"),
        ("teacher=7", "bad value for 'teacher'"),
        ("teacher=[]", "(--set teacher=[]); expected Tuple should have at least 1 item"),
        ("fusion.prompt_ensemble=mean", "'embedding', 'logits' or 'probabilities'"),
    ],
)
def test_mistakes_in_lists_of_networks_name_the_entry(override: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_build_recipe("digits", [*TWO, override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("num_view=3", "num_view", "num_views"),
        ("fusion.teacher_wieght=0.5", "fusion.teacher_wieght", "teacher_weight"),
        ("views.base_sed=1", "views.base_sed", "base_seed"),
        ("views.ops.0.pading=1", "pading", "padding"),
        ("teacher.weigths=x", "teacher.weigths", "weights"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_suggested(override: str, key: str, near: str) -> None:
    message = failure(override)
    assert f"{key}'" in message
    assert f"Did you mean '{near}'?" in message


def test_a_key_without_a_near_one_lists_the_known_keys() -> None:
    assert "Known keys: batch_size, block_rows" in failure("zzz=1")


@pytest.mark.parametrize("scale", ["-1", "0", "-.inf"])
def test_a_clip_scale_must_be_above_0(scale: str) -> None:
    failure(f"fusion.clip_scale={scale}")
    assert load_build_recipe("digits", ["fusion.clip_scale=1e-3"]).fusion.clip_scale == 1e-3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("fusion.clip_scale=-1", "(--set fusion.clip_scale=-1); expected model, match or a number above 0; found -1"),
        ("num_views=0", "; expected greater than 0; found 0."),
        ("store=both", "; expected 'fused' or 'components'; found 'both'."),
        ("num_views=many", "integer"),
        ("fusion.teacher_weight=1.5", "less than or equal to 1"),
        ("store=both", "fused"),
        ("dataset.image_size=64", "image_size is for folders only"),
        ("name=../x", "pattern"),
    ],
)
def test_bad_values_say_what_is_expected(override: str, words: str) -> None:
    message = failure(override)
    assert words in message
    assert "Value error" not in message


def test_long_input_is_abridged() -> None:
    assert len(failure(f"num_views={'x' * 5000}")) < 400


@pytest.mark.parametrize("item", ["num_views", "=3", "views.ops=[", "store.x=1"])
def test_malformed_set_items_are_refused(item: str) -> None:
    failure(item)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    assert "Did you mean 'digits'?" in failure(source="digit")


# Valid grammar, invalid values: a date, a number without digits or with too many, wrong tags, too large, too deep.
INVALID_VALUES = [
    "2020-13-45",
    "0b_",
    "9" * 5000,
    "0x" + "f" * 5000,
    "!!bool 7",
    "!!timestamp 7",
    "!!int ''",
    ":".join(["1"] * 200) + ".0",
    "[" * 1500,
]


@pytest.mark.parametrize("text", INVALID_VALUES)
def test_yaml_without_a_valid_value_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    assert "cannot read the value of --set" in failure(f"name={text}")
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: {text}\n")
    assert f"recipe is not valid YAML ({path})" in failure(source=str(path))


@pytest.mark.parametrize("text", ["[1, 2]", "name: [", "just words"])
def test_a_file_that_is_not_a_recipe_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    failure(source=str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "none.yaml" in failure(source=str(tmp_path / "none.yaml"))


def test_recipes_are_frozen() -> None:
    recipe = load_build_recipe("digits")
    with pytest.raises(ValueError, match="frozen"):
        recipe.num_views = 3


def test_an_empty_file_is_refused_for_missing_keys(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(RecipeError, match="'name'"):
        load_recipe(BuildRecipe, str(path), builtin_recipes())


def test_set_dotted_creates_missing_parents() -> None:
    data: dict = {"a": None}
    set_dotted(data, "a.b.c", 1)
    assert data == {"a": {"b": {"c": 1}}}


def test_messages_have_all_parts() -> None:
    error = CacheError("no such thing", where="x", expected="y", found="z", next_step="look there")
    assert str(error) == "no such thing (x); expected y; found z. Look there."
    assert yaml.safe_load(dump_yaml(load_build_recipe("digits")))["clip"]["templates"] == "richkd"


class _Grown(Extensible):
    added = frozenset({"margin"})
    width: int = 4
    margin: float = 0.0


def test_a_field_added_later_is_left_out_of_json_while_it_has_its_default() -> None:
    assert _Grown().model_dump(mode="json") == {"width": 4}
    assert _Grown(margin=0.5).model_dump(mode="json") == {"width": 4, "margin": 0.5}
    assert _Grown.model_validate(_Grown(margin=0.5).model_dump()) == _Grown(margin=0.5)
    assert dump_yaml(_Grown()) == "width: 4\nmargin: 0.0\n"
