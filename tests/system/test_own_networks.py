"""A network of one's own through every command: its runs resume, its teacher's targets are its logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.config import dump_yaml
from cache_tools.images import open_images
from cache_tools.preprocess import prepare
from cache_tools.reader import TeacherCache
from cache_tools.system import named
from pipeline.build.cache import build_cache
from pipeline.evaluate.evaluator import evaluate_student
from pipeline.evaluate.report import EvaluateOptions
from pipeline.plan import make_plan
from pipeline.replay import replay
from tests.support import tiny_build, tiny_run
from tests.support.shortcuts import take_shortcuts
from train.checkpoints import load_student
from train.export.student import ExportOptions, export_student
from train.run import train_student
from train.sweep.options import read_sweep
from train.sweep.run import run_sweep

pytestmark = pytest.mark.medium

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.dropout, self.out = nn.Dropout(0.2), nn.Linear(8, num_classes)

    def forward(self, images):
        return self.out(self.dropout(self.trunk(images).amax((2, 3))))
"""
NAME = "nets_for_all:Net"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_for_all.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(named, "_in_process", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("nets_for_all", None)
    take_shortcuts(monkeypatch)
    return tiny_build.prepare(tmp_path, train=48)


def test_a_network_of_ones_own_works_in_every_command(root: Path) -> None:
    labels: dict[str, Any] = {
        "cache": None,
        "dataset": tiny_run.dataset(root / "pictures").model_dump(),
        "loss": {"kind": "ce"},
        "student": NAME,
        "ema_decay": 0.5,
    }
    recipe = tiny_run.recipe("", root / "teacher")
    teacher = train_student(recipe.model_validate(recipe.model_dump() | labels))

    spec = {"name": NAME, "weights": str(root / "teacher"), "mean": (0.4,) * 3, "std": (0.25,) * 3}
    fusion = {"teacher_weight": 1.0, "feature_dim": 16}
    build = tiny_build.recipe(root, teacher=spec, num_views=2, fusion=fusion, views={"clean_first": True})
    build_cache(build)
    cache = TeacherCache.open(root / "cache.zarr")
    images = open_images(build.dataset)
    network, _ = load_student(teacher.folder)
    with torch.no_grad():
        logits = network(prepare(torch.from_numpy(images.load(slice(0, 8))), cache.recipe.teacher.preprocessing))
    stored = cache.load_view(0).logits(torch.arange(8))
    torch.testing.assert_close(stored, logits - logits.mean(1, keepdim=True), rtol=1e-5, atol=1e-5)
    assert make_plan(build, NAME, 3).student == NAME
    assert replay(cache, images, 8, device="cpu").sound

    changes: dict[str, Any] = {"student": NAME, "loss": {"kind": "kd", "feature": "crd", "crd_negatives": 4}}
    result = train_student(tiny_run.recipe(cache.path, root / "run", **changes, ema_decay=0.5))
    assert result.student == NAME
    assert load_student(result.folder)[1].architecture == NAME
    report = evaluate_student(result.folder, EvaluateOptions(device="cpu", teachers=True))
    assert report.figures[0].evaluation.top1 == result.last.top1
    exported = export_student(result.folder, ExportOptions(formats=("safetensors", "torchscript"), samples=6))
    assert all(file.top1_agreement == 1.0 for file in exported.files)

    base = tiny_run.recipe(cache.path, root / "unused", epochs=1).model_copy(update={"out": None})
    (root / "base.yaml").write_text(dump_yaml(base))
    sweep = read_sweep(None, str(root / "base.yaml"), {}, (), {"students": (NAME, "resnet8"), "losses": ("kd",)})
    table = run_sweep(sweep, root / "sweep").trials
    assert table["status"].to_list() == ["finished", "finished"]
    assert np.isfinite(table["top1"].to_numpy()).all()
