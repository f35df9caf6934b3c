"""Training recipes from what a user gives: a recipe or a folder, options and `--set`. Importable without torch."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from cache_tools.config import builtin_names, find_typed, given_settings, set_dotted, typed_settings, validate
from cache_tools.errors import CacheError
from cache_tools.images.own_folder import is_folder_argument, refuse_second_folder
from cache_tools.images.recipe import DatasetRecipe, check_location
from cache_tools.refusion import check_clip_scale
from cache_tools.views.recipe import ViewRecipe
from train.recipe.loss import needs_targets
from train.recipe.settings import TrainRecipe, all_fields, as_changes, default_fields, has_name
from train.recipe.sources import TrainSource, read_train_source
from train.recipe.unused import dotted_keys, refuse_unused

DEFAULT_RECIPE = "digits"
# Short names in `--grid` and `--set`, the same as the options of `train-student`.
SETTING_ALIASES = {
    "lr": "optimiser.learning_rate",
    "temperature": "loss.temperature",
    "weight_decay": "optimiser.weight_decay",
    "label_smoothing": "loss.label_smoothing",
    "class_weights": "loss.class_weights",
    "clip_grad_norm": "optimiser.clip_grad_norm",
    "accumulate": "optimiser.accumulate",
    "student.weights": "student_weights",
    "student.weights_key": "student_weights_key",
}
# The names of options that are not the last part of their key.
OPTION_NAMES = {
    "num_views": "--views",
    "optimiser.learning_rate": "--lr",
    "loggers": "--log",
    "pixels.disk": "--pixel-disk",
    "views.base_seed": "--seed",
    "teacher.weights": "--teacher-checkpoint",
    "clip.name": "--clip",
    "clip.weights": "--clip-checkpoint",
    "clip.templates": "--prompts",
}


def builtin_recipes() -> Traversable:
    """The folder of built-in training recipes."""
    return files("train") / "recipes"


def load_train_recipe(
    source: str | None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    for_sweep: bool = False,
    written: Mapping[str, str] | None = None,
) -> TrainRecipe:
    """Load a recipe, with options applied on top; see `cache_tools.config.load_recipe`.

    The dataset and views of a built-in recipe are for runs on labels alone: with a cache only those that `options` and
    `overrides` set count.

    Args:
        source: a built-in name, a YAML file of `train-student` or `build-cache`, a folder of images, or None for an
            empty recipe.
        for_sweep: whether other settings are still to come, so that a setting without effect may have one later.
        written: dotted key → where it is set, for the `overrides` that the user has not typed.

    Raises:
        RecipeError: as `load_recipe`; a setting that has no effect.
    """
    overrides = list(overrides)
    settings = given_settings(map(full_key, overrides), options)
    typed = {**typed_settings((), options, OPTION_NAMES), **_typed_overrides(overrides), **(written or {})}
    if source is not None and is_folder_argument(source, builtin_names(builtin_recipes())):
        refuse_second_folder(source, (key for key, _ in settings))
    data, own, of_a_run = TrainSource({}) if source is None else read_train_source(source, builtin_recipes(), settings)
    if of_a_run and needs_targets(data.get("loss")) and has_name(data.get("dataset")):
        data = {**data, "dataset": None, "views": None}  # earlier versions stored what the cache replaced
    for key, value in settings:
        set_dotted(data, key, copy.deepcopy(value))
    given = own | {key for key, _ in settings}
    if needs_targets(data.get("loss")) or ("cache" in given and data.get("cache") is not None):
        for part, model in (("dataset", DatasetRecipe), ("views", ViewRecipe)):
            values = data.get(part)
            if isinstance(values, dict):
                kept = values.keys() if part in given else _keys_below(part, given)
                data[part] = as_changes(model, {key: values[key] for key in kept if key in values}, part)
    elif data.get("dataset") is not None:
        data["cache"] = None  # named for other losses
    recipe = validate(TrainRecipe, data, where=source or "options", typed=typed)
    if (scale := recipe.fusion.clip_scale) is not None and "fusion.clip_scale" in typed:
        check_clip_scale(scale, where=typed["fusion.clip_scale"])
    if not for_sweep:
        given_keys = {key: find_typed(typed, key) or key for key in dotted_keys(settings)}
        refuse_unused(all_fields(recipe), default_fields(), given_keys)
    if isinstance(recipe.dataset, DatasetRecipe):
        recipe.own_dataset()  # refuses a data_dir of a source that has none
        check_location(recipe.dataset.name, recipe.dataset.data_dir, recipe.dataset.download)
    return recipe


def _typed_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """`typed_settings` of `--set` items, which may have short names."""
    return {full_key(key): text for key, text in typed_settings(overrides).items()}


def _keys_below(part: str, given: Iterable[str]) -> set[str]:
    """The keys of a part of a recipe that dotted keys set: `split` of `dataset.split`."""
    return {key.split(".")[1] for key in given if key.startswith(f"{part}.")}


def full_key(item: str) -> str:
    """A `--set` item with the full key in place of a short name such as `lr`."""
    key, separator, value = item.partition("=")
    return f"{SETTING_ALIASES.get(key.strip(), key)}{separator}{value}"


def named_after_cache(recipe: TrainRecipe) -> TrainRecipe:
    """The default recipe with the name of its cache, for a run where only a cache is given.

    Nothing changes if the recipe has another name or a cache that cannot be opened: the run itself reports that.
    """
    from cache_tools.home import registry
    from cache_tools.places import is_remote
    from cache_tools.store.group import read_manifest

    if recipe.cache is None or recipe.name != DEFAULT_RECIPE:
        return recipe
    try:
        if is_remote(recipe.cache):
            from cache_tools.reader import TeacherCache

            manifest = TeacherCache.open(recipe.cache).manifest
        else:
            manifest = read_manifest(registry.resolve(recipe.cache))
    except CacheError:
        return recipe
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", manifest.data_name).lstrip("._-")
    return recipe.model_copy(update={"name": name or DEFAULT_RECIPE})
