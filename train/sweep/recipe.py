"""The recipe of a sweep, and the trials that it describes. Imports no torch."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, model_validator

from cache_tools.config import Frozen, set_dotted, validate
from cache_tools.config.fields import MAX_TRIALS, Count, Name, Seed
from cache_tools.errors import RecipeError
from train.recipe import TrainRecipe, all_fields, default_fields
from train.recipe.loading import SETTING_ALIASES
from train.recipe.loss import CE_SETTINGS, LABELS_ALONE, named_loss
from train.recipe.unused import unused_settings, value_at
from train.sweep.search_recipe import Axis, Search, larger_is_better
from train.weights.run_files import TRIALS

TrialCount = Annotated[Count, Field(le=MAX_TRIALS)]


class Asha(Frozen):
    """Asynchronous successive halving (Li et al. 2020): a trial that is not among the best at a rung stops there.

    Rungs are after `first_epochs`, `first_epochs · keep_one_in`, … epochs. A trial is compared with all trials that
    have reached the rung so far; trials of one batch stream reach it together. Use it to choose settings, not to report
    figures: a stopped trial has no final figures, so there are no means over seeds.

    Attributes:
        metric: a column of a run's metrics, such as `test_top1` or `test_nll`.
        keep_one_in: one of this many trials continues [η].
        first_epochs: the first rung [r]. The default in a sweep is one epoch after the base's warm-up, because figures
            during the warm-up say little.
    """

    metric: str = "test_top1"
    keep_one_in: Annotated[Count, Field(ge=2)] = 3
    first_epochs: Count = 1

    @property
    def larger_is_better(self) -> bool:
        return larger_is_better(self.metric)

    def rungs(self, epochs: int) -> list[int]:
        """Numbers of epochs after which trials are compared; the last epoch is not one of them."""
        rungs = [self.first_epochs]
        while rungs[-1] * self.keep_one_in < epochs:
            rungs.append(rungs[-1] * self.keep_one_in)
        return [rung for rung in rungs if rung < epochs]


class SweepRecipe(Frozen):
    """Many runs of `train-student`: the product of students, losses, grid and seeds, or a list of trials.

    Attributes:
        base: the train recipe that all trials share, as plain data.
        students: names as for `train-student --student`; by default the base's student.
        losses: names as for `train-student --loss`; by default the base's loss.
        grid: dotted recipe keys (or `lr`, `temperature`, `weight_decay`) and their values.
        seeds: the number of seeds, starting at the base's seed, or a list of seeds.
        trials: settings of each trial, instead of the product; keys as in `grid`, and `student`, `loss`, `seed`.
        asha: stop the worse trials early; None trains all of them to the end.
        search: try suggested settings instead of the whole product; students, losses and grid become choices.
        given: dotted keys that a user has set for all trials; each must have an effect on one of them.
        loss_settings: keys and values of `loss` that also apply to a loss by name. A trial's own settings win.
    """

    name: Name
    base: dict[str, Any]
    students: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    seeds: TrialCount | Annotated[tuple[Seed, ...], Field(max_length=MAX_TRIALS)] = 1
    trials: tuple[dict[str, Any], ...] = ()
    asha: Asha | None = None
    search: Search | None = None
    loss_settings: dict[str, Any] = Field(default_factory=dict)
    given: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _first_rung_is_after_the_warm_up(cls, data: Any) -> Any:
        asha = data.get("asha") if isinstance(data, dict) else None
        if isinstance(asha, dict) and "first_epochs" not in asha:
            schedule = data.get("base", {}).get("schedule") or {}
            return {**data, "asha": {**asha, "first_epochs": 1 + schedule.get("warmup_epochs", 0)}}
        return data

    @model_validator(mode="after")
    def _is_a_product_or_a_list(self) -> SweepRecipe:
        if self.trials and (self.students or self.losses or self.grid):
            raise RecipeError(
                "a sweep is a product or a list of trials, not both",
                where=self.name,
                expected="students, losses, grid; or trials",
            )
        if self.seeds == ():
            raise RecipeError("a sweep without seeds", where="seeds")
        empty = [key for key, values in self.grid.items() if not values]
        if empty:
            raise RecipeError("a grid key without values", where=f"grid.{empty[0]}")
        return self

    @model_validator(mode="after")
    def _has_not_too_many_trials(self) -> SweepRecipe:
        seeds = self.seeds if isinstance(self.seeds, int) else len(self.seeds)
        lists = [values for values in self._axes().values() if isinstance(values, tuple)]
        count = (len(self.trials) or math.prod(map(len, lists))) * seeds
        if self.search is None and count > MAX_TRIALS:
            raise RecipeError(
                "the sweep is too large", where=self.name, expected=f"at most {MAX_TRIALS:,} trials", found=f"{count:,}"
            )
        return self

    @model_validator(mode="after")
    def _has_each_setting_once(self) -> SweepRecipe:
        named = [key for key, names in (("student", self.students), ("loss", self.losses)) if names]
        refuse_doubles([*named, *self.grid], "grid.")
        for number, trial in enumerate(self.trials):
            refuse_doubles(trial, f"trials.{number}.")
        if self.search is not None:
            refuse_doubles(self.search.space, "search.space.")
        elif "seed" in self.grid:
            raise RecipeError(
                "seeds are not for the grid",
                where="grid.seed",
                expected="--seeds N, from the recipe's seed on (--set seed=…), or seeds: [1, 2] in a sweep file",
                found=list(self.grid["seed"]),
            )
        return self

    @model_validator(mode="after")
    def _named_losses_keep_their_kind(self) -> SweepRecipe:
        named = "loss" in self.space() or any("loss" in trial for trial in self.trials)
        if named and "kind" in self.loss_settings:
            raise RecipeError(
                "losses by name, and a kind for all trials",
                where="loss.kind",
                expected="losses by name, or --set loss.kind=…",
                found=self.loss_settings["kind"],
            )
        return self

    @model_validator(mode="after")
    def _search_has_one_seed_and_a_space(self) -> SweepRecipe:
        if self.search is None:
            return self
        if self.trials:
            raise RecipeError("a search makes its own trials", where=self.name, expected="search or trials")
        if len(self.seed_numbers) > 1 or "seed" in self.space():
            raise RecipeError(
                "a search trains every trial with one seed",
                where=self.name,
                next_step="search without --seeds, then run the command that it prints to compare seeds",
            )
        if twice := [key for key in self._axes() if key in self._searched()]:
            raise RecipeError("searched twice", where=f"search.space.{twice[0]}", expected="one range or list")
        if empty := [key for key, axis in self.space().items() if axis == ()]:
            raise RecipeError("a searched key without values", where=f"search.space.{empty[0]}")
        if not any(not isinstance(axis, tuple) or len(axis) > 1 for axis in self.space().values()):
            raise RecipeError("nothing to search", where=self.name, next_step="give ranges, as in --grid lr=0.01..0.5")
        return self

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        first = int(self.base.get("seed", 0))
        return tuple(range(first, first + self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def space(self) -> dict[str, Axis]:
        """The space of a search, by dotted key."""
        return {**self._axes(), **self._searched()}

    def settings(self) -> Iterator[dict[str, Any]]:
        """The settings of each trial, by dotted key, in the order of the trials' numbers."""
        seeds = self.seed_numbers
        if self.trials:
            for trial in self.trials:
                chosen = {SETTING_ALIASES.get(key, key): value for key, value in trial.items()}
                yield from ([chosen] if "seed" in chosen else ({**chosen, "seed": seed} for seed in seeds))
            return
        axes = self._axes()
        for values in itertools.product(*axes.values()):
            for seed in seeds:
                yield {**dict(zip(axes, values, strict=True)), "seed": seed}

    def _axes(self) -> dict[str, tuple[Any, ...]]:
        axes: dict[str, tuple[Any, ...]] = {}
        if self.students:
            axes["student"] = self.students
        if self.losses:
            axes["loss"] = self.losses
        return axes | {SETTING_ALIASES.get(key, key): values for key, values in self.grid.items()}

    def _searched(self) -> dict[str, Axis]:
        return (
            {}
            if self.search is None
            else {SETTING_ALIASES.get(key, key): axis for key, axis in self.search.space.items()}
        )


