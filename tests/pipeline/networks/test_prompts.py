from pathlib import Path

import pytest
from open_clip import OPENAI_IMAGENET_TEMPLATES

from cache_tools.errors import RecipeError
from pipeline.networks.prompts import prompt_class_name, render_prompts, template_set


def test_the_richkd_set_has_the_twelve_templates_of_the_papers_code() -> None:
    templates = template_set("richkd")
    assert len(templates) == len(set(templates)) == 12
    assert templates[0] == "a photo of a {}"
    assert templates[9] == "a natural photo of a {} in the wild"
    assert templates[-1] == "a high quality photo of a {}"


def test_the_openai_set_renders_as_in_open_clip() -> None:
    templates = template_set("openai")
    assert len(templates) == 80
    for ours, theirs in zip(templates, OPENAI_IMAGENET_TEMPLATES, strict=True):
        assert ours.format("tabby cat") == theirs("tabby cat")


def test_the_siglip_set_has_one_template() -> None:
    assert template_set("siglip") == ("a photo of a {}.",)


@pytest.mark.parametrize("name", ["richkd", "openai", "siglip"])
def test_every_template_has_one_placeholder(name: str) -> None:
    assert all(template.count("{}") == 1 for template in template_set(name))


def test_a_file_keeps_its_order_and_skips_comments(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\n  a scan of the digit {}  \nthe number {}, écrit à la main\n", encoding="utf-8")
    assert template_set(str(path)) == ("a scan of the digit {}", "the number {}, écrit à la main")


@pytest.mark.parametrize("bad", ["a photo of a cat", "{} and {}"])
def test_a_bad_line_is_named_in_the_error(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(f"# first\na photo of a {{}}\n{bad}\n")
    with pytest.raises(RecipeError, match=r"prompts\.txt, line 3") as info:
        template_set(str(path))
    assert bad in str(info.value)


def test_empty_unreadable_and_missing_files(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("# nothing\n")
    binary.write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(RecipeError, match="no prompt templates"):
        template_set(str(empty))
    with pytest.raises(RecipeError, match="UTF-8"):
        template_set(str(binary))
    with pytest.raises(RecipeError, match="richkd, openai, siglip or a file"):
        template_set("richdk")


def test_given_templates_are_kept_and_checked() -> None:
    assert template_set(("the {}", "a {}")) == ("the {}", "a {}")
    with pytest.raises(RecipeError, match=r"exactly one \{\} \(template 1\)"):
        template_set(["the {}", "a cat"])
    with pytest.raises(RecipeError, match="no prompt templates"):
        template_set([])


def test_class_names_become_words_and_prompts_are_ordered_by_template() -> None:
    assert prompt_class_name("aquarium_fish") == "aquarium fish"
    assert prompt_class_name("T-shirt/top") == "T-shirt/top"
    assert render_prompts(("a {}", "the {}"), ("big_cat", "a{}b")) == ["a big cat", "a a{}b", "the big cat", "the a{}b"]
