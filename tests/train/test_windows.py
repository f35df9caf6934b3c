"""Windows of blocks: the order of an epoch, batches that equal those of whole views, memory, and whole runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools.codecs import SparseTargets
from cache_tools.errors import IncompleteError, OutOfMemoryError, RecipeError
from cache_tools.reader import TeacherCache
from cache_tools.views import MixRecipe, PadCrop, ViewRecipe
from tests.support import cache_factory, tiny_run
from tests.support.tiny_run import same_runs
from train.feed import (
    BatchTargets,
    CachedTargets,
    Feed,
    NoTargets,
    ResidentFeed,
    StreamingFeed,
    batch_bounds,
    epoch_order,
    open_feed,
)
from train.feed.targets import CachedWindow
from train.feed.windows import Blocks
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.recipe.loss import named_loss
from train.run import Run, train_student
from train.sweep.recipe import SweepRecipe
from train.sweep.run import run_sweep

CPU = torch.device("cpu")
SAMPLES, VIEWS, BLOCK = 75, 3, 16


# The order


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 300),
    rows=st.integers(1, 40),
    window=st.integers(1, 50),
    seed=st.integers(0, 1 << 40),
    epoch=st.integers(0, 3),
    kept=st.floats(0.05, 1.0),
)
def test_every_sample_comes_once_in_the_window_of_its_block(
    count: int, rows: int, window: int, seed: int, epoch: int, kept: float
) -> None:
    """Also where a split has a part of the samples of a cache, in any order."""
    numbers = np.random.default_rng(seed).permutation(count)[: max(1, round(kept * count))]
    for samples in (np.arange(count), numbers):
        blocks = Blocks((samples // rows).astype(np.int32), window)
        order, windows = blocks.order(seed, epoch, 2)
        assert sorted(order.tolist()) == list(range(len(samples)))
        begin = 0
        for part in windows:
            assert part.blocks is not None
            assert part.view == 2
            found = blocks.block_of[order[begin : part.stop].numpy()]
            assert set(found.tolist()) == set(part.blocks)
            begin = part.stop
        assert begin == len(samples)
        named = [block for part in windows for block in part.blocks or ()]
        assert sorted(named) == sorted(set(blocks.block_of.tolist()))
        assert all(len(part.blocks or ()) == window for part in windows[:-1])
        assert blocks.first(seed, epoch, 2) == windows[0]
        assert torch.equal(blocks.order(seed, epoch, 0)[0], order), "the order does not depend on the view"


def test_the_order_depends_on_seed_epoch_and_window_alone() -> None:
    def order(seed: int, epoch: int, window: int) -> tuple[int, ...]:
        torch.manual_seed(epoch)
        return tuple(Blocks(np.arange(200, dtype=np.int32) // 10, window).order(seed, epoch, 0)[0].tolist())

    choices = [(seed, epoch, window) for seed in (0, 1) for epoch in (0, 1) for window in (3, 4, 100)]
    orders = {order(*choice) for choice in choices}
    assert len(orders) == len(choices)
    assert {order(*choice) for choice in choices} == orders
    assert tuple(epoch_order(200, 0, 0).tolist()) not in orders


def test_the_samples_of_a_window_are_shuffled_together() -> None:
    order, windows = Blocks(np.arange(400, dtype=np.int32) // 100, 2).order(0, 0, 0)
    blocks = order[: windows[0].stop] // 100
    changes = int((blocks[1:] != blocks[:-1]).sum())
    assert changes > 60, "about a hundred of 200; one if blocks came one after the other"


# Batches


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherCache]:
    """75 samples in five blocks of 16, the last one short."""
    folder = tmp_path_factory.mktemp("windows")
    kinds: dict[str, dict[str, Any]] = {
        "fused": {},
        "compact": {"codec": "compact", "images": cache_factory.tiny_images(SAMPLES, 40)},
        "components": {"store": "components"},
        "top-k": {"codec": "top-k", "images": cache_factory.tiny_images(SAMPLES, 40)},
    }
    for name, kind in kinds.items():
        images = kind.pop("images", cache_factory.tiny_images(SAMPLES))
        cache_factory.build(folder / name, cache_factory.tiny_manifest(images, num_views=VIEWS, **kind), images)
    return {name: TeacherCache.open(folder / name) for name in kinds}


CHOICES: dict[str, dict[str, Any]] = {
    "fused": {"logits": True, "features": True},
    "compact": {"logits": True, "features": True},
    "components": {"logits": True, "features": False, "components": True},
    "top-k": {"logits": True, "features": False, "sparse_temperature": 1.0},
}


def make(cache: TeacherCache, kind: str, *, feed: type[Feed] = ResidentFeed, **changes: Any) -> Feed:
    images: Any = cache_factory.tiny_images(SAMPLES, cache.num_classes)
    if (samples := changes.get("samples")) is not None:
        images = images.subset(samples)
    options: dict[str, Any] = {"batch_size": 14, "epochs": 5, "seed": 5, "device": CPU, "window": 2} | changes
    return feed(images, cache.recipe.views, VIEWS, CachedTargets(cache, CPU, **CHOICES[kind]), **options)


def same_targets(found: BatchTargets, expected: BatchTargets) -> None:
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(one, other)


def flat(targets: BatchTargets) -> list[torch.Tensor]:
    logits = [*targets.logits] if isinstance(targets.logits, SparseTargets) else [targets.logits]
    return [part for part in (*logits, targets.features, *(targets.components or ())) if part is not None]


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("kind", CHOICES)
def test_batches_equal_those_of_whole_views_bit_for_bit(
    caches: dict[str, TeacherCache], kind: str, window: int
) -> None:
    """Batches of 14 begin in one window and end in another."""
    cache = caches[kind]
    whole = CachedTargets(cache, CPU, **CHOICES[kind])
    feed = make(cache, kind, window=window)
    blocks = Blocks(np.arange(SAMPLES, dtype=np.int32) // BLOCK, window)
    images = cache_factory.tiny_images(SAMPLES, cache.num_classes)
    for epoch in (0, 1, 4):
        view = epoch % VIEWS
        order, source = blocks.order(5, epoch, view)[0], whole.view(view)
        batches = list(feed.epoch(epoch))
        assert [len(batch.labels) for batch in batches] == [14, 14, 14, 14, 14, 5]
        for number, batch in enumerate(batches):
            rows = order[14 * number : 14 * number + 14]
            assert torch.equal(batch.index, rows)
            np.testing.assert_array_equal(batch.labels, images.labels[rows])
            pixels = cache.recipe.views.apply(torch.from_numpy(images.load(rows.numpy())), rows.numpy(), view)
            assert torch.equal(batch.pixels, pixels)
            same_targets(batch.targets, source.batch(rows, pixels))
    feed.close()


@pytest.mark.parametrize("feed", [ResidentFeed, StreamingFeed])
def test_a_part_of_the_samples_in_any_order(caches: dict[str, TeacherCache], feed: type[Feed]) -> None:
    cache, samples = caches["fused"], np.random.default_rng(3).permutation(SAMPLES)[:40]
    made = make(cache, "fused", feed=feed, samples=samples)
    whole = CachedTargets(cache, CPU, **CHOICES["fused"]).view(1)
    seen = []
    for batch in made.epoch(1):
        same_targets(batch.targets, whole.batch(torch.from_numpy(samples)[batch.index], batch.pixels))
        seen += batch.index.tolist()
    assert sorted(seen) == list(range(40))
    made.close()


def test_an_epoch_can_begin_at_any_batch(caches: dict[str, TeacherCache]) -> None:
    whole = list(make(caches["fused"], "fused").epoch(2))
    for first in range(1, 6):
        rest = list(make(caches["fused"], "fused").epoch(2, first))
        assert len(rest) == 6 - first
        for one, other in zip(rest, whole[first:], strict=True):
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.pixels, other.pixels)
            same_targets(one.targets, other.targets)


# Memory


class Counted(CachedTargets):
    """Counts the windows that are in memory together, and lists what was read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alive: list[weakref.ref[CachedWindow]] = []
        self.most, self.read = 0, list[tuple[int, tuple[int, ...]]]()
        self.has_read = threading.Semaphore(0)

    def window(self, view: int, blocks: Sequence[int]) -> CachedWindow:
        source = super().window(view, blocks)
        self.alive = [each for each in self.alive if each() is not None] + [weakref.ref(source)]
        self.most = max(self.most, len(self.alive))
        self.read.append((view, tuple(blocks)))
        self.has_read.release()
        return source


