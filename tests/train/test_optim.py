"""Updates of several batches, clipped gradients and class weights equal a plain float64 loop over whole updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cache_tools.format.recipe import Preprocessing
from cache_tools.views.recipe import ViewRecipe
from tests.support import cache_factory
from train.feed import Batch, BatchTargets, Feed, ResidentFeed, epoch_order
from train.labelled import PartialLabels
from train.loop import Learner, repeatable, train_epoch
from train.losses.class_weights import class_weights
from train.objective import Objective
from train.optim import update_of
from train.recipe import TrainRecipe

CPU = torch.device("cpu")
SAMPLES, CLASSES, EPOCHS = 70, 5, 2
IMAGES = cache_factory.tiny_images(SAMPLES, CLASSES)
LABELS = torch.from_numpy(IMAGES.labels)
TARGETS = torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1))
LABELLED = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(2)) < 0.6
VIEWS = ViewRecipe()
PLAIN = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
UNEVEN = (0.2, 3.0, 1.0, 0.0, 2.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with repeatable(CPU, False):
        yield
    torch.set_num_threads(threads)


# which batches share an update


@pytest.mark.parametrize(
    ("samples", "batch_size", "accumulate", "updates"),
    [
        (70, 16, 2, [[16, 16], [16, 16], [6]]),
        (70, 12, 2, [[12, 12], [12, 12], [12, 10]]),
        (70, 16, 4, [[16, 16, 16, 16], [6]]),
        (70, 16, 9, [[16, 16, 16, 16, 6]]),
        (65, 16, 3, [[16, 16, 16], [16]]),  # the last batch would hold one sample and is left out
        (64, 16, 1, [[16], [16], [16], [16]]),
    ],
)
def test_an_update_takes_the_next_batches_and_the_last_one_what_is_left(
    samples: int, batch_size: int, accumulate: int, updates: list[list[int]]
) -> None:
    recipe = make_recipe(batch_size=batch_size, accumulate=accumulate)
    feed = make_feed(recipe, samples=samples)
    found: list[list[int]] = []
    seen: list[torch.Tensor] = []
    share = 0.0
    for batch in feed.epoch(0):
        update = update_of(batch, batch_size, accumulate)
        if update.is_first:
            found.append([])
            seen, share = [], 0.0
        found[-1].append(len(batch.labels))
        seen, share = [*seen, batch.labels], share + update.share
        if update.is_last and accumulate > 1:
            assert share == pytest.approx(1.0, abs=1e-12)
            assert update.labels is not None
            assert torch.equal(update.labels, torch.cat(seen))
    assert found == updates


# updates


@dataclass(frozen=True)
class Case:
    """Settings of a run, and whether a part of the labels is used."""

    loss: dict[str, Any]
    batch_size: int
    accumulate: int
    clip: float | None = None
    partial: bool = False
    optimiser: str = "sgd"


CE, KD = {"kind": "ce"}, {"kind": "kd", "distill_weight": 2.0, "temperature": 2.0}
CASES = {
    "pairs": Case(CE, 8, 2),
    "triples of which the last is short": Case(KD, 8, 3),
    "a short batch in a whole update": Case(KD, 12, 2),
    "one update per epoch": Case(CE, 16, 100),
    "weights": Case({**CE, "class_weights": UNEVEN}, 8, 4),
    "weights and smoothing": Case({**KD, "class_weights": UNEVEN, "label_smoothing": 0.1}, 12, 3),
    "weights without accumulation": Case({**CE, "class_weights": UNEVEN, "label_smoothing": 0.2}, 16, 1),
    "clipping": Case(KD, 16, 1, clip=0.05),
    "clipping the sum": Case(KD, 8, 3, clip=0.05, optimiser="adamw"),
    "partial labels": Case({**KD, "class_weights": UNEVEN, "label_smoothing": 0.1}, 8, 3, clip=0.1, partial=True),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_a_plain_loop_in_float64(name: str) -> None:
    case = CASES[name]
    recipe = make_recipe(case.batch_size, case.accumulate, case.clip, case.loss, case.optimiser)
    known = PartialLabels(IMAGES.labels, LABELLED.numpy()) if case.partial else None
    learner, feed = make_learner(recipe), make_feed(recipe, known=known)
    start = copy.deepcopy(learner.student).double()
    means = [train(learner, feed, epoch) for epoch in range(EPOCHS)]
    expected, losses, norms, updates = plain_loop(start, case)
    assert learner.updates == updates == EPOCHS * math.ceil(70 / (case.batch_size * case.accumulate))
    for mean, loss in zip(means, losses, strict=True):
        assert mean["loss"] == pytest.approx(loss, rel=1e-5)
    if case.clip is not None:
        assert any(norm > 2 * case.clip for norm in norms), "gradients that need clipping"
    for ours, theirs in zip(learner.student.parameters(), expected.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 2e-6 + 2e-5 * float(theirs.detach().abs().max())


def plain_loop(student: nn.Module, case: Case) -> tuple[nn.Module, list[float], list[float], int]:
    """The definition: a batch for each update, the mean of its loss, torch's clipping, and a cosine over updates."""
    student = copy.deepcopy(student)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[case.optimiser]
    optimiser = kind(student.parameters(), lr=0.1, weight_decay=0.01)
    size = case.batch_size * case.accumulate
    total = EPOCHS * math.ceil(SAMPLES / size)
    weights = torch.tensor(case.loss.get("class_weights", [1.0] * CLASSES)).double()
    smoothing = case.loss.get("label_smoothing", 0.0)
    pixels = (torch.from_numpy(IMAGES.load(slice(None))).double() / 255 - 0.5) / 0.25
    losses, norms, updates = [], [], 0
    for epoch in range(EPOCHS):
        summed = 0.0
        for rows in epoch_order(SAMPLES, 0, epoch).split(size):
            optimiser.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * updates / total))
            log_q = student(pixels[rows]).log_softmax(1)
            uniform = torch.full_like(log_q, 1 / CLASSES)
            wanted = (1 - smoothing) * F.one_hot(LABELS[rows], CLASSES) + smoothing * uniform
            ce = -(wanted * weights * log_q).sum(1)
            if case.partial:
                ce = ce * LABELLED[rows]
            loss = ce.sum() / weights[LABELS[rows]].sum()
            if case.loss["kind"] == "kd":
                p, log_q = (TARGETS[rows].double() / 2).softmax(1), (student(pixels[rows]) / 2).log_softmax(1)
                loss = loss + 2 * 4 * (p * (p.log() - log_q)).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            if case.clip is not None:
                norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), case.clip)))
            optimiser.step()
            updates += 1
            summed += loss.item() * len(rows)
        losses.append(summed / SAMPLES)
    return student, losses, norms, updates


