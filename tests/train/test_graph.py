"""Updates that read nothing but tensors give the bits of the plain loop; on CUDA their graphs do too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch

from cache_tools.codecs import Float32, TopK
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from tests.support import cache_factory
from tests.support.fake_learner import make, pretended
from tests.train.test_loop import CLASSES, PREPROCESSING, SAMPLES, Dropping, assert_same, make_recipe
from train.feed import CachedTargets, Feed, ResidentFeed, StreamingFeed
from train.loop import Learner, repeatable, train_epoch
from train.loop.graph import WARM_UP, EpochBuffers, TensorEpochs
from train.losses.contrastive import Components
from train.objective import Objective
from train.recipe.loss import LOSSES

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
RUNS: dict[str, dict[str, Any]] = {
    "kd": {"loss": {"kind": "kd"}},
    "dkd, warm-ups": {"loss": {"kind": "dkd", "warmup_epochs": 2}, "schedule": {"warmup_epochs": 1}},
    "richkd": {"loss": {"kind": "kd", "feature": "crd", "crd_negatives": 8, "crd_dim": 8}, "store": "components"},
    "ema": {"loss": {"kind": "kd"}, "ema_decay": 0.9},
    "accumulation, clipping": {
        "loss": {"kind": "kd", "class_weights": "balanced"},
        "optimiser": {"accumulate": 2, "clip_grad_norm": 0.5},
        "ema_decay": 0.9,
    },
    "adamw": {"loss": {"kind": "kd", "feature": "mse"}, "optimiser": {"name": "adamw", "learning_rate": 1e-3}},
    "top-k": {"loss": {"kind": "kd", "temperature": 2.0}, "codec": "top-k"},
    "bfloat16": {"loss": {"kind": "kd"}, "precision": "bfloat16"},
}


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with repeatable(CPU, False):
        yield


def make_learner(cache: TeacherCache, device: torch.device, **settings: Any) -> tuple[Learner, Feed]:
    recipe = make_recipe(epochs=3, **settings)
    images, loss = cache_factory.tiny_images(SAMPLES, CLASSES), recipe.loss
    torch.manual_seed(1)
    student: Any = Dropping()
    components = Components((12, 10), (0.5, 0.5)) if cache.recipe.store == "components" else None
    uses = components is not None and loss.uses_components
    targets = CachedTargets(
        cache,
        device,
        logits=loss.needs_logits,
        features=loss.needs_features and not uses,
        components=uses,
        sparse_temperature=2.0 if "fused_logits" in cache.targets and is_sparse(cache) else None,
    )
    feed = ResidentFeed(
        images, cache.recipe.views, cache.num_views, targets,
        batch_size=16, epochs=3, seed=0, device=device,
    )  # fmt: skip
    objective = Objective(
        loss, 8, 8, CLASSES, SAMPLES, images.labels,
        components=components if uses else None,
        class_weights=torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5]) if loss.class_weights == "balanced" else None,
    )  # fmt: skip
    return Learner(recipe, student, objective, PREPROCESSING, feed.steps_per_epoch, device), feed


def is_sparse(cache: TeacherCache) -> bool:
    return isinstance(cache.targets["fused_logits"].codec, TopK)


@pytest.mark.medium
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_updates_in_tensors_equal_the_plain_loop_bit_for_bit(name: str, device: str, tmp_path: Path) -> None:
    settings = dict(RUNS[name])
    store, codec = settings.pop("store", "fused"), settings.pop("codec", "float32")
    if codec == "top-k":
        codec = TargetCodecs(logits=TopK(num_classes=CLASSES, temperature=2.0), features=Float32())
    images = cache_factory.tiny_images(SAMPLES, CLASSES)
    cache_factory.build(tmp_path / "c.zarr", cache_factory.tiny_manifest(images, store=store, codec=codec), images)
    cache = TeacherCache.open(tmp_path / "c.zarr")
    there = torch.device(device)
    with repeatable(there, True):
        plain, feed = make_learner(cache, there, **settings)
        # On CUDA the rates in tensors are float32, and the average has a rounding more: its graphs are compared with
        # the same updates without graphs.
        if device == "cuda":
            figures = in_tensors(plain, feed, capture=False)
        else:
            figures = [train_epoch([plain], feed, epoch, lambda count: None)[0] for epoch in range(2)]
            feed.close()
        tensors, feed = make_learner(cache, there, **settings)
        assert in_tensors(tensors, feed, capture=device == "cuda") == figures
    assert_same(dict(plain.state_dict()), dict(tensors.state_dict()))


def in_tensors(learner: Learner, feed: Feed, *, capture: bool) -> list[Any]:
    """The figures of two epochs."""
    epochs = TensorEpochs(learner, EpochBuffers(feed), capture=capture)
    figures = []
    for epoch in range(2):
        learner.begin_epoch(epoch)
        make_updates(epochs, epoch)
        assert learner.means.count == SAMPLES
        figures.append(learner.end_epoch(epoch))
    feed.close()
    return figures


def make_updates(epochs: TensorEpochs, epoch: int, after: Callable[[int], None] = lambda done: None) -> None:
    """All updates of an epoch; `after` is called with the number of batches that are done."""
    epochs.buffers.fill(epoch)
    epochs.begin(done := 0)
    while done < epochs.buffers.feed.steps_per_epoch:
        done = epochs.update(done)
        after(done)


def test_a_run_goes_on_between_plain_and_tensor_updates(tmp_path: Path) -> None:
    """From the middle of an epoch, in either direction."""
    images = cache_factory.tiny_images(SAMPLES, CLASSES)
    cache_factory.build(tmp_path / "c.zarr", cache_factory.tiny_manifest(images, codec="float32"), images)
    cache = TeacherCache.open(tmp_path / "c.zarr")
    whole, feed = make_learner(cache, CPU, ema_decay=0.9)
    train_epoch([whole], feed, 0, lambda count: None)
    train_epoch([whole], feed, 1, lambda count: None)

    saved: list[Any] = []
    first, _ = make_learner(cache, CPU, ema_decay=0.9)
    first.begin_epoch(0)
    buffers = EpochBuffers(feed)
    epochs = TensorEpochs(first, buffers, capture=False)
    make_updates(epochs, 0, lambda done: saved.append(keep(first)) if done == 2 else None)
    resumed, _ = make_learner(cache, CPU, ema_decay=0.9)
    state, means, random = saved[0]
    resumed.load_state_dict(state)
    begun = {"batches": 2, "means": means, "random": [random]}
    train_epoch([resumed], feed, 0, lambda count: None, begun=[begun])
    resumed.begin_epoch(1)
    make_updates(TensorEpochs(resumed, buffers, capture=False), 1)
    feed.close()
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))


def keep(learner: Learner) -> tuple[Any, Any, torch.Tensor]:
    return copy.deepcopy(learner.state_dict()), learner.means.state_dict(), torch.get_rng_state()


# on a pretended GPU

SMALL: dict[str, Any] = {"student": "resnet8", "count": 40, "batch_size": 16, "classes": 10, "width": 24, "side": 16}


@pytest.mark.medium
@pytest.mark.parametrize("loss", ["kd", "richkd"])
def test_an_update_copies_nothing_and_waits_for_nothing(loss: str) -> None:
    settings = {**SMALL, "loss": {**LOSSES[loss], "crd_negatives": 8}, "ema_decay": 0.9}
    with pretended() as gpu:
        learner, feed = make(gpu, **settings)
        learner.begin_epoch(0)
        epochs = TensorEpochs(learner, EpochBuffers(feed), capture=False)
        make_updates(epochs, 0)
        with gpu.watch() as watch:
            epochs._updates[16,]()
        feed.close()
    assert watch.transfers == []
    assert {group["lr"].device for group in learner.optimiser.param_groups} == {gpu.device}


class Graph:
    """In place of `torch.cuda.CUDAGraph`: remembers what was recorded, which a capture does not run."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.replays, self.streams = 0, set[Any]()
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        self.streams.add(torch.cuda.current_stream())


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Captures are pretended too. Returns the settings of each."""
    modes: list[dict[str, Any]] = []

    class Recording:
        def __init__(self, graph: Graph, **settings: Any) -> None:
            modes.append(settings)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    Graph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    return modes


def test_each_size_of_update_is_warmed_up_and_recorded_once(modes: list[dict[str, Any]]) -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["kd"], **{**SMALL, "count": 72})
        epochs = TensorEpochs(learner, EpochBuffers(feed), capture=True)
        for epoch in range(5):
            learner.begin_epoch(epoch)
            make_updates(epochs, epoch)
            assert learner.means.count == 72
        feed.close()
    assert learner.updates == 25
    assert [graph.replays for graph in Graph.made] == [20 - WARM_UP, 5 - WARM_UP]
    assert {mode["capture_error_mode"] for mode in modes} == {"thread_local"}
    assert {mode["stream"] for mode in modes} == {learner.stream}


def test_pixels_that_are_not_on_the_device_are_refused() -> None:
    with pretended() as gpu:
        _, feed = make(gpu, LOSSES["kd"], **SMALL, kind=StreamingFeed)
        with pytest.raises(RecipeError, match=r"all pixels on the device.*--compile"):
            EpochBuffers(feed)
        feed.close()


# several students


@pytest.mark.medium
def test_students_of_shared_buffers_have_the_weights_of_each_alone(tmp_path: Path) -> None:
    """Also with dropout, with updates of other sizes, from the middle of an epoch, and beside one that fails."""
    images = cache_factory.tiny_images(SAMPLES, CLASSES)
    cache_factory.build(tmp_path / "c.zarr", cache_factory.tiny_manifest(images, codec="float32"), images)
    cache = TeacherCache.open(tmp_path / "c.zarr")
    settings: list[dict[str, Any]] = [
        {"loss": {"kind": "kd"}},
        {"loss": {"kind": "kd", "temperature": 2.0}, "optimiser": {"accumulate": 2, "learning_rate": 0.02}},
        {"loss": {"kind": "dkd"}, "ema_decay": 0.9},
    ]
    alone, figures = [], []
    for each in settings:
        learner, feed = make_learner(cache, CPU, **each)
        figures.append([train_epoch([learner], feed, epoch, lambda count: None)[0] for epoch in range(2)])
        feed.close()
        alone.append(learner)
    together, (feed, *_) = map(
        list, zip(*[make_learner(cache, CPU, **each, compile="step") for each in settings], strict=True)
    )
    failing, _ = make_learner(cache, CPU, compile="step", loss={"kind": "kd"})
    failing.student.forward = None  # type: ignore[assignment]
    seen: list[int] = []
    saved: list[Any] = []
    first = train_epoch(
        [*together, failing], feed, 0, seen.append, save=lambda states: saved.append(copy.deepcopy(states()))
    )
    assert isinstance(first.pop(), TypeError)
    second = train_epoch(together, feed, 1, seen.append)
    assert [list(both) for both in zip(first, second, strict=True)] == figures
    assert sum(seen) == 2 * SAMPLES
    for one, other in zip(together, alone, strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert len({id(learner.captured.buffers) for learner in together}) == 1

    *states, none = saved[2]
    assert none is None
    assert [state["batches"] for state in states] == [3, 4, 3], "whoever is behind makes the next update"
    resumed, (feed, *_) = map(
        list, zip(*[make_learner(cache, CPU, **each, compile="step") for each in settings], strict=True)
    )
    for learner, state in zip(resumed, states, strict=True):
        learner.load_state_dict(state.pop("learner"))
    assert train_epoch(resumed, feed, 0, lambda count: None, begun=states) == first
    train_epoch(resumed, feed, 1, lambda count: None)
    feed.close()
    for one, other in zip(resumed, alone, strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))


@pytest.mark.medium
def test_each_student_has_its_graphs_and_its_stream_and_waits_once_an_epoch(modes: list[dict[str, Any]]) -> None:
    with pretended() as gpu:
        settings = {**SMALL, "count": 72, "compile": "step"}
        learners, (feed, *_) = map(list, zip(*[make(gpu, LOSSES["kd"], **settings) for _ in range(3)], strict=True))
        with mock.patch("train.loop.sums.Sums.compute", return_value={}):
            for epoch in range(4):
                gpu.events.clear()
                gpu.waits.clear()
                gpu.recorded = 0
                assert train_epoch(learners, feed, epoch, lambda count: None) == [{}] * 3
                assert gpu.events == [{}], "one event an epoch"
                assert gpu.waits == ["event"] * 3 + ["stream"] * 3
                assert gpu.recorded == 0
        feed.close()
    assert gpu.streams == 3
    assert [mode["stream"] for mode in modes] == [learner.stream for _ in range(2) for learner in learners]
    assert [graph.replays for graph in Graph.made] == [4 * 4 - WARM_UP] * 3 + [4 - WARM_UP] * 3
    assert [graph.streams for graph in Graph.made] == [{learner.stream} for _ in range(2) for learner in learners]
    assert len({id(learner.captured.buffers) for learner in learners}) == 1


@pytest.mark.medium
@pytest.mark.parametrize("compile", ["off", "step"])
def test_students_go_on_when_their_state_has_been_copied(modes: list[dict[str, Any]], compile: str) -> None:
    with pretended() as gpu:
        settings = {**SMALL, "count": 72, "compile": compile}
        learners, (feed, *_) = map(list, zip(*[make(gpu, LOSSES["kd"], **settings) for _ in range(2)], strict=True))
        calls: list[int] = []

        def save(states: Callable[[], Any]) -> None:
            calls.append(len(gpu.waits))
            if len(calls) == 2:
                assert len(states()) == 2

        with (
            mock.patch("train.loop.sums.Sums.compute", return_value={}),
            mock.patch.object(Learner, "state_dict", return_value={}),  # it reads rates that are in tensors
        ):
            train_epoch(learners, feed, 0, lambda count: None, save=save)
        feed.close()
    assert calls == [2, 2, 6, 6], "joined by who copies, who is then waited for"
    assert gpu.waits == ["event"] * 2 + ["stream"] * (2 + 2 + 2)


def test_students_that_draw_random_numbers_are_not_captured_beside_others(
    modes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    states = iter(torch.arange(100, dtype=torch.uint8))
    with pretended() as gpu:
        settings = {**SMALL, "compile": "step"}
        (first, feed), (second, _) = (make(gpu, LOSSES["kd"], **settings) for _ in range(2))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: next(states))
        outcomes = train_epoch([first, second], feed, 0, lambda count: None)
        feed.close()
    assert [isinstance(outcome, RecipeError) for outcome in outcomes] == [True, True]
    assert "draws random numbers, as for dropout, cannot be captured beside others" in str(outcomes[0])


@pytest.mark.cuda
def test_graphs_beside_others_are_those_of_each_alone_bit_for_bit(tmp_path: Path) -> None:
    """Eight students, each on its stream. Their networks draw no random numbers."""
    images = cache_factory.tiny_images(SAMPLES, CLASSES)
    cache_factory.build(tmp_path / "c.zarr", cache_factory.tiny_manifest(images, codec="float32"), images)
    cache, cuda = TeacherCache.open(tmp_path / "c.zarr"), torch.device("cuda")
    settings: list[dict[str, Any]] = [
        {"loss": {"kind": "kd", "temperature": 1.0 + number}, "compile": "step"} for number in range(8)
    ]

    def without_dropout(each: dict[str, Any]) -> tuple[Learner, Feed]:
        learner, feed = make_learner(cache, cuda, **each)
        learner.student.get_submodule("drop").p = 0.0  # type: ignore[assignment]
        return learner, feed

    with repeatable(cuda, True):
        alone, figures = [], []
        for each in settings:
            learner, feed = without_dropout(each)
            figures.append([train_epoch([learner], feed, epoch, lambda count: None)[0] for epoch in range(3)])
            feed.close()
            alone.append(learner)
        together, (feed, *_) = map(list, zip(*[without_dropout(each) for each in settings], strict=True))
        epochs = [train_epoch(together, feed, epoch, lambda count: None) for epoch in range(3)]
        feed.close()
    assert [list(each) for each in zip(*epochs, strict=True)] == figures
    for one, other in zip(together, alone, strict=True):
        assert_same(dict(one.state_dict()), dict(other.state_dict()))
