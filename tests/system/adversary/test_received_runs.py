"""Run folders that somebody else has made: one clear error or a result, no traceback, no hang, nothing outside changed.

The cases are the same in every run. The long turn has more than five hundred folders, each with every command:

    TEACHER_CACHE_LONG_TESTS=1 pytest tests/system/adversary/test_received_runs.py
"""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml
from typer.testing import CliRunner

import pipeline.cli
import pipeline.evaluate.cli
import train.cli
import train.export.cli
import train.report.cli
import train.sweep.cli
from tests.support import tiny_build, tiny_run
from tests.support.hostile import Victim, limited_resources
from tests.support.received_runs import mutation, snapshot
from tests.support.shortcuts import SMALLEST_PNG, take_shortcuts
from tests.support.turns import turns
from train import checkpoints
from train.run import train_student
from train.runs.folder import CHECKPOINT
from train.weights.run_files import write_file

pytestmark = [pytest.mark.medium, pytest.mark.turns, pytest.mark.filterwarnings("ignore")]

CASES = turns(6, 520)


class Received(NamedTuple):
    """Sound folders that are changed, with the commands that are run on each, and a folder that links lead to."""

    victims: dict[str, Victim]
    commands: dict[str, dict[str, tuple[typer.Typer, list[str]]]]
    other: Path
    outside: Path
    made: Path


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Received]:
    root = tmp_path_factory.mktemp("received")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEACHER_CACHE_HOME", str(root / "home"))
        patch.setenv("COLUMNS", "200")
        patch.chdir(root)
        take_shortcuts(patch)
        patch.setattr("train.run.state.plot_curves", lambda history, path, *_: write_file(path, SMALLEST_PNG))
        patch.setattr("train.evaluate.confusion.plot_confusion", lambda *_: SMALLEST_PNG)
        yield prepare(root)


def prepare(root: Path) -> Received:
    pictures = tiny_run.write_pictures(root / "pictures", train=24, test=9)
    cache = tiny_run.write_cache(root / "tiny.zarr", pictures)
    settings: dict[str, Any] = {"epochs": 2, "ema_decay": 0.9, "compare_with_labels": True}
    recipe = tiny_run.recipe(cache, root / "finished", **settings)
    train_student(recipe)
    begin(recipe.model_copy(update={"out": root / "begun"}))
    train_student(tiny_run.recipe(cache, root / "other", epochs=2, student="wrn_16_1"))
    base = {key: value for key, value in recipe.model_dump(mode="json").items() if key != "out"}
    (root / "base.yaml").write_text(yaml.safe_dump(base))
    trial = {**base, "epochs": 1, "compare_with_labels": False}
    (root / "trial.yaml").write_text(yaml.safe_dump(trial))
    build = tiny_build.recipe(root, num_views=1, clip=None, fusion={}, teacher={"name": str(root / "finished")})
    stored = build.model_dump(mode="json", exclude_unset=True) | {"out": str(root / "made" / "cache.zarr")}
    (root / "build.yaml").write_text(yaml.safe_dump(stored))
    sweep = [str(root / "trial.yaml"), "--seeds", "2", "--workers", "1", "--out", str(root / "sweep")]
    commands: dict[str, dict[str, tuple[typer.Typer, list[str]]]] = {
        "finished": {
            "train-student": (train.cli.app, [str(root / "base.yaml"), "--out", str(root / "finished")]),
            "evaluate-student": (pipeline.evaluate.cli.app, [str(root / "finished"), "--device", "cpu"]),
            "report-students": (train.report.cli.app, [str(root / "finished")]),
            "export-student": (
                train.export.cli.app,
                [str(root / "finished"), "--format", "safetensors", "--samples", "3"],
            ),
            "build-cache": (pipeline.cli.app, [str(root / "build.yaml")]),
        },
        "begun": {
            "train-student": (train.cli.app, [str(root / "base.yaml"), "--out", str(root / "begun")]),
            "report-students": (train.report.cli.app, [str(root / "begun")]),
            "evaluate-student": (
                pipeline.evaluate.cli.app,
                [str(root / "begun"), "--checkpoint", "best", "--device", "cpu"],
            ),
        },
        "sweep": {
            "sweep-students": (train.sweep.cli.app, sweep),
            "report-students": (train.report.cli.app, [str(root / "sweep")]),
        },
    }
    for kind, name in (("finished", "evaluate-student"), ("finished", "export-student"), ("sweep", "sweep-students")):
        app, arguments = commands[kind][name]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    for unfinished in sorted((root / "sweep" / "trials").iterdir())[1:]:
        (unfinished / "result.json").unlink()
    outside = root / "outside"
    (outside / "sub").mkdir(parents=True)
    for file in ("secret", "run.json.0123456789abcdef0123456789abcdef.partial", "sub/file"):
        (outside / file).write_text("secret")
    shutil.copytree(root / "finished", outside / "like it")
    (outside / "copies").mkdir()
    for folder in (root / "begun", root / "finished", root / "sweep"):
        for path in folder.rglob("*"):
            if path.is_file():
                shutil.copy2(path, outside / "copies" / path.name)
    victims = {name: Victim(root / name) for name in commands}
    return Received(victims, commands, root / "other", outside, root / "made")


def begin(recipe: Any) -> None:
    """Train an epoch and a part of the next one, whose checkpoint stays."""
    save = checkpoints.save_state

    def save_and_stop(path: Path, state: dict[str, Any]) -> None:
        save(path, state)
        if path.name == CHECKPOINT and state["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_state", save_and_stop)
        patch.setattr("train.loop.epoch.BYTES_PER_TURN", 1)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe.model_copy(update={"checkpoint_every_minutes": 1e-9}))


def run(received: Received, kind: str, command: str, change: Callable[[Path], None], name: str) -> str:
    """Run a command on a changed folder; its exit code and its error, for the figures."""
    app, arguments = received.commands[kind][command]
    before = snapshot(received.outside)
    with received.victims[kind].changed(change):
        try:
            with limited_resources():
                done = CliRunner().invoke(app, arguments)
        finally:
            shutil.rmtree(received.made, ignore_errors=True)
    what = f"{command} on a {kind} run, {name}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        pytest.fail(f"{what}:\n{''.join(traceback.format_exception(done.exception))}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.exit_code, len(errors)) in {(0, 0), (2, 1)}, f"{what}: {done.exit_code}\n{done.stderr}"
    assert "Traceback" not in done.stderr, what
    assert snapshot(received.outside) == before, f"{what}: something outside has changed"
    return f"{done.exit_code} {errors[0] if errors else ''}"


@pytest.mark.parametrize("number", range(CASES))
def test_a_changed_run(received: Received, number: int) -> None:
    draw = random.Random(number)
    kind = draw.choice(["finished", "finished", "begun", "begun", "sweep"])
    folder = received.victims[kind].path
    change = mutation(draw, folder, received.other, received.outside)
    names = sorted(received.commands[kind])
    for command in names if len(names) * CASES > 100 else [draw.choice(names)]:
        found = run(received, kind, command, change.change, change.name)
        print(f"{number} {command} on a {kind} run, {change.name}: {found}")


@pytest.mark.parametrize("kind", ["finished", "begun", "sweep"])
def test_the_sound_folders_pass(received: Received, kind: str) -> None:
    """Without a change every command succeeds, so that an error above comes from the change."""
    for command in received.commands[kind]:
        assert run(received, kind, command, lambda path: None, "sound").startswith("0"), command
