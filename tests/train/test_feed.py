"""Both feeds equal a plain reference and each other: same batches, same order, same bits."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import DataError, FormatError, RecipeError
from cache_tools.images.image_set import ImageSet
from cache_tools.reader import TeacherCache
from cache_tools.system.memory import free_memory
from cache_tools.views import ColourJitter, Flip, MixRecipe, PadCrop, RandomResizedCrop, ViewRecipe
from tests.support import cache_factory
from train.feed import (
    Batch,
    BatchTargets,
    CachedTargets,
    Feed,
    HostFeed,
    NoTargets,
    ResidentFeed,
    StreamingFeed,
    batch_bounds,
    epoch_order,
    mixed_seed,
    open_feed,
    pair_order,
    tiers,
)

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]
SAMPLES, VIEWS = 75, 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("feed") / "cache.zarr"
    images = cache_factory.tiny_images(SAMPLES)
    cache_factory.build(path, cache_factory.tiny_manifest(images, num_views=VIEWS), images)
    return TeacherCache.open(path)


@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
@pytest.mark.parametrize("device", DEVICES)
def test_batches_equal_a_plain_reference(cache: TeacherCache, kind: type[Feed], device: str) -> None:
    images = cache_factory.tiny_images(SAMPLES)
    feed = make(kind, images, cache, device=torch.device(device))
    for epoch in (0, 1, 4):
        order, view = epoch_order(SAMPLES, 5, epoch).numpy(), epoch % VIEWS
        logits, features = (cache.read_array(name, view) for name in ("fused_logits", "fused_features"))
        batches = list(feed.epoch(epoch))
        assert [len(batch.labels) for batch in batches] == [16, 16, 16, 16, 11]
        for number, batch in enumerate(batches):
            rows = order[16 * number : 16 * number + 16]
            pixels = cache.recipe.views.apply(torch.from_numpy(images.load(rows)), rows, view)
            assert torch.equal(batch.pixels.cpu(), pixels)
            np.testing.assert_array_equal(batch.index.cpu(), rows)
            np.testing.assert_array_equal(batch.labels.cpu(), images.labels[rows])
            assert batch.targets.logits is not None
            assert batch.targets.features is not None
            np.testing.assert_array_equal(batch.targets.logits.cpu(), logits[rows].astype(np.float32))
            np.testing.assert_array_equal(batch.targets.features.cpu(), features[rows].astype(np.float32))
    feed.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "views",
    [
        ViewRecipe(),
        ViewRecipe(ops=(PadCrop(), Flip()), clean_first=True),
        ViewRecipe(base_seed=3, ops=(RandomResizedCrop(size=24), ColourJitter(brightness=0.4, hue=0.1))),
    ],
    ids=["identity", "crop", "resized"],
)
def test_streaming_equals_resident_bit_for_bit(monkeypatch: pytest.MonkeyPatch, views: ViewRecipe, device: str) -> None:
    monkeypatch.setattr(
        "train.feed.resident.PIECE_BYTES", 20 * 3 * 32 * 32
    )  # several pieces, none a multiple of the batch
    images = cache_factory.tiny_images(SAMPLES)
    both = [make(kind, images, views=views, device=torch.device(device)) for kind in (ResidentFeed, StreamingFeed)]
    for epoch in range(3):
        pairs = list(zip(*(feed.epoch(epoch) for feed in both), strict=True))
        assert len(pairs) == both[0].steps_per_epoch == 5
        for resident, streamed in pairs:
            same(resident, streamed)
    for feed in both:
        feed.close()


def test_an_undecoded_source_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that decodes its images in pieces gives the same batches."""
    images = cache_factory.tiny_images(SAMPLES)
    lazy = Undecoded(images)
    for resident, streamed in zip(make(ResidentFeed, lazy).epoch(1), make(StreamingFeed, lazy).epoch(1), strict=True):
        same(resident, streamed)


