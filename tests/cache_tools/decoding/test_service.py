"""The decode service gives the pixels of the plain path, names what it cannot decode, and ends with its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.decoding import service as module
from cache_tools.decoding import worker
from cache_tools.decoding.service import DecodeService, load_canvases, service_for, start_loading
from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.encoded import EncodedImages, check_unchanged
from cache_tools.images.folder import FolderImages
from cache_tools.images.image_set import sample_key
from cache_tools.images.index import FileState
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views import ViewRecipe, load_each
from pipeline.build.cache import build_cache
from tests.support import tiny_build
from tests.support.pictures import photo, recipe_for
from tests.support.tiny_build import arrays_of
from tests.support.turns import slow
from train.feed import NoTargets, StreamingFeed

pytestmark = pytest.mark.medium

COUNT, CPU = 45, torch.device("cpu")
CROPPED: dict[str, Any] = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 20}, "flip"]}
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 0.9}
VIEWS = {
    "canvases": ViewRecipe.model_validate({"ops": ["flip"]}),
    "cropped": ViewRecipe.model_validate(CROPPED),
    "sized": ViewRecipe.model_validate(CROPPED | {"sizes": {"clip": 28}}),
    "mixed": ViewRecipe.model_validate(CROPPED | {"mix": MIX}).over(COUNT),
    "mixed canvases": ViewRecipe.model_validate({"ops": ["flip"], "mix": MIX, "clean_first": True}).over(COUNT),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes and several formats."""
    root = tmp_path_factory.mktemp("service")
    for number in range(COUNT):
        picture = photo(24 + 7 * (number % 6), 60 - 5 * (number % 5), number)
        file = root / "train" / f"class{number % 3}" / f"{number:03}.{('jpg', 'png', 'webp')[number % 4 % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return root


@pytest.fixture(scope="module")
def service() -> Iterator[DecodeService]:
    service = DecodeService(2)
    yield service
    service.close()


def opened(root: Path) -> FolderImages:
    images = open_images(recipe_for(root, test_split=None))
    assert isinstance(images, FolderImages)
    return images


def wanted(kind: str) -> list[tuple[ViewRecipe, int]]:
    return [(VIEWS[kind].seen_by(network), view) for view in (0, 3) for network in ("teacher", "clip")]


def children(of: int) -> list[int]:
    """The processes of services that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == of and b"decoding.worker" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has ended meanwhile
                continue
    return found


@pytest.mark.parametrize("from_files", [True, False])
@pytest.mark.parametrize("kind", VIEWS)
def test_the_pixels_are_those_of_the_plain_path(
    root: Path, service: DecodeService, kind: str, from_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests at once, of rows in any order and of other samples; also from bytes instead of files.

    In a view that mixes, rows are the samples themselves, and their partners are loaded too.
    """
    if not from_files:
        monkeypatch.setattr(FolderImages, "source_of", EncodedImages.source_of)
    images = opened(root)
    rows = np.random.default_rng(0).permutation(COUNT)[:37]
    requests: list[Any] = [
        (start_loading(service, images, chosen, index, wanted(kind), pin=False), chosen, index)
        for chosen, index in ((rows, rows + (0 if "mixed" in kind else 1000)), (slice(3, 5), np.array([3, 4])))
    ]
    for load, chosen, index in requests:
        expected = load_each(images, chosen, index, wanted(kind))
        found = load()
        assert len(found) == len(expected) == 4
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        if chosen is rows:
            assert (found[0] is found[3]) == (kind == "canvases")
            assert (len(found[3]) > len(index)) == ("mixed" in kind)


