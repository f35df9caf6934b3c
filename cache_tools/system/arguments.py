"""Text, paths and numbers that people type: what no command takes, and `~` for a home folder."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_tools.errors import RecipeError

MAX_INTEGER = 1 << 63
# Half surrogates stand for bytes that are not UTF-8. Other control characters may be in paths; printing escapes them.
_UNPRINTABLE = re.compile("[\0\ud800-\udfff]")


def expand_user(path: str | Path) -> Path:
    """A path with `~` and `~NAME` replaced by the home folder.

    Raises:
        RecipeError: there is no such user, or the process has no home folder (`HOME` is not set).
    """
    text = os.path.expanduser(path)
    unknown = text.startswith("~") or (os.environ.get("HOME") == "" and os.name != "nt")
    if not str(path).startswith("~") or not unknown:
        return Path(text)
    name = str(path).split("/", 1)[0]
    raise RecipeError(
        "the home folder is not known" if name == "~" else "no such user",
        where=path,
        expected="a path without ~" if name != "~" else None,
        next_step="set HOME, or give an absolute path (TEACHER_CACHE_HOME for the caches)",
    )


def unprintable(text: str) -> str | None:
    """The first character of a text that no file takes, NUL or half a surrogate; None if there is none."""
    found = _UNPRINTABLE.search(text)
    return None if found is None else ascii(found[0])[1:-1]


def path(text: str) -> Path:
    """A path from the command line. The name of this function is what `--help` shows for its values."""
    import typer

    if not text:
        raise typer.BadParameter("the path is empty")
    return Path(text)


def check_arguments(parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]) -> None:
    """Check the values of a command's arguments and options; defaults need no check.

    Args:
        parameters: of the command's function, annotated for typer.

    Raises:
        RecipeError: empty text, text that is not UTF-8, NaN, infinity, or a huge number. The
            message names the option.
    """
    for key, given in values.items():
        if given == parameters[key].default:
            continue
        for value in given if isinstance(given, list | tuple) else (given,):
            _check(_shown(parameters[key]), value)


def _shown(parameter: inspect.Parameter) -> str:
    """`--option`, or the name of an argument."""
    for info in getattr(parameter.annotation, "__metadata__", ()):
        # typer takes the first flag for a default until it reads the annotation
        flags = [getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())]
        if flag := next((one for one in flags if isinstance(one, str) and one.startswith("-")), None):
            return flag.partition("/")[0]
    return parameter.name.upper()


def _check(name: str, value: Any) -> None:
    if isinstance(value, str | Path):
        text = str(value)
        if not text:
            raise RecipeError("an argument is empty", where=name, next_step="give a value or leave it out")
        if (found := unprintable(text)) is not None:
            expected = "text in UTF-8"
            raise RecipeError("an argument is no plain text", where=name, expected=expected, found=found)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError("an argument is no number", where=name, expected="a finite number", found=value)
    elif isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise RecipeError("an argument is too large", where=name, expected=f"a number below {MAX_INTEGER:.0e}")


def require_current_folder() -> None:
    """Raise RecipeError if the current folder has been removed: no relative path means anything there."""
    try:
        os.getcwd()
    except OSError as error:
        raise RecipeError(
            "the current folder does not exist any more", next_step="change to another folder and run the command again"
        ) from error
