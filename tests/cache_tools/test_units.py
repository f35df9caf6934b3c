import pytest

from cache_tools import units
from cache_tools.errors import RecipeError

DAY = 86_400


@pytest.mark.parametrize(("text", "value"), [("30d", 30 * DAY), ("1.5h", 5400), ("90 m", 5400), ("2w", 14 * DAY)])
def test_times(text: str, value: float) -> None:
    assert units.seconds(text) == value


@pytest.mark.parametrize(("text", "value"), [("100GB", 10**11), ("1.5 mb", 1_500_000), ("7B", 7)])
def test_sizes(text: str, value: int) -> None:
    assert units.num_bytes(text) == value


@pytest.mark.parametrize("text", ["", "30", "d", "-3d", "3y", "1e3d", "30 d d", "3D"])
def test_a_malformed_time_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError, match="a time such as 30d"):
        units.seconds(text)


@pytest.mark.parametrize("text", ["", "30", "GB", "-1GB", "1PB", "1 G"])
def test_a_malformed_size_is_one_clear_error(text: str) -> None:
    with pytest.raises(RecipeError, match="a size such as 100GB"):
        units.num_bytes(text)