@pytest.mark.parametrize(("ahead", "most"), [(True, 2), (False, 1)])
def test_memory_holds_the_window_in_use_and_the_next(caches: dict[str, TeacherCache], ahead: bool, most: int) -> None:
    targets = Counted(caches["fused"], CPU, logits=True, features=True)
    options: dict[str, Any] = {"batch_size": 14, "epochs": 3, "seed": 5, "device": CPU, "window": 1}
    feed = ResidentFeed(
        cache_factory.tiny_images(SAMPLES), cache_factory.VIEWS, 2, targets, read_ahead=ahead, **options
    )
    for epoch in range(3):
        for number, _ in enumerate(feed.epoch(epoch)):
            if (epoch, number) == (0, 0):
                assert all(targets.has_read.acquire(timeout=10) for _ in range(most)), "the next one, if ahead"
    feed.close()
    assert targets.most == most
    blocks = Blocks(np.arange(SAMPLES, dtype=np.int32) // BLOCK, 1)
    expected = [(e % 2, part.blocks) for e in range(3) for part in blocks.order(5, e, e % 2)[1]]
    assert targets.read == expected, "each window once, nothing after the last epoch"


def opened(cache: TeacherCache, free: int, patch: pytest.MonkeyPatch, **changes: Any) -> Feed:
    patch.setattr("train.feed.windows.free_memory", lambda device: free)
    options: dict[str, Any] = {"batch_size": 14, "epochs": 3, "seed": 0, "device": CPU} | changes
    targets = CachedTargets(cache, CPU, logits=True, features=False)
    return open_feed(cache_factory.tiny_images(SAMPLES), cache.recipe.views, VIEWS, targets, **options)


def test_too_little_memory_is_said_before_the_first_step(
    caches: dict[str, TeacherCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five float16 logits: 160 bytes in a block of 16, 750 in a view. 80 % of the free memory is for targets."""
    cache = caches["fused"]
    assert CachedTargets(cache, CPU, logits=True, features=False).row_bytes == 10
    with pytest.raises(
        OutOfMemoryError, match=r"a whole view does not fit.*expected.*found 750 B.*--shuffle-window 2 "
    ):
        opened(cache, 900, monkeypatch)  # 720 usable: two windows of two blocks are 640
    with pytest.raises(OutOfMemoryError, match=r"window of 5 blocks.*--shuffle-window 5.*--shuffle-window 2 "):
        opened(cache, 900, monkeypatch, window=5)
    with pytest.raises(OutOfMemoryError, match="where there is more memory"):
        opened(cache, 100, monkeypatch, window=1)
    for free, window, ahead in ((1000, None, False), (1900, None, True), (500, 2, False), (900, 2, True)):
        feed = opened(cache, free, monkeypatch, window=window)
        assert feed._reader._ahead == ahead
        assert len(list(feed.epoch(1))) == len(batch_bounds(SAMPLES, 14))
        feed.close()


def test_a_component_cache_needs_memory_for_its_fused_targets(caches: dict[str, TeacherCache]) -> None:
    cache = caches["components"]
    view = cache.load_view(0, features=False)
    constants = sum(tensor.nbytes for tensor in view.constants.values())
    targets = CachedTargets(cache, CPU, logits=True, features=False)
    assert SAMPLES * targets.row_bytes == view.nbytes - constants


# Whole runs


@pytest.mark.medium
def test_a_run_with_a_window_resumes_inside_an_epoch(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(out: str, window: int | None = 2) -> TrainRecipe:
        changes: dict[str, Any] = {"epochs": 2, "loggers": (), "shuffle_window": window}
        return tiny_run.recipe(cache, tmp_path / out, checkpoint_every_minutes=1e-9, label_fraction=0.5, **changes)

    train_student(recipe("whole"))
    saved: list[int] = []
    original = Run.save_checkpoint

    def save(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        saved.append(len(saved))
        if len(saved) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_checkpoint", save)
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe("stopped"))
    train_student(recipe("stopped"))
    same_runs(tmp_path / "whole", tmp_path / "stopped")
    train_student(recipe("full", None))
    with pytest.raises(AssertionError):
        same_runs(tmp_path / "whole", tmp_path / "full")
    with pytest.raises(RecipeError, match="shuffle_window"):
        train_student(recipe("whole", 3))


@pytest.mark.medium
def test_students_that_train_together_end_as_alone(cache: Path, tmp_path: Path) -> None:
    """Trials of another window have a stream of their own; one on labels alone needs no window."""
    base = tiny_run.recipe(cache, Path("unused"), epochs=1, loggers=(), shuffle_window=1).model_dump(mode="json")
    trials = ({"loss": "kd"}, {"loss": "dkd"}, {"loss": "kd", "shuffle_window": 3}, {"loss": "ce"})
    result = run_sweep(SweepRecipe.model_validate({"name": "tiny", "base": base, "trials": trials}), tmp_path / "all")
    folders = [Path(folder) for folder in result.trials["folder"]]
    for number, (kind, window) in enumerate((("kd", 1), ("dkd", 1), ("kd", 3))):
        alone = tiny_run.recipe(
            cache, tmp_path / f"{number}", epochs=1, loggers=(), shuffle_window=window, loss=named_loss(kind)
        )
        train_student(alone)
        assert any(is_same(folder, tmp_path / f"{number}") for folder in folders), number


def is_same(one: Path, other: Path) -> bool:
    try:
        same_runs(one, other)
    except AssertionError:
        return False
    return True


def test_recipes_without_a_window_are_as_before(cache: Path, tmp_path: Path) -> None:
    without, windowed = (tiny_run.recipe(cache, tmp_path, shuffle_window=window) for window in (None, 4))
    assert "shuffle_window" not in without.model_dump(mode="json")
    assert "shuffle_window" not in without.values()
    assert windowed.values() == {**without.values(), "shuffle_window": 4}


def test_a_window_is_refused_where_it_cannot_be(cache: Path, caches: dict[str, TeacherCache], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no effect.*loss with targets"):
        load_train_recipe("digits", ["shuffle_window=4", "loss.kind=ce"])
    with pytest.raises(RecipeError, match="shuffle_window"):
        load_train_recipe("digits", ["shuffle_window=0", "cache=tiny"])
    mixed = ViewRecipe(version=2, ops=(PadCrop(),), mix=MixRecipe(mixup_alpha=0.8)).over(SAMPLES)
    recipe = tiny_run.recipe(cache, tmp_path, shuffle_window=2)
    with pytest.raises(RecipeError, match="two images that a view mixes"):
        recipe.check_mixed_views(mixed, 3, "cache")
    settings: dict[str, Any] = {"batch_size": 14, "epochs": 1, "seed": 0, "device": CPU, "window": 2}
    images = cache_factory.tiny_images(SAMPLES)
    with pytest.raises(RecipeError, match="not read from one"):
        ResidentFeed(images, cache_factory.VIEWS, 2, NoTargets(), **settings)
    targets = CachedTargets(caches["fused"], CPU, logits=True, features=False)
    with pytest.raises(RecipeError, match="two images that a view mixes"):
        next(ResidentFeed(images, mixed, 2, targets, **settings).epoch(0))


def test_a_missing_block_is_found_when_its_window_is_read(tmp_path: Path) -> None:
    images = cache_factory.tiny_images(SAMPLES)
    manifest = cache_factory.tiny_manifest(images, num_views=1)
    writer = cache_factory.create(tmp_path / "half", manifest, images)
    cache_factory.write(writer, cache_factory.tiny_targets(manifest), [(0, block) for block in range(4)])
    targets = CachedTargets(TeacherCache(tmp_path / "half"), CPU, logits=True, features=False)
    assert len(targets.window(0, [3, 1]).take(torch.tensor([16, 63]))) == 2
    with pytest.raises(IncompleteError):
        targets.window(0, [3, 4])
