"""The whole step on a pretended GPU: one device, no waiting, no copy within a step, and a budget of kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.fake_cuda import DEVICE, fake_cuda
from tests.support.fake_learner import PREPROCESSING, RUNS, count_step, make, pretended
from train.feed import ResidentFeed, StreamingFeed
from train.loop import model_inputs
from train.recipe.loss import LOSSES

# Kernels of a step: they may fall and never rise.
BUDGETS = {"KD": 117, "RichKD": 319, "KD, bfloat16": 144, "KD, EMA": 128, "KD, MobileNetV2": 404}
SMALL: dict[str, Any] = {"student": "resnet8", "count": 40, "batch_size": 16, "classes": 10, "width": 24, "side": 16}
KINDS = ("ce", "kd", "dkd", "standardised_kd", "standardised_dkd")
FEATURES = ("none", "mse", "cosine", "rkd", "pkt", "crd")


@pytest.mark.medium
@pytest.mark.parametrize("name", RUNS)
def test_a_step_keeps_to_its_budget_of_kernels(name: str) -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, **RUNS[name])
        counted = count_step(gpu, learner, feed)
        feed.close()
    assert counted.total <= BUDGETS[name], counted.launches
    assert counted.watch.transfers == [], "a step copies between host and device"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "feature"), [("kd", feature) for feature in FEATURES] + [(kind, "mse") for kind in KINDS]
)
def test_every_loss_runs_without_a_copy_or_a_wait(kind: str, feature: str) -> None:
    loss = {"kind": kind, "feature": feature, "crd_negatives": 8, "label_smoothing": 0.1}
    with pretended() as gpu:
        learner, feed = make(gpu, loss, **SMALL)
        assert count_step(gpu, learner, feed, steps=1).watch.transfers == []
        feed.close()


SETTINGS: dict[str, dict[str, Any]] = {
    "labels alone": {"loss": LOSSES["ce"], "dataset": {"name": "cifar10"}},
    "float16, clipping": {"loss": LOSSES["kd"], "precision": "float16", "optimiser": {"clip_grad_norm": 1.0}},
    "adamw, EMA": {"loss": LOSSES["kd"], "ema_decay": 0.9, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
    "accumulation": {"loss": LOSSES["dkd"], "optimiser": {"accumulate": 2}},
    "components": {"loss": {"kind": "kd", "feature": "crd", "crd_negatives": 8}, "components": True},
}


@pytest.mark.medium
@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_run_without_a_copy_or_a_wait(name: str) -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, **{**SMALL, "count": 64, **SETTINGS[name]})
        assert count_step(gpu, learner, feed, steps=2).watch.transfers == []
        feed.close()


@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
def test_an_epoch_copies_from_pinned_memory_or_waits(kind: Any) -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["kd"], kind=kind, **SMALL)
        learner.begin_epoch(0)
        with gpu.watch() as watch:
            for batch in feed.epoch(0):
                learner.step(batch, model_inputs(batch, PREPROCESSING))
        feed.close()
    assert watch.transfers
    assert [transfer for transfer in watch.transfers if not transfer.is_safe] == []


# the pretended GPU itself


def test_a_tensor_on_the_host_is_noticed() -> None:
    with fake_cuda() as gpu, gpu.watch(), pytest.raises(RuntimeError, match="device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


WAITS: dict[str, Any] = {
    "item": lambda tensor: tensor.sum().item(),
    "bool": lambda tensor: bool(tensor.sum() > 0),
    "nonzero": lambda tensor: tensor.nonzero(),
    "mask": lambda tensor: tensor[tensor > 0],
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_noticed(name: str) -> None:
    with fake_cuda() as gpu:
        tensor = torch.ones(3, device=DEVICE)
        with gpu.watch(), pytest.raises(AssertionError, match="waits for the device"):
            WAITS[name](tensor)


def test_copies_are_seen_with_their_memory() -> None:
    with fake_cuda() as gpu, gpu.watch() as watch:
        there = torch.ones(3).to(DEVICE, non_blocking=True)
        torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        there.to("cpu", non_blocking=True)
        there.cpu()
    assert [transfer.is_safe for transfer in watch.transfers] == [False, True, False, True]


def test_kernels_are_counted_and_views_are_not() -> None:
    with fake_cuda() as gpu:
        weight = torch.nn.Parameter(torch.ones(3, 3, device=DEVICE))
        with gpu.watch() as watch:
            (weight.t()[1:] * 2.0).sum().backward()
    assert watch.launches() == 5, watch.kernels  # mul, sum; ones, mul, and zeros with the slice in it
    assert weight.grad is not None


def test_everything_is_restored() -> None:
    names = ("is_available", "Stream", "mem_get_info", "current_device")
    before = [getattr(torch.cuda, name) for name in names]
    methods = torch.Tensor.backward, torch.Tensor.pin_memory, torch.nn.Module.to, torch.Generator
    with pretended():
        assert torch.cuda.is_available()
    assert [getattr(torch.cuda, name) for name in names] == before
    assert (torch.Tensor.backward, torch.Tensor.pin_memory, torch.nn.Module.to, torch.Generator) == methods
    assert type(torch.ones(2).sum()) is torch.Tensor
    weight = torch.nn.Parameter(torch.ones(2))
    (3 * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, 3.0]
