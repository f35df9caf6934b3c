"""`cache-tools show` as a command: its table, its files, its JSON, and one clear error for bad input."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoints
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cache_tools import plugins
from cache_tools.cli import app
from cache_tools.reader import TeacherCache
from tests.support.next_commands import commands_in, parse
from tests.support.show_case import CLASSES, declare_plugins, write_cache, write_pictures
from tests.support.tiny_run import recipe
from train.run import train_student

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("show") / "c.zarr", pictures, store="components")


def run(*arguments: object, code: int = 0) -> Result:
    words = ["show", *map(str, arguments)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("order", ["", "--disagree", "--confused", "--suspicious"])
def test_table_fits_80_columns_and_says_what_json_says(cache: TeacherCache, order: str) -> None:
    options = [order] if order else []
    text = run(cache.path, *options, "--count", 4).stdout
    data = json.loads(run(cache.path, *options, "--count", 4, "--json").stdout)
    table = text.partition("\n\n")[2].partition("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    rows = [line.split() for line in table.splitlines()]
    for each in data["samples"]:
        flat = " ".join(word for row in rows for word in row)
        said = [
            f"{'✓' if mean['right'] else '✗'} {mean['top'][0]['class']} {mean['top'][0]['probability']:.2f}"
            for mean in (each["mean"][source] for source in ("teacher", "clip", "fusion"))
        ]
        figure = [] if each["figure"] is None else [f"{each['figure']:.3f}"]
        assert " ".join([str(each["sample"]), each["file"], each["class"], *figure, *said]) in flat
    (following,) = commands_in(text)
    assert following[:3] == ["cache-tools", "show", str(cache.path)]
    assert parse(following)["out"] == Path("samples.html")
    assert parse(following)["count"] == 4


def test_gains_are_in_the_text(cache: TeacherCache) -> None:
    text, data = run(cache.path).stdout, json.loads(run(cache.path, "--json").stdout)
    assert data["helped"]
    for row in (*data["helped"], *data["hurt"]):
        gained = [f"{100 * row[f'gain_over_{name}']:+.2f}" for name in ("teacher", "clip")]
        assert " ".join([row["class"], str(row["n"]), *gained]) in " ".join(text.split())


def test_files_are_written(cache: TeacherCache, tmp_path: Path) -> None:
    for name in ("new/sheet.png", "new/sheet.HTML"):
        text = run(cache.path, "--sample", 7, "--sample", 2, "--sample", 7, "--view", "3,0", "--out", tmp_path / name)
        assert str(tmp_path / name) in text.stdout
        assert commands_in(text.stdout) == [["cache-tools", "stats", str(cache.path)]]
    with Image.open(tmp_path / "new/sheet.png") as picture:
        assert picture.format == "PNG"
    page = (tmp_path / "new/sheet.HTML").read_text()
    assert page.index('id="sample-7"') < page.index('id="sample-2"')
    assert page.count("<article") == 2
    assert page.count("<img") == 4


def test_next_command_keeps_the_options(cache: TeacherCache) -> None:
    text = run(cache.path, "--class", "cat", "--view", "1", "--temperature", 2, "--count", 3).stdout
    (words,) = commands_in(text)
    options = parse(words)
    kept = {name: options[name] for name in ("class_name", "view", "temperature", "count")}
    assert kept == {"class_name": "cat", "view": "1", "temperature": 2.0, "count": 3}


def test_view_all_shows_all(cache: TeacherCache) -> None:
    data = json.loads(run(cache.path, "--sample", 0, "--view", "all", "--json").stdout)
    assert data["views"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "3", "--class", "cat"], "expected one of them; found --sample and --class"),
        (["--disagree", "--confused", "--suspicious"], "found --disagree and --confused and --suspicious"),
        (["--sample", "3", "--count", "2"], "--count is not for samples that are named"),
        (["--sample", "45"], "no such sample"),
        (["--class", "unicorn"], "no such class"),
        (["--view", "0,0"], "bad --view"),
        (["--view", "1,x"], "bad --view"),
        (["--view", "9"], "no such view"),
        (["--view", "9" * 5000], "bad --view"),
        (["--out", "sheet.pdf"], "ends in .png or .html"),
        (["--temperature", "0"], "bad --temperature"),
        (["--count", "500", "--view", "all", "--data-dir", "nowhere"], "not found"),
        (["--data-dir", "nowhere"], "not found"),
        (["--student", "nowhere"], "no such checkpoint"),
    ],
)
def test_bad_input_is_one_clear_error(
    cache: TeacherCache, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    declare_plugins(monkeypatch)
    error = run(cache.path, *options, code=2).stderr
    assert len(error.splitlines()) == 1
    assert message in error


def test_missing_plugin_is_one_clear_error(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda **wanted: EntryPoints())
    error = run(cache.path, "--student", "runs/any", code=2).stderr
    assert "the plugin that runs this network is not installed (teacher_cache.plugins: student)" in error
    assert "Reinstall teacher-cache with pip" in error


def test_a_trained_student_is_asked(
    cache: TeacherCache, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare_plugins(monkeypatch)
    folder = tmp_path / "run"
    train_student(recipe(cache.path, folder, epochs=1, loggers=()))
    text = run(cache.path, "--student", folder, "--out", tmp_path / "page.html").stdout
    assert "student: resnet8, 1 epoch" in text
    assert "another cache" not in text
    assert "student: " in (tmp_path / "page.html").read_text()
    other = write_cache(tmp_path / "other.zarr", pictures, store="fused")
    text = run(other.path, "--student", folder).stdout
    assert f"The student learned from another cache, {cache.manifest.fingerprint[:12]}." in text
    fewer = write_cache(tmp_path / "fewer.zarr", write_pictures(tmp_path / "six", names=CLASSES[:6]))
    error = run(fewer.path, "--student", folder, code=2).stderr
    assert "the student has other classes than the cache" in error
    assert "expected 6 classes" in error
    assert "found 7 classes, such as 'gnu'" in error
