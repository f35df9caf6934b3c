"""Text from users and strangers: any bytes give plain data of a bounded size, or one clear line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cache_tools.config.text import MAX_RECIPE_BYTES, parse_json, parse_yaml, read_text
from cache_tools.errors import CacheError, RecipeError, WeightsError
from cache_tools.images.class_names import read_names
from cache_tools.images.label_table import read_label_table
from pipeline.networks.prompts import template_set
from pipeline.recipe import load_build_recipe
from train.recipe.loading import load_train_recipe
from train.sweep.options import load_sweep
from train.weights.files import read_config


def levels(count: int, wide: int = 10, opened: str = "[", closed: str = "]", merge: str = "") -> str:
    """YAML in which each line holds the line before `wide` times: `wide` to the power of `count` values."""
    start = "a0: &a0 {k: 1}" if merge else "a0: &a0 [x]"
    lines = [
        f"a{n + 1}: &a{n + 1} {opened}{merge}" + ",".join([f"*a{n}"] * wide) + f"{']' if merge else ''}{closed}"
        for n in range(count)
    ]
    return "\n".join([start, *lines])


TOO_MUCH = {
    "lists without end": "[" * 100_000,
    "mappings without end": "{a: " * 50_000,
    "keys of keys": "? " * 50_000,
    "dashes": "- " * 50_000,
    "aliases of aliases": levels(9),
    "merges of merges": levels(9, opened="{", closed="}", merge="<<: ["),
    "a list that contains itself": "a: &a [*a]",
    "a mapping that contains itself": "&a {b: *a}",
    "many values": "[" + "0," * 110_000 + "]",
    "sexagesimal digits": ":".join(["59"] * 100_000),
    "underscores": "1_" * 100_000,
    "a key twice": "epochs: 3\nseed: 1\nepochs: 4",
    "a key twice inside": "loss: {kind: kd, kind: ce}",
    "too many characters": "#" * (MAX_RECIPE_BYTES + 1),
    "a NUL": "name: a\0b",
    "a tag of Python": "!!python/object/apply:os.system [id]",
    "an undefined alias": "a: *b",
}


@pytest.mark.medium
@pytest.mark.parametrize("text", TOO_MUCH.values(), ids=TOO_MUCH)
def test_yaml_beyond_the_limits_is_refused_at_once(text: str) -> None:
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "no recipe", where="here")
    assert str(caught.value).startswith("no recipe (here); expected ")
    assert len(str(caught.value)) < 1500
    assert time.process_time() - start < 20.0


def test_yaml_within_the_limits_is_what_safe_load_gives() -> None:
    text = "a: &a {k: 1, l: [x, 2.5, null]}\nb: {<<: *a, k: 2}\nc: [*a, *a]\nd: 'é'\n"
    part = {"k": 1, "l": ["x", 2.5, None]}
    assert parse_yaml(text, "", where="") == {"a": part, "b": part | {"k": 2}, "c": [part, part], "d": "é"}
    assert parse_yaml("", "", where="") is None


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[" * 100_000, "NaN", '{"a": Infinity}', "{", "9" * 5000, "\ufeff"]
)
def test_json_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(WeightsError, match=r"^no config \(here\); expected JSON; found "):
        parse_json(text, "no config", where="here", error=WeightsError)


def test_json_that_nests_too_deeply_is_refused() -> None:
    with pytest.raises(RecipeError, match="more than 64 levels"):
        parse_json("[" * 80 + "]" * 80, "no config", where="here")
    assert parse_json("[" * 60 + "]" * 60, "no config", where="here") == json.loads("[" * 60 + "]" * 60)


BAD_BYTES = {
    "not UTF-8": b"name: caf\xe9\n",
    "UTF-16": "name: x\n".encode("utf-16"),
    "a NUL": b"name: x\n\0\n",
    "an escape": b"name: \x1b[31m\n",
    "a line separator": "name: a\u2028b\n".encode(),
    "half a surrogate": "name: \ud800\n".encode("utf-8", "surrogatepass"),
    "random": bytes(range(256)),
}
READERS = {
    "recipe.yaml": lambda path: load_build_recipe(str(path)),
    "train.yaml": lambda path: load_train_recipe(str(path)),
    "sweep.yml": load_sweep,
    "names.txt": lambda path: read_names(str(path), where="dataset.class_order"),
    "names.json": lambda path: read_names(str(path), where="dataset.class_order"),
    "labels.csv": lambda path: read_label_table(path, None),
    "prompts.txt": lambda path: template_set(str(path)),
    "config.json": lambda path: read_config(path.parent),
}


@pytest.mark.parametrize("content", BAD_BYTES.values(), ids=BAD_BYTES)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_bytes_that_are_no_text(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CacheError) as caught:
        READERS[name](tmp_path / name)
    message = str(caught.value)
    assert message.isprintable()
    assert any(words in message for words in ("other bytes in line ", "UTF-16 text", "the control character")), message


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CacheError):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["recipe.yaml", "sweep.yml", "names.txt", "prompts.txt", "config.json"])
def test_a_file_of_any_size_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(100 << 30)  # takes no room on the disk
    with pytest.raises(CacheError, match=r"at most .* bytes; found 107,374,182,400 bytes"):
        READERS[name](tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("ant\nbéé\n".encode("utf-8-sig"))
    assert read_text(tmp_path / "a.txt", "unreadable") == "ant\nbéé\n"
    assert read_names(str(tmp_path / "a.txt"), where="") == ["ant", "béé"]


def test_folders_and_devices_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found a folder"):
        read_text(tmp_path, "unreadable")
    with pytest.raises(RecipeError, match="found a pipe, device or socket"):
        read_text(Path("/dev/zero"), "unreadable")
    with pytest.raises(RecipeError, match="found no such file"):
        read_text(tmp_path / "x", "unreadable")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("path,ant,ant\na.png,1,0\n", "a column twice: ant"),
        ("path,ant, ant\na.png,1,0\n", "a column twice: ant"),
        ("path,labels\n" + "".join(f"{n}.png,c{n}\n" for n in range(100_000)), "100,000 images and 100,000 classes"),
    ],
)
def test_a_table_of_labels_is_checked_before_its_labels_take_memory(table: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(CacheError, match=words):
        read_label_table(tmp_path / "labels.csv", None)
