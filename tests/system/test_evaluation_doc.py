"""The script of docs/evaluation.md and `--robustness` on the digits; corrupted copies are made once for both."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cache_tools.images.recipe import DatasetRecipe
from pipeline.evaluate.cli import app
from train.evaluate import corrupt
from train.recipe import TrainRecipe
from train.run import train_student

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="needs imagecorruptions"),
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two students of digits, one epoch on labels each."""
    root = tmp_path_factory.mktemp("doc")
    folders = [root / f"seed-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        data: dict[str, Any] = {
            "name": "doc",
            "dataset": DatasetRecipe(name="digits").model_dump(),
            "student": "resnet8",
            "loss": {"kind": "ce"},
            "optimiser": {"learning_rate": 0.05},
            "epochs": 1,
            "seed": seed,
            "device": "cpu",
            "out": folder,
        }
        train_student(TrainRecipe.model_validate(data))
    return folders


def test_the_script_of_the_document_says_what_the_command_says(runs: list[Path], tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path))
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    own, other = names["evaluate_under_corruption"](runs, samples=4)
    assert own == pytest.approx(1.0)
    (folder,) = (tmp_path / "corruptions").iterdir()
    assert folder.name.startswith("digits-test-4-")
    monkeypatch.setattr(corrupt, "corrupt_images", None)  # all copies exist: a call would fail
    arguments = [runs[1], "--baseline", runs[0], "--robustness", "--robustness-samples", 4, "--workers", 1, "--json"]
    done = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["robustness"]
    assert report["samples"] == 4
    assert report["summary"]["mce"] == pytest.approx(other)
    assert report["source"].startswith("imagecorruptions-imaug")
