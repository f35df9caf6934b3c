"""Several ranks train one student as one process does: the same batches, losses and weights."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d
from torch import nn

from cache_tools.errors import RecipeError
from cache_tools.system.joined import Joined
from cache_tools.system.ranks import ALONE, Rank, own_rank
from tests.support import tiny_run
from tests.support.child import in_child
from tests.support.in_process import invoke
from tests.support.rank_workers import (
    CPU,
    PLAIN,
    answers_of_ranks,
    joined,
    losses_of_batches,
    on_ranks,
    record_losses,
    use_double_precision,
)
from tests.support.turns import slow
from train.data import TrainingData, open_data
from train.evaluate.metrics import Meter, evaluate_logits
from train.feed import Batch, CachedTargets
from train.feed import targets as feed_targets
from train.loop import Learner
from train.loop.batch_norm import average_statistics, synchronised
from train.recipe import TrainRecipe
from train.run import train_student
from train.run.ranks import check_batches, check_ranks
from train.weights.run_files import run_files

SAMPLES = 58  # batches of 16, and the last one of 10: parts of 2 and 3 on four ranks
CRD = {"kind": "kd", "feature": "crd", "crd_negatives": 8}
CASES: dict[str, dict[str, Any]] = {
    "kd": {"student": PLAIN},
    "richkd": {"student": PLAIN, "loss": CRD},
    "batch norm": {"sync_batchnorm": True, "ema_decay": 0.9},
    "half an update": {
        "student": PLAIN,
        "loss": {"kind": "kd", "class_weights": [1.0, 2.0, 5.0], "label_smoothing": 0.1},
        "optimiser": {"learning_rate": 0.02, "accumulate": 3, "clip_grad_norm": 0.5},
    },
    "rkd": {"student": PLAIN, "loss": {"kind": "ce", "feature": "rkd", "feature_weight": 0.1}},
    "pkt": {"student": PLAIN, "loss": {"kind": "ce", "feature": "pkt", "feature_weight": 100.0}},
    "few labels": {"student": PLAIN, "label_fraction": 0.3},
    "windows": {"student": PLAIN, "shuffle_window": 2},
    "features alone": {"loss": {"kind": "ce", "ce_weight": 0.0, "feature": "mse"}, "sync_batchnorm": True},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"), train=SAMPLES)


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "components.zarr", pictures, store="components")


@pytest.fixture(scope="module")
def top_k(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "top-k.zarr", pictures, codec="top-k")


def recipe(cache: Path, out: Path, **changes: Any) -> TrainRecipe:
    own = {"epochs": 2, "loggers": (), "optimiser": {"learning_rate": 0.02}}
    return tiny_run.recipe(cache, out, **(own | changes))


def losses(training: TrainRecipe) -> Callable[[], list[tuple[int, float]]]:
    """A function that trains, and returns the losses of this process."""

    def train() -> list[tuple[int, float]]:
        if training.sync_batchnorm:  # in float32 every step multiplies the rounding in which two runs differ
            use_double_precision()
        steps = record_losses()
        train_student(training)
        return steps

    return train


def compare(training: TrainRecipe, root: Path, count: int) -> None:
    """Train in one process and on several ranks; losses, figures and weights are the same."""
    alone, shared = (training.model_copy(update={"out": root / name}) for name in ("alone", "shared"))
    expected = [loss for _, loss in in_child(losses(alone), root / "log")]
    found = losses_of_batches(on_ranks(count, losses(shared), root))
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for weights in sorted((root / "alone").glob("*.safetensors")):
        one, other = load_file(weights), load_file(root / "shared" / weights.name)
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-4)
    tables = [metrics(root / name) for name in ("alone", "shared")]
    assert tables[0].keys() == tables[1].keys()
    for column, values in tables[0].items():
        # Rounding decides where two classes are within 1e-5 of each other: one sample of the 21 in the test split.
        margin = 1.01 / 21 if column.endswith("top1") else 2e-4
        assert values == pytest.approx(tables[1][column], abs=margin, rel=2e-4), column


def metrics(folder: Path) -> dict[str, list[float]]:
    """The figures of a run. Read in a child: polars has threads, with which this process could not fork again."""
    table: dict[str, list[float]] = in_child(
        lambda: pl.read_parquet(folder / "metrics.parquet").drop(tiny_run.TIMINGS).to_dict(as_series=False)
    )
    return {column: [value for value in values if value is not None] for column, values in table.items()}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("case", "count"),
    [
        *[("richkd", 2), ("batch norm", 2)],
        *[slow(case, count) for case in CASES for count in (2, 4)],
    ],
)
@pytest.mark.alone
def test_ranks_train_as_one_process_does(components: Path, tmp_path: Path, case: str, count: int) -> None:
    compare(recipe(components, tmp_path, **CASES[case]), tmp_path, count)


@pytest.mark.slow
@pytest.mark.alone
def test_top_k_targets(top_k: Path, tmp_path: Path) -> None:
    compare(recipe(top_k, tmp_path, student=PLAIN, epochs=1, loss={"kind": "kd", "temperature": 1.0}), tmp_path, 2)


@pytest.mark.slow
@pytest.mark.alone
def test_fifty_steps(components: Path, tmp_path: Path) -> None:
    compare(recipe(components, tmp_path, student=PLAIN, loss=CRD, epochs=13), tmp_path, 2)


@pytest.mark.medium
@pytest.mark.alone
def test_a_run_goes_on_with_another_number_of_ranks(components: Path, tmp_path: Path) -> None:
    """It is stopped inside an epoch on two ranks, then inside the next one on one, and ends on three."""
    settings = recipe(components, tmp_path, student=PLAIN, loss=CRD, batch_size=12, checkpoint_every_minutes=1e-9)
    stopped, whole = (settings.model_copy(update={"out": tmp_path / name}) for name in ("stopped", "whole"))
    assert on_ranks(2, stops_at(stopped, 4), tmp_path) == [3, 3]
    assert run_files(stopped.out or Path()).exists("checkpoint.pt")
    assert in_child(stops_at(stopped, 4), tmp_path / "log") == 3
    on_ranks(3, lambda: train_student(stopped).epochs, tmp_path)
    in_child(lambda: train_student(whole).epochs, tmp_path / "log")
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "stopped"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-5)


def stops_at(training: TrainRecipe, number: int) -> Callable[[], int]:
    """A function that trains until a step of this number begins; returns how many it has made."""

    def train() -> int:
        steps: list[int] = []
        step = Learner.step

        def stopping(self: Learner, batch: Batch, inputs_NCHW: torch.Tensor) -> None:
            if len(steps) == number - 1:
                raise KeyboardInterrupt
            steps.append(len(batch.labels))
            step(self, batch, inputs_NCHW)

        Learner.step = stopping  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            train_student(training)
        return len(steps)

    return train


# The batches


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shuffle_window": 2},
        {"label_fraction": 0.5},
        {"pixels": {"device_memory": 0}},
        {"pixels": {"device_memory": 0, "host_memory": 0}},
    ],
    ids=["device", "window", "few labels", "host", "decode"],
)
def test_the_parts_of_the_ranks_are_the_batches_of_one_process(
    components: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    training = recipe(components, tmp_path, loss={"kind": "kd", "feature": "mse"}, **changes)
    data = open_data(training, CPU)
    parts = [Rank(number, 3, number, 3) for number in range(3)]
    for epoch, first in ((0, 0), (1, 2)):
        whole = batches(data, training, ALONE, epoch, first)
        of_ranks = [batches(data, training, rank, epoch, first) for rank in parts]
        assert len(whole) == 4 - first
        for batch, *own in zip(whole, *of_ranks, strict=True):
            assert own[0].sizes == tuple(len(part.labels) for part in own)
            assert {part.samples for part in own} == {batch.samples}
            assert {part.start for part in own} == {batch.start}
            for name in ("pixels", "labels", "index"):
                assert torch.cat([getattr(part, name) for part in own]).equal(getattr(batch, name)), name
            for name in ("logits", "features"):
                found = torch.cat([getattr(part.targets, name) for part in own])
                assert found.equal(getattr(batch.targets, name)), name


def batches(data: TrainingData, training: TrainRecipe, rank: Rank, epoch: int, first: int) -> list[Batch]:
    feed = data.feed(training, CPU, rank=rank)
    with contextlib.closing(feed):
        return list(feed.epoch(epoch, first))


def test_a_rank_holds_the_targets_of_its_own_samples(components: Path, tmp_path: Path) -> None:
    data = open_data(recipe(components, tmp_path, loss={"kind": "kd", "feature": "mse"}), CPU)
    assert isinstance(data.targets, CachedTargets)
    samples = np.array([57, 3, 16, 15, 40])
    whole, own = data.targets.view(1), data.targets.rows(1, samples)
    assert len(own.view.targets) == len(samples)
    rows = sum(tensor.nbytes for tensor in whole.targets.arrays.values())
    assert sum(tensor.nbytes for tensor in own.view.targets.arrays.values()) * SAMPLES == rows * len(samples)
    index = torch.tensor([40, 3, 57])
    for one, other in zip(whole.batch(index, torch.empty(0)), own.batch(index, torch.empty(0)), strict=True):
        assert (one is None and other is None) or one.equal(other)  # type: ignore[arg-type]


def test_reading_a_few_blocks_at_a_time_gives_the_same_rows(
    components: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(recipe(components, tmp_path), CPU)
    assert isinstance(data.targets, CachedTargets)
    samples, index = np.arange(0, SAMPLES, 3), torch.tensor([57, 0, 18])
    expected = data.targets.rows(0, samples).batch(index, torch.empty(0)).logits
    monkeypatch.setattr(feed_targets, "READ_BYTES", 1)
    found = data.targets.rows(0, samples).batch(index, torch.empty(0)).logits
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert found.equal(expected)


# What the ranks do together


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "BatchNormAct2d"])
@pytest.mark.alone
def test_batch_norm_over_ranks(tmp_path: Path, kind: str) -> None:
    """Outputs, gradients and running statistics in double precision, of parts of 3 and 4 samples far from zero."""

    def network() -> nn.Module:
        torch.manual_seed(1)
        norm = {"BatchNorm1d": nn.BatchNorm1d, "BatchNorm2d": nn.BatchNorm2d, "BatchNormAct2d": BatchNormAct2d}[kind](5)
        layers: list[nn.Module] = [norm, nn.Tanh()]
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        return nn.Sequential(*layers).double()

    shape = (7, 5) if kind == "BatchNorm1d" else (7, 5, 4, 3)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100.0

    def gradients(model: nn.Module, rows: torch.Tensor) -> list[Any]:
        own = rows.clone().requires_grad_()
        for _ in range(2):  # twice, for the running statistics
            output = model(own)
        (output.square() * torch.arange(1.0, 1.0 + output[0].numel()).view(output[0].shape)).sum().backward()
        assert own.grad is not None
        statistics = {name: buffer.tolist() for name, buffer in model.named_buffers()}
        parameters = {
            name: weight.grad.tolist() for name, weight in model.named_parameters() if weight.grad is not None
        }
        return [output.tolist(), own.grad.tolist(), parameters, statistics, model.eval()(own).tolist()]

    def on_rank(ranks: Joined) -> list[Any]:
        return gradients(synchronised(network(), CPU), values[slice(*ranks.rank.part(0, 7))])

    plain = gradients(network(), values)
    found = on_ranks(2, joined(on_rank), tmp_path)
    for place in (0, 1, 4):
        both = torch.tensor(found[0][place] + found[1][place], dtype=torch.float64)
        torch.testing.assert_close(both, torch.tensor(plain[place], dtype=torch.float64), atol=1e-9, rtol=1e-9)
    for name, gradient in plain[2].items():
        added = torch.tensor(found[0][2][name]) + torch.tensor(found[1][2][name])
        torch.testing.assert_close(added, torch.tensor(gradient), atol=1e-5, rtol=1e-5)
    assert found[0][3] == found[1][3]
    for name, buffer in plain[3].items():
        assert found[0][3][name] == pytest.approx(buffer, rel=1e-9), name


def test_a_batch_norm_of_an_unknown_kind_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(RecipeError, match=r"cannot be synchronised.*found Own"):
        synchronised(nn.Sequential(Own(3)), CPU)


def test_running_statistics_become_the_mean_over_the_ranks(tmp_path: Path) -> None:
    def on_rank(ranks: Joined) -> list[Any]:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        network[1].running_mean.fill_(ranks.rank.number)  # type: ignore[operator]
        network[1].running_var.fill_(2.0 * ranks.rank.number + 1.0)  # type: ignore[operator]
        average_statistics(network, ranks)
        return [network[1].running_mean.tolist(), network[1].running_var.tolist()]  # type: ignore[operator]

    assert on_ranks(3, joined(on_rank), tmp_path) == [[[1.0, 1.0], [3.0, 3.0]]] * 3


@pytest.mark.alone
def test_gathered_rows_take_the_gradients_of_all_losses(tmp_path: Path) -> None:
    def on_rank(ranks: Joined) -> list[Any]:
        rows = torch.full((ranks.rank.number + 1, 2), float(ranks.rank.number), requires_grad=True)
        gathered = ranks.gather(rows, (1, 2))
        (gathered * torch.arange(6.0).view(3, 2) * (ranks.rank.number + 1)).sum().backward()
        assert rows.grad is not None
        return [gathered.tolist(), rows.grad.tolist()]

    found = on_ranks(2, joined(on_rank), tmp_path)
    assert [rows for rows, _ in found] == [[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]] * 2
    assert [gradient for _, gradient in found] == [[[0.0, 3.0]], [[6.0, 9.0], [12.0, 15.0]]]


def test_a_vote_is_known_one_call_later(tmp_path: Path) -> None:
    def on_rank(ranks: Joined) -> list[int]:
        wanted = [0, 0, 2, 0, 0] if ranks.rank.number else [0, 1, 0, 0, 0]
        decided = [ranks.vote(each) for each in wanted]
        ranks.close_vote()
        return [*decided, ranks.vote(0)]

    assert on_ranks(2, joined(on_rank), tmp_path) == [[0, 0, 1, 2, 0, 0]] * 2


def test_the_figures_of_meters_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 7, generator=generator), torch.randint(7, (50,), generator=generator)
    meters = [Meter(CPU) for _ in range(4)]  # the last one without samples
    for meter, rows in zip(meters, (slice(0, 20), slice(20, 21), slice(21, 50)), strict=False):
        meter.update(logits[rows], labels[rows])
    found = Meter.sum_of([meter.on_cpu() for meter in reversed(meters)]).compute()
    assert found.model_dump() == pytest.approx(evaluate_logits(logits, labels).model_dump())


def test_a_rank_that_ends_is_an_error_of_the_others(tmp_path: Path) -> None:
    def on_rank(ranks: Joined) -> None:
        if ranks.rank.number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.collect(None)

    first, second = answers_of_ranks(2, joined(on_rank), tmp_path)
    assert second is None
    assert first is not None
    assert "RankLostError: another process of this run has ended (rank 0 of 2)" in first["error"]


@pytest.mark.alone
def test_ranks_with_different_settings_are_refused(components: Path, tmp_path: Path) -> None:
    def on_rank() -> None:
        seed = 5 * own_rank().number
        train_student(tiny_run.recipe(components, tmp_path / "run", student=PLAIN, seed=seed))

    for answer in answers_of_ranks(2, on_rank, tmp_path):
        assert answer is not None
        assert "RecipeError: the processes of a run have different settings (seed of ranks 0 and 1)" in answer["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.alone
def test_a_rank_with_an_input_of_its_own_that_is_bad(components: Path, tmp_path: Path) -> None:
    """The others wait for it to join, and end with its error instead."""

    def on_rank() -> None:
        size = 15 if own_rank().number else 16
        train_student(tiny_run.recipe(components, tmp_path / "run", student=PLAIN, batch_size=size))

    for answer in answers_of_ranks(2, on_rank, tmp_path):
        assert answer is not None
        assert "RecipeError: the processes cannot share a batch equally (--batch-size 15)" in answer["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.alone
def test_an_error_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    def on_rank(ranks: Joined) -> None:
        with ranks.failing_together(), ranks.first_here_before_others():
            if ranks.rank.number == 0:
                raise RecipeError("only here", where="rank 0")

    for answer in answers_of_ranks(2, joined(on_rank), tmp_path):
        assert answer is not None
        assert "RecipeError: only here (rank 0)" in answer["error"]


# Ranks, and settings that do not fit them


def test_parts_cover_everything_in_order() -> None:
    for count in (1, 2, 3, 7):
        for length in range(20):
            parts = [Rank(number, count).part(100, 100 + length) for number in range(count)]
            assert [row for part in parts for row in range(*part)] == list(range(100, 100 + length))
            assert Rank(0, count).sizes(length) == tuple(stop - start for start, stop in parts)
            assert max(Rank(0, count).sizes(length)) - min(Rank(0, count).sizes(length)) <= 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def say(**variables: object) -> None:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1} | variables).items():
            monkeypatch.setenv(name, str(value))

    return say


def test_the_rank_is_in_the_environment(world: Callable[..., None]) -> None:
    world(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    assert own_rank() == Rank(5, 8, 1, 4)
    world(RANK=5, WORLD_SIZE=8)
    assert own_rank() == Rank(5, 8, 0, 1)
    world(RANK=0, WORLD_SIZE=1)
    assert own_rank() is ALONE
    world(WORLD_SIZE=4)
    assert own_rank() is ALONE


@pytest.mark.parametrize(
    "variables", [{"RANK": 2, "WORLD_SIZE": 2}, {"RANK": "one", "WORLD_SIZE": 2}, {"RANK": -1, "WORLD_SIZE": 2}]
)
def test_ranks_that_make_no_sense(world: Callable[..., None], variables: dict[str, object]) -> None:
    world(**variables)
    with pytest.raises(RecipeError, match="torchrun"):
        own_rank()


def test_a_sweep_is_not_for_torchrun(world: Callable[..., None]) -> None:
    world(RANK=0, WORLD_SIZE=2)
    refused = invoke("sweep-students", "--students", "resnet8")
    assert refused.exit_code == 2
    assert "error: a sweep starts its own processes, one for each GPU" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 18}, "cannot share a batch equally.*multiple of 4.*--batch-size 16"),
        ({"compile": "model"}, "operation by operation.*--compile model, 4 processes"),
    ],
)
def test_settings_that_do_not_fit_ranks(
    world: Callable[..., None], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    training = recipe(tmp_path / "none.zarr", tmp_path / "run", **changes)
    check_ranks(training, CPU)
    world(RANK=0, WORLD_SIZE=4)
    with pytest.raises(RecipeError, match=message):
        check_ranks(training, CPU)


def test_batches_that_are_too_small_for_ranks() -> None:
    norm, plain = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.Conv2d(3, 3, 1))
    check_batches([(0, 8), (8, 16)], norm, Rank(0, 4))
    check_batches([(0, 8), (8, 14)], plain, Rank(0, 4))
    check_batches([(0, 8), (8, 14)], synchronised(nn.Sequential(nn.BatchNorm2d(3)), CPU), Rank(0, 4))
    with pytest.raises(RecipeError, match=r"batch of 6.*two or more.*found 1.*--sync-batchnorm"):
        check_batches([(0, 8), (8, 14)], norm, Rank(0, 4))
    with pytest.raises(RecipeError, match=r"no samples of a batch.*batch of 3.*found 0"):
        check_batches([(0, 8), (8, 11)], plain, Rank(0, 4))
