"""cache_tools.units: sizes and durations."""

from __future__ import annotations

import pytest

from cache_tools.errors import RecipeError
from cache_tools.units import human_bytes, num_bytes, seconds

DAY = 86_400.0


@pytest.mark.parametrize(("text", "value"), [("30d", 30 * DAY), ("1.5h", 5400), ("90 m", 5400), ("2w", 14 * DAY)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("100GB", 10**11), ("1.5 mb", 1_500_000), ("7B", 7), ("1PB", 10**15), ("2GiB", 2 << 30), ("1.5 kib", 1536)],
)
def test_sizes(text: str, value: int) -> None:
    assert num_bytes(text) == value


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3y", "1e3d", "30 d d", "3D"])
def test_bad_durations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a time such as 30d"):
        seconds(text)


@pytest.mark.parametrize("text", ["", "30", "GB", "-1GB", "1ZB", "1 G", "1 Gbit", "100GB or so", "100GB 2GB"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a size such as 100GB"):
        num_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1_570_000, "1.6 MB"), (10**12, "1.0 TB")]
)
def test_sizes_are_printed_in_powers_of_1000(count: int, text: str) -> None:
    assert human_bytes(count) == text
