"""Run folders: their names, what a run takes over or refuses in one, and what it removes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import CacheError, StorageError, UnsafeFileError
from train.export.config import CONFIG
from train.export.formats import FORMATS
from train.recipe import TrainRecipe, recipe_digest
from train.runs import folder
from train.runs.folder import claimed, run_folder, stored_identity

IDENTITY = {"recipe": {"student": "resnet8", "epochs": 2}, "data": {"images": "0" * 64}}
PARTIAL = f"run.json.{'0' * 32}.partial"


def test_every_recipe_has_a_folder_with_a_telling_name() -> None:
    recipe = make(student="timm:mobilenetv3_small_050.lamb_in1k")
    folder = run_folder(recipe, recipe_digest({"recipe": recipe.values()}))
    assert folder.parent.name == "runs"
    assert folder.name.startswith("mine-timm_mobilenetv3_small_050.lamb_in1k-kd-")
    assert folder != run_folder(recipe, recipe_digest({"recipe": make(seed=1).values()}))
    assert str(run_folder(make(out="here"), "0" * 64)) == "here"


def make(**changes: Any) -> TrainRecipe:
    return TrainRecipe.model_validate({"name": "mine", "cache": "c", "epochs": 10} | changes)


def claim(run: Path, *, overwrite: bool = False) -> None:
    with claimed(run, IDENTITY, overwrite=overwrite):
        pass


def test_a_half_written_record_does_not_make_a_folder_foreign(tmp_path: Path) -> None:
    """A process that was killed between opening and renaming `run.json` leaves only this."""
    (tmp_path / PARTIAL).write_text("{")
    (tmp_path / ".lock").touch()
    claim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("name", [".lock", "state.pt", "run.json", "result.json", "recipe.yaml", "tb", "evaluation"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_and_pipes_are_refused_and_lead_nowhere(tmp_path: Path, name: str, kind: str, overwrite: bool) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    claim(run)
    outside.mkdir()
    (outside / "file").write_text("secret")
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        inside = "" if name in {"tb", "evaluation"} else "file"
        (run / name).symlink_to(outside / (inside if kind == "link" else "made"))
    with pytest.raises(UnsafeFileError, match=name):
        claim(run, overwrite=overwrite)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "secret"


def test_labels_only_that_is_a_link_is_refused_before_the_run_starts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run)
    claim(tmp_path / "twin")
    (run / "labels-only").symlink_to(tmp_path / "twin")
    for overwrite in (False, True):
        with pytest.raises(UnsafeFileError, match="labels-only"):
            claim(run, overwrite=overwrite)
    assert stored_identity(tmp_path / "twin") == IDENTITY


def test_starting_over_removes_only_names_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run)
    ours = [
        "state.pt",
        "evaluation/evaluation.json",
        "export/model.onnx",
        "tb/events.out.tfevents.1",
        "labels-only/run.json",
    ]
    theirs = [
        "notes.txt",
        "evaluation/notes.txt",
        "export/my.onnx",
        "tb/notes.txt",
        "labels-only/notes.txt",
        "x.partial",
    ]
    for name in (*ours, *theirs):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{}")
    (run / "labels-only" / "result.json").write_text("{}")
    claim(run, overwrite=True)
    left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert left == {*theirs, "run.json", ".lock"}


def test_the_lock_is_not_emptied_and_keeps_others_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run)
    (run / ".lock").write_text("kept")
    with claimed(run, IDENTITY, overwrite=False), pytest.raises(StorageError, match="another process"):
        claim(run)
    assert (run / ".lock").read_text() == "kept"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"recipe": 5, "data": {}}',
        '{"recipe": {"student": 5}, "data": {}}',
        '{"recipe": {"student": "x", "label_fraction": 1e-300}, "data": {}}',
        '{"recipe": {"student": "x", "epochs": "2"}, "data": {}}',
        '{"recipe": {"student": "x"}, "data": {"num_views": "many"}}',
    ],
)
def test_a_damaged_record_is_no_identity(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert stored_identity(tmp_path) is None
    with pytest.raises(CacheError, match="damaged record"):
        folder.read_identity(tmp_path)


def test_the_names_that_are_removed_are_those_that_are_written() -> None:
    assert {CONFIG, *(entry.file for entry in FORMATS.values())} == {*folder.EXPORT_FILES}
