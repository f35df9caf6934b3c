"""Nothing below a SafeFolder leads outside it, blocks, or changes a file in place."""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import FormatError, UnsafeFileError
from cache_tools.files import SafeFolder, is_partial, opened, safe
from tests.support.child import in_child

Links = Callable[[Path, Path], None]


def relative_link(place: Path, target: Path) -> None:
    place.symlink_to(os.path.relpath(target, place.parent))


def chain(place: Path, target: Path) -> None:
    between = place.with_name("between")
    between.symlink_to(target)
    place.symlink_to(between)


def loop(place: Path, _: Path) -> None:
    place.symlink_to(place.name)


def dangling(place: Path, target: Path) -> None:
    place.symlink_to(target.with_name("absent"))


LINKS: dict[str, Links] = {
    "absolute": lambda place, target: place.symlink_to(target),
    "relative": relative_link,
    "chain": chain,
    "loop": loop,
    "dangling": dangling,
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "secret").write_bytes(b"secret")
    (folder / "sub" / "file").write_bytes(b"secret")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> SafeFolder:
    (tmp_path / "cache" / "array").mkdir(parents=True)
    return SafeFolder(tmp_path / "cache")


def snapshot(path: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(each.relative_to(path)): (
            each.read_bytes() if each.is_file() else b"",
            each.stat().st_mtime_ns,
            each.stat().st_nlink,
        )
        for each in (path, *path.rglob("*"))
    }


def operations(folder: SafeFolder, name: str) -> dict[str, Callable[[], object]]:
    def replace() -> None:
        with folder.replaced_durably(name) as file:
            file.write(b"new")

    def lock() -> None:
        with folder.lock(name):
            pass

    return {
        "read": lambda: folder.read_bytes(name),
        "open": lambda: folder.open_read(name),
        "put": lambda: folder.put(name, b"new"),
        "put durably": lambda: folder.put_durably(name, b"new"),
        "put new": lambda: folder.put(name, b"new", only_new=True),
        "replace": replace,
        "lock": lock,
    }


@pytest.mark.parametrize("kind", LINKS)
def test_a_link_to_a_file_is_neither_read_nor_written(kind: str, folder: SafeFolder, outside: Path) -> None:
    LINKS[kind](folder.path / "link", outside / "secret")
    before = snapshot(outside)
    for what, operation in operations(folder, "link").items():
        with pytest.raises(UnsafeFileError, match=r"not a file .*; found a link to .*\. Remove it"):
            operation()
        assert snapshot(outside) == before, what
    assert (folder.path / "link").is_symlink()
    assert folder.exists("link")
    assert not folder.is_file("link")
    folder.remove("link")
    assert not folder.exists("link")
    assert snapshot(outside) == before


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("name", ["link", "link/file", "link/sub/file"])
def test_a_link_to_a_folder_is_not_entered(kind: str, name: str, folder: SafeFolder, outside: Path) -> None:
    LINKS[kind](folder.path / "link", outside)
    before = snapshot(outside)
    inside = name.startswith("link/")
    for what, operation in {
        **(operations(folder, name) if inside else {}),
        "names": lambda: folder.names(name),
        "entries": lambda: folder.entries(name),
        "make": lambda: folder.make_folder(name),
        "sync": lambda: folder.sync(name),
        "partials": lambda: folder.remove_partials(name, age_s=0.0),
        **({"remove": lambda: folder.remove(name), "tree": lambda: folder.remove_tree(name)} if inside else {}),
        **(
            {"rename": lambda: folder.rename(name, "new"), "into": lambda: folder.rename("array", name)}
            if inside
            else {}
        ),
    }.items():
        with pytest.raises(UnsafeFileError, match="not a folder"):
            operation()
        assert snapshot(outside) == before, what
    assert {entry.name for entry in folder.walk()} == {"link"} | ({"between"} if kind == "chain" else set())
    folder.remove_tree("link")
    assert not folder.exists("link")
    assert snapshot(outside) == before


def test_removing_a_tree_removes_links_and_not_what_they_lead_to(folder: SafeFolder, outside: Path) -> None:
    (folder.path / "array" / "folder").symlink_to(outside)
    (folder.path / "array" / "file").symlink_to(outside / "secret")
    os.link(outside / "secret", folder.path / "array" / "hard")
    before = {name: content for name, (content, *_) in snapshot(outside).items()}
    folder.remove_tree("array")
    assert folder.names() == []
    assert {name: content for name, (content, *_) in snapshot(outside).items()} == before


def test_writing_to_a_hard_link_replaces_the_name_alone(folder: SafeFolder, outside: Path) -> None:
    os.link(outside / "secret", folder.path / "hard")
    folder.put("hard", b"new", durable=False)
    assert (outside / "secret").read_bytes() == b"secret"
    assert (outside / "secret").stat().st_nlink == 1
    assert folder.read_bytes("hard") == b"new"


