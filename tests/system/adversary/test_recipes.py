"""Random recipes through every command that reads one: a clear line, or the work stops for lack of images.

TEACHER_CACHE_LONG_TESTS=1 runs 1500 of them, TEACHER_CACHE_FUZZ=20 other ones each time.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.odd_commands import names_below, run
from tests.support.odd_recipes import odd_recipes
from tests.support.turns import turns

pytestmark = [pytest.mark.turns, pytest.mark.medium]
SEED = random.randrange(1 << 30) if "TEACHER_CACHE_FUZZ" in os.environ else 0
# With these the work stops where the images are opened, whatever the recipe says.
STOP = ("--set", "dataset.name=folder", "--set", "dataset.data_dir=no/such/folder", "--set", "device=cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; nothing outside it changes."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(work / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(work / "user"))  # commands record there what the user has named
    outside = names_below(Path("/etc"), tmp_path, leave_out=work)
    yield work
    assert names_below(Path("/etc"), tmp_path, leave_out=work) - outside == set()


def test_random_recipes(folder: Path) -> None:
    count, codes, wrong = turns(20, 1500), Counter[str](), []
    for number, (kind, text) in enumerate(odd_recipes(count, SEED)):
        (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        lines: list[tuple[str, ...]] = []
        if kind == "build":
            lines += [("build-cache", "recipe.yaml", "--show-recipe"), ("build-cache", "recipe.yaml", *STOP)]
        elif kind == "train":
            lines += [("train-student", "recipe.yaml", "--show-recipe"), ("train-student", "recipe.yaml", *STOP)]
            lines += [("sweep-students", "recipe.yaml", "--seeds", "2", "--show-trials")]
        else:
            lines += [("sweep-students", "--sweep", "recipe.yaml", "--show-trials")]
        for command, *arguments in lines:
            ended = run(command, arguments)
            codes[f"{command} {ended.code}"] += 1
            if ended.problem is not None:
                wrong.append(f"{SEED}-{number} {command} {' '.join(arguments)}: {ended.problem}\n{text[:600]}")
    print(f"{count} recipes, {sum(codes.values())} commands: {dict(sorted(codes.items()))}")
    assert not wrong, "\n\n".join(wrong[:10])
    assert sum(number for name, number in codes.items() if name.endswith(" 0")) > count // 20, "some recipes are valid"
