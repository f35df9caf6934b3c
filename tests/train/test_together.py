"""Turns of several batches: how many, and that nothing else depends on them (`test_sweep` has whole trials)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import tiny_run
from train import together
from train.data import open_data
from train.loop import Learner, repeatable
from train.objective import Objective
from train.students import create_student

CPU = torch.device("cpu")
BATCH_BYTES = 16 * 3 * tiny_run.SIDE * tiny_run.SIDE * 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    return tiny_run.write_cache(folder / "tiny.zarr", tiny_run.write_pictures(folder / "pictures"))


def train(cache: Path, count: int) -> tuple[list[int], list[dict[str, torch.Tensor]]]:
    """An epoch of `count` students: how many images there were in each turn, and the weights."""
    recipe = tiny_run.recipe(cache, Path("unused"), epochs=1)
    data = open_data(recipe, CPU)
    feed = data.feed(recipe, CPU)
    turns: list[int] = []
    with repeatable(CPU, False):
        learners = []
        for number in range(count):
            torch.manual_seed(number)
            student = create_student("resnet8", 3)
            objective = Objective(recipe.loss, student.num_features, data.target_dim, 3, len(data.images), data.labels)
            learners.append(Learner(recipe, student, objective, data.preprocessing, feed.steps_per_epoch, CPU))
        outcomes = together.train_epoch_together(learners, feed, 0, turns.append)
    feed.close()
    assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    return turns, [learner.student.state_dict() for learner in learners]


@pytest.mark.parametrize(
    ("turn", "megabytes", "expected"),
    [(1, 64, [16, 16, 16, 2]), (3, 64, [48, 2]), (8, 64, [50]), (8, 2 * BATCH_BYTES / 2**20, [32, 18])],
)
def test_turns_are_of_so_many_batches_and_change_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, turn: int, megabytes: float, expected: list[int]
) -> None:
    alone, (weights,) = train(cache, 1)
    assert alone == [16, 16, 16, 2], "nobody to take turns with"
    monkeypatch.setattr(together, "TURN", turn)
    monkeypatch.setattr(together, "TURN_BYTES", int(megabytes * 2**20))
    turns, (first, second) = train(cache, 2)
    assert turns == expected
    assert all(torch.equal(first[name], weights[name]) for name in weights)
    assert not all(torch.equal(first[name], second[name]) for name in weights)
