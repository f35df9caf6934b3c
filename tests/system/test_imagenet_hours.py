"""The hours in docs/imagenet.md are what `build-cache --plan` computes from the operations of the networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipeline.plan import build_seconds, computed_seconds
from pipeline.recipe import load_build_recipe
from train.cost import count_flops
from train.recipe.loading import load_train_recipe
from train.students import create_student

pytestmark = pytest.mark.medium

PAGE = Path(__file__).parents[2] / "docs" / "imagenet.md"
IMAGES = 1_281_167
FORWARD_AND_BACKWARD = 3  # in forward passes
UTILISATION = {"convolutional": 0.12, "transformer": 0.4}
DEVICES = {"L4": 121e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}  # dense bfloat16, by their data sheets
# The image towers of the recipes' CLIPs, as timm has them.
TOWERS = {
    "ViT-L-14-quickgelu": "vit_large_patch14_clip_quickgelu_224",
    "ViT-B-16-SigLIP": "vit_base_patch16_siglip_224",
}


def operations(create: Callable[..., Any], name: str, side: int) -> int:
    with torch.device("meta"):
        return count_flops(create(name, num_classes=1000).eval().requires_grad_(False), (side, side))


def test_the_table_of_hours() -> None:
    lines = []
    for name in ("imagenet-1k", "imagenet-1k-fast"):
        build, train = load_build_recipe(name), load_train_recipe(name)
        (teacher,), (clip,) = build.teachers, build.clips
        of_view = {
            "convolutional": operations(create_student, teacher.name, 224),
            "transformer": operations(timm.create_model, TOWERS[clip.name], 224),
        }
        assert build.views.crop_size is not None
        student = operations(create_student, str(train.student), build.views.crop_size[0])
        rows = build.num_views * IMAGES
        for device, flops in DEVICES.items():
            view_s = computed_seconds(of_view, flops, UTILISATION)
            step_s = computed_seconds({"convolutional": FORWARD_AND_BACKWARD * student}, flops, UTILISATION)
            build_h = build_seconds(rows, build.preflight_samples, view_s) / 3600
            train_h = train.epochs * IMAGES * step_s / 3600
            cells = [
                f"`{name}`",
                device,
                f"{build_h:.1f}",
                f"{1 / view_s:,.0f}",
                f"{train_h:.1f}",
                f"{1 / step_s:,.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))
    found = re.findall(r"^\| `imagenet-1k(?:-fast)?` \| (?:L4|RTX|A100|H100).*$", PAGE.read_text(), re.MULTILINE)
    assert found == lines
