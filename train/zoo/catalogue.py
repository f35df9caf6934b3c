"""The list of students that `train-student --list-students` prints. The zoo's part needs no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from cache_tools.errors import RecipeError
from cache_tools.screen import TextTable, count
from train.recipe.student_names import ZOO_NAMES

CLASSES = 100
# Parameters of the zoo's networks for that many classes, in the order of ZOO_NAMES.
_PARAMETERS = (
    83_892, 181_108, 278_324, 472_756, 667_188, 861_620, 1_736_564, 1_233_540, 7_433_860, 11_220_132, 23_705_252,
    180_916, 703_284, 569_780, 2_255_156, 3_965_028, 9_277_284, 9_462_180, 14_774_436, 20_086_692, 812_836, 949_258,
    1_355_528,
)  # fmt: skip
ZOO_PARAMETERS = dict(zip(ZOO_NAMES, _PARAMETERS, strict=True))


def students_text(pattern: str | None) -> str:
    """The zoo with its sizes, or the names that match a pattern.

    Args:
        pattern: `resnet*`, `timm:*small*`, `torchvision:*`; a word matches anywhere in a name.

    Raises:
        RecipeError: no student matches.
    """
    if pattern is None:
        return "\n".join(
            [
                _zoo(ZOO_NAMES),
                "",
                f"Parameters are for {CLASSES} classes. Networks of timm and torchvision:",
                "  train-student --list-students --student 'timm:mobilenetv4*'",
                "  train-student --list-students --student 'torchvision:*'",
            ]
        )
    source, separator, name = pattern.partition(":")
    if not separator:
        found = _matching(ZOO_NAMES, pattern)
        if found:
            return _zoo(found)
    elif source.lower() in {"timm", "torchvision"}:
        names = _timm_names() if source.lower() == "timm" else _torchvision_names()
        found = [f"{source.lower()}:{each}" for each in _matching(names, name)]
        if found:
            return "\n".join(found)
    raise RecipeError(
        "no student matches",
        where=pattern,
        expected="part of a name of the zoo, timm:PATTERN or torchvision:PATTERN",
        next_step="`train-student --list-students` lists the zoo",
    )


def _zoo(names: Iterable[str]) -> str:
    table = TextTable(["student", "parameters"])
    for name in names:
        table.add_row(name, count(ZOO_PARAMETERS[name]))
    return table.text()


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    wanted = pattern.lower() if set(pattern) & set("*?[") else f"*{pattern.lower()}*"
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)]


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _torchvision_names() -> list[str]:
    from train.zoo import torchvision_net

    return sorted(torchvision_net.names())
