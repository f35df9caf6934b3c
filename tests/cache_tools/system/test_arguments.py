"""What people type: the home folder, characters that no file takes, and options whose names errors tell."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from cache_tools.console import command
from cache_tools.errors import RecipeError
from cache_tools.files import cache_home
from cache_tools.system.arguments import check_arguments, expand_user, unprintable
from tests.support.odd_commands import run


def test_the_home_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/here")
    assert [expand_user(path) for path in ("~", "~/a", "a/~", Path("~/b"))] == [
        Path("/here"), Path("/here/a"), Path("a/~"), Path("/here/b"),
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["~no_such_user/a", "~no_such_user"])
def test_a_user_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(RecipeError, match=r"no such user \(~no_such_user"):
        expand_user(path)


def test_without_a_home_folder_the_cache_home_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("TEACHER_CACHE_HOME")
    with pytest.raises(RecipeError, match=r"the home folder is not known .*TEACHER_CACHE_HOME"):
        cache_home()
    monkeypatch.setenv("TEACHER_CACHE_HOME", "/caches")
    assert cache_home() == Path("/caches")


@pytest.mark.parametrize(("text", "found"), [("é\t\n", None), ("a\0", "\\x00"), ("\x1b[", None), ("\udcff", "\\udcff")])
def test_characters_that_no_file_takes(text: str, found: str | None) -> None:
    assert unprintable(text) == found


def a_command(
    place: Annotated[Path | None, typer.Option("--where")] = None,
    rate: Annotated[float | None, typer.Option("--rate")] = None,
    title: Annotated[str, typer.Option("--title")] = "",
    several: Annotated[list[str] | None, typer.Option("--several")] = None,
    named: Annotated[int, typer.Argument()] = 3,
) -> None: ...


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": float("nan")}, "--rate"),
        ({"rate": float("inf")}, "--rate"),
        ({"several": ["a", ""]}, "--several"),
        ({"several": ["a\udcff"]}, "--several"),
        ({"place": Path("a\0b")}, "--where"),
        ({"named": 1 << 70}, "NAMED"),
    ],
)
def test_errors_name_the_option(values: dict[str, Any], words: str) -> None:
    parameters = inspect.signature(a_command, eval_str=True).parameters
    with pytest.raises(RecipeError, match=rf"\({words}\)"):
        check_arguments(parameters, values)
    check_arguments(parameters, {"title": "", "rate": 0.5, "place": None, "several": ["a"], "named": 3})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train-student", ["--out", ""]),
        ("export-student", [""]),
        ("report-students", ["a", ""]),
        ("build-cache", ["--data-dir="]),
    ],
)
def test_an_empty_path_is_not_the_current_folder(name: str, arguments: list[str]) -> None:
    ended = run(name, arguments)
    assert (ended.code, ended.problem) == (2, None)
    assert "the path is empty" in ended.output


def test_every_error_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def fails() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/x")

    with pytest.raises(SystemExit) as ended:
        fails()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot write or read: No such file or directory (/proc/x).")
