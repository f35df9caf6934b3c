"""What a run minimises, as a recipe. No torch here: recipes are read before anything heavy is imported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cache_tools.config import Frozen


class LossRecipe(Frozen):
    """ce_weight · CE + distill_weight · logit term + feature_weight · feature term.

    The defaults are RichKD's [CE 1, w_L = 3, T = 3, w_F = 0.8] with the feature term off; `feature: crd` turns it on.

    Attributes:
        kind: the logit term; `ce` for none.
        temperature: T of the logit term.
        dkd_alpha, dkd_beta: weights of DKD's two parts; the reference's beta depends on the pair of networks.
        warmup_epochs: the logit term's weight rises linearly to its full value in this many epochs (20 in the
            reference's DKD), 0 for none.
        feature: the feature term. `mse` and `cosine` learn a linear projector where the widths differ; `crd` learns
            an embedding for the student's features and one for each target's.
        feature_source: what `crd` embeds: `components`, the teacher's and CLIP's own features, mixed behind learned
            embeddings as in the paper; `fused`, the cache's fused features, mixed behind fixed projections; `auto`, the
            components where the cache has them. The other terms compare with the fused features.
        crd_negatives: per sample, from other classes; no more are drawn than the data set has.
        crd_dim: width of the embeddings.
    """

    ce_weight: NonNegativeFloat = 1.0
    kind: Literal["ce", "kd", "dkd", "standardised_kd", "standardised_dkd"] = "kd"
    distill_weight: NonNegativeFloat = 3.0
    temperature: PositiveFloat = 3.0
    dkd_alpha: NonNegativeFloat = 1.0
    dkd_beta: NonNegativeFloat = 8.0
    warmup_epochs: NonNegativeInt = 0
    feature: Literal["none", "mse", "cosine", "rkd", "pkt", "crd"] = "none"
    feature_weight: NonNegativeFloat = 0.8
    feature_source: Literal["auto", "fused", "components"] = "auto"
    rkd_distance_weight: NonNegativeFloat = 25.0
    rkd_angle_weight: NonNegativeFloat = 50.0
    crd_negatives: PositiveInt = 16_384
    crd_dim: PositiveInt = 128
    crd_temperature: PositiveFloat = 0.07
    crd_momentum: float = Field(0.5, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _something_to_minimise(self) -> LossRecipe:
        if self.ce_weight == 0.0 and not self.needs_targets:
            raise ValueError("a weight above 0 for at least one of CE, logit term and feature term")
        return self

    @model_validator(mode="after")
    def _components_are_for_crd(self) -> LossRecipe:
        if self.feature_source == "components" and self.feature not in {"none", "crd"}:
            raise ValueError(f"feature_source fused or auto, because {self.feature} compares with the fused features")
        return self

    @property
    def needs_logits(self) -> bool:
        """Whether the targets' logits are used."""
        return self.kind != "ce" and self.distill_weight > 0.0

    @property
    def needs_features(self) -> bool:
        """Whether the targets' features are used, fused or as components."""
        return self.feature != "none" and self.feature_weight > 0.0

    @property
    def needs_components(self) -> bool:
        """Whether only the teacher's and CLIP's own features will do."""
        return self.takes_components and self.feature_source == "components"

    @property
    def takes_components(self) -> bool:
        """Whether the teacher's and CLIP's own features are used where there are any."""
        return self.needs_features and self.feature == "crd" and self.feature_source != "fused"

    @property
    def needs_targets(self) -> bool:
        """Whether the run needs a cache at all."""
        return self.needs_logits or self.needs_features
