"""Updates that read nothing but tensors give the bits of the plain loop; on CUDA their graphs do too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

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
from train.loop.graph import WARM_UP, TensorEpochs
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
    epochs = TensorEpochs(learner, feed, capture=capture)
    seen: list[int] = []
    figures = []
    for epoch in range(2):
        learner.begin_epoch(epoch)
        epochs.train(epoch, 0, seen.append, lambda done: None)
        figures.append(learner.end_epoch(epoch))
    feed.close()
    assert sum(seen) == 2 * SAMPLES
    return figures


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
    TensorEpochs(first, feed, capture=False).train(
        0, 0, lambda count: None, lambda done: saved.append(keep(first)) if done == 2 else None
    )
    resumed, _ = make_learner(cache, CPU, ema_decay=0.9)
    state, means, random = saved[0]
    resumed.load_state_dict(state)
    begun = {"batches": 2, "means": means, "random": [random]}
    train_epoch([resumed], feed, 0, lambda count: None, begun=[begun])
    resumed.begin_epoch(1)
    TensorEpochs(resumed, feed, capture=False).train(1, 0, lambda count: None, lambda done: None)
    feed.close()
    assert_same(dict(whole.state_dict()), dict(resumed.state_dict()))


def keep(learner: Learner) -> tuple[Any, Any, torch.Tensor]:
    import copy

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
        epochs = TensorEpochs(learner, feed, capture=False)
        epochs.train(0, 0, lambda count: None, lambda done: None)
        with gpu.watch() as watch:
            epochs._updates[16,]()
        feed.close()
    assert watch.transfers == []
    assert {group["lr"].device for group in learner.optimiser.param_groups} == {gpu.device}


class Graph:
    """In place of `torch.cuda.CUDAGraph`: remembers what was recorded, which a capture does not run."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1


def test_each_size_of_update_is_warmed_up_and_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[dict[str, Any]] = []

    class Recording:
        def __init__(self, graph: Graph, **settings: Any) -> None:
            modes.append(settings)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    Graph.made = []
    with pretended() as gpu:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        learner, feed = make(gpu, LOSSES["kd"], **{**SMALL, "count": 72})
        epochs = TensorEpochs(learner, feed, capture=True)
        for epoch in range(5):
            learner.begin_epoch(epoch)
            epochs.train(epoch, 0, lambda count: None, lambda done: None)
            assert learner.means.count == 72
        feed.close()
    assert learner.updates == 25
    assert [graph.replays for graph in Graph.made] == [20 - WARM_UP, 5 - WARM_UP]
    assert {mode["capture_error_mode"] for mode in modes} == {"thread_local"}
    assert {mode["stream"] for mode in modes} == {learner.stream}


def test_pixels_that_are_not_on_the_device_are_refused() -> None:
    with pretended() as gpu:
        learner, feed = make(gpu, LOSSES["kd"], **SMALL, kind=StreamingFeed)
        with pytest.raises(RecipeError, match=r"all pixels on the device.*--compile"):
            TensorEpochs(learner, feed, capture=True)
        feed.close()
