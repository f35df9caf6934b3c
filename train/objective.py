"""The objective of a run: the weighted loss terms of a `LossRecipe`, with the layers they learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from cache_tools.codecs import SparseTargets
from cache_tools.errors import RecipeError
from cache_tools.system.devices import seeded_on_cpu
from cache_tools.system.joined import Joined
from train import losses
from train.feed import Batch
from train.losses.contrastive import Components, ContrastiveTerm, Gather
from train.losses.numerics import full_precision
from train.losses.tail import kd_tail
from train.recipe.loss import LossRecipe

LOGIT_TERMS: dict[str, Callable[[LossRecipe, Tensor, Tensor, Tensor], Tensor]] = {
    "kd": lambda recipe, student, target, labels: losses.kd(student, target, recipe.temperature),
    "dkd": lambda recipe, student, target, labels: losses.dkd(
        student, target, labels, recipe.dkd_alpha, recipe.dkd_beta, recipe.temperature
    ),
    "standardised_kd": lambda recipe, student, target, labels: losses.standardised_kd(
        student, target, recipe.temperature
    ),
    "standardised_dkd": lambda recipe, student, target, labels: losses.dkd(
        losses.standardise(student),
        losses.standardise(target),
        labels,
        recipe.dkd_alpha,
        recipe.dkd_beta,
        recipe.temperature,
    ),
    "bce": lambda recipe, student, target, labels: losses.sigmoid_kd(student, target, recipe.temperature),
}

FEATURE_TERMS: dict[str, Callable[[LossRecipe, Tensor, Tensor], Tensor]] = {
    "mse": lambda recipe, student, target: losses.feature_mse(student, target),
    "cosine": lambda recipe, student, target: losses.feature_cosine(student, target),
    "rkd": lambda recipe, student, target: losses.rkd(
        student, target, recipe.rkd_distance_weight, recipe.rkd_angle_weight
    ),
    "pkt": lambda recipe, student, target: losses.pkt(student, target),
}
COMPARE_SAMPLES = frozenset({"rkd", "pkt"})
"""Feature terms that compare the samples of a batch with each other."""


class Objective(nn.Module):
    """ce_weight · CE + distill_weight · logit term + feature_weight · feature term.

    CE is the binary cross entropy of every class for a loss of images with several labels.

    Its own parameters (a projector, CRD's embeddings) are trained with the student's by the same optimiser. Its
    `state_dict` also has CRD's memories and step count, so a resumed run draws the same negatives.

    Args:
        student_dim: width of the student's features.
        target_dim: width of the fused target features; None without targets.
        labels: int [N], the labels of all training samples, for CRD's negatives.
        has_logits: whether there are target logits; by default if there are features, as in every cache.
        components: the networks whose own features are among the targets; CRD uses them unless the recipe says `fused`.
        class_weights: [C], of the CE term, if the recipe has them; see `class_weights.class_weights`.
        seed: of the initial parameters and of CRD's negatives. The global random generator does not change.

    Raises:
        RecipeError: the recipe needs targets that are missing.
    """

    logit_weight: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        recipe: LossRecipe,
        student_dim: int,
        target_dim: int | None,
        num_classes: int,
        num_samples: int,
        labels: Tensor | np.ndarray,
        *,
        has_logits: bool | None = None,
        components: Components | None = None,
        class_weights: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        has_logits = target_dim is not None if has_logits is None else has_logits
        _check_targets(recipe, has_logits, target_dim is not None, components is not None, num_classes)
        assert len(labels) == num_samples, "one label per training sample"
        self.recipe = recipe
        self.ranks: Joined | None = None  # that train together; terms that compare samples compare those of all
        # A tensor on the device: a compiled step is not compiled again when it changes.
        self.register_buffer("logit_weight", torch.tensor(0.0), persistent=False)
        self.set_epoch(0)
        assert (class_weights is None) == (recipe.class_weights == "none"), "the weights of the recipe"
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.projector: nn.Module = nn.Identity()
        self.contrast: ContrastiveTerm | None = None
        self.components = components if recipe.uses_components else None
        with seeded_on_cpu(seed):
            if self.components is not None:
                self.contrast = ContrastiveTerm(recipe, student_dim, self.components, labels, seed)
            elif recipe.needs_features and target_dim is not None:
                if recipe.feature == "crd":
                    fused = Components((target_dim,), (1.0,))
                    self.contrast = ContrastiveTerm(recipe, student_dim, fused, labels, seed)
                elif recipe.feature in {"mse", "cosine"} and student_dim != target_dim:
                    self.projector = nn.Linear(student_dim, target_dim)

    def set_epoch(self, epoch: int) -> None:
        """Set the logit term's weight for an epoch: epoch e, from 0, has the factor min((e + 1) / warmup_epochs, 1).

        The reference counts epochs from 1, so its first epoch has the same weight.
        """
        warmup = self.recipe.warmup_epochs
        share = min((epoch + 1) / warmup, 1.0) if warmup else 1.0
        self.logit_weight.fill_(self.recipe.distill_weight * share)

    @full_precision
    def forward(
        self,
        student_logits: Tensor,
        student_features: Tensor | None,
        batch: Batch,
        update_labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss terms of one step, scalars on the device.

        Args:
            student_logits: [B, C].
            student_features: [B, student_dim], the classifier's input; None if the recipe has no feature term.
            update_labels: of all samples of an update of several batches, whose class weights CE is divided by.

        Returns:
            `loss`, with its gradient, and the detached weighted terms that add up to it: those of `loss_ce`,
            `loss_logit`, `loss_feature` that the recipe has. Nothing waits for the device.
        """
        recipe, terms = self.recipe, {}
        if recipe.ce_weight > 0.0:
            terms["loss_ce"] = _weighted(recipe.ce_weight, self._cross_entropy(student_logits, batch, update_labels))
        if recipe.needs_logits:
            terms["loss_logit"] = self.logit_weight * self._logit_term(student_logits, batch)
        if recipe.needs_features:
            terms["loss_feature"] = self._feature_term(student_features, batch)
        return {
            "loss": _added(*terms.values()),
            **{name: term.detach() for name, term in terms.items()},
        }

    def _cross_entropy(self, student_logits: Tensor, batch: Batch, update_labels: Tensor | None) -> Tensor:
        if self.recipe.multi_label:
            return losses.binary_cross_entropy(student_logits, batch.labels)
        if batch.mixed is not None:
            return losses.mixed_cross_entropy(
                student_logits, batch.labels, *batch.mixed, label_smoothing=self.recipe.label_smoothing
            )
        mean_weight = None
        if self.class_weights is not None and update_labels is not None:
            mean_weight = self.class_weights[update_labels].mean()
        return losses.cross_entropy(
            student_logits,
            batch.labels,
            batch.labelled,
            label_smoothing=self.recipe.label_smoothing,
            class_weights=self.class_weights,
            mean_weight=mean_weight,
        )

    def _logit_term(self, student_logits: Tensor, batch: Batch) -> Tensor:
        target, recipe = batch.targets.logits, self.recipe
        assert target is not None, "the feed left out the target logits"
        if isinstance(target, SparseTargets):
            assert recipe.kind == "kd", "open_data refuses other losses on sparse targets"
            return kd_tail(student_logits, target.classes, target.log_p, target.log_tail, recipe.temperature)
        return LOGIT_TERMS[recipe.kind](recipe, student_logits, target, batch.labels)

    def _feature_term(self, student_features: Tensor | None, batch: Batch) -> Tensor:
        assert student_features is not None, "the loop left out the student's features"
        gather = self._gather(batch)
        if self.contrast is not None and self.components is not None:
            assert batch.targets.components is not None, "the feed left out the networks' own features"
            return self.contrast(student_features, batch.targets.components, batch.index, gather)
        target_features = batch.targets.features
        assert target_features is not None, "the feed left out the target features"
        if self.contrast is not None:
            return self.contrast(student_features, (target_features,), batch.index, gather)
        student_features = self.projector(student_features)
        if gather is not None and self.recipe.feature in COMPARE_SAMPLES:
            student_features, target_features = gather(student_features), gather(target_features)
        term = FEATURE_TERMS[self.recipe.feature](self.recipe, student_features, target_features)
        return _weighted(self.recipe.feature_weight, term)

    def _gather(self, batch: Batch) -> Gather | None:
        """Collects rows of the batch from all ranks, with their gradients; None in one process."""
        if self.ranks is None or batch.sizes is None:
            return None
        return partial(self.ranks.gather, sizes=batch.sizes)


def _weighted(weight: float, term: Tensor) -> Tensor:
    return term if weight == 1.0 else weight * term


def _added(first: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        first = first + other
    return first


def _check_targets(
    recipe: LossRecipe, has_logits: bool, has_features: bool, has_components: bool, num_classes: int
) -> None:
    targets = {"logits": has_logits, "fused features": has_features, "component features": has_components}
    available = [name for name, is_available in targets.items() if is_available]
    fused_features = recipe.needs_features and not (recipe.uses_components and has_components)
    for term, name, needed in (
        (f"loss.kind: {recipe.kind}", "logits", recipe.needs_logits),
        ("loss.feature_source: components", "component features", recipe.needs_components),
        (f"loss.feature: {recipe.feature}", "fused features", fused_features),
    ):
        if needed and name not in available:
            raise RecipeError(
                f"the loss needs target {name}",
                where=term,
                found=f"targets with {' and '.join(available)}" if available else "no targets",
                next_step="use a cache that has them, or set loss.kind=ce and loss.feature=none to learn from labels",
            )
    if recipe.kind in {"dkd", "standardised_dkd"} and recipe.needs_logits and num_classes < 2:
        raise RecipeError("decoupled KD needs at least two classes", found=f"{num_classes}")