def test_views_cycle_with_a_cache_and_never_repeat_without(cache: TeacherCache) -> None:
    cached, fresh = make(ResidentFeed, cache=cache, epochs=8), make(ResidentFeed, epochs=8)
    epochs = range(7)
    assert [cached._view_of(epoch) for epoch in epochs] == [0, 1, 2, 0, 1, 2, 0]
    assert [fresh._view_of(epoch) for epoch in epochs] == list(epochs)
    assert not torch.equal(next(fresh.epoch(3)).pixels, next(fresh.epoch(6)).pixels)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = [epoch_order(100, seed, epoch) for seed in (0, 1, 1 << 32, 1 << 40) for epoch in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(epoch_order(100, 1, 1), orders[3])
    torch.manual_seed(12)
    assert torch.equal(epoch_order(100, 1, 1), orders[3]), "the global generator has no effect"


def test_mixed_seeds_differ_within_32_bits() -> None:
    assert len({mixed_seed(seed, epoch) for seed in range(50) for epoch in range(50)}) == 2500
    assert all(0 <= mixed_seed(seed, 0) < 1 << 32 for seed in (0, (1 << 63) - 1))


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (9, 4, [4, 4]), (3, 4, [3]), (3, 1, [1, 1, 1]), (2, 2, [2])],
)
def test_only_a_last_batch_of_one_is_left_out(count: int, size: int, sizes: list[int]) -> None:
    bounds = batch_bounds(count, size)
    assert [stop - start for start, stop in bounds] == sizes
    assert [start for start, _ in bounds] == list(np.cumsum([0, *sizes[:-1]]))


def test_a_single_sample_is_an_error() -> None:
    with pytest.raises(RecipeError, match="single sample"):
        batch_bounds(1, 64)


@pytest.mark.parametrize("used", ["logits", "features"])
def test_only_the_arrays_in_use_are_read(cache: TeacherCache, tmp_path: Path, used: str) -> None:
    path = tmp_path / "half.zarr"
    shutil.copytree(cache.path, path)
    other = {"logits": "fused_features", "features": "fused_logits"}[used]
    for chunk in (path / other).glob("c*"):
        chunk.unlink()
    half = TeacherCache.open(path)
    source = CachedTargets(half, CPU, logits=used == "logits", features=used == "features")
    targets = source.view(0).batch(torch.arange(4), torch.empty(0))
    assert (targets.logits is None) == (used == "features")
    assert (targets.features is None) == (used == "logits")
    with pytest.raises(FormatError):
        CachedTargets(half, CPU, logits=True, features=True).view(0)


def test_the_next_view_is_fetched_during_an_epoch_and_nothing_after_the_last() -> None:
    source = Recorder()
    feed = make(ResidentFeed, targets=source, num_views=3, epochs=3)
    steps: Any = feed.epoch(0)  # a generator
    next(steps)
    assert source.fetched.acquire(timeout=10)
    assert source.fetched.acquire(timeout=10), "view 1 while epoch 0 runs"
    assert source.views == [0, 1]
    for epoch in (0, 1, 2):
        list(feed.epoch(epoch))
    feed.close()
    assert not source.closed, "the feed does not own the source"
    assert source.views == [0, 1, 2]


def test_a_single_view_is_fetched_once() -> None:
    source = Recorder()
    feed = make(ResidentFeed, targets=source, num_views=1, epochs=4)
    for epoch in range(4):
        list(feed.epoch(epoch))
    assert source.views == [0]


def test_an_error_in_the_background_thread_is_raised() -> None:
    class Broken(Undecoded):
        def load(self, index: Any) -> np.ndarray:
            raise DataError("cannot decode", where="x.png")

    with pytest.raises(DataError, match=r"x\.png"):
        list(make(StreamingFeed, Broken(cache_factory.tiny_images(SAMPLES))).epoch(0))

    class Gone(Recorder):
        def view(self, view: int) -> Any:
            raise FormatError("damaged", where="view 0")

    with pytest.raises(FormatError, match="view 0"):
        list(make(ResidentFeed, targets=Gone()).epoch(0))


def test_views_of_the_next_epoch_are_drawn_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_by, draw = [], ViewRecipe._draw

    def watched(self: ViewRecipe, *args: Any, **kwargs: Any) -> Any:
        drawn_by.append(threading.current_thread())
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(ViewRecipe, "_draw", watched)
    feed = make(ResidentFeed, views=ViewRecipe(ops=(PadCrop(), Flip())))
    for epoch in range(3):
        list(feed.epoch(epoch))
    feed.close()
    assert len(drawn_by) >= 3
    assert [by for by in drawn_by if by is threading.main_thread()] == drawn_by[:1], "only the first epoch"


def test_an_abandoned_epoch_leaves_no_threads() -> None:
    before = set(threading.enumerate())
    feed = make(StreamingFeed)
    steps: Any = feed.epoch(0)  # a generator
    next(steps)
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("pixels")]
    steps.close()
    feed.close()
    ours = ("pixels", "next-view", "next-epoch")
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith(ours)]


@pytest.mark.parametrize(("free", "kind"), [(1 << 40, ResidentFeed), (1000, HostFeed)])
def test_free_memory_decides_which_feed_is_opened(monkeypatch: pytest.MonkeyPatch, free: int, kind: type[Feed]) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda device: free)
    settings: dict[str, Any] = {"batch_size": 16, "epochs": 1, "seed": 0, "device": CPU}
    feed = open_feed(cache_factory.tiny_images(SAMPLES), ViewRecipe(), None, NoTargets(), **settings)
    assert type(feed) is kind


