"""Types of the fields of recipes and options: numbers with bounds, names, paths. A value outside them is an error.

A bound is far above what anybody uses, and below what would only fail later: in memory, in a file name, in a tensor.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from cache_tools.errors import RecipeError
from cache_tools.units import num_bytes

MAX_COUNT = 10**9
MAX_VIEWS = 1 << 21
MAX_WIDTH = 1 << 16
MAX_TRIALS = 100_000
MAX_NAME = 180  # a file name has 255, with a fingerprint and an ending


def _number(value: Any) -> Any:
    """YAML reads yes and no as booleans, and Python takes those for 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number")
    return value


def _count_or_auto(value: Any) -> Any:
    """`auto`, or a number as YAML and options have it."""
    if value == "auto":
        return value
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"[0-9]{1,10}", value) else None
    try:
        count = None if isinstance(value, bool) or (isinstance(value, float) and value % 1.0) else int(value)
    except (TypeError, ValueError, OverflowError):
        count = None
    if count is None or not 0 < count <= MAX_COUNT:
        raise PydanticCustomError("count_or_auto", "auto, or a number from 1 to 1,000,000,000")
    return count


def _path(value: Any) -> Any:
    if value == "":
        raise PydanticCustomError("path", "a path")
    return value


def _size(value: Any) -> Any:
    """Text as options have it, or a number of bytes, as recipes are stored."""
    if not isinstance(value, str):
        return value
    try:
        return 0 if value.strip() == "0" else num_bytes(value)
    except RecipeError as error:
        raise PydanticCustomError("size", "a size such as 20GB or 500MB, or 0") from error


_NUMBER = BeforeValidator(_number)

Whole = Annotated[int, _NUMBER]
Count = Annotated[int, _NUMBER, Field(gt=0, le=MAX_COUNT)]
CountOrZero = Annotated[int, _NUMBER, Field(ge=0, le=MAX_COUNT)]
CountOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_count_or_auto)]
ViewCount = Annotated[int, _NUMBER, Field(gt=0, le=MAX_VIEWS)]
Width = Annotated[int, _NUMBER, Field(gt=0, le=MAX_WIDTH)]
Seed = Annotated[int, _NUMBER, Field(ge=0, lt=1 << 63)]

NumBytes = Annotated[int, _NUMBER, BeforeValidator(_size), Field(ge=0, lt=1 << 63)]

Number = Annotated[float, _NUMBER, Field(allow_inf_nan=False)]
Positive = Annotated[float, _NUMBER, Field(gt=0.0, allow_inf_nan=False)]
NotNegative = Annotated[float, _NUMBER, Field(ge=0.0, allow_inf_nan=False)]
Share = Annotated[float, _NUMBER, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, _NUMBER, Field(ge=0.0, lt=1.0)]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=MAX_NAME)]
PlacePath = Annotated[Path, BeforeValidator(_path)]
