"""The objective gives the golden numbers, and every golden array is tested."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cache_tools import fusion
from tests.support.golden_cases import (
    BATCHES,
    FEATURE_CASES,
    FUSED_SCALES,
    FUSED_WEIGHTS,
    LOGIT_CASES,
    REFERENCE_LOGITS,
    TOTAL_CASES,
)
from train.feed import Batch, BatchTargets
from train.losses.contrastive import Components
from train.objective import Objective
from train.recipe.loss import LossRecipe, named_loss

GOLDEN = Path(__file__).parents[1] / "golden"
# Losses of spatial maps, which a cache does not store.
SPATIAL = {"student_map", "teacher_map"} | {
    f"{name}.{part}" for name in ("at_p2", "sp", "nst") for part in ("loss", "grad")
}


class Data(dict[str, Tensor]):
    """The arrays of a golden file, with a record of those that were read."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as file:
            super().__init__({key: torch.from_numpy(file[key]) for key in file.files})
        self.unread = set(self)

    def __getitem__(self, key: str) -> Tensor:
        self.unread.discard(key)
        return super().__getitem__(key)


class Drawn(nn.Module):
    """Replaces the sampler by the negatives that the reference drew."""

    contrast_index: Tensor

    def forward(self, index: Tensor, generator: torch.Generator) -> Tensor:
        return self.contrast_index


