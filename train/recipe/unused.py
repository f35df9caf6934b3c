"""Settings of a recipe that have no effect on a run. Importable without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cache_tools.errors import RecipeError

_DKD = ("dkd_alpha", "dkd_beta")
_RKD = ("rkd_distance_weight", "rkd_angle_weight")
_CRD = ("crd_negatives", "crd_dim", "crd_temperature", "crd_momentum")
_OF_LOGITS = ("temperature", "warmup_epochs")
_FUSION_OF_LOGITS = ("teacher_weight", "clip_scale", "prompt_ensemble", "prompts")


def unused_settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key → what it needs, for the settings of a train recipe that have no effect.

    Args:
        recipe: as plain data, with all fields.
    """
    return {key: needs for keys, needs in _unused(recipe) for key in keys}


def refuse_unused(recipe: Mapping[str, Any], defaults: Mapping[str, Any], given: Mapping[str, str]) -> None:
    """Raise RecipeError for the first setting that a user has made and that has no effect; a default is no setting.

    Args:
        recipe, defaults: the recipe and one with default values, as plain data with all fields.
        given: dotted key → what the user typed to set it.
    """
    unused = unused_settings(recipe)
    for key, typed in given.items():
        if key in unused and value_at(recipe, key) != value_at(defaults, key):
            raise RecipeError(
                "this setting has no effect",
                where=typed if "=" in typed else f"{typed} {value_at(recipe, key)}",
                expected=unused[key],
                next_step="leave it out, or change what it needs",
            )


def value_at(recipe: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    node: Any = recipe
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def dotted_keys(settings: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """The dotted keys of settings, those in a mapping one by one."""
    for key, value in settings:
        if isinstance(value, Mapping):
            yield from dotted_keys((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key


def _unused(recipe: Mapping[str, Any]) -> Iterator[tuple[Iterable[str], str]]:
    loss, schedule = recipe["loss"], recipe["schedule"]
    has_logits = loss["kind"] != "ce" and loss["distill_weight"] > 0.0
    has_features = loss["feature"] != "none" and loss["feature_weight"] > 0.0
    if loss["kind"] == "ce":
        yield ["loss.distill_weight"], "a logit term: loss.kind other than ce"
    if not has_logits:
        yield _below("loss", _OF_LOGITS), "a logit term: loss.kind other than ce, with loss.distill_weight above 0"
    if not has_logits or not str(loss["kind"]).endswith("dkd"):
        yield _below("loss", _DKD), "loss.kind=dkd or standardised_dkd"
    if loss["feature"] == "none":
        yield ["loss.feature_weight"], "a feature term: loss.feature other than none"
    if not has_features:
        yield ["loss.feature_source"], "a feature term: loss.feature other than none"
    if not has_features or loss["feature"] != "rkd":
        yield _below("loss", _RKD), "loss.feature=rkd"
    if not has_features or loss["feature"] != "crd":
        yield _below("loss", _CRD), "loss.feature=crd"
    if schedule["name"] != "multistep":
        yield ["schedule.milestones", "schedule.gamma"], "schedule.name=multistep"
    if schedule["name"] != "cosine":
        yield ["schedule.min_learning_rate"], "schedule.name=cosine"
    if recipe["optimiser"]["weight_decay"] == 0.0:
        yield ["optimiser.weight_decay_exclusions"], "an optimiser.weight_decay above 0"
    if recipe["label_fraction"] == 1.0:
        yield ["label_seed"], "a label_fraction below 1"
    uses_logits = has_logits or (has_features and recipe["label_fraction"] < 1.0)
    if not uses_logits and not has_features:
        yield [f"fusion.{key}" for key in recipe["fusion"]], "a loss with targets"
        yield ["compare_with_labels"], "a loss with targets: this run is one on labels alone"
        yield ["shuffle_window"], "a loss with targets: a window is a number of blocks of cached targets"
    elif not uses_logits:
        yield _below("fusion", _FUSION_OF_LOGITS), "a loss with a logit term"
    elif not has_features:
        yield ["fusion.feature_weight"], "a loss with a feature term"


def _below(part: str, keys: Iterable[str]) -> list[str]:
    return [f"{part}.{key}" for key in keys]
