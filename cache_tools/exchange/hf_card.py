"""The card of an exported cache: what its rows are, which networks and views they come from, how to read them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from typing import Any

from cache_tools.config import dump_yaml
from cache_tools.errors import printable
from cache_tools.exchange.hf_rows import ExportedRows
from cache_tools.reader import TeacherCache
from cache_tools.refusion import describe_fusion


def dataset_card(rows: ExportedRows, views: list[int], split: str) -> str:
    """The card of an export, Markdown with a YAML header.

    Args:
        views: that are in the export.
        split: its name on the hub.
    """
    import yaml

    cache, manifest, recipe = rows.cache, rows.cache.manifest, rows.cache.recipe
    header = {
        "license": "unknown",
        "pretty_name": f"Targets of {printable(manifest.name)}",
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "teacher-cache"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]},
        ],
    }
    names = ", ".join(recipe.dataset.class_names[:5]) + (", …" if cache.num_classes > 5 else "")
    lines = [
        f"# Targets of {_plain(manifest.name)}",
        "",
        "What teachers said of images, for knowledge distillation: a row for each view of each image. The images are "
        "not in it; `key` and `sample` say which one a row is about.",
        "",
        "> **Licence**: not chosen. Choose one in the header of this card before you publish it, in keeping with the "
        "licences of the images and of the networks.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_plain(text)} |" for name, text in _facts(cache, views, names)),
        "",
        "| column | type | what it has |",
        "|---|---|---|",
        *(f"| `{name}` | {_type_of(rows.features[name])} | {about} |" for name, about in rows.about.items()),
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        f'rows = load_dataset("FOLDER_OR_NAME", split="{split}")  # streaming=True reads it piece by piece',
        "```",
        "",
        "## Views",
        "",
        *_about_views(cache),
        "",
        "```yaml",
        *_fenced(dump_yaml(recipe.views)),
        "```",
        "",
        "## Fusion",
        "",
        "```yaml",
        *_fenced(dump_yaml(recipe.fusion)),
        "```",
        "",
        f"Made with [teacher-cache](https://pypi.org/project/teacher-cache/) from the cache {manifest.fingerprint}.",
        "",
    ]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=False, width=200)
    return "\n".join(["---", front.rstrip("\n"), "---", "", *lines])


def _facts(cache: TeacherCache, views: list[int], names: str) -> Iterator[tuple[str, str]]:
    recipe, dataset = cache.recipe, cache.recipe.dataset
    yield "images", f"{dataset.name}, split {dataset.split}: {dataset.num_samples:,}"
    yield "classes", f"{cache.num_classes:,}: {names}"
    yield (
        "views",
        f"{len(views)} of {cache.num_views}: {', '.join(map(str, views[:12]))}{', …' if len(views) > 12 else ''}",
    )
    for teacher in recipe.teachers:
        yield "teacher", f"{teacher.architecture}, weights {teacher.weights_digest[:12]}, share {teacher.weight:g}"
    for clip in recipe.clips:
        yield "CLIP", f"{clip.architecture}, weights {clip.weights_digest[:12]}, share {clip.weight:g}"
        yield "prompts", f"{len(clip.templates)}, the first: {clip.templates[0]}"
    yield "fusion", describe_fusion(cache.manifest)
    yield "codec of the cache", str(recipe.codecs)
    if recipe.imported is not None:
        mean = "" if recipe.imported.averaged is None else f", the mean over {recipe.imported.averaged} views"
        yield "imported from", f"{recipe.imported.kind}{mean}"


def _about_views(cache: TeacherCache) -> list[str]:
    views = cache.recipe.views
    if views.made_by is not None:
        return [f"The views were drawn by {views.made_by.tool}; teacher-cache cannot make their pixels again."]
    return [
        "A view is a function of this recipe, its number and the number of the image. teacher-cache makes the pixels "
        "that the teachers saw: `ViewRecipe.model_validate(recipe).apply(images, index, view)`.",
    ]


def _type_of(feature: dict[str, Any]) -> str:
    if feature["_type"] == "List":
        length = feature["length"]
        return f"list of {_type_of(feature['feature'])}" + (f" [{length}]" if length >= 0 else "")
    return "class label" if feature["_type"] == "ClassLabel" else str(feature["dtype"])


def _plain(text: str) -> str:
    """Text from a cache in a table of Markdown: it stays in its cell, and is no markup."""
    line = escape(printable(text))
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)


def _fenced(text: str) -> list[str]:
    """YAML whose text cannot end the block."""
    return [printable(line).replace("```", "'''") for line in text.rstrip("\n").split("\n")]
