"""Views of fused and of component caches, and the rows that they return."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools.errors import NotFoundError
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache, ViewTargets
from cache_tools.targets import ComponentView, FusedView, take
from tests.support.cache_factory import build, tiny_images, tiny_manifest

IMAGES = tiny_images()


@pytest.mark.parametrize("codec", ["float32", "top-k"])
def test_a_fused_view_has_no_targets_of_single_networks(tmp_path: Path, codec: Any) -> None:
    build(tmp_path / "c", tiny_manifest(IMAGES, codec=codec), IMAGES)
    targets = TeacherCache.open(tmp_path / "c").load_view(1)
    assert isinstance(targets, FusedView)
    assert isinstance(targets, ViewTargets)
    for method in (
        "teacher_features",
        "clip_features",
        "component_features",
        "teacher_logits",
        "clip_logits",
        "cosine",
    ):
        with pytest.raises(NotFoundError, match=r"are not loaded \(view 1\).*--store components"):
            getattr(targets, method)([0])


def test_a_component_view_has_its_fusion_and_no_sparse_logits(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, store="components")
    build(tmp_path / "c", manifest, IMAGES)
    targets = TeacherCache.open(tmp_path / "c").load_view(0)
    assert isinstance(targets, ComponentView)
    assert targets.fusion == Fusion.stored(manifest)
    with pytest.raises(NotFoundError, match="not sparse"):
        targets.sparse_logits([0], 1.0)


@settings(deadline=None)
@given(st.lists(st.integers(0, 74), max_size=40), st.sampled_from(["float16", "float32"]))
def test_every_kind_of_index_gives_the_same_new_rows(numbers: list[int], dtype: str) -> None:
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(75, 5)).astype(dtype))
    expected = np.array([rows[number].numpy() for number in numbers], dtype=np.float32).reshape(len(numbers), 5)
    array = np.array(numbers, dtype=np.int64)
    for index in (
        numbers,
        tuple(numbers),
        array,
        array.astype(np.uint8),
        array[::-1][::-1],
        torch.from_numpy(array),
        torch.from_numpy(array.astype(np.uint8)),
        torch.from_numpy(array.astype(np.int32)),
    ):
        found = take(rows, index)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("index", [slice(3, 9), slice(None), range(4), [1, 2], np.arange(75) % 3 == 0])
def test_rows_are_new_memory(index: object) -> None:
    rows = torch.randn(75, 5)
    before = rows.clone()
    take(rows, index).zero_()  # type: ignore[arg-type]
    assert torch.equal(rows, before)