def test_a_lock_changes_nothing(folder: SafeFolder) -> None:
    file = folder.path / ".lock"
    file.write_bytes(b"content")
    os.utime(file, (1, 1))
    with folder.lock(".lock"):
        assert file.read_bytes() == b"content"

        def second() -> str:
            try:
                with folder.lock(".lock"):
                    return "held twice"
            except BlockingIOError as error:
                return str(error.filename)

        assert in_child(second) == str(file)
    assert file.read_bytes() == b"content"
    assert file.stat().st_mtime == 1
    with folder.lock("new"):
        assert folder.read_bytes("new") == b""


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_neither_blocks_nor_is_written(kind: str, folder: SafeFolder) -> None:
    place = folder.path / "file"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    else:
        try:
            os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    start = time.monotonic()
    for operation in operations(folder, "file").values():
        with pytest.raises(UnsafeFileError, match=f"not a file .*; found a {kind}. Remove it"):
            operation()
    with pytest.raises(UnsafeFileError, match=f"not a folder .*; found a {kind}"):
        folder.names("file")
    assert time.monotonic() - start < 5.0
    folder.remove("file")
    assert not folder.exists("file")


@pytest.mark.parametrize("name", ["..", "../outside/secret", "array/../../x", "/etc/passwd", ".", "a//b", "a/", "a\0b"])
def test_names_stay_inside(name: str, folder: SafeFolder, outside: Path) -> None:
    for operation in operations(folder, name).values():
        with pytest.raises(FormatError, match="not a name inside this folder"):
            operation()
    with pytest.raises(FormatError):
        folder.below(name)


def test_the_folder_itself_may_be_a_link(folder: SafeFolder, tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "cache")
    linked = SafeFolder(tmp_path / "home")
    linked.make_folder("new/inner")
    linked.put("new/inner/file", b"content")
    assert folder.read_bytes("new/inner/file") == b"content"
    assert linked.below("new").read_bytes("inner/file") == b"content"
    assert [entry.name for entry in linked.walk()] == ["new/inner/file"]
    with pytest.raises(UnsafeFileError):
        SafeFolder(tmp_path).below("home").names()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes files of other users")
def test_a_link_that_another_user_put_into_an_open_folder_is_refused(folder: SafeFolder, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "cache").symlink_to(folder.path)
    assert SafeFolder(shared / "cache").names() == ["array"]
    os.lchown(shared / "cache", 65534, 65534)
    with pytest.raises(UnsafeFileError, match="a link of another user"):
        SafeFolder(shared / "cache").names()
    shared.chmod(0o755)
    assert SafeFolder(shared / "cache").names() == ["array"]


def test_reading_and_writing(folder: SafeFolder) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        folder.read_bytes("array/c.0")
    assert missing.value.filename == str(folder.path / "array" / "c.0")
    folder.put_durably("array/c.0", memoryview(b"12345"))
    assert folder.read_bytes("array/c.0", limit=5) == b"12345"
    with pytest.raises(FormatError, match="larger than it can be"):
        folder.read_bytes("array/c.0", limit=4)
    with pytest.raises(FormatError, match="larger than it can be"):
        folder.open_read("array/c.0", limit=4)
    with folder.open_read("array/c.0") as file:
        file.seek(3)
        assert file.read() == b"45"
    assert not folder.put("array/c.0", b"other", only_new=True)
    assert folder.put("array/c.1", b"other", only_new=True)
    assert folder.names("array") == ["c.0", "c.1"]
    with pytest.raises(IsADirectoryError):
        folder.read_bytes("array")
    with pytest.raises(IsADirectoryError):
        folder.put("array", b"")
    with pytest.raises(NotADirectoryError):
        folder.read_bytes("array/c.0/x")
    assert folder.status("array/c.0/x") is None
    folder.rename("array/c.1", "c.1")
    assert folder.names() == ["array", "c.1"]
    assert not folder.remove_empty("array")
    folder.remove("array/c.0")
    assert folder.remove_empty("array")
    assert folder.remove_empty("array")
    folder.remove("absent")
    folder.remove_tree("absent")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder: SafeFolder) -> None:
    folder.put("file", b"old")
    with pytest.raises(TypeError, match="bytes-like"), folder.replaced_durably("file") as file:
        file.write("text")  # type: ignore[call-overload]
    assert folder.names() == ["array", "file"]
    assert folder.read_bytes("file") == b"old"


def test_only_names_that_we_make_are_cleaned(folder: SafeFolder, outside: Path) -> None:
    ours = [f"c.0.{'0a' * 16}.partial", f"0.1.0.4711.{'0a' * 8}.partial"]
    foreign = [
        "notes.partial",
        ".partial",
        f"{'0a' * 16}.partial",
        f"c.{'0a' * 16}.partial.txt",
        f"c.{'0A' * 16}.partial",
    ]
    for name in (*ours, *foreign):
        folder.put(f"array/{name}", b"")
    (folder.path / "array" / f"link.{'0b' * 16}.partial").symlink_to(outside / "secret")
    (folder.path / "array" / f"folder.{'0b' * 16}.partial").mkdir()
    assert all(map(is_partial, ours))
    folder.remove_partials("array")  # younger than an hour
    assert set(ours) <= set(folder.names("array"))
    folder.remove_partials("array", age_s=0.0)
    left = [f"folder.{'0b' * 16}.partial", f"link.{'0b' * 16}.partial"]
    assert folder.names("array") == sorted([*foreign, *left])


