"""Students and training states are read back as they were written; damaged files are clear errors."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cache_tools.errors import WeightsError
from train.checkpoints import (
    LAST,
    StudentCard,
    load_state,
    load_student,
    read_card,
    save_state,
    save_student,
    student_file,
)
from train.students import create_student

CARD = StudentCard(
    architecture="resnet8",
    num_classes=3,
    class_names=("a_b", "ünï", "c"),
    image_size=(32, 32),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    dataset="folder",
    recipe_digest="12ab",
    epoch=4,
)


def test_student_round_trip(tmp_path: Path) -> None:
    student = trained_student()
    save_student(tmp_path / "s.safetensors", student, CARD)
    loaded, card = load_student(tmp_path / "s.safetensors")
    assert card == CARD
    assert not loaded.training
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images), student.eval()(images), rtol=0, atol=0)


def test_metadata_are_plain_strings_that_others_can_read(tmp_path: Path) -> None:
    save_student(tmp_path / "s.safetensors", trained_student(), CARD)
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as stored:
        metadata = stored.metadata()
    assert metadata["architecture"] == "resnet8"
    assert metadata["class_names"] == '["a_b", "\\u00fcn\\u00ef", "c"]'
    assert metadata["mean"] == "[0.1, 0.2, 0.3]"
    assert metadata["num_classes"] == "3"


def test_the_file_does_not_depend_on_the_memory_layout(tmp_path: Path) -> None:
    student = trained_student()
    save_student(tmp_path / "plain", student, CARD)
    save_student(tmp_path / "channels_last", student.to(memory_format=torch.channels_last), CARD)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "channels_last").read_bytes()


def test_a_run_folder_loads_its_last_epoch(tmp_path: Path) -> None:
    save_student(tmp_path / LAST, trained_student(), CARD)
    assert student_file(tmp_path) == tmp_path / LAST
    assert load_student(tmp_path)[1] == CARD


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "no card", "other classes"])
def test_bad_checkpoints_are_weights_errors(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "s.safetensors"
    save_student(path, trained_student(), CARD)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"no safetensors here" * 10)
    elif damage == "no card":
        save_file({"x": torch.zeros(2)}, path)
    else:
        save_student(path, trained_student(), CARD.model_copy(update={"num_classes": 4}))
    with pytest.raises(WeightsError, match=r"s\.safetensors") as caught:
        load_student(path)
    assert "\n" not in str(caught.value)


def test_a_card_may_have_unknown_keys_but_no_missing_ones(tmp_path: Path) -> None:
    metadata = CARD.to_metadata()
    assert StudentCard.from_metadata(metadata | {"format": "pt"}, Path("x")) == CARD
    del metadata["class_names"]
    with pytest.raises(WeightsError, match="not a student checkpoint"):
        StudentCard.from_metadata(metadata, Path("x"))
    save_student(tmp_path / "s", trained_student(), CARD)
    assert read_card(tmp_path / "s") == CARD


def test_state_round_trip(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "weights": torch.arange(3),
        "history": [{"epoch": 0, "loss": 1.5, "top5": None}],
        "best_epoch": 0,
    }
    assert load_state(tmp_path / "state.pt") is None
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert loaded is not None
    assert torch.equal(loaded.pop("weights"), state.pop("weights"))
    assert loaded == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_state_is_an_error(tmp_path: Path, keep: int) -> None:
    save_state(tmp_path / "state.pt", {"weights": torch.arange(100)})
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="--overwrite"):
        load_state(path)


def test_a_state_without_a_key_is_an_error(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", {"learner": {}, "history": []})
    with pytest.raises(WeightsError, match="--overwrite"):
        load_state(tmp_path / "state.pt", ("learner", "history", "best_epoch"))


def test_loading_a_state_runs_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    (tmp_path / "pickled.pt").write_bytes(pickle.dumps({"x": Payload()}, protocol=2))
    torch.save({"x": Payload()}, tmp_path / "zipped.pt")
    for name in ("pickled.pt", "zipped.pt"):
        with pytest.raises(WeightsError):
            load_state(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def trained_student() -> torch.nn.Module:
    torch.manual_seed(0)
    student = create_student("resnet8", 3)
    student(torch.rand(4, 3, 32, 32))  # so that batch statistics differ from their initial values
    return student
