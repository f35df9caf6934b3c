"""The build loop decodes every picture once for all views of a block, and stores the same bytes as view by view."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cache_tools.format.commits import BlockId
from cache_tools.images import open_images
from cache_tools.images.folder import FolderImages
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from pipeline.build import blocks
from pipeline.build.blocks import BatchLoader, LoadedBatch, views_at_once
from pipeline.build.cache import build_cache
from pipeline.networks.ensemble import load_pixels
from pipeline.recipe import MAX_VIEWS_AT_ONCE
from tests.support import tiny_build
from tests.support.tiny_build import arrays_of

VIEWS, ROWS, BATCH, SAMPLES = 4, 16, 12, 50
CROPPED: dict[str, Any] = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 12}, "flip"]}
KINDS: dict[str, dict[str, Any]] = {
    "canvases": {"base_seed": 11, "ops": ["pad-crop", "flip"]},
    "sized": CROPPED | {"sizes": {"clip": 20}},
    "mixed": CROPPED | {"mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 0.9}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_build.prepare(tmp_path_factory.mktemp("blocks"), train=SAMPLES)


@pytest.fixture(scope="module", params=KINDS)
def built(root: Path, request: pytest.FixtureRequest) -> TeacherCache:
    views, out = KINDS[request.param], root / request.param
    recipe = tiny_build.recipe(root, views=views, num_views=VIEWS, block_rows=ROWS, batch_size=BATCH, out=out)
    return TeacherCache.open(build_cache(recipe).path)


def groups_of(manifest: Any, views: list[int]) -> list[list[BlockId]]:
    return [[BlockId(view, block) for view in views] for block in range(manifest.num_blocks)]


def load(cache: TeacherCache, groups: list[list[BlockId]]) -> list[LoadedBatch]:
    loader = BatchLoader(open_images(cache.manifest.dataset), cache.manifest, groups, BATCH, pin=False)
    with loader as batches:
        return [batch for batch in batches if batch is not None]


@pytest.mark.medium
def test_a_group_decodes_every_picture_once_and_loads_what_each_view_alone_does(
    built: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[int] = Counter()
    read = FolderImages.read

    def counting(self: FolderImages, sample: int) -> bytes:
        reads[sample] += 1
        return read(self, sample)

    monkeypatch.setattr(FolderImages, "read", counting)
    found = load(built, groups_of(built.manifest, [3, 0, 2]))
    if built.recipe.views.mix is None:
        assert reads == Counter(range(SAMPLES))
    else:  # partners are in other batches, and others in each view
        assert reads.keys() == set(range(SAMPLES))
        separate = sum(len(built.recipe.views.with_partners(batch.samples, batch.view)) for batch in found)
        assert reads.total() < 0.8 * separate
    assert [(batch.block, batch.view) for batch in found[:6]] == [(0, 3), (0, 0), (0, 2)] * 2
    images, views = open_images(built.manifest.dataset), built.recipe.views
    seen: Counter[tuple[int, int]] = Counter()
    for batch in found:
        alone = load_pixels(images, views, batch.samples, batch.samples, batch.view)
        for grouped, single in zip(batch.pixels, alone, strict=True):
            if single is None:
                assert grouped is None
            else:
                assert grouped is not None
                assert torch.equal(grouped, single)
        seen.update((batch.view, sample) for sample in batch.samples.tolist())
    assert seen == Counter((view, sample) for view in (3, 0, 2) for sample in range(SAMPLES))


@pytest.mark.medium
def test_the_bytes_are_those_of_a_build_view_by_view(
    root: Path, built: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `views_at_once` every view is committed before the next one begins."""
    stored, order = CacheWriter.write_block, list[int]()

    def record(self: CacheWriter, view: int, *rest: Any, **options: Any) -> None:
        order.append(view)
        stored(self, view, *rest, **options)

    monkeypatch.setattr(CacheWriter, "write_block", record)
    settings = {"views": built.recipe.views, "num_views": VIEWS, "block_rows": ROWS, "batch_size": BATCH}
    alone = build_cache(tiny_build.recipe(root, **settings, views_at_once=1, out=tmp_path / "c"))
    assert arrays_of(alone.path) == arrays_of(built.path)
    assert order == sorted(order)
    order.clear()
    pairs = build_cache(tiny_build.recipe(root, **settings, views_at_once=2, out=tmp_path / "d"))
    assert arrays_of(pairs.path) == arrays_of(built.path)
    assert [view // 2 for view in order] == sorted(view // 2 for view in order)
    assert order != sorted(order)


def test_groups_are_bounded_by_memory_and_images_in_memory_need_none(
    built: TeacherCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, images = built.manifest, open_images(built.manifest.dataset)
    assert views_at_once(manifest.recipe, manifest.block_rows, images, BATCH) == MAX_VIEWS_AT_ONCE
    views = built.recipe.views
    crops = {views.seen_by(network).output_size((16, 16)) for network in ("teacher", "clip")}
    pixels = sum(3 * BATCH * side * side for side, _ in crops) if views.version == 2 else 0
    pixels *= 1 if views.mix is None else 2
    rows = 4 * ROWS * (len(manifest.recipe.dataset.class_names) + manifest.recipe.fusion.feature_dim)
    monkeypatch.setattr(blocks, "GROUP_BYTES", 7 * (4 * pixels + 2 * rows) + 1)
    assert views_at_once(manifest.recipe, manifest.block_rows, images, BATCH) == 7
    monkeypatch.setattr(blocks, "GROUP_BYTES", 1)
    assert views_at_once(manifest.recipe, manifest.block_rows, images, BATCH) == 1
    digits = open_images(DatasetRecipe(name="digits"))
    monkeypatch.undo()
    assert views_at_once(manifest.recipe, manifest.block_rows, digits, BATCH) == 1
