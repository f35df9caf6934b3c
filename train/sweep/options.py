"""Read a sweep from the options of `sweep-students` and its sweep file. Options win over the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, Field

from cache_tools.config import Frozen, given_settings, parse_yaml, typed_settings, validate
from cache_tools.config.text import MAX_RECIPE_BYTES, read_text
from cache_tools.errors import NotFoundError, RecipeError
from train.recipe import TrainRecipe
from train.recipe.loading import DEFAULT_RECIPE, full_key, load_train_recipe, named_after_cache
from train.recipe.unused import dotted_keys
from train.sweep.recipe import SweepRecipe, refuse_doubles
from train.sweep.search_recipe import Search, parse_range
from train.weights.run_files import SWEEP, read_file
from train.weights.text import first_line


class _FileKeys(Frozen):
    """Keys of a sweep file that are needed before there is a `SweepRecipe`, which validates the others."""

    model_config = ConfigDict(extra="ignore")

    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    search: Search | None = None


def read_sweep(
    file: Path | None,
    recipe: str | None,
    options: Mapping[str, Any],
    overrides: Sequence[str],
    sweep_keys: Mapping[str, Any],
    grid: Sequence[str] = (),
    search: int | None = None,
    asha: bool = False,
) -> SweepRecipe:
    """Apply options to a sweep file, and both to a train recipe.

    Args:
        file: the sweep file, if any.
        recipe: of `train-student`; None for the file's recipe, or `digits`.
        options: dotted recipe key → value, for all trials; None values are ignored.
        overrides: `--set` items, which win over everything else of the recipe.
        sweep_keys: key of `SweepRecipe` → value, from options; None values are ignored.
        grid: `--grid` items, lists and ranges.
        search: number of trials of a search; None for no search.
        asha: stop the worse trials early.

    Raises:
        NotFoundError, RecipeError: no such file or recipe, or a bad value in them or in the options.
    """
    stored = {} if file is None else load_sweep(file)
    keys = validate(_FileKeys, stored, where=str(file))
    settings = {key: value for key, value in keys.set.items() if options.get(key) is None}
    of_file = _items(settings)
    items = [full_key(item) for item in (*of_file, *overrides)]
    written = {key: f"{file}, set.{key}" for key in typed_settings(map(full_key, of_file))}
    written = {key: place for key, place in written.items() if key not in typed_settings(map(full_key, overrides))}
    base = load_train_recipe(
        recipe or keys.recipe or DEFAULT_RECIPE, [*of_file, *overrides], options, for_sweep=True, written=written
    )
    if recipe is None and keys.recipe is None:
        base = named_after_cache(base)
    data = {"name": base.name, **{key: value for key, value in stored.items() if key not in {"recipe", "set"}}}
    data |= {"base": base.model_dump(mode="json"), "loss_settings": _loss_settings(base, items)}
    data |= {key: value for key, value in sweep_keys.items() if value is not None}
    if search is not None:
        data["search"] = {**(data.get("search") or {}), "trials": search}
    data |= _axes(grid, data.get("search"))
    data["given"] = sorted(set(dotted_keys(given_settings(items, options))))
    if asha and not data.get("asha"):
        data["asha"] = {}
    axes = {"grid": grid or None, "search.space": grid or None, "search.trials": search}
    names = {"search.space": "--grid", "search.trials": "--search"}
    typed = typed_settings((), {**sweep_keys, **axes}, names)
    return validate(SweepRecipe, data, where=str(file or "options"), typed=typed)


def default_folder(sweep: SweepRecipe) -> Path:
    """`runs/sweep-NAME`.

    Earlier versions named a sweep after the default recipe where only a cache was given. Such a sweep continues there.
    """
    folder, earlier = (Path("runs") / f"sweep-{name}" for name in (sweep.name, DEFAULT_RECIPE))
    if not folder.exists() and (data := read_file(earlier / SWEEP)) is not None:
        try:
            stored = parse_yaml(data.decode("utf-8"), "damaged sweep", where=earlier / SWEEP)
            if stored["base"]["cache"] == sweep.base["cache"]:
                return earlier
        except (UnicodeDecodeError, TypeError, LookupError) as error:
            raise RecipeError("damaged sweep", where=earlier / SWEEP, found=first_line(error)) from error
    return folder


def load_sweep(file: Path) -> dict[str, Any]:
    """Load a sweep file (YAML) as plain data.

    Raises:
        NotFoundError, RecipeError: no such file, or it is no YAML mapping.
    """
    if not os.path.exists(file):
        raise NotFoundError("no such sweep file", where=file)
    what = "a sweep file that cannot be read"
    text = read_text(file, what, limit=MAX_RECIPE_BYTES, expected="a YAML file in UTF-8")
    data = parse_yaml(text, what, where=file)
    if not isinstance(data, dict):
        raise RecipeError("not a sweep file", where=file, expected="a YAML mapping")
    if stored := data.keys() & {"base", "loss_settings", "given"}:  # keys of the `sweep.yaml` in a sweep's folder
        raise RecipeError(
            f"'{min(stored)}' is not for a sweep file",
            where=file,
            expected="recipe: NAME or FILE, and set: {KEY: VALUE}",
        )
    return data


def _items(settings: Mapping[str, Any]) -> list[str]:
    """The `set` of a sweep file as `--set` items."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for key, value in settings.items()
    ]


def _loss_settings(base: TrainRecipe, items: Iterable[str]) -> dict[str, Any]:
    """Settings of the loss from `--set`. A loss by name replaces the base's loss, but these still apply."""
    keys = {item.partition("=")[0].strip() for item in items}
    all_fields = base.loss.model_fields_set if "loss" in keys else set()
    names = all_fields | {key.removeprefix("loss.") for key in keys if key.startswith("loss.")}
    return {name: getattr(base.loss, name) for name in sorted(names)}


def _axes(grid: Sequence[str], search: Mapping[str, Any] | None) -> dict[str, Any]:
    """The sweep's `grid` and `search` from `--grid` items: lists go to the grid, ranges to the search."""
    lists: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    refuse_doubles((text.partition("=")[0].strip() for text in grid), "--grid ")
    for text in grid:
        key, _, values = text.partition("=")
        parsed = parse_range(values)
        if parsed is None:
            lists |= [_axis(text)]
        elif search is None:
            raise RecipeError("a range is for a search", where=f"--grid {text}", next_step="give --search N, or values")
        else:
            ranges[key.strip()] = parsed
    axes = {"grid": lists} if lists else {}
    if search is not None and ranges:
        axes["search"] = {**search, "space": {**search.get("space", {}), **ranges}}
    return axes


def _axis(text: str) -> tuple[str, list[Any]]:
    key, separator, values = text.partition("=")
    if not separator or not key.strip() or not values.strip():
        raise RecipeError("not KEY=VALUE,VALUE", where=f"--grid {text}", expected="such as lr=0.05,0.1")
    return key.strip(), parse_yaml(f"[{values}]", "values that cannot be read", where=f"--grid {text}")
