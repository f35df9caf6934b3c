"""Training recipes: the names in them, the values that identify a run, and the same run on labels alone."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from cache_tools.config import dump_yaml
from cache_tools.errors import DeviceError
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views.recipe import ViewRecipe
from tests.support.fake_cuda import fake_cuda
from train.recipe import TrainRecipe, recipe_digest
from train.recipe.loss import LossRecipe


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ({"kind": "ce"}, "ce"),
        ({"kind": "kd"}, "kd"),
        ({"kind": "kd", "feature": "crd"}, "kd+crd"),
        ({"kind": "ce", "feature": "mse"}, "ce+mse"),
        ({"kind": "kd", "distill_weight": 0.0}, "ce"),
        ({"kind": "bce", "feature": "pkt"}, "bce+pkt"),
        ({"kind": "bce", "distill_weight": 0.0}, "bce-labels"),
    ],
)
def test_the_name_of_a_loss(loss: dict[str, Any], name: str) -> None:
    assert make(loss=loss).loss_name == name


def test_values_hold_everything_that_determines_the_result() -> None:
    recipe = make()
    for same in ({"device": "cpu"}, {"out": "x"}, {"name": "other"}, {"data_dir": "d"}, {"cache": "elsewhere"},
                 {"dataset": {"name": "cifar10"}}, {"compare_with_labels": True}):  # fmt: skip
        assert make(**same).values() == recipe.values(), same
    for different in ({"seed": 1}, {"epochs": 9}, {"student": "vgg8"}, {"precision": "bfloat16"},
                      {"loss": {"kind": "dkd"}}, {"evaluate_every": 2}, {"batch_size": 63},
                      {"num_views": 3}, {"label_fraction": 0.1}, {"fusion": {"teacher_weight": 0.5}}):  # fmt: skip
        assert make(**different).values() != recipe.values(), different


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("resnet8X4", "resnet8x4"),
        ("mobilenetv2", "MobileNetV2"),
        ("shufflenetv1", "ShuffleV1"),
        ("Torchvision:ResNet18", "torchvision:resnet18"),
        ("TIMM:resnet10t", "timm:resnet10t"),
        ("timm:Mine", "timm:Mine"),
        ("Nobody's", "Nobody's"),
    ],
)
def test_a_student_has_one_canonical_name(written: str, name: str) -> None:
    assert make(student=written).values() == make(student=name).values()
    assert make(student=name).student == name


def test_on_labels_alone_the_values_hold_dataset_and_views_but_not_data_dir() -> None:
    recipe = make(loss={"kind": "ce"})
    assert recipe.values() != make(loss={"kind": "kd"}).values()
    assert make(loss={"kind": "ce"}, cache="other").values() == recipe.values()
    assert make(loss={"kind": "ce"}, dataset={"name": "digits", "data_dir": "x"}).values() == recipe.values()
    assert make(loss={"kind": "ce"}, dataset={"name": "cifar10"}).values() != recipe.values()
    assert make(loss={"kind": "ce"}, num_views=2).values() != recipe.values()
    assert make(loss={"kind": "ce"}, views={"base_seed": 2}).values() != recipe.values()


def test_on_labels_changes_only_the_loss() -> None:
    recipe = make(compare_with_labels=True)
    on_labels = recipe.on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    before, after = recipe.model_dump(), on_labels.model_dump()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"cache", "dataset", "views", "loss", "num_views", "compare_with_labels"}
    assert not on_labels.loss.needs_targets


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "d19dde278b7f12d6a863bf74b552fd7b3cfda6776843e14bd49ce3f35e83fb25"),
        ({"loss": {"kind": "ce"}}, "06b1060efbc91dba50e504ca728ad49f17ac7038712f5f1076b2ea61d61b1188"),
        (
            {"optimiser": {"name": "adamw", "learning_rate": 0.001}},
            "c5179835658efbf661d222c3248c33038f6a85f7ac1a140d500b07cb85e39241",
        ),
    ],
)
def test_digests_of_earlier_versions_stay(changes: dict[str, Any], digest: str) -> None:
    """Runs of version 0.1 resume and are found again."""
    assert recipe_digest({"recipe": make(**changes).values()}) == digest


ADDED: dict[str, dict[str, Any]] = {
    "optimiser": {"accumulate": 4, "clip_grad_norm": 1.0},
    "loss": {"label_smoothing": 0.1, "class_weights": (1.0, 2.0)},
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, values in ADDED.items() for key in values])
def test_an_added_setting_is_another_run(part: str, key: str) -> None:
    recipe = make(**{part: {key: ADDED[part][key]}})
    assert recipe.values() != make().values()
    assert f"{key}: " in dump_yaml(make()), "a shown recipe has all settings"


def test_on_labels_keeps_the_settings_of_the_ce_term() -> None:
    recipe = make(loss={"kind": "dkd", "ce_weight": 0.5, "label_smoothing": 0.2, "class_weights": "balanced"})
    on_labels = recipe.on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    assert on_labels.loss == LossRecipe(kind="ce", label_smoothing=0.2, class_weights="balanced")
    several = make(loss={"kind": "bce", "ce_weight": 0.5}).on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    assert several.loss_name == "bce-labels"


def make(**changes: Any) -> TrainRecipe:
    data: dict[str, Any] = {"name": "mine", "cache": "c", "dataset": {"name": "digits"}, "epochs": 10}
    return TrainRecipe.model_validate(data | changes)


def test_the_precision_of_the_device_is_recorded_as_itself() -> None:
    auto = {"name": "a", "cache": "c", "precision": "auto"}
    on_cpu = TrainRecipe.model_validate(auto | {"device": "cpu"})
    assert on_cpu.stored().precision == "float32"
    assert on_cpu.values() == TrainRecipe.model_validate({"name": "a", "cache": "c"}).values()
    with fake_cuda():
        assert TrainRecipe.model_validate(auto).precision == "bfloat16"
        assert TrainRecipe.model_validate(auto | {"device": "cpu"}).precision == "float32"
        with mock.patch.object(torch.cuda, "get_device_capability", return_value=(7, 5)):
            assert TrainRecipe.model_validate(auto).precision == "float32"
    with pytest.raises(DeviceError, match="no such device"):
        TrainRecipe.model_validate(auto | {"device": "toaster"})
