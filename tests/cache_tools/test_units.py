"""cache_tools.units: sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ByteSize

from cache_tools.errors import RecipeError
from cache_tools.units import duration, human_bytes, num_bytes, seconds

DAY = 86_400.0


@given(st.one_of(st.integers(-(10**20), 10**20), st.integers(0, 10**7)))
def test_sizes_are_written_as_pydantic_writes_them(count: int) -> None:
    assert human_bytes(count) == ByteSize(count).human_readable(decimal=True, separator=" ")


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


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0 s"), (3.24, "3.2 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (750, "12 min 30 s"),
        (3599.6, "1 h 00 min"), (3900, "1 h 05 min"), (10 * 3600 + 59 * 60 + 31, "11 h 00 min"), (51 * 3600, "2 d 3 h"),
    ],
)  # fmt: skip
def test_durations_are_printed_in_minutes_and_hours(value: float, text: str) -> None:
    assert duration(value) == text