def test_memory_is_used_again(root: Path, service: DecodeService) -> None:
    images, rows = opened(root), np.arange(COUNT)
    service.load(images, rows, rows, wanted("cropped")).result()
    before = service._memory._size
    for _ in range(4):
        service.load(images, rows, rows, wanted("cropped")).result()
        abandoned = service.load(images, rows[:9], rows[:9], wanted("cropped"))
        del abandoned
    assert service._memory._size <= 2 * before


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_an_error_names_the_file_as_the_plain_path_does(
    root: Path, service: DecodeService, tmp_path: Path, damage: str
) -> None:
    other = tmp_path / "train" / "class0"
    other.mkdir(parents=True)
    for number in range(20):
        photo(40, 36, number).save(other / f"{number:02}.jpg")
    victim = other / "13.jpg"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:500])
    images = opened(tmp_path)
    if damage == "changed":
        photo(40, 36, 99).save(victim)
    elif damage == "gone":
        victim.unlink()
    rows = np.arange(20)
    messages = []
    for by in (None, service):
        with pytest.raises(DataError) as caught:
            start_loading(by, images, rows, rows, wanted("cropped"), pin=False)()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert str(victim) in messages[0]
    whole = opened(root)
    (pixels, *_) = service.load(whole, rows, rows, wanted("canvases")).result()
    np.testing.assert_array_equal(pixels.numpy(), whole.load(rows))


def test_contents_are_hashed_again_only_where_the_file_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    photo(40, 36).save(file)
    data, hashed = file.read_bytes(), []

    def check(data: bytes, key: bytes, where: str) -> None:
        hashed.append(where)
        check_unchanged(data, key, where)

    monkeypatch.setattr(worker, "check_unchanged", check)
    first = worker.Picture(str(file), "here", sample_key(data), FileState(0, 0, 0, 0, 0), 0, 0, ())
    assert worker._read(first) == (data, None)  # too young to tell a later write apart
    monkeypatch.setattr("cache_tools.images.index.YOUNG_NS", 0)
    read, state = worker._read(first)
    assert read == data
    assert state == FileState.of(file.stat())
    again = first._replace(known=state)
    assert len(hashed) == 2
    assert worker._read(again) == (data, None)
    assert len(hashed) == 2
    file.write_bytes(data[:-1] + b"x")  # of the same size
    with pytest.raises(DataError, match="image changed since the folder was opened"):
        worker._read(again)


def test_a_killed_process_is_replaced_and_nothing_is_lost(root: Path, service: DecodeService) -> None:
    images, rows = opened(root), np.arange(COUNT)
    service.load(images, rows, rows, wanted("canvases")).result()
    victim = children(os.getpid())[0]
    os.kill(victim, signal.SIGSTOP)  # so that it has tasks when it dies
    loading = service.load(images, rows, rows, wanted("canvases"))
    time.sleep(0.2)
    os.kill(victim, signal.SIGKILL)
    expected = load_each(images, rows, rows, wanted("canvases"))
    for one, other in zip(loading.result(), expected, strict=True):
        assert torch.equal(one, other)
    assert victim not in children(os.getpid())


DEADLY = """
import os
from PIL import Image
whole = Image.open
def open_or_die(file, *arguments, **options):
    if b"deadly" in file.getvalue():
        os.kill(os.getpid(), 9)
    return whole(file, *arguments, **options)
Image.open = open_or_die
"""


def test_a_picture_that_kills_its_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder crashes, or the system takes the memory back; the pictures beside it are decoded."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    folder = tmp_path / "pictures" / "train" / "class0"
    folder.mkdir(parents=True)
    for number in range(10):
        photo(40, 36, number).save(folder / f"{number}.png")
    with (folder / "4.png").open("ab") as file:
        file.write(b"deadly")
    images, rows = opened(tmp_path / "pictures"), np.arange(10)
    own = DecodeService(1)
    try:
        with pytest.raises(
            DataError, match=r"ended the process that decoded it .*/4\.png.*signal 9, probably for lack"
        ):
            own.load(images, rows, rows, wanted("canvases")).result()
        (pixels, *_) = own.load(images, rows[5:], rows[5:], wanted("canvases")).result()
        np.testing.assert_array_equal(pixels.numpy(), images.load(rows[5:]))
    finally:
        own.close()


