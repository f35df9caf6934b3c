"""Training from a cache equals training with live teachers: bit for bit in float32, closely in float16.

`make test` does this with an eighth of the digits, `make test-slow` with all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cache_tools.images import open_images
from pipeline.build.cache import build_cache
from pipeline.networks.ensemble import load_ensemble
from pipeline.online import LiveTeachers
from pipeline.recipe import load_build_recipe
from tests.support.turns import LONG
from train.data import TrainingData, open_data
from train.recipe import TrainRecipe
from train.run import train_on

pytestmark = [pytest.mark.medium, pytest.mark.turns]

SPLIT = "train" if LONG else "train[::8]"

CPU = torch.device("cpu")
BATCH_SIZE = 64  # any size of at least 16: below, matrix products take another path and differ in the last bit


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Caches of the embedded digits with the shipped, trained teachers: two views, float32 and float16."""
    root = tmp_path_factory.mktemp("online")
    for dtype in ("float32", "float16"):
        options = {"num_views": 2, "preflight_samples": 0, "codec": dtype, "out": str(root / dtype), "device": "cpu"}
        build_cache(load_build_recipe("digits", [f"dataset.split={SPLIT}"], options))
    return root


def recipe(root: Path, name: str, **loss: object) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "name": "online",
            "cache": str(root / "float32"),
            "student": "resnet8",
            "loss": {"kind": "kd"} | loss,
            "optimiser": {"learning_rate": 0.05},
            "epochs": 2,
            "batch_size": BATCH_SIZE,
            "device": "cpu",
            "out": root / name,
        }
    )


def live(data: TrainingData) -> TrainingData:
    """The same images and views, with both networks in the process instead of the cache."""
    build = load_build_recipe("digits")
    ensemble = load_ensemble(build.teacher, build.clip, build.fusion, data.images, build.dataset, CPU, "float32")
    return replace(data, targets=LiveTeachers(ensemble), cache=None)


def train(root: Path, cache: str, name: str, *, online: bool = False, **loss: object) -> tuple[dict, list[float]]:
    """Last weights and the loss of every epoch."""
    run = recipe(root, name, **loss).model_copy(update={"cache": str(root / cache)})
    data = open_data(run, CPU)
    train_on(live(data) if online else data, run, CPU)
    assert run.out is not None
    history = pl.read_parquet(run.out / "metrics.parquet")
    return load_file(run.out / "last.safetensors"), history["loss"].to_list()


@pytest.mark.parametrize(
    "loss", [pytest.param({}, marks=pytest.mark.slow), {"feature": "cosine"}], ids=["kd", "kd+features"]
)
def test_a_float32_cache_gives_the_weights_of_live_teachers_bit_for_bit(root: Path, loss: dict):
    tag = "-".join(loss.values()) or "kd"
    cached, cached_losses = train(root, "float32", f"cached-{tag}", **loss)
    online, online_losses = train(root, "float32", f"live-{tag}", online=True, **loss)
    assert cached_losses == online_losses
    assert cached.keys() == online.keys()
    for name, weight in cached.items():
        assert torch.equal(weight, online[name]), name


def test_a_float16_cache_barely_changes_the_loss(root: Path, record_property):
    """The same weights on the same batches: the largest relative difference of the loss that float16 targets make."""
    from train.losses.functions import kd
    from train.students import create_student

    run = recipe(root, "unused")
    data32 = open_data(run, CPU)
    data16 = open_data(run.model_copy(update={"cache": str(root / "float16")}), CPU)
    torch.manual_seed(0)
    student = create_student("resnet8", 10).eval()
    images = open_images(data32.dataset)
    worst = 0.0
    with torch.inference_mode():
        for view in range(2):
            exact, rounded = data32.cache.load_view(view), data16.cache.load_view(view)
            for start in range(0, len(images), BATCH_SIZE):
                index = torch.arange(start, min(start + BATCH_SIZE, len(images)))
                pixels = data32.views.apply(torch.from_numpy(images.load(index.numpy())), index, view)
                logits = student(pixels.float() / 255)
                full, half = kd(logits, exact.logits(index), 4.0), kd(logits, rounded.logits(index), 4.0)
                worst = max(worst, float((half - full).abs() / full))
    print(f"largest relative difference of KD(4) between float16 and float32 targets: {worst:.2e}")
    record_property("float16_loss_difference", worst)
    assert 0 < worst < 2e-3
