"""The pages that people read first: their tables are computed again, and the error messages that they quote exist."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from cache_tools.format.recipe import FusionRecipe
from pipeline.recipe import load_build_recipe
from train.recipe.loading import load_train_recipe
from train.students import create_student

ROOT = Path(__file__).parents[2]
TERAFLOPS = 100
IMAGES = {
    "cifar100": (50_000, 100, 32),
    "imagenet-1k": (1_281_167, 1000, 224),
    "imagenet-1k-fast": (1_281_167, 1000, 224),
}


def table(page: str, first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has this title."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def name_of(cell: str) -> str:
    return cell.strip("` ")


@cache
def network(name: str, classes: int) -> torch.nn.Module:
    """A teacher or CLIP without weights, and without memory for them."""
    with torch.device("meta"):
        if name.startswith("ViT-"):
            import open_clip

            model: torch.nn.Module = open_clip.create_model(name, pretrained=None, device="meta")
            return model.eval()
        return create_student(name, num_classes=classes).eval()


def flops(model: torch.nn.Module, size: int) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"))
    return int(counter.get_total_flops())


@pytest.mark.medium
def test_costs_on_the_first_page_are_right() -> None:
    """Sizes of the targets as `--plan` counts them, and hours of the networks at the stated speed."""
    expected = []
    for name, (images, classes, size) in IMAGES.items():
        recipe, epochs = load_build_recipe(name), load_train_recipe(name).epochs
        work = flops(network(recipe.teachers[0].name, classes), size)
        clip: Any = network(recipe.clips[0].name, classes)
        work += flops(clip.visual, 224)
        stored = images * recipe.num_views * 2 * (classes + FusionRecipe().feature_dim)

        def hours(count: int, work: int = work) -> str:
            return f"{count * work / (TERAFLOPS * 1e12) / 3600:.1f}"

        expected.append(
            [
                f"`{name}`",
                f"{images:,} × {recipe.num_views} views",
                f"{stored / 1e9:.2f} GB" if stored < 1e9 else f"{stored / 1e9:.1f} GB",
                f"{work / 1e9:.0f}",
                hours(images * recipe.num_views),
                hours(images * epochs),
            ]
        )
    assert table("index.md", "recipe") == expected


def test_every_recipe_is_in_the_gallery() -> None:
    def recipes(package: str) -> set[str]:
        return {path.stem for path in (ROOT / package / "recipes").glob("*.yaml")}

    assert {name_of(row[0]) for row in table("recipes.md", "recipe | images")} == recipes("pipeline")
    for name, *_, views in table("recipes.md", "recipe | images"):
        assert load_build_recipe(name_of(name), []).num_views == int(views), name
    rows = table("recipes.md", "recipe | student")
    assert {name_of(row[0]) for row in rows} == recipes("train")
    for name, student, epochs, _ in rows:
        recipe = load_train_recipe(name_of(name))
        assert (recipe.student, recipe.epochs) == (name_of(student), int(epochs)), name


@pytest.mark.medium
def test_sizes_of_networks_are_right() -> None:
    for name, _, parameters, size, *_ in table("networks.md", "`--teacher`, `--clip`"):
        if "package:" in name:
            continue
        classes = 100 if name_of(name) in {"resnet32x4", "vgg13", "wrn_40_2"} else 1000
        count = sum(each.numel() for each in network(name_of(name), classes).parameters())
        assert parameters == f"{count / 1e6:.1f} M", name
        assert size == f"{4 * count / 1e6:.1f} MB", name
    named = {name_of(row[0]) for row in table("networks.md", "`--teacher`, `--clip`")}
    recipes = [load_build_recipe(path.stem, []) for path in (ROOT / "pipeline/recipes").glob("*.yaml")]
    used = {each.name for recipe in recipes for each in recipe.teachers}
    used |= {each.name for recipe in recipes for each in recipe.clips}
    assert {each for each in used if not each.startswith(("runs/", "local-dir:runs/"))} <= named


def test_quoted_error_messages_exist() -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for package in ("cache_tools", "train", "pipeline", "teacher_cache")
        for path in sorted((ROOT / package).rglob("*.py"))
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a message in several parts
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    assert [message for message in rows if message not in source] == []


def test_the_citation_file_is_complete() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= set(citation)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
