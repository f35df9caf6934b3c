"""Caches, views, image sets and errors travel to the workers of a DataLoader and come back."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cache_tools.errors import CacheError, FormatError, MismatchError, NotFoundError, OutOfMemoryError
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.places import open_place
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.s3_server import new_bucket, upload
from tests.support.turns import slow
from tests.support.worker_data import EverythingOf

IMAGES = tiny_images()
KINDS: dict[str, dict[str, Any]] = {
    "fused": {},
    "components": {"store": "components"},
    "several": {"store": "components", "teacher_weights": (0.25, 0.75), "codec": "compact"},
    "top-k": {"codec": "top-k"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each kind, not to be written to."""
    folder = tmp_path_factory.mktemp("caches")
    for name, kind in KINDS.items():
        build(folder / name, tiny_manifest(IMAGES, **kind), IMAGES)
    return folder


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("method", "kind"),
    [("spawn", "fused"), slow("spawn", "components"), slow("forkserver", "several"), ("fork", "components")],
)
def test_workers_read_what_this_process_reads(folder: Path, method: str, kind: str) -> None:
    data = EverythingOf(TeacherCache.open(folder / kind), IMAGES)
    loader = DataLoader(data, batch_size=5, num_workers=1, multiprocessing_context=method, sampler=[3, 74, 0, 8, 3])
    (batch,) = loader
    for row, sample in enumerate([3, 74, 0, 8, 3]):
        for name, expected in data[sample].items():
            assert torch.equal(batch[name][row], expected), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_cache_is_opened_again(folder: Path, kind: str) -> None:
    cache = TeacherCache.open(folder / kind)
    data = pickle.dumps(cache)
    assert len(data) < 500
    for other in (pickle.loads(data), copy.deepcopy(cache), copy.copy(cache)):
        assert other is not cache
        assert (other.path, other.manifest, other.origin) == (cache.path, cache.manifest, None)
        assert np.array_equal(other.labels, cache.labels)
        assert torch.equal(other.load_view(2).logits([5, 1]), cache.load_view(2).logits([5, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_views_are_pickled_and_copied_with_their_numbers(folder: Path, kind: str) -> None:
    view = TeacherCache.open(folder / kind).load_view(1)
    for other in (pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        assert type(other) is type(view)
        assert (other.view, len(other), other.nbytes, other.device) == (1, len(view), view.nbytes, view.device)
        assert torch.equal(other.logits(slice(None)), view.logits(slice(None)))
        assert torch.equal(other.features(range(4)), view.features(range(4)))
        assert all(other.arrays[name].data_ptr() != view.arrays[name].data_ptr() for name in view.arrays)


def test_the_path_in_a_pickle_is_absolute(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    data = pickle.dumps(TeacherCache.open("./fused"))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(data).path == folder / "fused"


def test_a_pickle_of_a_cache_that_was_removed_or_replaced(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    shutil.copytree(folder / "fused", path)
    data = pickle.dumps(TeacherCache.open(path))
    shutil.rmtree(path)
    with pytest.raises(NotFoundError, match="no cache here"):
        pickle.loads(data)
    shutil.copytree(folder / "components", path)
    with pytest.raises(MismatchError, match="another cache is where the pickled one was"):
        pickle.loads(data)


def test_a_pickled_remote_cache_stages_what_it_needs(
    folder: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path))
    url = f"s3://{new_bucket()}/tiny.zarr"
    upload(folder / "fused", url)
    cache = TeacherCache.open(url)
    other = pickle.loads(pickle.dumps(cache))
    assert other.origin.url == url
    assert len(list((other.path / "fused_logits").glob("c.1.*"))) == 0
    expected = TeacherCache.open(folder / "fused").load_view(1).logits(slice(None))
    assert torch.equal(other.load_view(1).logits(slice(None)), expected)
    assert pickle.loads(pickle.dumps(open_place(url))).read("zarr.json") == (folder / "fused/zarr.json").read_bytes()


def image_sets(tmp_path: Path) -> dict[str, ImageSet]:
    pictures = tiny_run.write_pictures(tmp_path, train=12, test=3)
    folder = tiny_run.dataset(pictures)
    return {
        "arrays": open_images(DatasetRecipe(name="digits"), "test[:9]"),
        "folder": open_images(folder),
        "part": open_images(folder, "train[::2]"),
    }


@pytest.mark.parametrize("kind", ["arrays", "folder", "part"])
def test_image_sets_are_pickled_and_copied(tmp_path: Path, kind: str) -> None:
    images = image_sets(tmp_path)[kind]
    for other in (pickle.loads(pickle.dumps(images)), copy.deepcopy(images)):
        assert other.identity() == images.identity()
        assert np.array_equal(other.load(slice(None)), images.load(slice(None)))


@pytest.mark.parametrize(
    "error",
    [
        FormatError("damaged", where=Path("/a"), expected=3, found=[1, 2], next_step="rebuild it"),
        OutOfMemoryError("not enough memory", next_step="buy some?"),
        CacheError("plain", where=lambda: None),  # anything with a text, picklable or not
    ],
)
def test_errors_keep_their_words(error: CacheError) -> None:
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert (str(other), other.what, other.next_step) == (str(error), error.what, error.next_step)