def test_clipped_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimiser gets the gradients that clip_grad_norm_ makes of the whole update's, embeddings included."""
    loss = {"kind": "ce", "feature": "mse", "feature_weight": 5.0}
    with_limit, without = (make_learner(make_recipe(16, 2, limit, loss), width=9) for limit in (0.1, None))
    found: list[list[torch.Tensor]] = []
    for learner in (with_limit, without):
        parameters = [*learner.student.parameters(), *learner.objective.parameters()]

        def keep(parameters: list[nn.Parameter] = parameters) -> None:
            found.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

        monkeypatch.setattr(learner.optimiser, "step", keep)
        batches = make_feed(learner.recipe, width=9).epoch(0)
        learner.begin_epoch(0)
        for _, batch in zip(range(2), batches, strict=False):
            learner.step(batch, scaled(batch))
    clipped, plain = found
    assert len(clipped) == len(plain) == 4 + 2
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in plain))
    assert norm > 0.2
    for ours, theirs in zip(clipped, plain, strict=True):
        torch.testing.assert_close(ours, theirs * (0.1 / norm), rtol=1e-5, atol=1e-8)
    assert math.sqrt(sum(float(gradient.square().sum()) for gradient in clipped)) == pytest.approx(0.1, rel=1e-4)


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    """As with float16 on CUDA. The scale does not change the weights, and a norm is that of the real gradients."""
    weights = []
    for scale in (None, 1024.0):
        learner = make_learner(make_recipe(8, 3, 0.05, KD))
        if scale is not None:
            learner.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        train(learner, make_feed(learner.recipe), 0)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in learner.student.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-7)


def test_an_overflow_in_a_batch_leaves_out_its_whole_update() -> None:
    learner = make_learner(make_recipe(8, 2))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [parameter.detach().clone() for parameter in learner.student.parameters()]
    learner.begin_epoch(0)
    batches = make_feed(learner.recipe).epoch(0)
    for number, batch in zip(range(2), batches, strict=False):
        learner.step(batch, scaled(batch) * (math.inf if number == 0 else 1.0))
    assert learner.scaler.get_scale() == 512.0
    for parameter, same in zip(learner.student.parameters(), before, strict=True):
        assert torch.equal(parameter, same)


