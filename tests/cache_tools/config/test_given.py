"""What the user typed: the words that an error names."""

from __future__ import annotations

import pytest

from cache_tools.config import find_typed, option_name, typed_settings
from cache_tools.config.given import abridged

NAMES = {"optimiser.learning_rate": "--lr"}


def test_options_and_set_items_are_named_as_typed() -> None:
    options = {"optimiser.learning_rate": 0.1, "label_fraction": 0.5, "data_dir": None}
    typed = typed_settings(["loss.temperature = 4", "loss={kind: kd}"], options, NAMES)
    assert typed == {
        "optimiser.learning_rate": "--lr",
        "label_fraction": "--label-fraction",
        "loss.temperature": "--set loss.temperature = 4",
        "loss": "--set loss={kind: kd}",
    }


def test_set_wins_over_an_option_of_the_same_key() -> None:
    assert typed_settings(["epochs=-1"], {"epochs": 3}) == {"epochs": "--set epochs=-1"}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("teacher.weights", "--teacher-checkpoint"),  # the nearest of the two that contain it
        ("teacher.mean.1", "--teacher"),
        ("clip", "--clip"),  # a part of it
        ("teachers", None),
        ("epochs", None),
    ],
)
def test_the_nearest_setting_is_found(key: str, expected: str | None) -> None:
    typed = {"teacher": "--teacher", "teacher.weights": "--teacher-checkpoint", "clip.name": "--clip"}
    assert find_typed(typed, key) == expected


def test_a_long_item_is_cut() -> None:
    typed = typed_settings([f"name={'x' * 500}"])
    assert typed == {"name": f"--set {'name=' + 'x' * 72}…"}
    assert len(abridged("x" * 500)) == 78


def test_the_last_part_of_a_key_is_the_option() -> None:
    assert option_name("fusion.teacher_weight") == "--teacher-weight"
    assert option_name("optimiser.learning_rate", NAMES) == "--lr"
