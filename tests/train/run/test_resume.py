"""States of training that are damaged, of another run, or made by somebody else are one error before the first step."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.errors import FormatError, StorageError, UnsafeFileError, WeightsError
from cache_tools.format.stored import MANIFEST_KEY
from tests.support import tiny_run
from tests.support.hostile import with_right_digests
from train import checkpoints
from train.recipe import TrainRecipe
from train.run import train_student
from train.runs.advice import next_steps
from train.runs.folder import STATE
from train.runs.result import summary

pytestmark = pytest.mark.medium

State = dict[str, Any]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRecipe, State]:
    """A recipe, and the state of its run after the first of two epochs."""
    root = tmp_path_factory.mktemp("begun")
    pictures = tiny_run.write_pictures(root / "pictures", train=24, test=9)
    cache = tiny_run.write_cache(root / "tiny.zarr", pictures)
    recipe = tiny_run.recipe(cache, root / "run", epochs=2, ema_decay=0.9, loggers=[])
    save = checkpoints.save_state

    def save_and_stop(path: Path, state: State) -> None:
        save(path, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe)
    state = checkpoints.load_state(root / "run" / STATE)
    assert state is not None
    return recipe, state


def set_in(*keys: Any, value: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        place = state
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value

    return change


def first_momentum(state: State) -> State:
    found: State = state["learner"]["optimiser"]["state"][0]
    return found


WEIGHT = ("learner", "student", "conv1.weight")
CHANGES: dict[str, Callable[[State], None]] = {
    "history of text": set_in("history", value="epochs"),
    "a row of text": set_in("history", 0, value="row"),
    "a figure of text": set_in("history", 0, "test_top1", value="high"),
    "a fraction of images": set_in("history", 0, "test_n", value=1.5),
    "no such column": lambda state: state["history"][0].pop("test_top1"),
    "epochs out of order": set_in("history", 0, "epoch", value=3),
    "negative time": set_in("history", 0, "train_s", value=-1.0),
    "more epochs than the run has": lambda state: state["history"].extend(state["history"] * 5),
    "a best epoch to come": set_in("best_epoch", value=1),
    "a best epoch of text": set_in("best_epoch", value="first"),
    "no learner": set_in("learner", value=None),
    "negative updates": set_in("learner", "updates", value=-1),
    "updates of NaN": set_in("learner", "updates", value=float("nan")),
    "another shape": set_in(*WEIGHT, value=lambda tensor: tensor[:1]),
    "another type": set_in(*WEIGHT, value=lambda tensor: tensor.double()),
    "sparse": set_in(*WEIGHT, value=lambda tensor: tensor.to_sparse()),
    "meta": set_in(*WEIGHT, value=lambda tensor: tensor.to("meta")),
    "a missing tensor": lambda state: state["learner"]["student"].pop("conv1.weight"),
    "another average": set_in("learner", "average", value={}),
    "an optimiser of text": set_in("learner", "optimiser", value="sgd"),
    "a learning rate of text": set_in("learner", "optimiser", "param_groups", 0, "lr", value="high"),
    "other parameters": set_in("learner", "optimiser", "param_groups", 0, "params", value=[0]),
    "momentum of another shape": lambda state: first_momentum(state).update(momentum_buffer=torch.zeros(3)),
    "momentum of another name": lambda state: first_momentum(state).update(velocity=None),
    "gradients of other weights": set_in("learner", "gradients", value=[None]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_state_is_one_error(begun: tuple[TrainRecipe, State], name: str) -> None:
    recipe, sound = begun
    assert recipe.out is not None
    changed = copy.deepcopy(sound)
    CHANGES[name](changed)
    torch.save(changed, recipe.out / STATE)
    before = (recipe.out / STATE).read_bytes()
    with pytest.raises(WeightsError, match="damaged training state") as caught:
        train_student(recipe)
    assert "--overwrite" in str(caught.value)
    assert (recipe.out / STATE).read_bytes() == before  # nothing was trained


def test_a_state_is_not_read_through_a_link_or_from_a_pipe_or_beyond_its_size(begun: tuple[TrainRecipe, State]) -> None:
    recipe, sound = begun
    assert recipe.out is not None
    file = recipe.out / STATE
    torch.save(sound, file.with_name("elsewhere.pt"))
    file.unlink(missing_ok=True)
    file.symlink_to("elsewhere.pt")
    with pytest.raises(UnsafeFileError, match=r"state\.pt"):
        train_student(recipe)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UnsafeFileError, match=r"state\.pt"):
        train_student(recipe)
    file.unlink()
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(FormatError, match="larger"):
        train_student(recipe)
    file.unlink()


def test_the_sound_state_is_resumed_from(begun: tuple[TrainRecipe, State]) -> None:
    recipe, sound = begun
    assert recipe.out is not None
    (recipe.out / STATE).unlink(missing_ok=True)
    torch.save(sound, recipe.out / STATE)
    assert train_student(recipe).epochs == 2


def test_a_run_folder_that_is_removed_while_it_trains_is_one_error(
    begun: tuple[TrainRecipe, State], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, _ = begun
    run, save = tmp_path / "run", checkpoints.save_state

    def remove_and_save(path: Path, state: State) -> None:
        shutil.rmtree(run)
        save(path, state)

    monkeypatch.setattr(checkpoints, "save_state", remove_and_save)
    with pytest.raises(StorageError, match="removed while it was in use"):
        train_student(recipe.model_copy(update={"out": run}))
    assert not run.exists()


@pytest.mark.parametrize(
    ("figures", "problem"),
    [({"teacher_top1": "high"}, "teacher_top1"), ({"fusion_top1": 3.0}, "fusion_top1"), ({"n": None}, "n is")],
)
def test_a_preflight_that_cannot_be_shown_stops_a_run_before_its_first_step(
    begun: tuple[TrainRecipe, State], tmp_path: Path, figures: dict[str, Any], problem: str
) -> None:
    recipe, _ = begun
    run = tmp_path / "run"
    with pytest.raises(FormatError, match=problem):
        train_student(with_preflight(recipe, tmp_path, figures).model_copy(update={"out": run}))
    assert not (run / "metrics.parquet").exists()


def test_a_preflight_without_the_figure_of_the_teacher_is_shown(
    begun: tuple[TrainRecipe, State], tmp_path: Path
) -> None:
    recipe = with_preflight(begun[0], tmp_path, {"teacher_top1": None, "fusion_top1": 0.9, "n": 9, "split": "test"})
    result = train_student(recipe.model_copy(update={"out": tmp_path / "run", "compare_with_labels": True}))
    assert "90.00%" in summary(result)
    worse = result.model_copy(update={"labels_only": result.model_copy(update={"last": raised(result.last)})})
    assert any("export-student" in line for line in next_steps(worse))


def raised(figures: Any) -> Any:
    return figures.model_copy(update={"top1": figures.top1 + 0.1})


def with_preflight(recipe: TrainRecipe, folder: Path, figures: dict[str, Any]) -> TrainRecipe:
    """The recipe with a copy of its cache whose manifest has these figures."""
    assert recipe.cache is not None
    copied = Path(shutil.copytree(recipe.cache, folder / "tiny.zarr"))
    group = json.loads((copied / "zarr.json").read_bytes())
    manifest = group["attributes"][MANIFEST_KEY]
    manifest["provenance"]["preflight"] = figures
    group["attributes"][MANIFEST_KEY] = with_right_digests(manifest)
    (copied / "zarr.json").write_text(json.dumps(group))
    return recipe.model_copy(update={"cache": str(copied)})
