"""Networks of one's own: `package.module:function`, from the current folder or from what is installed.

The function gets the number of classes and returns an `nn.Module`. A network with timm's interface is used as it is. Of
any other, the features are the input of its last linear layer, which must give the logits.

A user who names such a network asks for its code. A name that comes with a stored run or cache does not: its code is
imported only if the user has named the same module in the same place before, or lists it in `$TEACHER_CACHE_MODULES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.errors import RecipeError
from cache_tools.system import named

if TYPE_CHECKING:
    from torch import nn

ALLOWED = "TEACHER_CACHE_MODULES"  # environment: names of modules, with commas
_OWN = re.compile(r"[A-Za-z_]\w+(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_LIBRARIES = {"timm", "torchvision", "package"}
_OURS = {"cache_tools", "train", "pipeline", "teacher_cache"}
_INTERFACE = ("forward_features", "forward_head", "get_classifier", "num_features")


def is_own(name: str) -> bool:
    """Whether a name of a network is `package.module:function`."""
    return bool(_OWN.fullmatch(name)) and name.partition(":")[0].lower() not in _LIBRARIES


def create(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Import the module, call the function and give its network timm's interface.

    Raises:
        RecipeError: no such module or function, an error in it, or a result that is no classifier of these classes.
    """
    from torch import nn

    function = find_function(name)
    remember(name)
    try:
        network = function(**options, **_arguments(function, num_classes, options, name))
    except RecipeError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise RecipeError(
            "the function that builds the network failed", where=f"{name}, {_place(error)}", found=_reason(error)
        ) from error
    if not isinstance(network, nn.Module):
        raise RecipeError(
            "the function returns no network",
            where=name,
            expected="a torch.nn.Module",
            found=type(network).__name__,
        )
    if all(hasattr(network, attribute) for attribute in _INTERFACE):
        classifier = network.get_classifier()  # type: ignore[operator]
        if isinstance(classifier, nn.Linear) and classifier.out_features != num_classes:
            raise _other_class_count(name, num_classes, classifier.out_features)
        return network
    from train.zoo.own_net import OwnNetwork

    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    fitting = [module for module in linear if module.out_features == num_classes]
    if linear and not fitting:
        raise _other_class_count(name, num_classes, linear[-1].out_features)
    if not fitting:
        raise RecipeError(
            "the network has no linear layer that gives the logits",
            where=name,
            expected=f"a Linear layer, or timm's interface: {', '.join(_INTERFACE)}",
            found=type(network).__name__,
        )
    return OwnNetwork(network, fitting[-1], name, num_classes)


def remember(name: str) -> None:
    """Record that the user has named this network: its module may be imported for stored runs from now on."""
    named.remember("modules", _entry(name))


def require_consent(name: str, where: object) -> None:
    """Refuse to import a module that the user has not named.

    Args:
        name: of a network, as a stored run or cache has it.
        where: that run or cache, for messages.

    Raises:
        RecipeError: it is a network of someone's own, and nothing says that the user wants its code to run.
    """
    if not is_own(name):
        return
    module = name.partition(":")[0]
    allowed = {part.strip() for part in os.environ.get(ALLOWED, "").split(",")}
    if allowed & {name, module, module.partition(".")[0]} or named.is_named("modules", _entry(name)):
        return
    place = origin(name)
    raise RecipeError(
        "to load this network, its code has to be imported, and you have not named it before",
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


def _entry(name: str) -> str:
    """A module and its place, as the record of what the user has named has it."""
    return f"{name.partition(':')[0]}\t{origin(name)}"


def _see_current_folder() -> None:
    """Let modules of the current folder be found, after everything that is installed."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def find_function(name: str) -> Callable[..., Any]:
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
                "the module of this network needs a package that is not installed", where=name, found=error.name
            ) from error
        raise RecipeError(
            f"no module '{error.name}'",
            where=name,
            expected="timm:NAME, torchvision:NAME, or a module of the current folder or of an installed package",
            found=f"none in {Path.cwd()}",
            next_step=_advice(module_name, attribute),
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise RecipeError(
            "cannot import the module of this network", where=f"{name}, {_place(error)}", found=_reason(error)
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise RecipeError(
            f"the module has no function '{attribute}'",
            where=f"{name}, {getattr(sys.modules[module_name], '__file__', None)}",
            expected="a function of the number of classes that returns a torch.nn.Module",
        )
    function: Callable[..., Any] = found
    return function


def _advice(module_name: str, attribute: str) -> str | None:
    from train.weights.text import nearest

    if module_name.endswith(".py"):
        return f"leave out '.py': {module_name.removesuffix('.py')}:{attribute}"
    if module_name.partition(".")[0] in _OURS:
        return f"'{module_name.partition('.')[0]}' is a package of teacher-cache: give your module another name"
    return nearest(module_name, ("timm", "torchvision"))


def _arguments(function: Callable[..., Any], num_classes: int, options: Collection[str], name: str) -> dict[str, Any]:
    """`num_classes` as a keyword, or under the name of the only argument without a default; else nothing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {"num_classes": num_classes}
    names = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    required = [
        each.name
        for each in parameters
        if each.default is each.empty and each.name in names and each.name not in options
    ]
    by_name = "num_classes" in names or any(each.kind is each.VAR_KEYWORD for each in parameters)
    if by_name and set(required) <= {"num_classes"}:
        return {"num_classes": num_classes}
    if by_name or len(required) > 1:
        raise RecipeError(
            "the function needs other arguments than the number of classes",
            where=name,
            expected="num_classes alone, and defaults for the rest",
            found=", ".join(required),
        )
    return dict.fromkeys(required, num_classes)


def _other_class_count(name: str, num_classes: int, found: int) -> RecipeError:
    return RecipeError(
        "the network has another class count than the dataset",
        where=name,
        expected=f"{num_classes} outputs of its last linear layer",
        found=found,
        next_step="let the function use its argument num_classes",
    )


def _place(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    return f"{frame.filename}, line {frame.lineno}"


def _reason(error: BaseException) -> str:
    from train.weights.text import first_line

    return first_line(error)
