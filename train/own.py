"""Networks of one's own: `package.module:function`, from the current folder or from what is installed.

The function gets the number of classes and returns an `nn.Module`. A network with timm's interface is used as it is. Of
any other, the features are the input of its last linear layer, which must give the logits.

A user who names such a network asks for its code. A name that comes with a stored run or cache does not: its code is
imported only if the user has named the same module in the same place before, or lists it in `$TEACHER_CACHE_MODULES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from cache_tools.errors import RecipeError
from cache_tools.system import own_code
from cache_tools.system.own_code import ALLOWED, first_line, is_own, place_of, remember, require_consent

if TYPE_CHECKING:
    from torch import nn

__all__ = ["ALLOWED", "create", "find_function", "is_own", "remember", "require_consent"]

_INTERFACE = ("forward_features", "forward_head", "get_classifier", "num_features")
_NETWORK = own_code.Purpose(
    "network",
    "timm:NAME, torchvision:NAME, or ",
    "a function of the number of classes that returns a torch.nn.Module",
    ("timm", "torchvision"),
)


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
            "the function that builds the network failed", where=f"{name}, {place_of(error)}", found=first_line(error)
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


def find_function(name: str) -> Callable[..., Any]:
    """Import the module and return the function; raises as `cache_tools.system.own_code.find_function`."""
    return own_code.find_function(name, _NETWORK)


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