def assert_near(actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest expected value."""
    assert actual is not None
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * float(expected.abs().max())


def batch_of(index: Tensor, labels: Tensor, **targets: Tensor | tuple[Tensor, ...]) -> Batch:
    return Batch(torch.empty(0), labels, index, BatchTargets(**targets))  # type: ignore[arg-type]


# Loss and gradient of one step on logits

TOTALS: dict[str, tuple[LossRecipe, int]] = {
    "lskd_total_T2_ce0.1_kd9": (LossRecipe(**named_loss("standardised_kd")), 1),
    "dkd_total_a1_b8_T4_ce1_epoch5_warmup20": (LossRecipe(**named_loss("dkd"), warmup_epochs=20), 5),
    "dkd_total_a1_b8_T4_ce1_epoch30_warmup20": (LossRecipe(**named_loss("dkd"), warmup_epochs=20), 30),
    "lsdkd_total_a9_b72_T2_ce1_epoch30_warmup20": (
        LossRecipe(kind="standardised_dkd", distill_weight=9.0, temperature=2.0, warmup_epochs=20),
        30,
    ),
}


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("batch", BATCHES)
def test_totals_with_warm_up(batch: str, name: str) -> None:
    data = Data(f"more_losses_{batch}")
    recipe, epoch = TOTALS[name]
    count, classes = data["student_logits"].shape
    objective = Objective(recipe, 4, None, classes, count, data["labels"], has_logits=True)
    objective.set_epoch(epoch - 1)  # the reference counts from 1
    logits = data["student_logits"].requires_grad_()
    loss = objective(logits, None, batch_of(torch.arange(count), data["labels"], logits=data["teacher_logits"]))["loss"]
    loss.backward()
    assert_near(loss.detach(), data[f"{name}.loss"], 1e-5)
    assert_near(logits.grad, data[f"{name}.grad"], 1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("scale", [1, 100])
def test_the_logit_term_of_richkd_on_fused_logits(batch: str, scale: int) -> None:
    """Targets as in a cache: α · teacher + (1 − α) · scale · cosine, rows of mean 0."""
    data = Data(f"losses_{batch}")
    count, classes = data["student_logits"].shape
    fused = fusion.centre_rows(fusion.fuse_logits(data["teacher_logits"], data["clip_cosine"], 0.7, scale))
    objective = Objective(
        LossRecipe(**named_loss("richkd-l")), 4, None, classes, count, data["labels"], has_logits=True
    )
    logits = data["student_logits"].requires_grad_()
    loss = objective(logits, None, batch_of(torch.arange(count), data["labels"], logits=fused))["loss"]
    loss.backward()
    name = f"richkd_logit_a0.7_T3_w3_scale{scale}"
    assert_near(loss.detach(), data["ce.loss"] + data[f"{name}.loss"], 1e-5)
    assert_near(logits.grad, data["ce.grad"] + data[f"{name}.grad"], 1e-5)


# CRD and the whole of RichKD over two steps


def objective_of(
    data: Data, recipe: dict[str, object], sides: dict[str, str], components: Components | None
) -> Objective:
    """An objective with the golden sizes, embeddings and memories; `sides`: the golden name of each embedding."""
    samples, dim = data["memory_student.0"].shape
    negatives = data["step0.contrast_index"].shape[1] - 1
    objective = Objective(
        LossRecipe(**(recipe | {"crd_negatives": negatives, "crd_dim": dim})),
        student_dim=data["embed_student.weight"].shape[1],
        target_dim=64,
        num_classes=20,
        num_samples=samples,
        labels=np.arange(samples) % 20,
        components=components,
    )
    contrast = objective.contrast
    assert contrast is not None
    assert contrast.memory.negatives == negatives
    contrast.sampler = Drawn()  # type: ignore[assignment]
    with torch.no_grad():
        for ours, theirs in sides.items():
            for part in ("weight", "bias"):
                contrast.get_parameter(f"{ours}.{part}").copy_(data[f"{theirs}.{part}"])
        contrast.memory.memory_student.copy_(data["memory_student.0"])
        contrast.memory.memory_target.copy_(data["memory_target.0"])
    return objective


def assert_memories_near(objective: Objective, data: Data, step: str) -> None:
    assert objective.contrast is not None
    memory = objective.contrast.memory
    assert_near(memory.log_normaliser.exp(), data[f"{step}.Z"], 1e-5)
    assert_near(memory.memory_student, data[f"{step}.memory_student"], 1e-5)
    assert_near(memory.memory_target, data[f"{step}.memory_target"], 1e-5)


def test_crd_on_one_target_over_two_steps() -> None:
    data = Data("crd")
    sides = {"embed_student": "embed_student", "embed_targets.0": "embed_target"}
    recipe = named_loss("crd") | {"ce_weight": 0.0, "feature_weight": 1.0}
    objective = objective_of(data, recipe, sides, None)
    for step in ("step0", "step1"):
        objective.contrast.sampler.contrast_index = data[f"{step}.contrast_index"]
        features, index = data[f"{step}.student_features"].requires_grad_(), data[f"{step}.index"]
        batch = batch_of(index, index % 20, features=data[f"{step}.target_features"])
        loss = objective(torch.zeros(8, 20), features, batch)["loss"]
        loss.backward()
        assert_near(loss.detach(), data[f"{step}.loss"], 1e-5)
        assert_near(features.grad, data[f"{step}.grad_student_features"], 1e-4)
        assert_memories_near(objective, data, step)
    assert not data.unread


TERMS = {
    "richkd": ("loss_ce", "loss_logit", "loss_feature"),
    "richkd-l": ("loss_ce", "loss_logit"),
    "richkd-f": ("loss_ce", "loss_feature"),
    "crd": ("loss_ce", "loss_feature"),
}


def richkd_batch(data: Data, step: str) -> Batch:
    """Fused logits, and the features of a component cache."""
    alpha = float(data["alpha"])
    teacher, cosine = data[f"{step}.teacher_logits"], data[f"{step}.clip_cosine"]
    fused = fusion.centre_rows(fusion.fuse_logits(teacher, cosine, alpha, clip_scale=1.0))
    components = data[f"{step}.teacher_features"], data[f"{step}.clip_features"]
    return batch_of(data[f"{step}.index"], data[f"{step}.labels"], logits=fused, components=components)


@pytest.mark.parametrize("loss", ["richkd", "richkd-f", "crd"])
def test_richkd_on_component_targets_over_two_steps(loss: str) -> None:
    data = Data("richkd_b16")
    alpha = float(data["alpha"])
    sides = {"embed_student": "embed_student", "embed_targets.0": "embed_teacher", "embed_targets.1": "embed_clip"}
    objective = objective_of(data, named_loss(loss), sides, Components((64, 48), (alpha, 1 - alpha)))
    contrast = objective.contrast
    assert contrast is not None
    for step in ("step0", "step1"):
        contrast.sampler.contrast_index = data[f"{step}.contrast_index"]
        logits = data[f"{step}.student_logits"].requires_grad_()
        features = data[f"{step}.student_features"].requires_grad_()
        objective.zero_grad()
        terms = objective(logits, features, richkd_batch(data, step))
        terms["loss"].backward()

        assert set(terms) == {"loss", *TERMS[loss]}
        for name in TERMS[loss]:
            assert_near(terms[name], data[f"{step}.{name}"], 1e-5)
        assert_near(features.grad, data[f"{step}.grad_student_features"], 1e-4)
        if loss == "richkd":
            assert_near(terms["loss"].detach(), data[f"{step}.loss"], 1e-5)
            assert_near(logits.grad, data[f"{step}.grad_student_logits"], 1e-5)
        for ours, theirs in sides.items():
            for part in ("weight", "bias"):
                gradient = contrast.get_parameter(f"{ours}.{part}").grad
                assert_near(gradient, data[f"{step}.grad_{theirs}.{part}"], 1e-4)
        assert_memories_near(objective, data, step)
    assert loss != "richkd" or not data.unread


def test_richkd_l_needs_no_features() -> None:
    data = Data("richkd_b16")
    objective = Objective(LossRecipe(**named_loss("richkd-l")), 32, 128, 20, 100, np.arange(100) % 20)
    for step in ("step0", "step1"):
        terms = objective(data[f"{step}.student_logits"], None, richkd_batch(data, step))
        assert set(terms) == {"loss", *TERMS["richkd-l"]}
        for name in TERMS["richkd-l"]:
            assert_near(terms[name], data[f"{step}.{name}"], 1e-5)


# Completeness


def test_every_golden_array_is_tested() -> None:
    """The tests of crd and richkd_b16 above check themselves that they read every array."""
    results = {
        name: {f"{name}.{part}" for part in ("loss", "grad")} for name in (*LOGIT_CASES, *FEATURE_CASES, *TOTALS)
    }
    inputs = {"student_logits", "teacher_logits", "labels"}
    assert set(TOTAL_CASES) <= set(TOTALS)
    for batch in BATCHES:
        cases = set().union(*(results[name] for name in (*LOGIT_CASES, *FEATURE_CASES)))
        features = {"clip_cosine", "student_features", "teacher_features"}
        assert set(Data(f"losses_{batch}")) == inputs | features | cases
        totals = set().union(*(results[name] for name in TOTALS))
        assert set(Data(f"more_losses_{batch}")) == inputs | totals | SPATIAL
    prompts = {"text_features", "image_features", "class_embeddings", "cosine"}
    assert set(Data("prompts")) == prompts
    fused = {f"fused_w{weight}_scale{scale}" for weight in FUSED_WEIGHTS for scale in FUSED_SCALES}
    assert set(Data("fusion")) == prompts | {"teacher_logits"} | fused
    networks = set(json.loads((GOLDEN / "models.json").read_text()))
    outputs = {f"{name}.{part}" for name in networks - set(REFERENCE_LOGITS) for part in ("logits", "features")}
    assert set(Data("models")) == {"input"} | outputs
    files = {
        "losses_b16_c20",
        "losses_b8_c100",
        "more_losses_b16_c20",
        "more_losses_b8_c100",
        "prompts",
        "fusion",
        "models",
    }
    assert {path.stem for path in GOLDEN.glob("*.npz")} == files | {"crd", "richkd_b16"}
