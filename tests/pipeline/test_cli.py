"""The `build-cache` command: its output, its options, and errors of one line with exit code 2."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cache_tools.config import dump_yaml
from cache_tools.reader import TeacherCache
from pipeline.cli import app
from pipeline.recipe import load_build_recipe
from tests.support import tiny_build
from train.cli import app as train_app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("cli"), train=60)
    path = root / "tiny.yaml"
    path.write_text(dump_yaml(tiny_build.recipe(root, num_views=1)))
    return path


def build(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_build_and_its_repetition(recipe_file: Path, tmp_path: Path):
    first = build(recipe_file, "--out", tmp_path / "c", "--json")
    assert first.exit_code == 0, first.stderr
    summary = json.loads(first.stdout)
    assert (summary["images_computed"], summary["num_views"]) == (60, 1)
    again = build(recipe_file, "--out", tmp_path / "c")
    assert "complete: nothing to do" in again.stdout
    more = build(recipe_file, "--out", tmp_path / "c", "--views", 2)
    assert "computed 60 images" in more.stdout


def test_the_printed_next_step_runs(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It names the cache if the name is a recipe of `train-student` and unique; otherwise it gives the path."""
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "a home"))

    def next_step(*options: object) -> list[str]:
        done = build(recipe_file, "--set", "preflight_samples=0", "--set", "out=null", *options)
        assert done.exit_code == 0, done.stderr
        label, command, *arguments = shlex.split(done.stdout.splitlines()[-1])
        assert (label, command) == ("next:", "train-student")
        shown = CliRunner().invoke(train_app, [*arguments, "--show-recipe"])
        assert shown.exit_code == 0, shown.stderr
        TeacherCache.open(yaml.safe_load(shown.stdout)["cache"])
        return arguments

    assert next_step() == ["--cache", yaml.safe_load(recipe_file.read_text())["name"]]
    assert next_step("--set", "name=digits") == ["--cache", "digits"], "its images are not those of the recipe digits"
    out = str(tmp_path / "c")
    assert next_step("--set", f"out={out}") == ["--cache", out]


def test_a_build_into_the_working_folder(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    done = build(recipe_file, "--out", ".")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    monkeypatch.chdir(tmp_path)  # the cache has replaced the folder
    again = build(recipe_file, "--out", tmp_path / "c")
    assert "complete: nothing to do" in again.stdout, again.stderr


def test_options_reach_the_recipe():
    shown = build(
        "digits", "--views", 5, "--seed", 3, "--teacher", "timm:resnet10t", "--teacher-checkpoint", "a.pth",
        "--clip", "ViT-B-32", "--clip-checkpoint", "openai", "--prompts", "siglip", "--teacher-weight", 0.4,
        "--store", "components", "--device", "cpu", "--batch-size", 7, "--precision", "bfloat16", "--show-recipe",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    for line in (
        "num_views: 5", "base_seed: 3", "name: timm:resnet10t", "weights: a.pth", "name: ViT-B-32", "weights: openai",
        "templates: siglip", "teacher_weight: 0.4", "store: components", "device: cpu", "batch_size: 7",
        "precision: bfloat16",
    ):  # fmt: skip
        assert line in shown.stdout


def test_another_clip_drops_the_tag_of_the_recipe():
    shown = build("cifar100", "--clip", "local-dir:somewhere", "--show-recipe")
    assert "weights: openai" not in shown.stdout


def test_options_for_one_network_against_a_recipe_of_several(tmp_path: Path):
    """--teacher replaces all teachers. Options that change one network name the key to set instead."""
    several = load_build_recipe(
        "digits",
        ["teacher=[{name: resnet8, weights: a.pth}, {name: resnet20, weights: b.pth}]", "clip=[{name: c}, {name: d}]"],
    )
    file = tmp_path / "several.yaml"
    file.write_text(dump_yaml(several))
    shown = yaml.safe_load(build(file, "--show-recipe").stdout)
    assert [teacher["weights"] for teacher in shown["teacher"]] == ["a.pth", "b.pth"]
    alone = build(file, "--teacher", "resnet14", "--teacher-checkpoint", "c.pth", "--show-recipe")
    assert yaml.safe_load(alone.stdout)["teacher"]["name"] == "resnet14"
    for option, entry in (("--teacher-checkpoint", "teacher.0.weights"), ("--clip", "clip.0.name")):
        refused = build(file, option, "x", "--show-recipe")
        assert refused.exit_code == 2
        assert f"--set {entry}=" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "num_vews=3"], "Did you mean 'num_views'?"),
        (["--teacher", "resnet8", "--teacher-checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--teacher", "resnet8"], "weights"),
        (["--teacher", "resnet9"], "resnet"),
        (["--clip", "local-dir:nowhere"], "nowhere"),
        (["--clip", "ViT-B-32", "--clip-checkpoint", "openai"], "ViT-B-32-quickgelu"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--device", "tpu"], "tpu"),
        (["--store", "everything"], "components"),
        (["--set", "teacher.weight=0.5"], "do not sum to 1 (teacher weights)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(recipe_file: Path, tmp_path: Path, arguments: list[str], words: str):
    done = build(recipe_file, "--out", tmp_path / "c", *arguments)
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "c").exists()


def test_cuda_where_there_is_none(recipe_file: Path, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = build(recipe_file, "--out", tmp_path / "c", "--device", "cuda")
    assert done.exit_code == 2
    assert "0 CUDA device(s)" in done.stderr


def test_a_broken_image_is_a_one_line_error(recipe_file: Path, tmp_path: Path):
    pictures = tmp_path / "pictures"
    shutil.copytree(recipe_file.parent / "pictures", pictures)
    victim = next((pictures / "train" / "green").iterdir())
    victim.write_bytes(b"not a picture")
    done = build(recipe_file, "--out", tmp_path / "c", "--data-dir", pictures)
    assert done.exit_code == 2
    assert victim.name in done.stderr


UNPRIVILEGED = ["unshare", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNPRIVILEGED, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.medium
@pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs user namespaces")
def test_a_read_only_disk_is_a_one_line_error(recipe_file: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"mount -t tmpfs -o ro none {disk} && exec {sys.executable} -m pipeline.cli {recipe_file} --out {disk}/c"
    done = subprocess.run([*UNPRIVILEGED, "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