def test_the_average_follows_updates_and_not_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(make_recipe(8, 3, ema_decay=0.9))
    assert learner.average is not None
    counts: list[int] = []
    update = learner.average.update

    def count(number: int) -> None:
        counts.append(number)
        update(number)

    monkeypatch.setattr(learner.average, "update", count)
    train(learner, make_feed(learner.recipe), 0)
    assert counts == [1, 2, 3]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_state_between_the_batches_of_an_update_continues_exactly(stop: int) -> None:
    recipe = make_recipe(8, 3, 0.5, {"kind": "kd", "feature": "crd", "crd_dim": 4, "crd_negatives": 7})
    feed = make_feed(recipe)
    whole, stopped, resumed = (make_learner(recipe) for _ in range(3))
    for learner in (whole, stopped, resumed):
        learner.begin_epoch(0)
    for number, batch in enumerate(feed.epoch(0)):
        whole.step(batch, scaled(batch))
        if number < stop:
            stopped.step(batch, scaled(batch))
        if number == stop:
            state = copy.deepcopy(stopped.state_dict())
            assert (state["gradients"] is None) == (stop % 3 == 0)
            resumed.load_state_dict(state)
        if number >= stop:
            resumed.step(batch, scaled(batch))
    for ours, theirs in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert whole.updates == resumed.updates == 3


def test_a_state_of_an_earlier_version_has_no_gradients() -> None:
    recipe = make_recipe(8, 1)
    learner = make_learner(recipe)
    train(learner, make_feed(recipe), 0)
    state = learner.state_dict()
    assert state.pop("gradients") is None
    again = make_learner(recipe)
    again.load_state_dict(state)
    assert again.updates == 9


def test_students_of_one_stream_may_take_updates_of_different_sizes() -> None:
    recipes = [
        make_recipe(8, 1, 0.5),
        make_recipe(8, 3, None, {**KD, "label_smoothing": 0.1}),
        make_recipe(8, 4, None, {"kind": "ce", "class_weights": UNEVEN}),
        make_recipe(8, 2, precision="bfloat16"),
    ]
    alone = [make_learner(recipe) for recipe in recipes]
    together = [make_learner(recipe) for recipe in recipes]
    feed = make_feed(recipes[1])
    for epoch in range(EPOCHS):
        for learner in alone:
            train(learner, feed, epoch)
        assert not [one for one in train_epoch(together, feed, epoch, lambda count: None) if isinstance(one, Exception)]
    assert [learner.updates for learner in together] == [18, 6, 6, 10]
    for one, other in zip(alone, together, strict=True):
        for ours, theirs in zip(one.student.parameters(), other.student.parameters(), strict=True):
            assert torch.equal(ours, theirs)


class FixedTargets:
    """The same targets in every view."""

    def __init__(self, width: int) -> None:
        self.features = torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(3))

    def view(self, view: int) -> FixedTargets:
        return self

    def batch(self, index: torch.Tensor, pixels_NCHW_u8: torch.Tensor) -> BatchTargets:
        return BatchTargets(TARGETS[index], self.features[index])

    def close(self) -> None:
        pass


class Simple(nn.Sequential):
    """A student without batch statistics, in timm's interface."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, stride=4), nn.Linear(6, CLASSES))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.relu(self[0](images))

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = maps.mean((2, 3))
        return pooled if pre_logits else torch.as_tensor(self[1](pooled))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def make_recipe(
    batch_size: int,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    loss: dict[str, Any] | None = None,
    optimiser: str = "sgd",
    **changes: Any,
) -> TrainRecipe:
    settings: dict[str, Any] = {"name": optimiser, "learning_rate": 0.1, "weight_decay": 0.01}
    settings |= {"accumulate": accumulate, "clip_grad_norm": clip_grad_norm}
    settings |= {"momentum": 0.0} if optimiser == "sgd" else {}
    data = {"name": "updates", "cache": "none", "dataset": {"name": "digits"}, "loss": loss or KD, "epochs": EPOCHS}
    return TrainRecipe.model_validate(data | {"batch_size": batch_size, "optimiser": settings} | changes)


def make_learner(recipe: TrainRecipe, width: int = 8) -> Learner:
    torch.manual_seed(0)
    student = Simple()
    weights = class_weights(recipe.loss, IMAGES.class_names, IMAGES.labels)
    objective = Objective(
        recipe.loss, student.num_features, width, CLASSES, SAMPLES, IMAGES.labels, class_weights=weights
    )
    steps = math.ceil(SAMPLES / recipe.batch_size)
    return Learner(recipe, student, objective, PLAIN, steps, CPU)


def make_feed(
    recipe: TrainRecipe, *, samples: int = SAMPLES, known: PartialLabels | None = None, width: int = 8
) -> Feed:
    return ResidentFeed(
        IMAGES.subset(slice(samples)),
        VIEWS,
        1,
        FixedTargets(width),
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        seed=0,
        device=CPU,
        known=known,
    )


def scaled(batch: Batch) -> torch.Tensor:
    return (batch.pixels.float() / 255 - 0.5) / 0.25


def train(learner: Learner, feed: Feed, epoch: int) -> dict[str, float]:
    (outcome,) = train_epoch([learner], feed, epoch, lambda count: None)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
