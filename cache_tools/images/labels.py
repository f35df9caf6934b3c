"""Labels that a list or a shard gives as names or as numbers: the classes, and the number of each sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError
from cache_tools.images.class_names import (
    Names,
    arrange,
    describe,
    has_control_character,
    listed,
    names_that_look_the_same,
)
from cache_tools.system.arguments import unprintable

if TYPE_CHECKING:
    import polars as pl

LABEL_COLUMNS = ("label", "labels", "class", "category", "target")


def number_labels(
    values: pl.Series,
    class_order: str | Names,
    *,
    names: Names | None = None,
    is_training: bool,
    where: object,
) -> tuple[Names, npt.NDArray[np.int64]]:
    """The class names, and the labels int64 [N].

    Whole numbers number the classes of `names`, or of a `class_order` that lists them; without either each is a class
    of its own, in numerical order. All else are names of classes, sorted as a folder's are.

    Args:
        values: text, without nulls.
        class_order: see `DatasetRecipe`.
        names: of the classes by number, where the data set has them; their order stays unless `class_order` is set.
        is_training: `class_order` and `names` then have no further classes.

    Raises:
        DataError: a name or number of no class, or a name that cannot be shown.
    """
    import polars as pl

    found = values.unique().to_list()
    are_numbers = all(map(_is_number, found))
    known = class_order if names is None and not isinstance(class_order, str) else names
    if are_numbers and known is not None and not set(found) <= set(known):
        if beyond := [value for value in found if int(value) >= len(known)]:
            raise DataError(
                "labels that are no number of a class",
                where=where,
                expected=f"0 to {len(known) - 1}, for {describe(known)}",
                found=listed(sorted(beyond, key=int)),
            )
        name_of, all_names = {value: known[int(value)] for value in found}, known
    else:
        if names is not None and (unknown := sorted(set(found) - set(names))):
            raise DataError("labels of no known class", where=where, expected=describe(names), found=listed(unknown))
        name_of = {value: value for value in found}
        all_names = names or tuple(sorted(found, key=int if are_numbers else None))
    _check_names(all_names, where)
    class_names = all_names
    if class_order not in ("sorted", all_names):
        class_names = arrange(all_names, class_order, complete=is_training)
    number = {name: place for place, name in enumerate(class_names)}
    labels = values.replace_strict(found, [number[name_of[value]] for value in found], return_dtype=pl.Int64)
    return class_names, labels.to_numpy().astype(np.int64)


def _is_number(text: str) -> bool:
    """Whether a label is a whole number as it is usually written: `07` is a name."""
    return text.isascii() and text.isdigit() and (text == "0" or text[0] != "0")


def _check_names(names: Names, where: object) -> None:
    if "" in names:
        raise DataError("a class without a name", where=where, found=describe([repr(name) for name in names]))
    for name in names:
        if unprintable(name) or has_control_character(name):
            raise DataError("the name of a class has a control character", where=where, found=ascii(name))
    if (same := names_that_look_the_same(names)) is not None:
        raise DataError(
            "two classes have names that look the same",
            where=where,
            expected="names that differ in more than spaces and Unicode forms",
            found=f"{same[0]!a} and {same[1]!a}",
        )
