"""Mixed views from the files of a folder to a trained student, by command line, and against live teachers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cache_tools.analysis.stats import analyse
from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from pipeline.networks.ensemble import load_ensemble
from pipeline.online import LiveTeachers
from tests.support import tiny_build, tiny_run
from tests.support.in_process import invoke
from train.data import open_data
from train.feed import StreamingFeed
from train.recipe import TrainRecipe
from train.run import train_on

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
SAMPLES = 43  # odd: one of them has no partner
VIEWS: dict[str, Any] = {
    "clean_first": True,
    "ops": [{"op": "random-resized-crop", "size": 16}, "flip", "rand-augment"],
    "mix": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 0.9},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, an untrained teacher, and a cache of mixed views built by the command."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for split, count in (("train", SAMPLES), ("test", 6)):
        for number in range(count):
            label = number % 3
            pixels = rng.integers(0, 160, (20 + 3 * (number % 7), 50 - 4 * (number % 8), 3))
            pixels[..., 2 - label] += 60
            file = root / "pictures" / split / tiny_run.CLASSES[label] / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    tiny_build.write_teacher(root / "teacher.safetensors")
    (root / "plan.yaml").write_text(dump_yaml(build(root)))
    assert invoke("build-cache", root / "plan.yaml").exit_code == 0
    return root


def build(root: Path, **changes: Any) -> Any:
    dataset = {"name": "folder", "data_dir": str(root / "pictures")}
    return tiny_build.recipe(root, dataset=dataset, views=VIEWS, batch_size=64, block_rows=64, **changes)


def run(root: Path, name: str, **changes: Any) -> TrainRecipe:
    return tiny_run.recipe(root / "cache.zarr", root / name, batch_size=22, **changes)


def live(root: Path, data: Any) -> Any:
    plan = build(root)
    ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, data.images, plan.dataset, CPU, "float32")
    return replace(data, targets=LiveTeachers(ensemble), cache=None)


def test_commands_replay_train_and_resume_mixed_views(root: Path) -> None:
    verified = invoke("cache-tools", "verify", root / "cache.zarr", "--replay", "24", "--device", "cpu")
    assert verified.exit_code == 0, verified.output
    assert "24 rows computed again" in verified.output
    shown = invoke("cache-tools", "info", root / "cache.zarr").stdout
    assert "rand-augment → MixUp (α 0.8) or CutMix (α 1), view 0 clean" in shown
    options = (
        "--student",
        "resnet8",
        "--batch-size",
        "22",
        "--device",
        "cpu",
        "--epochs",
        "3",
        "--compare-with-labels",
    )
    trained = invoke("train-student", "--cache", root / "cache.zarr", "--out", root / "by-command", *options)
    assert trained.exit_code == 0, trained.output
    assert (root / "by-command" / "last.safetensors").is_file()
    odd = invoke("train-student", "--cache", root / "cache.zarr", "--out", root / "odd", "--batch-size", "21")
    assert odd.exit_code == 2
    assert "an even batch_size; found 21" in " ".join(odd.output.split())


def test_a_float32_cache_trains_as_live_teachers_do_bit_for_bit(root: Path) -> None:
    recipe = run(root, "unused", epochs=2, loggers=())  # a clean view and a mixed one
    data = open_data(recipe, CPU)
    weights = []
    for name, source in (("cached", data), ("live", live(root, data))):
        train_on(source, recipe.model_copy(update={"out": root / name}), CPU)
        weights.append(load_file(root / name / "last.safetensors"))
    tables = [pl.read_parquet(root / name / "metrics.parquet").drop(tiny_run.TIMINGS) for name in ("cached", "live")]
    assert tables[0].equals(tables[1])
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def test_batches_hold_whole_pairs_and_a_foreign_loop_makes_the_same(root: Path) -> None:
    data = open_data(run(root, "unused"), CPU)
    feed = data.feed(run(root, "unused"), CPU)
    assert isinstance(feed, StreamingFeed)
    teachers = live(root, data).targets
    cache = TeacherCache(root / "cache.zarr")
    labels = torch.from_numpy(data.images.labels)
    try:
        for epoch in (1, 2, 4):
            view, rows = epoch % 3, []
            for batch in feed.epoch(epoch):
                assert batch.mixed is not None
                rows += batch.index.tolist()
                mixing = cache.recipe.views.mixing(batch.index, view, data.images.image_size)
                assert mixing is not None
                assert set(mixing.partner) <= set(batch.index.tolist())
                assert torch.equal(batch.mixed.partner, labels[mixing.partner])
                assert torch.equal(batch.mixed.share, torch.from_numpy(mixing.share).float())
                pictures = [torch.from_numpy(picture) for picture in data.images.pictures(batch.index.numpy())]
                assert torch.equal(batch.pixels, cache.recipe.views.apply(pictures, batch.index, view))
                cached, made = batch.targets.logits, teachers.batch(batch.index, batch.pixels).logits
                assert isinstance(cached, torch.Tensor)
                assert torch.equal(cached, made)
            assert sorted(rows) == list(range(SAMPLES))
        clean = next(feed.epoch(0))
        assert clean.mixed is None
    finally:
        feed.close()


def test_statistics_compare_linear_labels_with_the_targets(root: Path) -> None:
    """Every figure in plain loops, from the stored logits."""
    cache = TeacherCache(root / "cache.zarr")
    sums: dict[str, float] = dict.fromkeys(("kl", "distance", "top1", "in_pair", "label_mass"), 0.0)
    count = 0
    for view in (1, 2):
        mixing = cache.recipe.views.mixing(range(SAMPLES), view, (1, 1))
        assert mixing is not None
        logits = cache.read_array("fused_logits", view).astype(np.float64)
        for i in range(SAMPLES):
            share, own, other = mixing.share[i], int(cache.labels[i]), int(cache.labels[mixing.partner[i]])
            if share == 1.0:
                continue
            p = np.exp(logits[i] - logits[i].max())
            p /= p.sum()
            y = [share * (c == own) + (1 - share) * (c == other) for c in range(3)]
            sums["kl"] += sum(a * math.log(a / b) for a, b in zip(y, p, strict=True) if a > 0)
            sums["distance"] += sum(abs(a - b) for a, b in zip(y, p, strict=True)) / 2
            sums["top1"] += int(p.argmax()) == (own if share >= 0.5 else other)
            sums["in_pair"] += int(p.argmax()) in (own, other)
            sums["label_mass"] += p[own] + (p[other] if other != own else 0.0)
            count += 1
    assert 50 < count < 2 * SAMPLES
    overall = analyse(cache).mixed.filter(pl.col("view").is_null()).to_dicts()
    assert [(row["source"], row["n"]) for row in overall] == [("fusion", count)]
    for name, total in sums.items():
        assert overall[0][name] == pytest.approx(total / count, rel=1e-9), name
    assert analyse(cache, views=[0]).mixed.is_empty()
    shown = invoke("cache-tools", "stats", root / "cache.zarr")
    assert "KL of mixed labels from targets" in shown.output
    plain = json.loads(invoke("cache-tools", "stats", root / "cache.zarr", "--json").stdout)
    assert [row["view"] for row in plain["mixed"]] == [1, 2, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kind": "dkd"}}, "loss.kind: dkd"),
        ({"loss": {"kind": "standardised_dkd"}}, "loss.kind: standardised_dkd"),
        ({"loss": {"kind": "kd", "feature": "crd"}}, "loss.feature: crd"),
        ({"loss": {"class_weights": "balanced"}}, "loss.class_weights"),
        ({"label_fraction": 0.5}, "label_fraction: 0.5"),
        ({"dataset": {"split": "train[::2]"}}, "mix images of the whole cache"),
    ],
)
def test_settings_for_images_of_one_class_are_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        open_data(run(root, "refused", **changes), CPU)
    open_data(run(root, "clean", num_views=1, **changes), CPU)  # view 0 is clean


def test_recipes_on_labels_and_for_several_labels_are_refused_when_they_are_read(root: Path) -> None:
    own = {"name": "own", "dataset": {"name": "digits"}, "views": VIEWS}
    with pytest.raises(RecipeError, match="an even batch_size"):
        TrainRecipe.model_validate({**own, "loss": {"kind": "ce"}, "batch_size": 21})
    with pytest.raises(RecipeError, match="bce"):
        TrainRecipe.model_validate({**own, "loss": {"kind": "bce", "distill_weight": 0.0}})
    TrainRecipe.model_validate({**own, "loss": {"kind": "ce"}})
    plan = build(root).model_dump(mode="json")
    plan |= {"clip": None, "dataset": {**plan["dataset"], "labels": "labels.csv"}}
    with pytest.raises(RecipeError, match="any number of labels"):
        type(build(root)).model_validate(plan)


def test_a_fusion_is_not_chosen_by_labels_of_mixed_views(root: Path) -> None:
    out = root / "components"
    components = build(root, store="components", out=out, num_views=2)
    (root / "components.yaml").write_text(dump_yaml(components))
    assert invoke("build-cache", root / "components.yaml").exit_code == 0
    refused = invoke("cache-tools", "tune-fusion", out)
    assert refused.exit_code == 2
    assert "--view 0" in refused.output
    assert invoke("cache-tools", "tune-fusion", out, "--view", "0").exit_code == 0