# Without torch, which takes seconds to import.
PARENT = """
import sys, time
from concurrent.futures import wait
from pathlib import Path
import numpy as np
from cache_tools.decoding.service import DecodeService
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views.recipe import ViewRecipe
images = open_images(DatasetRecipe(name="folder", data_dir=Path(sys.argv[1]), image_size=32, test_split=None))
index = np.arange(20)
loading = DecodeService(1).load(images, index, index, [(ViewRecipe(), 0)])
wait(loading.futures)
print("ready", flush=True)
if sys.argv[2] != "exit":
    time.sleep(60)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [slow("exit"), "kill", "interrupt"])
def test_the_processes_end_with_their_parent(root: Path, end: str) -> None:
    """When it returns without closing the service, when it is killed, and when a terminal sends Ctrl-C to its group."""
    code, pipe = [sys.executable, "-c", PARENT, str(root), end], subprocess.PIPE
    parent = subprocess.Popen(
        code, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=Path(__file__).parents[3], process_group=0
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    pids = children(parent.pid)
    assert len(pids) == 1
    if end != "exit":
        os.killpg(parent.pid, {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}[end])
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == {"exit": 0, "kill": -signal.SIGKILL, "interrupt": -signal.SIGINT}[end]
    assert errors.count("Traceback") == (end == "interrupt"), errors  # its own, and none of the processes
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_threads_do_small_jobs_and_images_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = opened(root)
    assert service_for(images, module.FROM_PICTURES - 1) is None
    monkeypatch.setattr(module, "FROM_PICTURES", 40)
    one = service_for(images, 40)
    assert one is not None
    assert one is service_for(images, 80)
    assert service_for(open_images(DatasetRecipe(name="digits")), 10**9) is None


def test_evaluation_loads_the_canvases_of_many_images_with_it(
    root: Path, service: DecodeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = opened(root)
    assert load_canvases(images) == images.load
    monkeypatch.setattr(module, "FROM_PICTURES", 0)
    monkeypatch.setitem(module._services, os.getpid(), service)
    load = load_canvases(images)
    assert load != images.load
    for rows in (slice(7, 30), slice(40, 99)):
        np.testing.assert_array_equal(load(rows), images.load(rows))
    other = images.at(24, "bilinear")
    np.testing.assert_array_equal(load_canvases(other)(slice(7, 30)), other.load(slice(7, 30)))
    assert not np.array_equal(other.load(slice(7, 30)), images.at(24).load(slice(7, 30)))


def test_builds_and_training_give_the_same_with_it(
    service: DecodeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_build.prepare(tmp_path, train=40)
    options: dict[str, Any] = {"views": CROPPED, "num_views": 3, "block_rows": 32, "batch_size": 20}

    def results(name: str) -> tuple[dict[str, bytes], list[torch.Tensor]]:
        arrays = arrays_of(build_cache(tiny_build.recipe(root, out=tmp_path / name, **options)).path)
        images = open_images(tiny_build.recipe(root).dataset)
        feed = StreamingFeed(
            images, VIEWS["cropped"], 2, NoTargets(), batch_size=16, epochs=2, seed=1, device=CPU, known=None
        )
        try:
            return arrays, [batch.pixels for epoch in range(2) for batch in feed.epoch(epoch)]
        finally:
            feed.close()

    plain = results("plain")
    monkeypatch.setattr(module, "FROM_PICTURES", 0)
    monkeypatch.setitem(module._services, os.getpid(), service)
    asked, load = [], service.load

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(service, "load", counted)
    found = results("service")
    assert len(asked) == 3 + 2 * 3  # batches of the build, where three views share each, and of two epochs
    assert found[0] == plain[0]
    assert len(found[1]) == len(plain[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(found[1], plain[1], strict=True))
