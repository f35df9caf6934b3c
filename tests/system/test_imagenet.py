"""The recipes for ImageNet, and the sizes in docs/imagenet.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip

from cache_tools.format.recipe import FusionRecipe
from pipeline.networks.class_words import class_words, imagenet_ids
from pipeline.recipe import BuildRecipe, load_build_recipe
from train.recipe.loading import load_train_recipe
from train.students import create_student

TEXT = (Path(__file__).parents[2] / "docs" / "imagenet.md").read_text(encoding="utf-8")
NAMES = ("imagenet-1k", "imagenet-1k-fast")
TRAINING_IMAGES = 1_281_167


def rows(first_column: str) -> list[list[str]]:
    """The rows of the table whose first column has this title."""
    lines = TEXT[TEXT.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def gigabytes(numbers: int, views: int) -> str:
    return f"{TRAINING_IMAGES * 2 * numbers * views / 1e9:.1f} GB"


def test_sizes_are_right() -> None:
    fused = 1000 + FusionRecipe().feature_dim
    recipes: dict[str, BuildRecipe] = {name: load_build_recipe(name) for name in NAMES}
    widths: dict[str, Any] = {}
    for name, recipe in recipes.items():
        features = create_student(recipe.teachers[0].name, 1000).num_features
        clip = open_clip.get_model_config(recipe.clips[0].name)
        assert clip is not None
        widths[name] = (features, clip["embed_dim"])
    views = {name: recipe.num_views for name, recipe in recipes.items()}
    expected = [
        [
            "`fused`, the default",
            f"1000 + {fused - 1000}",
            gigabytes(fused, 1),
            *(gigabytes(fused, views[name]) for name in NAMES),
        ]
    ]
    for name in NAMES:
        total = sum(widths[name])
        sizes = [gigabytes(total, views[name]) if name == other else "–" for other in NAMES]
        numbers = " + ".join(map(str, widths[name]))
        expected.append([f"`components` of `{name}`", numbers, gigabytes(total, 1), *sizes])
    assert rows("store") == expected


def test_the_table_of_recipes_is_right() -> None:
    for name, *_, student, views in rows("recipe"):
        build, training = load_build_recipe(name.strip("`")), load_train_recipe(name.strip("`"))
        size = build.views.seen_by("student").output_size((256, 256))[0]
        assert training.student == "torchvision:resnet18"
        assert student == f"ResNet-18 at {size} pixels, {training.epochs} epochs"
        assert views == str(build.num_views)


def test_clip_reads_english_names() -> None:
    words = class_words(imagenet_ids())
    assert len(words) == 1000
    assert words[0] == "tench"
