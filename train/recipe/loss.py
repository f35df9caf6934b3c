"""The settings of a loss, and the losses that have a name. Importable without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ValidationError, model_validator

from cache_tools.config import Extensible, parse_yaml
from cache_tools.config.fields import BelowOne, Count, CountOrZero, NotNegative, Positive, Width
from cache_tools.config.text import MAX_RECIPE_BYTES, read_text
from cache_tools.errors import RecipeError
from cache_tools.system.arguments import expand_user

# The settings of `--loss NAME`, from the paper or the reference implementation of each method.
LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"kind": "ce"},
    "kd": {"kind": "kd"},
    "dkd": {"kind": "dkd", "distill_weight": 1.0, "temperature": 4.0},
    "standardised_kd": {"kind": "standardised_kd", "ce_weight": 0.1, "distill_weight": 9.0, "temperature": 2.0},
    "crd": {"kind": "ce", "feature": "crd"},
    "richkd-l": {"kind": "kd"},
    "richkd-f": {"kind": "ce", "feature": "crd"},
    "richkd": {"kind": "kd", "feature": "crd"},
    "bce": {"kind": "bce", "distill_weight": 1.0, "temperature": 1.0},
    "bce-labels": {"kind": "bce", "distill_weight": 0.0},
}
# Names of losses without targets.
LABELS_ALONE = ("ce", "bce-labels")
# Settings of the CE term, which a run on labels alone shares with a run with targets.
CE_SETTINGS = ("label_smoothing", "class_weights")


def _class_weights(value: Any) -> str | tuple[float, ...] | dict[str, float]:
    """Class weights from a recipe or an option: `none`, `balanced`, a list, a mapping, or a file of weights.

    The weights in a file become part of the recipe, so that a change of the file is a change of the run.
    """
    if value is None or value in ("none", "balanced"):
        return value or "none"
    where: object = "loss.class_weights"
    if isinstance(value, str) and (numbers := _numbers(value.split(","))) is not None:
        value = numbers
    elif isinstance(value, str):
        where = expand_user(value)
        value = _weights_in_file(where)
    # YAML reads some class names as numbers.
    named = {str(key): weight for key, weight in value.items()} if isinstance(value, dict) else None
    weights = _numbers(value if named is None else named.values()) if isinstance(value, list | tuple | dict) else None
    if not weights or not all(0.0 <= weight < math.inf for weight in weights):
        expected = "none, balanced, a weight of 0 or more for each class, or a file of such weights"
        raise RecipeError("bad class weights", where=where, expected=expected, found=repr(value)[:80])
    return tuple(weights) if named is None else dict(zip(named, weights, strict=True))


def _weights_in_file(path: Path) -> Any:
    expected = "none, balanced, numbers with commas, or a UTF-8 file of weights (YAML, JSON or plain numbers)"
    text = read_text(path, "cannot read class weights", limit=MAX_RECIPE_BYTES, expected=expected)
    return _numbers(text.split()) or parse_yaml(text, "cannot read class weights", where=path)


def _numbers(values: Iterable[Any]) -> list[float] | None:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        return None


ClassWeights = Annotated[str | tuple[float, ...] | dict[str, float], BeforeValidator(_class_weights)]


class LossRecipe(Extensible):
    """ce_weight · CE + distill_weight · logit term + feature_weight · feature term.

    For images with several labels (`bce`) CE is the binary cross entropy of every class. The defaults are RichKD's
    [CE 1, w_L = 3, T = 3, w_F = 0.8] with the feature term off; `feature: crd` turns it on.

    Attributes:
        kind: the logit term; `ce` for none. `bce`, the sigmoid KD, is for images with several labels, and no other is.
        temperature: T of the logit term.
        dkd_alpha, dkd_beta: weights of DKD's two parts; the reference's beta depends on the pair of networks.
        warmup_epochs: the logit term's weight rises linearly to its full value in this many epochs (20 in the
            reference's DKD), 0 for none.
        feature: the feature term. `mse` and `cosine` learn a linear projector where the widths differ; `crd` learns
            an embedding for the student's features and one for each target's.
        feature_source: what `crd` embeds: `components`, the teacher's and CLIP's own features, mixed behind learned
            embeddings as in the paper; `fused`, the cache's fused features, mixed behind fixed projections; `auto`, the
            components if the cache has them. The other terms compare with the fused features.
        crd_negatives: per sample, from other classes; at most as many as the dataset has.
        crd_dim: width of the embeddings.
        label_smoothing: ε of the CE term: the labelled class has probability 1 − ε + ε/C and each other ε/C.
        class_weights: of the CE term: `none`, `balanced` (N / (C · n_c), for n_c labelled images of the class), or a
            weight per class: a list in class order or a mapping of names, as such or in a file.
    """

    added: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "class_weights"})

    ce_weight: NotNegative = 1.0
    kind: Literal["ce", "kd", "dkd", "standardised_kd", "standardised_dkd", "bce"] = "kd"
    distill_weight: NotNegative = 3.0
    temperature: Positive = 3.0
    dkd_alpha: NotNegative = 1.0
    dkd_beta: NotNegative = 8.0
    warmup_epochs: CountOrZero = 0
    feature: Literal["none", "mse", "cosine", "rkd", "pkt", "crd"] = "none"
    feature_weight: NotNegative = 0.8
    feature_source: Literal["auto", "fused", "components"] = "auto"
    rkd_distance_weight: NotNegative = 25.0
    rkd_angle_weight: NotNegative = 50.0
    crd_negatives: Count = 16_384
    crd_dim: Width = 128
    crd_temperature: Positive = 0.07
    crd_momentum: BelowOne = 0.5
    label_smoothing: BelowOne = 0.0
    class_weights: ClassWeights = "none"

    @model_validator(mode="after")
    def _something_to_minimise(self) -> LossRecipe:
        if self.ce_weight == 0.0 and not self.needs_targets:
            raise ValueError("a weight above 0 for at least one of CE, logit term and feature term")
        return self

    @model_validator(mode="after")
    def _smoothing_and_class_weights_are_for_ce(self) -> LossRecipe:
        used = [name for name in CE_SETTINGS if getattr(self, name) not in (0.0, "none")]
        if used and self.ce_weight == 0.0:
            raise ValueError(f"a ce_weight above 0 for {' and '.join(used)}: no other term uses the labels so")
        return self

    @model_validator(mode="after")
    def _several_labels_have_no_class(self) -> LossRecipe:
        if self.kind != "bce":
            return self
        if self.needs_features and self.feature == "crd":
            raise ValueError("another feature than crd with bce: its negatives are of other classes")
        if used := [name for name in CE_SETTINGS if getattr(self, name) not in (0.0, "none")]:
            raise ValueError(f"no {' and '.join(used)} with bce: it is for images with one label")
        return self

    @model_validator(mode="after")
    def _components_are_for_crd(self) -> LossRecipe:
        if self.feature_source == "components" and self.feature not in {"none", "crd"}:
            raise ValueError(f"feature_source fused or auto, because {self.feature} compares with the fused features")
        return self

    def on_labels(self) -> LossRecipe:
        """The loss of the same run on labels alone."""
        if self.multi_label:
            return LossRecipe(kind="bce", distill_weight=0.0)
        return LossRecipe(kind="ce", **{name: getattr(self, name) for name in CE_SETTINGS})

    @property
    def multi_label(self) -> bool:
        """Whether the loss is for images with any number of labels."""
        return self.kind == "bce"

    @property
    def needs_logits(self) -> bool:
        """Whether the loss uses the targets' logits."""
        return self.kind != "ce" and self.distill_weight > 0.0

    @property
    def needs_features(self) -> bool:
        """Whether the loss uses the targets' features, fused or as components."""
        return self.feature != "none" and self.feature_weight > 0.0

    @property
    def needs_components(self) -> bool:
        """Whether the loss requires the teacher's and CLIP's own features."""
        return self.uses_components and self.feature_source == "components"

    @property
    def uses_components(self) -> bool:
        """Whether the loss uses the teacher's and CLIP's own features if the cache has them."""
        return self.needs_features and self.feature == "crd" and self.feature_source != "fused"

    @property
    def needs_targets(self) -> bool:
        """Whether the run needs a cache."""
        return self.needs_logits or self.needs_features


def needs_targets(loss: Any) -> bool:
    """Whether a loss, given as a model or plain data, uses targets; True for one that is not valid."""
    try:
        return LossRecipe.model_validate({} if loss is None else loss).needs_targets
    except (ValidationError, RecipeError):
        return True


def named_loss(name: str) -> dict[str, Any]:
    """The settings of `--loss NAME`, as plain data.

    Raises:
        RecipeError: no such loss.
    """
    if name not in LOSSES:
        raise RecipeError(
            "no such loss",
            where=f"--loss {name}",
            expected=f"one of {', '.join(LOSSES)}",
            next_step="choose any other combination with --set loss.kind=…, --set loss.feature=…",
        )
    return dict(LOSSES[name])
