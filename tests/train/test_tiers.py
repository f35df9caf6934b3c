"""Every tier gives the same batches and the same weights; budgets choose it; it is told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache_tools.decoding.packing import make_packed
from cache_tools.images import open_images
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views import ViewRecipe
from tests.support import tiny_run
from tests.support.pictures import photo, recipe_for
from train.feed import (
    Batch,
    Feed,
    HostFeed,
    NoTargets,
    ResidentFeed,
    StreamingFeed,
    choose_tier,
    memory_shares,
    open_feed,
    tiers,
)
from train.labelled import PartialLabels
from train.loop import Learner
from train.recipe import TrainRecipe
from train.recipe.pixels import PixelRecipe
from train.run import train_student
from train.runs.result import load_result

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]
COUNT = 37
CROPPED: dict[str, Any] = {"version": 2, "ops": [{"op": "random-resized-crop", "size": 20}, "flip"]}
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
VIEWS = {
    "canvases": {"ops": ["pad-crop", "flip"], "clean_first": True},
    "boxes": CROPPED,
    "mixed canvases": {"version": 2, "ops": ["pad-crop", "flip"], "mix": MIX},
    "mixed boxes": CROPPED | {"mix": MIX},
}
TIERS = {
    "decode": PixelRecipe(device_memory=0, host_memory=0, disk=0),
    "disk": PixelRecipe(device_memory=0, host_memory=0, disk=10**8),
    "host": PixelRecipe(device_memory=0, disk=0),
    "device": PixelRecipe(disk=0),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for number in range(COUNT):
        file = root / "train" / f"class{number % 3}" / f"{number:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(24 + 7 * (number % 6), 60 - 5 * (number % 5), number).save(file, quality=90)
    return root


@pytest.fixture
def images(root: Path) -> EncodedImages:
    images = open_images(recipe_for(root, test_split=None))
    assert isinstance(images, EncodedImages)
    return images


def opened(images: Any, views: ViewRecipe, pixels: PixelRecipe, device: str = "cpu", **changes: Any) -> Feed:
    settings: dict[str, Any] = {"batch_size": 8, "epochs": 2, "seed": 3, "device": torch.device(device)}
    return open_feed(images, views, 2, NoTargets(), pixels=pixels, **(settings | changes))


def batches(feed: Feed) -> list[Batch]:
    try:
        return [batch for epoch in (0, 1) for batch in feed.epoch(epoch)]
    finally:
        feed.close()


def same(one: Batch, other: Batch) -> None:
    for name in ("pixels", "labels", "index", "labelled"):
        left, right = getattr(one, name), getattr(other, name)
        assert left is right is None or torch.equal(left.cpu(), right.cpu()), name
    assert (one.mixed is None) == (other.mixed is None)
    if one.mixed is not None and other.mixed is not None:
        assert all(torch.equal(left.cpu(), right.cpu()) for left, right in zip(one.mixed, other.mixed, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", VIEWS)
def test_every_tier_gives_the_same_batches(images: EncodedImages, kind: str, device: str) -> None:
    """Of a whole split, and where nothing is mixed of a part with its numbers in the cache and a few labels."""
    views = ViewRecipe.model_validate(VIEWS[kind]).over(COUNT)
    cases: list[tuple[EncodedImages, dict[str, Any]]] = [(images, {})]
    if views.mix is None:
        rows = np.array([30, 2, 3, 4, 5, 6, 7, 8, 11, 36])
        known = PartialLabels(images.labels[rows], rows % 2 == 0)
        cases.append((images.subset(rows), {"samples": rows, "known": known}))
    for some, changes in cases:
        expected = batches(opened(some, views, TIERS["decode"], device, **changes))
        for name in ("disk", "host", "device"):
            tier = choose_tier(some, views, torch.device(device), TIERS[name])
            assert tier.name == ("host" if "boxes" in kind and name == "device" else name)
            found = batches(opened(some, views, TIERS[name], device, **changes))
            for one, other in zip(found, expected, strict=True):
                same(one, other)


def test_budgets_choose_the_tier(images: EncodedImages, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda device: 1000)
    views, crops = (ViewRecipe.model_validate(VIEWS[kind]) for kind in ("canvases", "boxes"))
    canvases = 3 * 32 * 32 * COUNT

    def chosen(views: ViewRecipe = views, of: Any = images, **pixels: int) -> tuple[str, type[Feed], str]:
        tier = choose_tier(of, views, CPU, PixelRecipe(**pixels))
        return tier.name, tier.feed, tier.reason

    text = "pixels: in memory (227.3 KB, with one view of them)"
    assert chosen(device_memory=2 * canvases) == ("device", ResidentFeed, text)
    text = (
        "pixels: in memory, viewed batch by batch (113.7 KB; with one view of them 227.3 KB, where memory may hold "
        "227.3 KB)"
    )
    assert chosen(device_memory=2 * canvases - 1, host_memory=canvases) == ("host", HostFeed, text)
    text = "pixels: decoded in every epoch (119.1 KB; --pixel-disk 1MB would keep them)"
    assert chosen(host_memory=canvases - 1) == ("decode", StreamingFeed, text)
    assert not home.exists(), "nothing is written where nobody offers it"
    name, _, text = chosen(crops)
    assert (name, text) == (
        "decode",
        "pixels: decoded in every epoch (about 234.2 KB; --pixel-disk 1MB would keep them)",
    )
    text = "pixels: in memory, cropped batch by batch (about 234.2 KB)"
    assert chosen(crops, host_memory=240_000) == ("host", HostFeed, text)
    assert choose_tier(images, crops, CPU, PixelRecipe(host_memory=240_000), epochs=1).name == "decode"
    name, kind, text = chosen(disk=10**6)
    assert (name, kind) == ("disk", StreamingFeed)
    (file,) = (home / "pixels").glob("*.pixels")
    assert text == f"pixels: from {file} (119.1 KB)"
    assert chosen()[0] == "disk", "what exists is used"
    assert chosen(disk=0)[0] == "decode"
    assert chosen(host_memory=canvases)[0] == "host"
    name, _, text = chosen(crops, disk=300_000)
    assert (name, text.partition("; ")[2]) == ("decode", "other pixel files take 119.1 KB of --pixel-disk 1MB)")
    digits = open_images(DatasetRecipe(name="digits", split="train[:50]"))
    assert chosen(of=digits)[0] == "host"
    assert chosen(of=digits, device_memory=3 * 32 * 32 * 50)[0] == "device", "it is in memory already"


def test_memory_is_loaded_from_a_file_that_exists(images: EncodedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    make_packed(images, canvases=True, budget=10**8)
    monkeypatch.setattr(EncodedImages, "_read_each", None)  # nothing is decoded
    for pixels in (PixelRecipe(), PixelRecipe(device_memory=0)):
        assert len(batches(opened(images, ViewRecipe(), pixels))) == 10


def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "free_memory", lambda device: 1000 if device.type == "cpu" else 5000)
    given = PixelRecipe(host_memory=100, disk=7)
    assert memory_shares(given, CPU, 1, 1) == given
    assert memory_shares(given, CPU, 4, 1) == PixelRecipe(device_memory=150, host_memory=25, disk=7)
    cuda = torch.device("cuda")
    assert memory_shares(PixelRecipe(), cuda, 4, 2) == PixelRecipe(device_memory=1500, host_memory=150)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiers")
    return tiny_run.write_cache(root / "cache.zarr", tiny_run.write_pictures(root / "pictures"), num_views=2)


def recipe(cache: Path, out: Path, tier: str) -> TrainRecipe:
    pixels = TIERS[tier].model_dump()
    return tiny_run.recipe(cache, out, epochs=2, loggers=(), checkpoint_every_minutes=1e-9, pixels=pixels)


@pytest.mark.medium
def test_every_tier_trains_the_same_student_also_after_resuming_in_another(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tier in TIERS:
        train_student(recipe(cache, tmp_path / tier, tier))
        tiny_run.same_runs(tmp_path / "decode", tmp_path / tier)
    printed = capsys.readouterr().err.splitlines()
    results = [load_result(tmp_path / tier) for tier in TIERS]
    lines = {result.pixels for result in results if result is not None}
    assert len(lines) == 4
    assert lines <= set(printed)
    original, steps = Learner.step, 0

    def step(self: Learner, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 0:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Learner, "step", step)
    for tier in ("decode", "device", "disk", "host"):  # of 8 steps each makes two
        if tier == "host":
            monkeypatch.setattr(Learner, "step", original)
            train_student(recipe(cache, tmp_path / "resumed", tier))
            break
        with pytest.raises(KeyboardInterrupt):
            train_student(recipe(cache, tmp_path / "resumed", tier))
    tiny_run.same_runs(tmp_path / "decode", tmp_path / "resumed")


def test_no_tier_is_in_the_identity_of_a_run() -> None:
    one, other = (recipe(Path("cache"), Path("run"), tier) for tier in ("decode", "disk"))
    assert one.values() == other.values()
    assert "pixels" not in one.values()
    assert "pixels" not in tiny_run.recipe("cache", Path("run")).model_dump(mode="json"), "nor in older digests"


def test_the_command_takes_sizes_and_tells_where_the_pixels_are(cache: Path, tmp_path: Path) -> None:
    from train.cli import app

    run = CliRunner()
    plan = ["--cache", str(cache), "--student", "resnet8", "--epochs", "1", "--log", "none", "--device", "cpu"]
    sizes = ["--device-memory", "0", "--host-memory", "0", "--pixel-disk", "5MB"]
    done = run.invoke(app, [*plan, *sizes, "--out", str(tmp_path / "run"), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    line = json.loads(done.stdout)["pixels"]
    assert line.startswith("pixels: from ")
    assert f"\n{line}\n" in f"\n{done.stderr}"
    for bad in ("5", "-7", "lots", "1XB"):
        done = run.invoke(app, [*plan, "--pixel-disk", bad], catch_exceptions=False)
        assert done.exit_code == 2
        assert f"(--pixel-disk); expected a size such as 20GB or 500MB, or 0; found '{bad}'" in done.stderr


def test_the_processes_of_a_sweep_take_their_shares(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.sweep import streams
    from train.sweep.recipe import Trial

    given: list[PixelRecipe] = []
    monkeypatch.setattr(streams, "_train", lambda opened, lead, options: given.append(options.pixels))
    run = recipe(cache, tmp_path, "decode").model_copy(update={"pixels": PixelRecipe(host_memory=100)})
    trial = Trial(number=0, settings={}, recipe=run)
    for workers in ((1, 1), (4, 2)):
        streams.train_stream([trial], workers=workers)
    monkeypatch.setattr(tiers, "free_memory", lambda device: 1000)
    assert given[0] == run.pixels
    assert given[1].host_memory == 25
    assert given[1].device_memory is not None
