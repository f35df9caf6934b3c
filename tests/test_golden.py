"""The whole RichKD objective, as training runs it on component targets, against the golden numbers of two steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache_tools import fusion
from train.contrastive import Components
from train.feed import Batch, BatchTargets
from train.loss_recipe import LossRecipe
from train.objective import Objective
from train.recipe import named_loss

GOLDEN = Path(__file__).parent / "golden"
SIDES = {"embed_student": "student", "embed_targets.0": "teacher", "embed_targets.1": "clip"}
Data = dict[str, Tensor]


class Drawn(nn.Module):
    """In place of the sampler: the negatives that the reference drew."""

    contrast_index: Tensor

    def forward(self, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.contrast_index


def load(name: str) -> Data:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def step_of(data: Data, number: int) -> Data:
    prefix = f"step{number}."
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def objective_of(data: Data, loss: str) -> Objective:
    """`--loss` with the golden sizes, embeddings and memories."""
    samples, dim = data["memory_student.0"].shape
    negatives = data["step0.contrast_index"].shape[1] - 1
    alpha = float(data["alpha"])
    objective = Objective(
        LossRecipe(**(named_loss(loss) | {"crd_negatives": negatives, "crd_dim": dim})),
        student_dim=32,
        target_dim=128,
        num_classes=20,
        num_samples=samples,
        labels=np.arange(samples) % 20,
        components=Components((64, 48), (alpha, 1 - alpha)),
    )
    contrast = objective.contrast
    assert contrast is not None
    assert contrast.memory.negatives == negatives
    contrast.sampler = Drawn()  # type: ignore[assignment]
    with torch.no_grad():
        for ours, theirs in SIDES.items():
            for part in ("weight", "bias"):
                contrast.get_parameter(f"{ours}.{part}").copy_(data[f"embed_{theirs}.{part}"])
        contrast.memory.memory_student.copy_(data["memory_student.0"])
        contrast.memory.memory_target.copy_(data["memory_target.0"])
    return objective


def batch_of(step: Data, alpha: float) -> Batch:
    """The targets as a component cache gives them: fused logits have rows of mean 0."""
    logits = fusion.centre_rows(fusion.fuse_logits(step["teacher_logits"], step["clip_cosine"], alpha, clip_scale=1.0))
    targets = BatchTargets(logits, None, (step["teacher_features"], step["clip_features"]))
    return Batch(torch.empty(0), step["labels"], step["index"], targets)


TERMS = {
    "richkd": ("loss_ce", "loss_logit", "loss_feature"),
    "richkd-l": ("loss_ce", "loss_logit"),
    "richkd-f": ("loss_ce", "loss_feature"),
    "crd": ("loss_ce", "loss_feature"),
}


@pytest.mark.parametrize("loss", ["richkd", "richkd-f", "crd"])
def test_the_objective_on_component_targets_over_two_steps(loss: str) -> None:
    data = load("richkd_b16")
    objective = objective_of(data, loss)
    contrast = objective.contrast
    assert contrast is not None
    for number in range(2):
        step = step_of(data, number)
        contrast.sampler.contrast_index = step["contrast_index"]
        logits, features = step["student_logits"].requires_grad_(), step["student_features"].requires_grad_()
        objective.zero_grad()
        terms = objective(logits, features, batch_of(step, float(data["alpha"])))
        terms["loss"].backward()

        assert set(terms) == {"loss", *TERMS[loss]}
        for name in TERMS[loss]:
            assert_near(terms[name], step[name], 1e-5)
        wanted = step["loss"] if loss == "richkd" else torch.stack([step[name] for name in TERMS[loss]]).sum()
        assert_near(terms["loss"].detach(), wanted, 1e-5)
        assert features.grad is not None
        assert_near(features.grad, step["grad_student_features"], 1e-4)
        if loss == "richkd":
            assert logits.grad is not None
            assert_near(logits.grad, step["grad_student_logits"], 1e-5)
        for ours, theirs in SIDES.items():
            for part in ("weight", "bias"):
                gradient = contrast.get_parameter(f"{ours}.{part}").grad
                assert gradient is not None
                assert_near(gradient, step[f"grad_embed_{theirs}.{part}"], 1e-4)
        assert_near(contrast.memory.log_normaliser.exp(), step["Z"], 1e-5)
        assert_near(contrast.memory.memory_student, step["memory_student"], 1e-5)
        assert_near(contrast.memory.memory_target, step["memory_target"], 1e-5)


def test_the_logit_objective_needs_no_features() -> None:
    data = load("richkd_b16")
    objective = Objective(LossRecipe(**named_loss("richkd-l")), 32, 128, 20, 100, np.arange(100) % 20)
    for number in range(2):
        step = step_of(data, number)
        terms = objective(step["student_logits"], None, batch_of(step, float(data["alpha"])))
        assert set(terms) == {"loss", *TERMS["richkd-l"]}
        for name in TERMS["richkd-l"]:
            assert_near(terms[name], step[name], 1e-5)
