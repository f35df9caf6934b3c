"""Code of one's own: `package.module:function`, from the current folder or from what is installed.

A user who names such a function asks for its code. A name that comes with a stored run or cache does not: its code is
imported only if the user has named the same module in the same place before, or lists it in `$TEACHER_CACHE_MODULES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.errors import RecipeError
from cache_tools.system import named

ALLOWED = "TEACHER_CACHE_MODULES"  # environment: names of modules, with commas
_OWN = re.compile(r"[A-Za-z_]\w+(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LIBRARIES = {"timm", "torchvision", "package"}
_OURS = {"cache_tools", "train", "pipeline", "teacher_cache"}
_LINE_LIMIT = 160


class Purpose(NamedTuple):
    """What a function is for, in words for messages.

    Attributes:
        noun: what it makes, such as `network`.
        others: names of other things that are no module, such as `timm:NAME, `.
        function: what it takes and returns.
        near: such names without their colon.
    """

    noun: str
    others: str
    function: str
    near: tuple[str, ...] = ()


def is_own(name: str) -> bool:
    """Whether a name is `package.module:function`."""
    return bool(_OWN.fullmatch(name)) and name.partition(":")[0].lower() not in _LIBRARIES


def remember(name: str) -> None:
    """Record that the user has named this function: its module may be imported for stored runs from now on."""
    named.remember("modules", _entry(name))


def require_consent(name: str, where: object, noun: str = "network") -> None:
    """Refuse to import a module that the user has not named.

    Args:
        name: as a stored run or cache has it.
        where: that run or cache, for messages.
        noun: what the function makes, for messages.

    Raises:
        RecipeError: it is a function of someone's own, and nothing says that the user wants its code to run.
    """
    if not is_own(name):
        return
    module = name.partition(":")[0]
    allowed = {part.strip() for part in os.environ.get(ALLOWED, "").split(",")}
    if allowed & {name, module, module.partition(".")[0]} or named.is_named("modules", _entry(name)):
        return
    place = origin(name)
    raise RecipeError(
        f"to load this {noun}, its code has to be imported, and you have not named it before",
        where=where,
        found=f"{name}, {f'in {place}' if place else 'which is not here'}",
        next_step=f"if you trust that code, set {ALLOWED}={module} and run the command again",
    )


def origin(name: str) -> str | None:
    """The file or folder of the module's top-level package; None if there is none. Imports nothing."""
    _see_current_folder()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0].partition(".")[0])
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    found = spec.origin or next(iter(spec.submodule_search_locations or ()), None)
    return None if found is None else str(Path(found).resolve())


def find_function(name: str, purpose: Purpose) -> Callable[..., Any]:
    """Import the module and return the function.

    Raises:
        RecipeError: no such module or function, or an error in the module.
    """
    module_name, _, attribute = name.partition(":")
    _see_current_folder()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RecipeError(
                f"the module of this {purpose.noun} needs a package that is not installed",
                where=name,
                found=error.name,
            ) from error
        raise RecipeError(
            f"no module '{error.name}'",
            where=name,
            expected=f"{purpose.others}a module of the current folder or of an installed package",
            found=f"none in {Path.cwd()}",
            next_step=_advice(module_name, attribute, purpose),
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise RecipeError(
            f"cannot import the module of this {purpose.noun}",
            where=f"{name}, {place_of(error)}",
            found=first_line(error),
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(
            f"the module has no function '{attribute}'",
            where=f"{name}, {getattr(sys.modules[module_name], '__file__', None)}",
            expected=purpose.function,
        )
    function: Callable[..., Any] = found
    return function


def place_of(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    return f"{frame.filename}, line {frame.lineno}"


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, cut to fit into a one-line message."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= _LINE_LIMIT else f"{lines[0][:_LINE_LIMIT]}…"
    return f"{type(error).__name__}: {text}".removesuffix(": ").rstrip(".")


def _entry(name: str) -> str:
    """A module and its place, as the record of what the user has named has it."""
    return f"{name.partition(':')[0]}\t{origin(name)}"


def _see_current_folder() -> None:
    """Let modules of the current folder be found, after everything that is installed."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _advice(module_name: str, attribute: str, purpose: Purpose) -> str | None:
    import difflib

    if module_name.endswith(".py"):
        return f"leave out '.py': {module_name.removesuffix('.py')}:{attribute}"
    if module_name.partition(".")[0] in _OURS:
        return f"'{module_name.partition('.')[0]}' is a package of teacher-cache: give your module another name"
    close = difflib.get_close_matches(module_name.lower(), purpose.near, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else None
