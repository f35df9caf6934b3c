"""A student of views that are smaller than the canvas: its files take the cropped image, and timm's config says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache_tools.images import open_images
from tests.support import tiny_run
from train.checkpoints import load_student
from train.export.student import ExportOptions, export_student
from train.run import train_student


@pytest.mark.medium
def test_a_cropped_student_is_exported_at_the_size_of_its_views(tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "pictures", train=24, test=9)
    settings = {
        "loss": {"kind": "ce"},
        "dataset": tiny_run.dataset(pictures),
        "views": {"ops": [{"op": "random-resized-crop", "size": 14}]},
        "epochs": 1,
        "loggers": (),
    }
    run = train_student(tiny_run.recipe("", tmp_path / "run", **settings)).folder
    report = export_student(run, ExportOptions(formats=("safetensors", "torchscript")))
    assert report.image_size == (14, 14)
    config = json.loads((run / "export" / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["crop_pct"], config["crop_mode"]) == ([3, 14, 14], 7 / 8, "center")

    centre = torch.from_numpy(open_images(tiny_run.dataset(pictures), "test").load(slice(None))[:, :, 1:15, 1:15])
    model, card = load_student(run / "last.safetensors")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    files = {file.format: run / "export" / file.file for file in report.files}
    exported = torch.jit.load(files["torchscript"])
    with torch.no_grad():
        expected = model((centre.float() / 255 - mean) / std)
        torch.testing.assert_close(exported(centre), expected, rtol=1e-3, atol=1e-4)
