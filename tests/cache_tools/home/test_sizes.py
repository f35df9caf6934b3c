import os
import time
from pathlib import Path

import pytest

from cache_tools.home import sizes
from cache_tools.home.sizes import INDEX, Sizes, size_and_time

LONG_AGO = time.time() - 1000


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two folders of files written some time ago."""
    for name in ("a.zarr", "b.zarr"):
        for folder in ("logits", "commits"):
            (tmp_path / name / folder).mkdir(parents=True)
            (tmp_path / name / folder / "c.0.0.0").write_bytes(bytes(100))
        (tmp_path / name / "zarr.json").write_bytes(bytes(7))
        settle(tmp_path / name)
    return tmp_path


def settle(path: Path) -> None:
    for each in [*path.rglob("*"), path]:
        os.utime(each, (LONG_AGO, LONG_AGO))


def measure(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], list[str]]:
    """The sizes by name, and the caches whose files were looked at."""
    walked: list[str] = []

    def counted(path: Path) -> tuple[int, float]:
        walked.append(path.name)
        return size_and_time(path)

    monkeypatch.setattr(sizes, "size_and_time", counted)
    with Sizes(home) as known:
        found = {path.name: known.of(path) for path in sorted(home.glob("*.zarr"))}
    assert found == {path.name: size_and_time(path) for path in home.glob("*.zarr")}
    return {name: size for name, (size, _) in found.items()}, walked


def test_a_size_is_computed_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(home, monkeypatch) == ({"a.zarr": 207, "b.zarr": 207}, ["a.zarr", "b.zarr"])
    assert measure(home, monkeypatch) == ({"a.zarr": 207, "b.zarr": 207}, [])


@pytest.mark.parametrize("change", ["new", "gone", "replaced", "folder"])
def test_the_size_of_a_changed_cache_is_computed_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    measure(home, monkeypatch)
    commits = home / "a.zarr" / "commits"
    if change == "new":
        (commits / "c.0.1.0").write_bytes(bytes(5))
    elif change == "gone":
        (commits / "c.0.0.0").unlink()
    elif change == "folder":
        (home / "a.zarr" / "more").mkdir()
    else:
        (commits / "temporary").write_bytes(bytes(11))
        (commits / "temporary").replace(commits / "c.0.0.0")
    assert measure(home, monkeypatch)[1] == ["a.zarr"]
    assert measure(home, monkeypatch)[1] == ["a.zarr"], "it may change again within one tick of the clock"
    settle(home / "a.zarr")
    assert measure(home, monkeypatch)[1] == ["a.zarr"]
    assert measure(home, monkeypatch)[1] == []


def test_a_removed_cache_leaves_the_index(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(home, monkeypatch)
    (home / "a.zarr").rename(home / "elsewhere")
    measure(home, monkeypatch)
    assert "a.zarr" not in (home / INDEX).read_text()


@pytest.mark.parametrize("index", [b"", b"[]", b'{"a.zarr": 1}', b'{"a.zarr": ["x", "many", 0]}', b"\xff\x00"])
def test_a_damaged_index_is_rewritten(home: Path, monkeypatch: pytest.MonkeyPatch, index: bytes) -> None:
    (home / INDEX).write_bytes(index)
    assert measure(home, monkeypatch)[0] == {"a.zarr": 207, "b.zarr": 207}
    assert measure(home, monkeypatch)[1] == []


def test_sizes_of_a_read_only_home_are_computed_each_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / INDEX).mkdir()
    for _ in range(2):
        assert measure(home, monkeypatch) == ({"a.zarr": 207, "b.zarr": 207}, ["a.zarr", "b.zarr"])
    assert sorted(path.name for path in home.iterdir()) == [INDEX, "a.zarr", "b.zarr"]