def test_the_resident_feed_needs_memory_for_all_pixels_and_one_view(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Undecoded(cache_factory.tiny_images(SAMPLES))
    settings: dict[str, Any] = {"batch_size": 16, "epochs": 1, "seed": 0, "device": CPU}
    needed = SAMPLES * 3 * (32 * 32 + 24 * 24)
    views = ViewRecipe(ops=(RandomResizedCrop(size=24),))
    for spare, kind in ((2, ResidentFeed), (-2, HostFeed)):
        monkeypatch.setattr(tiers, "free_memory", lambda device, spare=spare: needed / tiers.MEMORY_SHARE + spare)
        assert type(open_feed(images, views, None, NoTargets(), **settings)) is kind


def test_free_memory_is_plausible() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < free_memory(CPU) <= total


class Recorder:
    """A target source without targets that records the requested views."""

    def __init__(self) -> None:
        self.views: list[int] = []
        self.fetched = threading.Semaphore(0)
        self.closed = False

    def view(self, view: int) -> NoTargets:
        self.views.append(view)
        self.fetched.release()
        return NoTargets()

    def close(self) -> None:
        self.closed = True


class Undecoded(ImageSet):
    """Images that must be loaded piece by piece, like a folder's."""

    def __init__(self, images: ImageSet) -> None:
        names = ("name", "split", "class_names", "labels", "keys", "image_size")
        super().__init__(**{name: getattr(images, name) for name in names})
        object.__setattr__(self, "_images", images)

    @property
    def resident(self) -> bool:
        return False

    def load(self, index: Any) -> np.ndarray:
        return self._images.load(index).copy()  # type: ignore[attr-defined]

    def _fields_at(self, rows: Any) -> dict[str, Any]:
        raise NotImplementedError


def make(kind: type[Feed], images: ImageSet | None = None, cache: TeacherCache | None = None, **changes: Any) -> Feed:
    settings: dict[str, Any] = {
        "views": cache.recipe.views if cache else cache_factory.VIEWS,
        "num_views": cache.num_views if cache else None,
        "targets": NoTargets(),
        "batch_size": 16,
        "epochs": 5,
        "seed": 5,
        "device": CPU,
    } | changes
    if cache is not None:
        settings["targets"] = CachedTargets(cache, settings["device"], logits=True, features=True)
    return kind(images or cache_factory.tiny_images(SAMPLES), **settings)


def same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.index, other.index)
    assert one.targets == other.targets == BatchTargets()


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES - 1])
def test_mixed_views_are_the_same_in_memory_and_streamed(monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """Batches of whole pairs, in another order every epoch, although pieces of the resident feed cut pairs in two."""
    monkeypatch.setattr("train.feed.resident.PIECE_BYTES", 21 * 3 * 32 * 32)
    images = cache_factory.tiny_images(samples)
    mix = MixRecipe(mixup_alpha=0.8, cutmix_alpha=1.0)
    views = ViewRecipe(version=2, ops=(PadCrop(), Flip()), mix=mix, clean_first=True).over(samples)
    both = [make(kind, images, views=views) for kind in (ResidentFeed, StreamingFeed)]
    orders = []
    for epoch in range(3):
        rows = []
        for resident, streamed in zip(*(feed.epoch(epoch) for feed in both), strict=True):
            same(resident, streamed)
            rows += resident.index.tolist()
            if resident.mixed is None or streamed.mixed is None:
                assert epoch == 0
                continue
            partner = views.mixing(resident.index, epoch, (32, 32)).partner
            assert set(partner) <= set(resident.index.tolist())
            assert torch.equal(resident.mixed.partner, torch.from_numpy(images.labels[partner]))
            assert torch.equal(resident.mixed.share, streamed.mixed.share)
        assert sorted(rows) == list(range(samples))
        orders.append(rows)
    assert len({tuple(order) for order in orders}) == 3
    pairs = torch.from_numpy(views.pairs(2))
    first, again = pair_order(pairs, 5, 2), pair_order(pairs, 5, 5)
    assert first.tolist() == orders[2]
    assert not torch.equal(first, again)
    whole = samples // 2 * 2
    for order in (first, again):
        assert set(map(tuple, order[:whole].view(-1, 2).tolist())) == set(
            map(tuple, pairs[:whole].view(-1, 2).tolist())
        )
    for feed in both:
        feed.close()
