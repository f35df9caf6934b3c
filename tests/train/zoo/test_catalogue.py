"""The list of students: the right sizes, and names that can be trained."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from cache_tools.errors import RecipeError
from cache_tools.screen import count
from train.cli import app
from train.cost import count_parameters
from train.students import create_student, student_names
from train.zoo.catalogue import CLASSES, ZOO_PARAMETERS, students_text


def test_the_zoo_is_complete_and_its_sizes_are_right() -> None:
    assert tuple(ZOO_PARAMETERS) == student_names()
    with torch.device("meta"):
        sizes = {name: count_parameters(create_student(name, CLASSES)) for name in student_names()}
    assert sizes == ZOO_PARAMETERS
    lines = [line.split(maxsplit=1) for line in students_text(None).splitlines()[1 : 1 + len(sizes)]]
    assert lines == [[name, count(size)] for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("wrn", ["wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2"]),
        ("resnet?x4", ["resnet8x4"]),
        ("mobile", ["MobileNetV2"]),
        ("torchvision:shufflenet*5", ["torchvision:shufflenet_v2_x0_5", "torchvision:shufflenet_v2_x1_5"]),
        ("timm:mobilenetv4*small_0*", ["timm:mobilenetv4_conv_small_035", "timm:mobilenetv4_conv_small_050"]),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    lines = [line for line in students_text(pattern).splitlines() if not line.startswith("student ")]
    assert [line.split()[0] for line in lines] == names


@pytest.mark.parametrize("pattern", ["nothing", "timm:nothing-like-it", "keras:resnet50"])
def test_nothing_matches(pattern: str) -> None:
    with pytest.raises(RecipeError, match="no student matches"):
        students_text(pattern)


def test_the_command_lists_students_without_a_recipe_or_a_cache() -> None:
    shown = CliRunner().invoke(app, ["--list-students", "--student", "vgg1"])
    assert shown.stdout.split() == [
        "student",
        "parameters",
        *["vgg11", "9.28", "M", "vgg13", "9.46", "M", "vgg16", "14.8", "M", "vgg19", "20.1", "M"],
    ]


@pytest.mark.medium
def test_the_list_needs_no_torch() -> None:
    code = "import sys, train.zoo.catalogue as zoo; zoo.students_text(None); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
