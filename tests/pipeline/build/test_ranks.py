"""Several ranks build one cache: the first creates it, all compute blocks, and the arrays are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_tools.images.index import num_workers
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build
from tests.support.child import in_child
from tests.support.rank_workers import answers_of_ranks, on_ranks

VIEWS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("files"))


def build(recipe: BuildRecipe) -> dict[str, Any]:
    said: list[str] = []
    result = build_cache(recipe, said.append)
    return {"images": result.images, "of_ranks": result.images_of_ranks, "said": said}


@pytest.mark.medium
@pytest.mark.alone
def test_ranks_build_the_arrays_of_one_process(files: Path, tmp_path: Path) -> None:
    recipe = tiny_build.recipe(files, num_views=VIEWS, block_rows=16, out=tmp_path / "shared.zarr")
    first, second = on_ranks(2, lambda: build(recipe), tmp_path)
    assert first["of_ranks"] == [first["images"], second["images"]]
    assert second["of_ranks"] == []
    assert sum(first["of_ranks"]) == VIEWS * 150
    in_child(lambda: build(recipe.model_copy(update={"out": tmp_path / "alone.zarr"})), tmp_path / "log")
    one, other = (TeacherCache.open(tmp_path / f"{name}.zarr") for name in ("shared", "alone"))
    assert one.is_complete
    assert one.manifest.constants_digest == other.manifest.constants_digest
    for view in range(VIEWS):
        for name in one.targets:
            np.testing.assert_array_equal(one.read_array(name, view), other.read_array(name, view))
    again = on_ranks(2, lambda: build(recipe), tmp_path)
    assert [rank["images"] for rank in again] == [0, 0]
    assert "is complete: nothing to do" in again[0]["said"][-1]


@pytest.mark.medium
@pytest.mark.alone
def test_an_error_of_the_first_rank_ends_the_others(files: Path, tmp_path: Path) -> None:
    """Without torchrun's store: that of rank 0 ends with it."""
    recipe = tiny_build.recipe(files, out=tmp_path / "taken.zarr")
    (tmp_path / "taken.zarr").mkdir()
    (tmp_path / "taken.zarr/file").touch()
    first, second = answers_of_ranks(2, lambda: build(recipe), tmp_path)
    assert first is not None
    assert second is not None
    assert "StorageError" in first["error"]
    assert "RankLostError: rank 0 has ended (rank 1 of 2)" in second["error"]


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(12))
    assert num_workers() == 12
    own = {"RANK": 1, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4, "MASTER_ADDR": "host", "MASTER_PORT": 1}
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    assert num_workers() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(2))
    assert num_workers() == 1
