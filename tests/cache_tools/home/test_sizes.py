import json
import os
import time
from pathlib import Path
from typing import Any

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


FIELDS: dict[str, Any] = {
    "name": "a",
    "fingerprint": "f" * 64,
    "dataset": "digits/train",
    "teacher": "t",
    "clip": "",
    "views_done": 1,
    "views_total": 2,
    "views_dropped": 0,
}


def remembered(home: Path, **changes: Any) -> dict[str, Any] | None:
    """The fields of a.zarr that a new process would find, after `changes` to those in the index."""
    if changes:
        index = json.loads((home / INDEX).read_text())
        index["caches"]["a.zarr"][3] |= changes
        (home / INDEX).write_text(json.dumps(index))
    with Sizes(home) as known:
        known.of(home / "a.zarr")
        return known.fields_of(home / "a.zarr")


def remember(home: Path) -> None:
    with Sizes(home) as known:
        known.of(home / "a.zarr")
        known.remember(home / "a.zarr", FIELDS)
    assert remembered(home) == FIELDS


@pytest.mark.parametrize("change", ["edited", "replaced", "linked", "committed"])
def test_fields_of_a_changed_cache_are_forgotten(home: Path, change: str) -> None:
    remember(home)
    file = home / "a.zarr" / "zarr.json"
    if change == "edited":  # in place, and dated back: only the time of the last change of its status differs
        before = file.stat()
        file.write_bytes(b"another")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    elif change == "replaced":
        (home / "new").write_bytes(bytes(7))
        (home / "new").replace(file)
        settle(home / "a.zarr")
    elif change == "linked":
        file.rename(home / "elsewhere")
        file.symlink_to(home / "elsewhere")
        os.utime(home / "a.zarr", (LONG_AGO, LONG_AGO))
    else:
        (home / "a.zarr" / "commits" / "c.0.1.0").write_bytes(bytes(5))
    assert remembered(home) is None


def test_fields_of_a_cache_that_may_still_change_are_not_kept(home: Path) -> None:
    (home / "a.zarr" / "commits" / "c.0.1.0").write_bytes(bytes(5))
    with Sizes(home) as known:
        known.of(home / "a.zarr")
        known.remember(home / "a.zarr", FIELDS)
    assert remembered(home) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"name": None},
        {"name": "\ud800"},
        {"clip": 3},
        {"views_done": "1"},
        {"views_done": True},
        {"views_total": -1},
        {"views_total": 1 << 70},
        {"views_dropped": 0.0},
        {"problem": "none"},
    ],
)
def test_an_index_with_odd_fields_is_not_believed(home: Path, changes: dict[str, Any]) -> None:
    remember(home)
    assert remembered(home, name="b") == FIELDS | {"name": "b"}
    assert remembered(home, **changes) is None


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b'{"a.zarr": 1}',
        b'{"version": 2, "caches": {"a.zarr": ["x", "many", 0.0, null]}}',
        b'{"version": 2, "caches": {"a.zarr": ["x", 1, NaN, null]}}',
        b'{"version": 2, "caches": {"a.zarr": ["x", 1]}}',
        b'{"version": 2, "caches": [1]}',
        b'{"version": 1, "caches": {}}',
        b"[" * 100_000,
        b"\xff\x00",
    ],
)
def test_a_damaged_index_is_rewritten(home: Path, monkeypatch: pytest.MonkeyPatch, index: bytes) -> None:
    (home / INDEX).write_bytes(index)
    assert measure(home, monkeypatch)[0] == {"a.zarr": 207, "b.zarr": 207}
    assert measure(home, monkeypatch)[1] == []


def test_sizes_of_a_read_only_home_are_computed_each_time(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / INDEX).mkdir()
    for _ in range(2):
        assert measure(home, monkeypatch) == ({"a.zarr": 207, "b.zarr": 207}, ["a.zarr", "b.zarr"])
    assert sorted(path.name for path in home.iterdir()) == [INDEX, "a.zarr", "b.zarr"]
