"""The objective: its terms, its learned layers, its warm-up, exact resume, and errors for missing targets."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache_tools.config import validate
from cache_tools.errors import RecipeError
from train import losses
from train.feed import Batch, BatchTargets, MixedLabels
from train.loop import Sums
from train.losses.contrastive import Components
from train.losses.numerics import unit_rows
from train.objective import FEATURE_TERMS, LOGIT_TERMS, Objective
from train.recipe.loss import LossRecipe

SAMPLES, CLASSES, STUDENT_DIM, TARGET_DIM = 60, 7, 12, 9
LABELS = np.arange(SAMPLES) % CLASSES
NO_PIXELS = torch.empty(0)


def make_objective(target_dim: int | None = TARGET_DIM, **recipe: Any) -> Objective:
    return Objective(
        LossRecipe(**recipe),
        student_dim=STUDENT_DIM,
        target_dim=target_dim,
        num_classes=CLASSES,
        num_samples=SAMPLES,
        labels=LABELS,
    )


def make_step(seed: int) -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(SAMPLES, generator=generator)[:8]
    logits, target_logits = (torch.randn(8, CLASSES, generator=generator) for _ in range(2))
    features = torch.randn(8, STUDENT_DIM, generator=generator)
    target_features = torch.randn(8, TARGET_DIM, generator=generator)
    labels, targets = torch.from_numpy(LABELS)[index], BatchTargets(target_logits, target_features)
    batch = Batch(NO_PIXELS, labels, index, targets)
    return logits.requires_grad_(), features.requires_grad_(), batch


COMPONENTS = Components((11, 5), (0.7, 0.3))


def component_objective(components: Components, *, seed: int = 0, **recipe: Any) -> Objective:
    settings = {"kind": "ce", "feature": "crd", "crd_negatives": 11, "crd_dim": 6} | recipe
    return Objective(
        LossRecipe(**settings),
        STUDENT_DIM, TARGET_DIM, CLASSES, SAMPLES, LABELS, components=components, seed=seed,
    )  # fmt: skip


def component_targets(seed: int) -> BatchTargets:
    generator = torch.Generator().manual_seed(seed)
    return BatchTargets(None, None, tuple(torch.randn(8, width, generator=generator) for width in COMPONENTS.widths))


KINDS = ("ce", "kd", "dkd", "standardised_kd", "standardised_dkd")
FEATURES = ("none", "mse", "cosine", "rkd", "pkt", "crd")


@pytest.mark.parametrize(("kind", "feature"), list(itertools.product(KINDS, FEATURES)))
def test_terms_add_up_and_reach_the_student(kind: str, feature: str) -> None:
    objective = make_objective(kind=kind, feature=feature, ce_weight=0.7)
    logits, features, batch = make_step(0)
    terms = objective(logits, features, batch)
    expected = ["loss_ce"] + ["loss_logit"] * (kind != "ce") + ["loss_feature"] * (feature != "none")
    assert list(terms) == ["loss", *expected]
    torch.testing.assert_close(terms["loss"].detach(), sum(terms[name] for name in expected))
    assert not any(terms[name].requires_grad for name in expected)
    terms["loss"].backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    assert (features.grad is not None and bool(features.grad.abs().sum() > 0)) == (feature != "none")
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_each_term_is_its_loss_with_the_settings_of_the_recipe() -> None:
    logits, features, batch = make_step(1)
    target, labels = batch.targets.logits, batch.labels
    assert isinstance(target, Tensor)
    target_features = torch.randn(8, STUDENT_DIM)
    square = Batch(NO_PIXELS, batch.labels, batch.index, BatchTargets(target, target_features))
    numbers: dict[str, Any] = {
        "temperature": 5.0, "distill_weight": 2.0, "dkd_alpha": 1.5, "dkd_beta": 6.0, "feature_weight": 0.5,
        "rkd_distance_weight": 3.0, "rkd_angle_weight": 4.0,
    }  # fmt: skip
    logit_losses = {
        "kd": losses.kd(logits, target, 5.0),
        "dkd": losses.dkd(logits, target, labels, 1.5, 6.0, 5.0),
        "standardised_kd": losses.standardised_kd(logits, target, 5.0),
        "standardised_dkd": losses.dkd(losses.standardise(logits), losses.standardise(target), labels, 1.5, 6.0, 5.0),
        "bce": losses.sigmoid_kd(logits, target, 5.0),
    }
    feature_losses = {
        "mse": losses.feature_mse(features, target_features),
        "cosine": losses.feature_cosine(features, target_features),
        "rkd": losses.rkd(features, target_features, 3.0, 4.0),
        "pkt": losses.pkt(features, target_features),
    }
    assert logit_losses.keys() == LOGIT_TERMS.keys()
    assert feature_losses.keys() == FEATURE_TERMS.keys()
    for kind, expected in logit_losses.items():
        term = make_objective(kind=kind, ce_weight=0.0, **numbers)(logits, None, batch)["loss_logit"]
        assert torch.equal(term, 2.0 * expected)
    for feature, expected in feature_losses.items():
        objective = make_objective(STUDENT_DIM, kind="ce", feature=feature, **numbers)
        assert not list(objective.parameters()), "equal widths need no projector"
        assert torch.equal(objective(logits, features, square)["loss_feature"], 0.5 * expected)


def test_warm_up_weights_only_the_logit_term() -> None:
    logits, features, batch = make_step(2)
    objective = make_objective(kind="kd", feature="pkt", warmup_epochs=4)
    runs = []
    for epoch in (0, 1, 3, 9):
        objective.set_epoch(epoch)
        runs.append(objective(logits, features, batch))
    full = runs[-1]
    for terms, share in zip(runs, (0.25, 0.5, 1.0, 1.0), strict=True):
        torch.testing.assert_close(terms["loss_logit"], share * full["loss_logit"])
        assert torch.equal(terms["loss_feature"], full["loss_feature"])


def train_steps(objective: Objective, steps: range, *, components: bool = False) -> list[Tensor]:
    optimiser = torch.optim.SGD(objective.parameters(), lr=0.1)
    values = []
    for k in steps:
        logits, features, batch = make_step(k)
        terms = objective(logits, features, replace(batch, targets=component_targets(k)) if components else batch)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        values.append(terms["loss"].detach())
    return values


def test_crd_resumes_exactly_and_draws_new_negatives_every_step() -> None:
    settings: dict[str, Any] = {"kind": "ce", "feature": "crd", "crd_negatives": 11, "crd_dim": 6}
    straight = train_steps(make_objective(**settings), range(6))
    first = make_objective(**settings)
    train_steps(first, range(3))
    resumed = make_objective(**settings)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(train_steps(resumed, range(3, 6))), torch.stack(straight[3:]))

    forgetful = make_objective(**settings)
    forgetful.load_state_dict(first.state_dict())
    assert forgetful.contrast is not None
    forgetful.contrast.step.zero_()
    assert not torch.equal(train_steps(forgetful, range(3, 4))[0], straight[3])


def test_crd_does_not_change_its_state_in_eval_mode() -> None:
    objective = make_objective(kind="ce", feature="crd", crd_dim=6)
    train_steps(objective, range(2))
    objective.eval()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    values = [objective(*make_step(3))["loss"] for _ in range(2)]
    assert torch.equal(*values)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_crd_draws_at_most_all_samples_of_other_classes() -> None:
    objective = make_objective(feature="crd")
    assert objective.contrast is not None
    assert objective.contrast.memory.negatives == SAMPLES - int(np.bincount(LABELS).max())


def test_the_seed_sets_the_initial_parameters_and_not_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, same = (make_objective(feature="mse") for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    other = Objective(LossRecipe(feature="mse"), STUDENT_DIM, TARGET_DIM, CLASSES, SAMPLES, LABELS, seed=1)
    weights = [objective.get_parameter("projector.weight") for objective in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_half_precision_student_gives_float32_terms() -> None:
    objective = make_objective(kind="kd", feature="crd", crd_dim=6)
    logits, features, batch = make_step(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = objective(logits.bfloat16(), features.bfloat16(), batch)
    assert all(value.dtype is torch.float32 for value in terms.values())


@pytest.mark.parametrize(
    ("recipe", "has_logits", "target_dim", "message"),
    [
        ({"kind": "dkd"}, False, None, r"needs target logits \(loss.kind: dkd\).*found no targets"),
        ({"kind": "kd", "feature": "crd"}, True, None, r"features \(loss.feature: crd\).*targets with logits\."),
        ({"kind": "kd", "feature": "mse"}, False, 9, r"needs target logits .*found targets with fused features"),
        (
            {"kind": "ce", "feature": "crd", "feature_source": "components"},
            True,
            9,
            r"needs target component features \(loss.feature_source: components\).*with logits and fused features",
        ),
    ],
)
def test_missing_targets_are_named(
    recipe: dict[str, Any], has_logits: bool, target_dim: int | None, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Objective(
            LossRecipe(**recipe),
            STUDENT_DIM, target_dim, CLASSES, SAMPLES, LABELS, has_logits=has_logits,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "weights", "names"),
    [
        ("auto", (0.7, 0.3), ["student", "targets.0", "targets.1"]),
        ("components", (0.7, 0.3), ["student", "targets.0", "targets.1"]),
        ("auto", (1.0, 0.0), ["student", "targets.0"]),
        ("fused", (0.7, 0.3), ["student", "targets.0"]),
    ],
)
def test_which_features_crd_embeds(source: str, weights: tuple[float, float], names: list[str]) -> None:
    """Each network with a weight above 0 has an embedding; the fused features have one."""
    widths = {"fused": (TARGET_DIM,)}.get(source, COMPONENTS.widths)
    objective = component_objective(COMPONENTS._replace(weights=weights), feature_source=source)
    learned = {name.removeprefix("contrast.embed_"): value for name, value in objective.named_parameters()}
    assert [name.removesuffix(".weight") for name in learned if name.endswith("weight")] == names
    assert [learned[f"{name}.weight"].shape[1] for name in names] == [STUDENT_DIM, *widths][: len(names)]
    logits, features, batch = make_step(0)
    batch = replace(batch, targets=component_targets(0)._replace(features=batch.targets.features))
    objective(logits, features, batch)["loss"].backward()
    for name, value in learned.items():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name


def test_the_weights_of_components_decide_the_mix() -> None:
    logits, features, batch = make_step(0)
    batch = replace(batch, targets=component_targets(0))
    teacher, clip = batch.targets.components or ()
    even = component_objective(COMPONENTS._replace(weights=(0.5, 0.5)))
    embeds = [even.get_submodule(f"contrast.embed_targets.{number}") for number in range(2)]
    units = [unit_rows(embed(each)) for embed, each in zip(embeds, (teacher, clip), strict=True)]
    unit, _ = even.get_submodule("contrast")._mix(units)  # type: ignore[operator]
    expected = unit_rows(unit_rows(embeds[0](teacher)) + unit_rows(embeds[1](clip)))
    torch.testing.assert_close(unit, expected)
    other = component_objective(COMPONENTS._replace(weights=(0.9, 0.1)))
    assert even(logits, features, batch)["loss"] != other(logits, features, batch)["loss"]


def test_crd_on_components_resumes_exactly() -> None:
    def steps(objective: Objective, numbers: range) -> list[Tensor]:
        return train_steps(objective, numbers, components=True)

    straight = steps(component_objective(COMPONENTS), range(6))
    first = component_objective(COMPONENTS)
    steps(first, range(3))
    resumed = component_objective(COMPONENTS)
    for parameter in resumed.parameters():
        torch.nn.init.zeros_(parameter)  # only the seed of the negatives is the run's; everything else is loaded
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(steps(resumed, range(3, 6))), torch.stack(straight[3:]))


def test_only_crd_embeds_components() -> None:
    recipe = LossRecipe(feature="cosine")
    assert not recipe.uses_components
    for feature in ("mse", "cosine", "rkd", "pkt"):
        with pytest.raises(RecipeError, match=f"feature_source fused or auto, because {feature}"):
            validate(LossRecipe, {"feature": feature, "feature_source": "components"}, where="loss")
    assert not LossRecipe(feature_source="components").needs_components, "there is no feature term"


def test_labels_only_needs_no_targets() -> None:
    objective = make_objective(target_dim=None, kind="ce")
    logits, _, batch = make_step(5)
    batch = replace(batch, targets=BatchTargets(None, None))
    assert torch.equal(
        objective(logits, None, batch)["loss"].detach(), losses.cross_entropy(logits, batch.labels).detach()
    )


def test_recipe_properties() -> None:
    assert not LossRecipe(kind="ce").needs_targets
    assert LossRecipe(kind="ce", feature="crd").needs_features
    assert not LossRecipe(kind="ce", feature="crd").needs_logits
    assert not LossRecipe(distill_weight=0.0).needs_targets
    assert LossRecipe().needs_logits
    assert not LossRecipe().needs_features


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"temperatur": 4}, "Did you mean 'temperature'"),
        ({"temperature": 0}, "bad value for 'temperature'"),
        ({"kind": "ce", "ce_weight": 0}, "at least one of CE, logit term and feature term"),
        ({"kind": "dist"}, "bad value for 'kind'"),
        ({"crd_momentum": 1.0}, "bad value for 'crd_momentum'"),
    ],
)
def test_invalid_recipes_are_errors(data: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(LossRecipe, data, where="loss")


def test_recipe_does_not_import_torch() -> None:
    code = "import sys, train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_never_waits_for_the_device() -> None:
    objective = make_objective(kind="dkd", feature="crd", warmup_epochs=3).cuda()
    mixed = component_objective(COMPONENTS).cuda()
    logits, features, batch = make_step(0)
    assert isinstance(batch.targets.logits, Tensor)
    assert batch.targets.features is not None
    components = tuple(part.cuda() for part in component_targets(0).components or ())
    targets = BatchTargets(batch.targets.logits.cuda(), batch.targets.features.cuda(), components)
    on_gpu = Batch(NO_PIXELS, batch.labels.cuda(), batch.index.cuda(), targets)
    logits, features = logits.detach().cuda(), features.detach().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective.set_epoch(1)
        objective(logits, features, on_gpu)
        mixed(logits, features, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_mixed_samples_are_mixed(smoothing: float) -> None:
    """CE against a slow sum over the mixed and smoothed label distribution, in float64, with its gradient."""
    objective = make_objective(kind="ce", ce_weight=0.7, label_smoothing=smoothing)
    logits, features, batch = make_step(3)
    partner, share = batch.labels.flip(0), torch.linspace(0.0, 1.0, 8)
    mixed = dataclasses.replace(batch, mixed=MixedLabels(partner, share))
    loss = objective(logits, features, mixed)["loss"]
    loss.backward()
    z = logits.detach().double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.full((8, CLASSES), smoothing / CLASSES)
    for i in range(8):
        y[i, batch.labels[i]] += (1 - smoothing) * float(share[i])
        y[i, partner[i]] += (1 - smoothing) * (1 - float(share[i]))
    assert float(loss.detach()) == pytest.approx(-0.7 * (y * np.log(p)).sum() / 8, rel=1e-6)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), 0.7 * (p - y) / 8, atol=1e-7)


def test_top1_of_mixed_samples_counts_the_shares_of_their_labels() -> None:
    logits, _, batch = make_step(4)
    partner, share = batch.labels.roll(1), torch.linspace(0.0, 1.0, 8)
    means = Sums()
    means.add({"loss": logits.sum()}, logits, batch.labels, MixedLabels(partner, share))
    best = logits.argmax(1)
    slow = [
        float(share[i]) * bool(best[i] == batch.labels[i]) + (1 - float(share[i])) * bool(best[i] == partner[i])
        for i in range(8)
    ]
    assert sum(slow) > 0
    assert means.compute()["train_top1"] == pytest.approx(sum(slow) / 8, rel=1e-6)