def refuse_doubles(keys: Iterable[str], prefix: str) -> None:
    """Raise a RecipeError if two keys name the same setting; `prefix` goes before the key in the message."""
    seen: set[str] = set()
    for key in keys:
        if (full := SETTING_ALIASES.get(key, key)) in seen:
            raise RecipeError("a setting is given twice", where=f"{prefix}{key}", expected=f"{full} once")
        seen.add(full)


class Trial(Frozen):
    """One run of a sweep.

    Attributes:
        number: from 0.
        settings: its own settings, by dotted key; a loss by its name.
        recipe: of its run. `train-student` with this recipe gives the same numbers.
    """

    number: NonNegativeInt
    settings: dict[str, Any]
    recipe: TrainRecipe

    @property
    def name(self) -> str:
        """A short name, also a file name. It has no number, so a larger sweep finds the trials that are finished."""
        words = [
            str(value) if key in {"student", "loss"} else _short(key, value) for key, value in self.settings.items()
        ]
        return re.sub(r"[^A-Za-z0-9._+=-]+", "_", "-".join(words))

    @property
    def folder(self) -> Path:
        """The run folder."""
        assert self.recipe.out is not None, "make_trials gives every trial its folder"
        return self.recipe.out

    @property
    def loss(self) -> str:
        return str(self.settings.get("loss", self.recipe.loss_name))


