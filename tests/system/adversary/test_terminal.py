"""Names in received files reach a terminal, a log, a page and a picture with their control characters escaped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cache_tools.config import dump_yaml
from cache_tools.errors import printable
from tests.support import cache_factory, tiny_run
from tests.support.in_process import invoke
from tests.support.run_folders import write_run, write_sweep
from train.run import train_student

pytestmark = [
    pytest.mark.medium,
    pytest.mark.filterwarnings("ignore:Glyph"),
]

# Colour and title of the terminal, C1, carriage return and a forged line, direction of text, zero width, line ends.
HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\rgone\nsound: all\x7f\u202eesrever\u2066\u200b\u200f\u2028\ufeffend"
INVISIBLE = "\u202e\u2066\u200b"  # a class folder may not have control characters, but these
SHORT = "\x1b7\u202e\n!"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("terminal")
        patch.setenv("TEACHER_CACHE_HOME", str(folder / "home"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def pictures(root: Path) -> Path:
    """Folders of images whose classes have hostile names, in a folder with one."""
    made = tiny_run.write_pictures(root / "plain", train=30, test=9)
    for split in ("train", "test"):
        for number, name in enumerate(tiny_run.CLASSES):
            (made / split / name).rename(made / split / f"{number}{INVISIBLE}{name}")
    return made.rename(root / f"pictures {SHORT}")


@pytest.fixture(scope="module")
def cache(root: Path, pictures: Path) -> Path:
    """In the cache home, with hostile names and provenance; components, so that every analysis applies."""
    manifest: dict[str, Any] = {"name": f"evil {HOSTILE}", "store": "components"}
    path = tiny_run.write_cache(root / "home" / f"evil {SHORT}-000000000000.zarr", pictures, **manifest)
    stored = json.loads((path / "zarr.json").read_text())
    assert HOSTILE in json.dumps(stored, ensure_ascii=False) or "\\u202e" in json.dumps(stored)
    return path


@pytest.fixture(scope="module")
def run(root: Path, cache: Path) -> Path:
    recipe = tiny_run.recipe(cache, root / f"run {SHORT}", epochs=1, loggers=(), name="recipe")
    return train_student(recipe).folder


def shown(result: Any) -> str:
    """What a command printed. There must be no raw control character in it, and no line that a name has forged."""
    text: str = result.stdout + result.stderr
    raw = sorted({f"U+{ord(each):04X}" for each in text if not each.isprintable() and each != "\n"})
    assert not raw, f"{raw} in {text!r}"
    assert not re.search(r"(?m)^(sound: all|!)", text), text
    return text


@pytest.mark.parametrize(
    "words",
    [
        ["ls"], ["ls", "--json"], ["info", "{cache}"], ["info", "{cache}", "--json"], ["verify", "{cache}"],
        ["verify", "{cache}", "--images"], ["stats", "{cache}"], ["stats", "{cache}", "--json"],
        ["show", "{cache}"], ["show", "{cache}", "--disagree", "--json"], ["show", "{cache}", "--class", HOSTILE],
        ["fidelity", "{cache}", "--codec", "float16"], ["fidelity", "{cache}", "--codec", "float16", "--json"],
        ["tune-fusion", "{cache}"], ["path", "{cache}"], ["rm", "{cache}"], ["prune", "--older-than", "0s"],
        ["repair", "{cache}"], ["info", f"no such {HOSTILE}"], ["copy", "{cache}", "{new}"],
        ["recode", "{cache}", "--codec", "float16", "--out", "{new}"], ["fuse", "{cache}", "--out", "{new}"],
    ],
    ids=lambda words: " ".join(words[:1] + [word for word in words[1:] if word.startswith("--")]),
)  # fmt: skip
def test_commands_on_a_cache(cache: Path, tmp_path: Path, words: list[str]) -> None:
    names = {"{cache}": str(cache), "{new}": str(tmp_path / f"new {SHORT}.zarr")}
    result = invoke("cache-tools", *(names.get(word, word) for word in words))
    text = shown(result)
    assert result.exit_code in {0, 2}, text
    if "--json" in words:
        json.loads(result.stdout)


def test_damage_is_reported_with_escaped_names(cache: Path, tmp_path: Path) -> None:
    damaged = tmp_path / f"damaged {SHORT}.zarr"
    shutil.copytree(cache, damaged)
    next(damaged.glob("*/c.*")).write_bytes(b"\x1b[31m")
    (damaged / f"foreign {SHORT}").write_bytes(b"")
    for words in (["verify", damaged], ["repair", damaged], ["repair", damaged, "--yes"], ["stats", damaged]):
        shown(invoke("cache-tools", *words))


def test_training(cache: Path, root: Path, run: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path / f"new {SHORT}", epochs=1, loggers=(), name="recipe")
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    printed = shown(invoke("train-student", tmp_path / "recipe.yaml"))
    assert printable(SHORT) in printed
    described = invoke("train-student", tmp_path / "recipe.yaml", "--show-recipe")
    assert yaml.safe_load(shown(described) and described.stdout)["name"] == "recipe"
    shown(invoke("train-student", tmp_path / "recipe.yaml", "--json"))
    shown(invoke("train-student", tmp_path / "recipe.yaml", "--student", f"no such {HOSTILE}"))
    shown(invoke("train-student", tmp_path / f"no such {HOSTILE}.yaml"))


def test_what_is_done_with_a_run(run: Path, tmp_path: Path) -> None:
    report = shown(invoke("evaluate-student", run, "--device", "cpu"))
    assert printable(SHORT) in report
    json.loads(invoke("evaluate-student", run, "--device", "cpu", "--json").stdout)
    shown(invoke("export-student", run, "--format", "safetensors", "--out", tmp_path / f"export {SHORT}"))
    shown(invoke("report-students", run, "--out", tmp_path / f"page {SHORT}.html"))


def test_a_sweep(cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(cache, tmp_path, epochs=1, loggers=(), name="recipe")
    (tmp_path / "recipe.yaml").write_text(
        json.dumps(recipe.model_dump(mode="json", exclude={"out"}), ensure_ascii=True)
    )
    words = ["--students", "resnet8", "--losses", "kd,ce", "--workers", 1, "--out", tmp_path / f"sweep {SHORT}"]
    shown(invoke("sweep-students", tmp_path / "recipe.yaml", *words))
    shown(invoke("sweep-students", tmp_path / "recipe.yaml", *words, "--json"))


def test_a_page_shows_escaped_names(tmp_path: Path) -> None:
    names = (f"a {HOSTILE}", *(f"class {number}" for number in range(9)))
    runs = [
        write_run(tmp_path / f"{number} {SHORT}", seed=number, class_names=names, command=f"train {HOSTILE}")
        for number in range(2)
    ]
    write_sweep(tmp_path / "sweep", {f"resnet8 {HOSTILE}"[:12]: 0.9}, seeds=1)
    invoke("report-students", *runs, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not [each for each in page if not each.isprintable() and each not in "\n\t"]
    assert printable(HOSTILE[:8]) in page
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    if data is not None:  # what the script shows
        assert "\\u202e" not in data[1].replace("\\\\u202e", "")


def test_pictures_with_hostile_titles_can_be_drawn() -> None:
    from cache_tools.plotting import new_figure, png, shorten

    figure = new_figure(4, 3, f"{HOSTILE} $\\frac{{", HOSTILE)
    figure.subplots().set_yticks([0], [shorten(f"$x_{{ {HOSTILE}")])
    assert not [text for text in figure.findobj(lambda one: hasattr(one, "get_text")) if "\x1b" in text.get_text()]
    assert png(figure).startswith(b"\x89PNG")


def test_a_factory_cache_with_every_name_hostile(root: Path, tmp_path: Path) -> None:
    images = cache_factory.tiny_images()
    manifest = cache_factory.tiny_manifest(images, name=HOSTILE)
    changed = manifest.model_copy(
        update={"provenance": {HOSTILE: {HOSTILE: HOSTILE}, "command": HOSTILE}, "build_recipe": {HOSTILE: HOSTILE}}
    )
    cache_factory.build(tmp_path / "tiny.zarr", changed, images)
    for words in (["info", tmp_path / "tiny.zarr"], ["verify", tmp_path / "tiny.zarr", "--replay", "2"]):
        assert printable(HOSTILE) in shown(invoke("cache-tools", *words)) or words[0] == "verify"