def test_a_folder_nested_too_deeply_is_not_removed(folder: SafeFolder) -> None:
    deep = folder.path.joinpath(*["d"] * 60)
    deep.mkdir(parents=True)
    with pytest.raises(FormatError, match="nested more deeply"):
        folder.remove_tree("d")
    assert deep.exists()


def test_a_repeated_request_of_a_network_share_is_recognised(folder: SafeFolder, monkeypatch) -> None:
    """NFS repeats a request whose answer was lost: the second one finds what the first has made."""
    link, opens = os.link, 0

    def link_twice(*arguments: Any, **options: Any) -> None:
        link(*arguments, **options)
        link(*arguments, **options)

    real_open = os.open

    def open_twice(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        nonlocal opens
        if flags & os.O_EXCL and not opens:
            opens += 1
            os.close(real_open(path, flags, *arguments, **options))
        return real_open(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "link", link_twice)
    monkeypatch.setattr(os, "open", open_twice)
    assert folder.put("claim", b"mine", only_new=True)
    assert folder.read_bytes("claim") == b"mine"
    monkeypatch.setattr(os, "link", link)
    assert not folder.put("claim", b"other", only_new=True)
    assert opens == 1


@pytest.mark.parametrize("times", [1, 3, 1000])
def test_a_stale_handle_is_tried_again(times: int, folder: SafeFolder, monkeypatch) -> None:
    folder.put("file", b"content")
    left, real_open = times, os.open

    def stale(path: Any, *arguments: Any, **options: Any) -> int:
        nonlocal left
        if path == "file" and left:
            left -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "file")
        return real_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", stale)
    if times < 100:
        assert folder.read_bytes("file") == b"content"
    else:
        with pytest.raises(OSError, match="Stale") as error:
            folder.read_bytes("file")
        assert error.value.filename == str(folder.path / "file")


def test_threads_wait_for_each_other_where_few_files_may_be_open(folder: SafeFolder) -> None:
    def work() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 4, 4096))
        barrier = threading.Barrier(8)

        def put(number: int) -> None:
            barrier.wait()
            for turn in range(20):
                folder.put(f"array/{number}.{turn}", b"content", durable=False)
                assert folder.read_bytes(f"array/{number}.{turn}") == b"content"

        with ThreadPoolExecutor(8) as pool:
            return len(list(pool.map(put, range(8))))

    assert in_child(work) == 8
    assert len(folder.names("array")) == 160


def test_too_few_open_files_is_an_error_after_a_while(folder: SafeFolder, monkeypatch) -> None:
    monkeypatch.setattr(safe, "PATIENCE_S", 0.2)
    real_open = os.open

    def full(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "file":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_open(path, *arguments, **options)

    folder.put("file", b"")
    monkeypatch.setattr(os, "open", full)
    with pytest.raises(OSError, match="Too many open files") as error:
        folder.read_bytes("file")
    assert error.value.filename == str(folder.path / "file")


def test_without_descriptors_of_folders_links_are_refused_too(folder: SafeFolder, outside: Path, monkeypatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(opened, "_HAS_DESCRIPTORS", False)
    folder.make_folder("new/inner")
    folder.put("new/inner/file", b"content")
    assert folder.put("new/inner/second", b"", only_new=True)
    assert not folder.put("new/inner/second", b"", only_new=True)
    assert folder.read_bytes("new/inner/file") == b"content"
    assert [entry.name for entry in folder.walk()] == ["new/inner/file", "new/inner/second"]
    (folder.path / "link").symlink_to(outside)
    (folder.path / "file").symlink_to(outside / "secret")
    before = snapshot(outside)
    for operation in (*operations(folder, "file").values(), *operations(folder, "link/sub/file").values()):
        with pytest.raises(UnsafeFileError):
            operation()
    folder.remove_tree("link")
    folder.remove_tree("file")
    folder.remove_tree("new")
    assert folder.names() == ["array"]
    assert snapshot(outside) == before


def test_a_folder_that_becomes_a_link_while_we_write_leads_nowhere(folder: SafeFolder, outside: Path) -> None:
    """The file is renamed in the folder that was opened, whatever its name leads to by then."""
    before = snapshot(outside)
    with folder.replaced_durably("array/sub") as file:
        file.write(b"new")
        (folder.path / "array").rename(folder.path / "moved")
        (folder.path / "array").symlink_to(outside)
    assert folder.read_bytes("moved/sub") == b"new"
    assert snapshot(outside) == before
