"""What a run prints at its end: the next commands, and what to try where labels alone were better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support import tiny_run
from tests.support.next_commands import commands_in, parse
from train.recipe.loading import load_train_recipe
from train.run import train_student
from train.runs.advice import next_steps
from train.runs.result import RunResult, load_result, summary

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advice")
    pictures = tiny_run.write_pictures(root / "pictures", train=24, test=9)
    cache = tiny_run.write_cache(root / "my cache.zarr", pictures)
    train_student(tiny_run.recipe(cache, root / "run 1", epochs=1, compare_with_labels=True))
    return root / "run 1"


def result_of(
    run: Path, distilled: float, labels: float, store: str = "fused", teachers: dict[str, float] | None = None
) -> RunResult:
    """The result with other figures, from a cache with this store."""
    record = json.loads((run / "cache.json").read_text())
    record["manifest"]["recipe"]["store"] = store
    record["manifest"]["provenance"]["command"] = "/usr/bin/build-cache photos.yaml --views 3 --device cpu"
    (run / "cache.json").write_text(json.dumps(record))
    found = load_result(run)
    assert found is not None
    assert found.last is not None
    assert found.labels_only is not None
    twin = found.labels_only.model_copy(update={"last": found.last.model_copy(update={"top1": labels})})
    changes: dict[str, Any] = {"last": found.last.model_copy(update={"top1": distilled}), "labels_only": twin}
    return found.model_copy(update=changes | {"teachers": teachers})


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run 1"))


@pytest.mark.parametrize(("distilled", "labels"), [(0.7333, 0.6667), (0.5, 0.5)])
def test_a_run_ends_with_the_next_commands(run: Path, distilled: float, labels: float) -> None:
    text = "\n".join(next_steps(result_of(run, distilled, labels)))
    assert commands_in(text) == [["evaluate-student", str(run)], ["export-student", str(run)]]
    assert f"{100 * (distilled - labels):+.2f} points" in summary(result_of(run, distilled, labels))


def test_a_negative_result_says_what_to_try(run: Path) -> None:
    teachers = {"teacher_top1": 0.9, "clip_top1": 0.3, "fusion_top1": 0.75}
    found = result_of(run, 0.6667, 0.7333, "components", teachers)
    text = "\n".join(next_steps(found))
    assert text.startswith("Labels alone are better by 6.66 points on this seed. What to try:")
    assert "# the fusion is 15.00 points below the teacher alone" in text
    tune, seed, temperature, epochs, views, *_ = commands_in(text)
    assert tune == ["cache-tools", "tune-fusion", json.loads((run / "cache.json").read_text())["path"]]
    recipe = str(run / "recipe.yaml")
    assert seed == ["train-student", recipe, "--seed", "1", "--out", f"{run}-seed"]
    assert temperature == ["train-student", recipe, "--set", "temperature=1.5", "--out", f"{run}-T1.5"]
    assert epochs == ["train-student", recipe, "--epochs", "3", "--out", f"{run}-3-epochs"]
    assert views == ["build-cache", "photos.yaml", "--device", "cpu", "--views", "12"]
    assert f"{100 * (0.6667 - 0.7333):+.2f} points" in summary(found)


def test_more_views_are_made_of_the_images_that_the_run_used(run: Path) -> None:
    found = result_of(run, 0.5, 0.6)
    stored = run / "recipe.yaml"
    stored.write_text(stored.read_text().replace("data_dir: null", "data_dir: /data/my photos"))
    *_, views, _, _ = commands_in("\n".join(next_steps(found)))
    moved = ["--data-dir", "/data/my photos"]
    assert views == ["build-cache", "photos.yaml", "--device", "cpu", "--views", "12", *moved]


def test_a_very_high_likelihood_asks_for_a_lower_learning_rate(run: Path) -> None:
    found = result_of(run, 0.5, 0.6)
    assert found.last is not None
    assert all("--lr" not in words for words in commands_in("\n".join(next_steps(found))))
    unsettled = found.model_copy(update={"last": found.last.model_copy(update={"nll": 5.5})})
    rate = load_train_recipe(str(run / "recipe.yaml")).optimiser.learning_rate / 5
    first = commands_in("\n".join(next_steps(unsettled)))[0]
    recipe = str(run / "recipe.yaml")
    assert first == ["train-student", recipe, "--lr", f"{rate:g}", "--out", f"{run}-lr{rate:g}"]


def test_a_fused_cache_is_built_again_with_its_components(run: Path) -> None:
    teachers = {"teacher_top1": 0.4, "clip_top1": 0.8, "fusion_top1": 0.5}
    text = "\n".join(next_steps(result_of(run, 0.5, 0.6, "fused", teachers)))
    assert "the fusion is 30.00 points below CLIP alone" in text
    again = ["build-cache", "photos.yaml", "--views", "3", "--device", "cpu", "--store", "components"]
    assert commands_in(text)[0] == again


def test_a_fused_cache_whose_fusion_is_best_is_not_built_again(run: Path) -> None:
    teachers = {"teacher_top1": 0.4, "clip_top1": 0.5, "fusion_top1": 0.6}
    commands = commands_in("\n".join(next_steps(result_of(run, 0.5, 0.6, "fused", teachers))))
    assert all("--store" not in words for words in commands)


def test_the_commands_that_it_prints_train(run: Path) -> None:
    """The same settings with another seed: the recipe of the run, with its cache and its comparison."""
    from typer.testing import CliRunner

    from train.cli import app

    words = next(words for words in commands_in("\n".join(next_steps(result_of(run, 0.5, 0.6)))) if "--seed" in words)
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.stderr
    again = load_result(Path(f"{run}-seed"))
    assert again is not None
    assert (again.seed, again.epochs, again.labels_only is not None) == (1, 1, True)
    commands_in(done.stdout)


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["train-student", "--no-such-option"])


@pytest.mark.parametrize(("size", "options"), [(None, []), (32, ["--set", "dataset.image_size=32"])])
def test_a_network_of_a_folder_is_offered_as_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, options: list[str]
) -> None:
    tiny_run.write_pictures(tmp_path / "photos", train=8, test=6)
    monkeypatch.chdir(tmp_path)
    overrides = [] if size is None else [f"dataset.image_size={size}"]
    settings = {
        "loss": {"kind": "ce"},
        "student": "resnet8",
        "epochs": 1,
        "batch_size": 4,
        "out": "runs/t",
        "loggers": [],
    }
    recipe = load_train_recipe("photos", overrides, settings | {"schedule.warmup_epochs": 0})
    text = "\n".join(next_steps(train_student(recipe)))
    assert commands_in(text)[0] == ["build-cache", "photos", "--teacher", "runs/t", *options]


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({}, {"teacher_top1", "clip_top1", "fusion_top1"}),
        ({"teacher_weight": 0.1}, {"teacher_top1", "clip_top1"}),
        ({"clip_scale": 3.0}, {"teacher_top1"}),
    ],
)
def test_accuracies_of_another_fusion_are_left_out(
    trained: Path, tmp_path: Path, choice: dict[str, Any], left: set[str]
) -> None:
    cache = TeacherCache(tiny_run.write_cache(tmp_path / "c.zarr", trained.parent / "pictures", store="components"))
    found = {"teacher_top1": 0.9, "clip_top1": 0.3, "fusion_top1": 0.75}
    cache.manifest.provenance["preflight"] = found
    assert FusionChoice(**choice).kept_accuracies(cache) == {key: found[key] for key in left}
