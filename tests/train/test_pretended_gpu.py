"""The whole step on a pretended GPU: one device, no waiting, no copy within a step, and a budget of kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from cache_tools.errors import RecipeError
from cache_tools.system.devices import copy_to, seeded_on_cpu
from cache_tools.system.memory import free_memory
from cache_tools.targets import FusedView
from tests.support.fake_cuda import DEVICE, FakeGpu, fake_cuda
from tests.support.fake_learner import PREPROCESSING, RUNS, count_step, make, make_recipe, pretended
from train.feed import Batch, Feed, HostFeed, ResidentFeed, StreamingFeed
from train.loop import Learner, explain_failure, model_inputs, repeatable, train_epoch
from train.loop.epoch import EPOCH_SHARE
from train.objective import Objective
from train.recipe.loss import LOSSES, LossRecipe
from train.run.background import Snapshot

# Kernels of a step: they may fall and never rise.
BUDGETS = {"KD": 100, "RichKD": 189, "KD, bfloat16": 127, "KD, EMA": 101, "KD, MobileNetV2": 344}
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


@pytest.mark.parametrize("kind", [ResidentFeed, HostFeed, StreamingFeed])
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


def test_an_epoch_begins_with_copies_that_the_host_does_not_wait_for() -> None:
    with pretended() as gpu:
        _, feed = make(gpu, LOSSES["kd"], **SMALL)
        list(feed.epoch(0))
        with gpu.watch() as watch:
            next(feed.epoch(1))
        feed.close()
    assert len(watch.transfers) == 2, "the order of the samples, and the draws of their views"
    assert all(transfer.non_blocking and transfer.is_safe for transfer in watch.transfers)


def test_a_snapshot_is_copied_to_pinned_memory_and_waited_for_once() -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["richkd"], **SMALL)
        state = learner.state_dict()
        with gpu.watch() as watch:
            snapshot = Snapshot(state, gpu.device)
        assert {(transfer.pinned, transfer.non_blocking) for transfer in watch.transfers} == {(True, True)}
        assert gpu.events == [{"blocking": True}]
        with mock.patch.object(torch.cuda.Event, "synchronize") as wait:
            copied = snapshot.get()
        wait.assert_called_once()
        assert {tensor.device.type for tensor in copied["student"].values()} == {"cpu"}
        feed.close()


@pytest.mark.parametrize("kind", [ResidentFeed, StreamingFeed])
def test_threads_of_the_feed_work_on_the_stream_of_the_caller(kind: Any) -> None:
    with pretended() as gpu:
        side: Any = torch.cuda.Stream(gpu.device)
        with gpu.watch() as watch, torch.cuda.stream(side):
            _, feed = make(gpu, LOSSES["kd"], kind=kind, **SMALL)
            list(feed.epoch(0))
            feed.close()
    assert {transfer.stream for transfer in watch.transfers} == {side}


def test_a_learner_has_one_stream_for_all_epochs() -> None:
    with pretended() as gpu:
        first, feed = make(gpu, LOSSES["kd"], **SMALL)
        second, _ = make(gpu, LOSSES["kd"], **SMALL)
        with mock.patch("train.loop.sums.Sums.compute", return_value={}):
            for epoch in range(2):
                assert train_epoch([first, second], feed, epoch, lambda count: None) == [{}, {}]
        feed.close()
    assert gpu.streams == 2


def train_together(gpu: FakeGpu, feed: Feed, learners: list[Learner]) -> None:
    """An epoch, on whose waits and events `gpu` reports."""
    gpu.events.clear()
    gpu.waits.clear()
    gpu.recorded = 0
    with mock.patch("train.loop.sums.Sums.compute", return_value={}):
        assert train_epoch(learners, feed, 1, lambda count: None) == [{}] * len(learners)


@pytest.mark.medium
@pytest.mark.parametrize("loss", ["kd", "richkd"])
def test_students_wait_once_an_epoch_for_buffers_that_they_share(loss: str) -> None:
    with pretended() as gpu:
        settings = {**SMALL, "count": 112, "components": loss == "richkd"}
        made = [make(gpu, LOSSES[loss] | {"crd_negatives": 8}, **settings) for _ in range(3)]
        learners, feed = [learner for learner, _ in made], made[0][1]
        seen: list[Any] = []
        with mock.patch.object(Learner, "step", autospec=True, side_effect=look(seen, gpu)):
            train_together(gpu, feed, learners)
        feed.close()
    assert feed.steps_per_epoch == 7
    assert gpu.events == [{}], "one event an epoch"
    assert gpu.waits == ["event"] * 3 + ["stream"] * 3, "each student waits for it, and its stream is joined at the end"
    assert gpu.recorded == 0
    assert {stream for _, stream, _ in seen} == {learner.stream for learner in learners}
    pixels = {learner: [place for who, _, place in seen if who is learner] for learner in learners}
    assert len(pixels[learners[0]]) == 7
    assert pixels[learners[0]] == pixels[learners[1]] == pixels[learners[2]], "all read the same tensors"


def look(seen: list[Any], gpu: FakeGpu) -> Callable[..., None]:
    """A step that only notes who makes it, on which stream, and from which tensors."""

    def step(learner: Learner, batch: Batch, inputs: torch.Tensor) -> None:
        assert inputs.shape == batch.pixels.shape
        seen.append((learner, gpu.stream, (id(batch), id(batch.pixels))))

    return step


@pytest.mark.parametrize("kind", [ResidentFeed, HostFeed, StreamingFeed])
def test_students_wait_for_each_batch_that_is_made_while_they_train(kind: Any) -> None:
    """Of pixels that come batch by batch, and of an epoch whose targets would take too much memory."""
    with pretended() as gpu:
        first, feed = make(gpu, LOSSES["kd"], kind=kind, **{**SMALL, "count": 112})
        second, _ = make(gpu, LOSSES["kd"], **SMALL)
        gpu.free_bytes = int(112 * 10 * 4 / EPOCH_SHARE) - 1
        with mock.patch.object(Learner, "step"):
            train_together(gpu, feed, [first, second])
        feed.close()
    assert gpu.events == []
    assert gpu.waits == ["stream"] * (7 * 2 + 2)
    assert gpu.recorded >= 7 * 2 * 5, "pixels, labels, rows, inputs and logits of each batch and student"


def test_a_student_alone_waits_for_nothing() -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["kd"], **SMALL)
        train_together(gpu, feed, [learner])
        feed.close()
    assert (gpu.events, gpu.waits, gpu.recorded) == ([], [], 0)


def test_a_run_of_the_cpu_goes_on_with_fused_kernels() -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["kd"], **SMALL, optimiser={"name": "adamw"})
        count_step(gpu, learner, feed, steps=1)
        state = copy.copy(learner.state_dict())
        groups = [{**group, "fused": None, "lr": 0.5} for group in state["optimiser"]["param_groups"]]
        steps = {
            number: {name: values.to("cpu") for name, values in one.items()}
            for number, one in state["optimiser"]["state"].items()
        }
        learner.load_state_dict({**state, "optimiser": {"state": steps, "param_groups": groups}})
        (group,) = learner.optimiser.param_groups
        assert group["fused"] is True
        assert group["lr"] != 0.5, "the rate is a function of the number of updates"
        assert {value.device for one in learner.optimiser.state.values() for value in one.values()} == {gpu.device}
        feed.close()


def test_free_memory_has_what_torch_holds_and_does_not_use() -> None:
    with fake_cuda() as gpu:
        gpu.free_bytes, gpu.reserved_bytes, gpu.allocated_bytes = 1000, 500, 200
        assert free_memory(gpu.device) == 1300


@pytest.mark.parametrize("there", ["cuda:0", "cpu"])
def test_targets_move_between_devices_without_being_read_too_early(there: str) -> None:
    with fake_cuda() as gpu, gpu.watch() as watch:
        here = torch.device("cpu" if there == "cuda:0" else "cuda:0")
        rows = torch.zeros(4, 3).to(here)
        targets = FusedView(0, {"fused_logits": rows}, {}, {}).to(there)
    assert targets.device == torch.device(there)
    assert [transfer for transfer in watch.transfers if not transfer.is_safe] == []


def test_only_copies_of_pinned_memory_are_not_waited_for() -> None:
    with fake_cuda() as gpu, gpu.watch() as watch:
        copy_to(torch.ones(3), gpu.device)
        there = copy_to(torch.ones(3).pin_memory(), gpu.device)
        copy_to(there, torch.device("cpu"))
    assert [transfer.non_blocking for transfer in watch.transfers] == [False, True, False]


def test_a_seed_on_the_cpu_leaves_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of CUDA are seeded"))
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    before = torch.get_rng_state()
    with seeded_on_cpu(5):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    Objective(LossRecipe(feature="mse"), 4, 6, 3, 5, torch.arange(5) % 3)


def test_an_operation_that_cannot_repeat_stops_a_deterministic_run() -> None:
    recipe = make_recipe(LOSSES["kd"], deterministic=True)
    device = torch.device("cuda:0")
    with fake_cuda(), repeatable(device, True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    with (
        pytest.raises(RecipeError, match=r"cannot repeat bit for bit.*adaptive_max.*deterministic=false"),
        explain_failure(recipe, device),
    ):
        raise RuntimeError("adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but …")


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
