"""Labels as names or numbers: which classes there are, and in which order."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from cache_tools.errors import DataError
from cache_tools.images.labels import number_labels


def numbered(values: list[str], order: Any = "sorted", **settings: Any) -> tuple[tuple[str, ...], list[int]]:
    names, labels = number_labels(
        pl.Series(values, dtype=pl.String), order, **{"is_training": True, "where": "list.csv", **settings}
    )
    assert labels.dtype == "int64"
    return names, labels.tolist()


@pytest.mark.parametrize(
    ("values", "order", "settings", "names", "labels"),
    [
        (["dog", "cat", "dog"], "sorted", {}, ("cat", "dog"), [1, 0, 1]),
        (["10", "2", "2"], "sorted", {}, ("2", "10"), [1, 0, 0]),  # numbers, not text
        (["10", "02", "02"], "sorted", {}, ("02", "10"), [1, 0, 0]),  # names: nobody numbers classes like that
        (["b10", "b2"], "natural", {}, ("b2", "b10"), [1, 0]),
        (["2", "10"], "reversed", {}, ("2", "10"), [0, 1]),
        (["0", "2"], ("cat", "dog", "cow"), {}, ("cat", "dog", "cow"), [0, 2]),
        (["7", "3"], ("7", "3"), {}, ("7", "3"), [0, 1]),  # names that look like numbers
        (["dog", "cat"], ("dog", "cat"), {}, ("dog", "cat"), [0, 1]),
        (["1", "0"], "sorted", {"names": ("dog", "cat")}, ("dog", "cat"), [1, 0]),
        (["1", "0"], "natural", {"names": ("dog", "cat")}, ("cat", "dog"), [0, 1]),
        (["cat"], "sorted", {"names": ("dog", "cat")}, ("dog", "cat"), [1]),
        (["dog"], ("dog", "cat"), {"is_training": False}, ("dog",), [0]),
        (["1"], ("dog", "cat"), {"is_training": False}, ("dog", "cat"), [1]),
    ],
)
def test_classes_and_labels(values: Any, order: Any, settings: Any, names: Any, labels: Any) -> None:
    assert numbered(values, order, **settings) == (names, labels)


@pytest.mark.parametrize(
    ("values", "order", "settings", "message"),
    [
        (["0", "3"], ("cat", "dog", "cow"), {}, r"no number of a class \(list.csv\); expected 0 to 2.*found 3"),
        (["cow"], "sorted", {"names": ("dog", "cat")}, "no known class .*dog, cat; found cow"),
        (["dog", "cat"], ("dog",), {}, "not listed: cat"),
        (["a\tb", "c"], "sorted", {}, "control character"),
        (["a  b", "a b"], "sorted", {}, "look the same"),
        (["", "b"], "sorted", {}, "class without a name"),
    ],
)
def test_labels_of_no_class_are_one_error(values: Any, order: Any, settings: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbered(values, order, **settings)