def make_trials(sweep: SweepRecipe, folder: Path) -> list[Trial]:
    """The trials of a sweep, each with a run folder below `folder`.

    A trial on labels alone (`ce`) has the images and views of the base's cache, as with `--compare-with-labels`.

    Raises:
        RecipeError: a bad key or value, or two equal trials.
        NotFoundError, FormatError: no such cache.
    """
    trials: list[Trial] = []
    seen: dict[str, str] = {}
    for settings in sweep.settings():
        trial = make_trial(sweep, settings, folder, len(trials))
        values = str(_effective(trial.recipe))
        if values in seen:
            if settings.get("loss") in LABELS_ALONE or _has_unused(trial):  # the grid varies a setting of other losses
                continue
            raise RecipeError("two trials of the sweep are the same", where=f"{seen[values]} and {trial.name}")
        if trial.name in seen.values():
            raise RecipeError("two trials of the sweep have the same name", where=trial.name)
        seen[values] = trial.name
        trials.append(trial)
    _refuse_unused(sweep, trials)
    return trials


def _effective(recipe: TrainRecipe) -> dict[str, Any]:
    """The values that determine the result of a run, without settings that have no effect."""
    values = recipe.values()
    for key in unused_settings(all_fields(recipe)):
        part, _, name = key.rpartition(".")
        node = values.get(part) if part else values
        if isinstance(node, dict):
            node.pop(name, None)
    return values


def _has_unused(trial: Trial) -> bool:
    """Whether a setting of a trial has no effect."""
    return bool(trial.settings.keys() & unused_settings(all_fields(trial.recipe)).keys())


def _refuse_unused(sweep: SweepRecipe, trials: Iterable[Trial]) -> None:
    """Raise RecipeError for a setting of the sweep that has no effect on any of its trials."""
    set_to = {key: [value_at(sweep.base, key)] for key in sweep.given}
    for trial in trials:
        for key, value in trial.settings.items():
            set_to.setdefault(key, []).append(value)
    unused, defaults = [unused_settings(all_fields(trial.recipe)) for trial in trials], default_fields()
    for key, values in set_to.items():
        others = [value for value in values if value not in (None, value_at(defaults, key))]
        if others and unused and all(key in one for one in unused):
            raise RecipeError(
                "this setting has no effect on any trial of the sweep",
                where=f"{key}={others[0]}",
                expected=unused[0][key],
                next_step=f"leave {key} out, or change what it needs",
            )


def make_trial(sweep: SweepRecipe, settings: Mapping[str, Any], folder: Path, number: int = 0) -> Trial:
    """One trial of a sweep; raises as `make_trials`."""
    recipe = _recipe(sweep, settings)
    student = {"student": recipe.student} if "student" in settings else {}  # as the recipe spells it
    trial = Trial(number=number, settings={**settings, **student}, recipe=recipe)
    out = folder / TRIALS / trial.name
    return trial.model_copy(update={"recipe": recipe.model_copy(update={"out": out})})


def _recipe(sweep: SweepRecipe, settings: Mapping[str, Any]) -> TrainRecipe:
    data: dict[str, Any] = {**copy.deepcopy(sweep.base), "name": sweep.name, "compare_with_labels": False}
    on_labels = settings.get("loss") in LABELS_ALONE and data.get("cache") is not None
    if on_labels:  # the loss that the other trials' names replace stays, but for its CE term
        others = {key: value for key, value in data.get("loss", {}).items() if key not in CE_SETTINGS}
        data["loss"] = others | {key: value for key, value in sweep.loss_settings.items() if key in CE_SETTINGS}
        data["loss"]["kind"] = "bce" if settings["loss"] == "bce-labels" else "kd"
    elif "loss" in settings:
        data["loss"] = named_loss(str(settings["loss"])) | sweep.loss_settings
    for key, value in settings.items():
        if key != "loss":
            set_dotted(data, key, list(value) if isinstance(value, tuple) else value)
    where = f"sweep {sweep.name}"
    typed = {key: f"{where}, {_short(key, value)}" for key, value in settings.items()}
    recipe = validate(TrainRecipe, data, where=where, typed=typed)
    if not on_labels and (recipe.loss.needs_targets or not recipe.takes_images_of_cache):
        return recipe
    from cache_tools.reader import TeacherCache

    assert recipe.cache is not None, "the base has a cache"
    manifest = TeacherCache.open(recipe.cache).manifest
    if not on_labels:
        return recipe.with_images_of(manifest)
    return recipe.on_labels(
        recipe.cached_dataset(manifest), manifest.recipe.views, recipe.num_views or manifest.num_views
    )


def _short(key: str, value: Any) -> str:
    last = {full: short for short, full in SETTING_ALIASES.items()}.get(key, key.rpartition(".")[2])
    return f"s{value}" if key == "seed" else f"{last}={value}"
