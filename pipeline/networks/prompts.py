"""Prompt templates: sentences with one `{}` for the class name. Their text embeddings average to class embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cache_tools.config.text import MAX_RECIPE_BYTES, read_text
from cache_tools.errors import RecipeError

# In the order of the paper's code: the order is part of a cache's identity.
RICHKD_TEMPLATES = (
    "a photo of a {}",
    "a blurry photo of a {}",
    "a cropped photo of a {}",
    "a close-up photo of a {}",
    "a low resolution photo of a {}",
    "a bright photo of a {}",
    "a picture of a {}",
    "a detailed image of a {}",
    "a sketch of a {}",
    "a natural photo of a {} in the wild",
    "a realistic image of a {}",
    "a high quality photo of a {}",
)
SIGLIP_TEMPLATES = ("a photo of a {}.",)
BUILTIN_SETS = ("richkd", "openai", "siglip")


def template_set(choice: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a built-in set or a text file, or the given ones.

    Args:
        choice: `richkd` (the 12 of the paper's code), `openai` (the 80 for ImageNet), `siglip` (one), a UTF-8 file with
            one template per line (empty lines and lines that start with `#` are skipped), or the templates themselves.

    Raises:
        RecipeError: neither a set nor a file, an unreadable or empty file, or a template without exactly one `{}`.
    """
    if not isinstance(choice, str):
        return _checked([(f"template {number}", text) for number, text in enumerate(choice)], "clip.templates")
    if choice == "richkd":
        return RICHKD_TEMPLATES
    if choice == "siglip":
        return SIGLIP_TEMPLATES
    if choice == "openai":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(render("{}") for render in OPENAI_IMAGENET_TEMPLATES)
    return _read_file(Path(choice))


def prompt_class_name(name: str) -> str:
    """A dataset's class name as words: `aquarium_fish` → `aquarium fish`."""
    return " ".join(name.replace("_", " ").split())


def render_prompts(templates: tuple[str, ...], class_names: tuple[str, ...]) -> list[str]:
    """All prompts, template by template: prompt p·C + c is template p with class c."""
    words = [prompt_class_name(name) for name in class_names]
    # Not str.format: other braces in a template or class name are plain characters.
    return [template.replace("{}", word) for template in templates for word in words]


def _read_file(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise RecipeError(
            "no such prompt templates", where=path, expected=f"{', '.join(BUILTIN_SETS)} or a file with one per line"
        )
    lines = read_text(path, "cannot read the prompt templates", limit=MAX_RECIPE_BYTES).splitlines()
    texts = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return _checked([(f"{path}, line {n}", text) for n, text in texts if text and not text.startswith("#")], path)


def _checked(templates: Sequence[tuple[str, str]], where: object) -> tuple[str, ...]:
    """The templates of (place, template) entries, each with exactly one `{}`."""
    for place, text in templates:
        if text.count("{}") != 1:
            raise RecipeError(
                "a prompt template needs exactly one {}",
                where=place,
                expected="like 'a photo of a {}'",
                found=f"{text!r} with {text.count('{}')}",
            )
    if not templates:
        raise RecipeError("no prompt templates", where=where, expected="one per line, like 'a photo of a {}'")
    return tuple(text for _, text in templates)
