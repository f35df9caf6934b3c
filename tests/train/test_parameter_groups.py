"""Layer decay and weight-decay exclusions: the groups and the rates of timm's own optimisers and schedules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from cache_tools.errors import RecipeError
from cache_tools.format.recipe import Preprocessing
from tests.support import tiny_run
from train.feed import Batch, BatchTargets
from train.loop import Learner
from train.objective import Objective
from train.optim import Schedule, create_optimiser, parameter_groups
from train.recipe.loss import LossRecipe
from train.recipe.optim import OptimiserRecipe, ScheduleRecipe
from train.run.resume import check_learner
from train.students import create_student

CPU = torch.device("cpu")
MODELS = ("test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet")


def objective(student: Any, target_dim: int = 7) -> Objective:
    recipe = LossRecipe(kind="ce", feature="mse")
    return Objective(recipe, student.num_features, target_dim, 5, 10, torch.arange(10) % 5)


def rates(optimiser: torch.optim.Optimizer, model: nn.Module, key: str = "lr_scale") -> dict[str, tuple[float, float]]:
    """(learning rate or its scale, weight decay) of each parameter by name."""
    found = {
        id(each): (group.get(key, 1.0), group["weight_decay"])
        for group in optimiser.param_groups
        for each in group["params"]
    }
    return {name: found[id(each)] for name, each in model.named_parameters() if id(each) in found}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer_decay", [None, 0.65])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_groups_are_those_of_timm(name: str, layer_decay: float | None, optimiser: Any) -> None:
    student = create_student(f"timm:{name}", 5)
    settings = {"learning_rate": 0.1, "weight_decay": 0.05, "weight_decay_exclusions": True}
    recipe = OptimiserRecipe(name=optimiser, layer_decay=layer_decay, **settings)
    terms = objective(student)
    ours = create_optimiser(recipe, parameter_groups(recipe, student, terms))
    timms = create_optimizer_v2(student, optimiser, lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    assert rates(ours, student) == rates(timms, student)
    assert len(rates(ours, student)) == len(list(student.parameters()))
    assert {decay for _, decay in rates(ours, student).values()} == {0.0, 0.05}
    assert rates(ours, terms) == {"projector.weight": (1.0, 0.05), "projector.bias": (1.0, 0.0)}
    scales = {scale for scale, _ in rates(ours, student).values()}
    assert (len(scales) > 3) == (layer_decay is not None)
    assert max(scales) == 1.0
    for each in (ours, timms):
        schedule = Schedule(ScheduleRecipe(warmup_epochs=1), each, epochs=4, updates_per_epoch=3)
        schedule.step_update(7)
    assert rates(ours, student, "lr") == rates(timms, student, "lr")


def test_by_default_all_parameters_are_one_group() -> None:
    student = create_student("timm:test_vit", 5)
    next(student.parameters()).requires_grad = False
    recipe, terms = OptimiserRecipe(), objective(student)
    (group,) = create_optimiser(recipe, parameter_groups(recipe, student, terms)).param_groups
    every = [*student.parameters(), *terms.parameters()]
    assert list(map(id, group["params"])) == [id(each) for each in every if each.requires_grad]
    assert group["weight_decay"] == 5e-4
    assert recipe.model_dump().keys().isdisjoint({"layer_decay", "weight_decay_exclusions"})


def test_layer_decay_alone_decays_all_weights() -> None:
    student = create_student("timm:test_vit", 5)
    recipe = OptimiserRecipe(layer_decay=0.5, weight_decay=0.1)
    found = rates(create_optimiser(recipe, parameter_groups(recipe, student, objective(student))), student)
    assert {decay for _, decay in found.values()} == {0.1}
    assert found["head.weight"][0] == 1.0
    assert found["patch_embed.proj.weight"][0] == 0.5 ** (len({scale for scale, _ in found.values()}) - 1)


def test_a_step_changes_each_layer_by_its_own_rate() -> None:
    """SGD without momentum in float64: w − lr · scale · (g + decay · w) for every parameter."""
    student = create_student("timm:test_resnet", 5).double()
    recipe = OptimiserRecipe(
        learning_rate=0.1, momentum=0.0, weight_decay=0.05, layer_decay=0.7, weight_decay_exclusions=True
    )
    optimiser = create_optimiser(recipe, parameter_groups(recipe, student, nn.Identity()))
    schedule = Schedule(ScheduleRecipe(name="constant"), optimiser, epochs=2, updates_per_epoch=2)
    schedule.step_update(0)
    known = rates(create_optimizer_v2(student, "sgd", lr=0.1, weight_decay=0.05, layer_decay=0.7), student)
    generator = torch.Generator().manual_seed(0)
    before = {name: each.detach().clone() for name, each in student.named_parameters()}
    for each in student.parameters():
        each.grad = torch.randn(each.shape, generator=generator, dtype=torch.float64)
    optimiser.step()
    for name, each in student.named_parameters():
        scale, decay = known[name]
        assert each.grad is not None
        expected = before[name] - 0.1 * scale * (each.grad + decay * before[name])
        torch.testing.assert_close(each.detach(), expected, rtol=1e-12, atol=1e-12)


def test_networks_without_known_layers_are_refused() -> None:
    student = create_student("resnet8", 5)
    with pytest.raises(RecipeError, match="network whose layers are known"):
        parameter_groups(OptimiserRecipe(layer_decay=0.7), student, nn.Identity())
    recipe = OptimiserRecipe(weight_decay_exclusions=True)
    found = rates(create_optimiser(recipe, parameter_groups(recipe, student, nn.Identity())), student)
    assert all(
        (decay == 0.0) == (dict(student.named_parameters())[name].ndim <= 1) for name, (_, decay) in found.items()
    )


def test_a_stored_state_with_groups_is_read_again() -> None:
    settings = {"learning_rate": 0.1, "layer_decay": 0.7, "weight_decay_exclusions": True}
    recipe = tiny_run.recipe("", Path("unused"), loss={"kind": "ce"}, dataset={"name": "digits"}, optimiser=settings)
    learners = []
    for _ in range(2):
        student: Any = create_student("timm:test_vit", 5)
        terms = Objective(recipe.loss, student.num_features, None, 5, 10, torch.arange(10) % 5)
        learners.append(Learner(recipe, student, terms, Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3), 4, CPU))
    first, second = learners
    batch = Batch(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.arange(4), torch.arange(4), BatchTargets())
    first.step(batch, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert first.learning_rate == 0.1
    state = copy.deepcopy(first.state_dict())
    check_learner(state, second)
    second.load_state_dict(state)
    assert rates(first.optimiser, first.student, "lr") == rates(second.optimiser, second.student, "lr")
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True))
