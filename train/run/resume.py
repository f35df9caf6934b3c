"""Check a stored training state against the run that resumes from it, before any of it is used.

The file may be damaged, of another run, or made by somebody else: each tensor has the shape and type of the learner's
own, each counter is a number in its range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from train.evaluate.multilabel import Figures
from train.loop import Learner
from train.optim import trained_parameters
from train.runs.folder import MAX_EPOCHS

_MAX_COUNT = 1 << 53


def state_bytes(learner: Learner) -> int:
    """More bytes than a training state of this learner can have."""
    tensors = [*learner.student.state_dict().values(), *learner.objective.state_dict().values()]
    return 8 * sum(tensor.nbytes for tensor in tensors) + (1 << 30)


def check_history(
    history: Any, best_epoch: Any, *, epochs: int, headline: str, figures: Sequence[tuple[str, type[Figures]]]
) -> None:
    """Raise ValueError unless these are the rows of a run's finished epochs.

    Args:
        epochs: of the whole run.
        headline: the column that the best epoch is chosen by.
        figures: the beginning of the columns of an evaluation, and their kind.
    """
    _require(isinstance(history, list) and len(history) <= epochs <= MAX_EPOCHS, "more epochs than the run has")
    for epoch, row in enumerate(history):
        where = f"epoch {epoch + 1}"
        _require(isinstance(row, dict) and all(isinstance(name, str) for name in row), f"{where} is no row of figures")
        _require(all(value is None or _is_number(value) for value in row.values()), f"{where} has no numbers")
        _require({"epoch", "train_s", headline} <= row.keys(), f"{where} lacks figures")
        _require(type(row["epoch"]) is int and row["epoch"] == epoch, f"{where} is not in its place")
        _require((row.get("updates") or 0) >= 0, f"{where} has a negative counter")
        _require(row["train_s"] is not None and 0.0 <= row["train_s"] < 1e12, f"{where} has no time")
        for prefix, kind in figures:
            _check_figures(row, prefix, kind, where)
    if best_epoch is not None:
        known = type(best_epoch) is int and 0 <= best_epoch < len(history)
        _require(known and history[best_epoch][headline] is not None, "a best epoch that is none of them")


def check_learner(state: Any, learner: Learner) -> None:
    """Raise ValueError unless a state has what this learner loads, with its shapes and types."""
    _require(isinstance(state, dict), "no state of a learner")
    own = learner.state_dict()
    _require(own.keys() - {"gradients"} <= state.keys(), "a part of the state is missing")
    for part in ("student", "objective", "average"):
        if own[part] is not None:
            _check_tensors(state[part], own[part], part)
    _require(type(state["updates"]) is int and 0 <= state["updates"] < _MAX_COUNT, "the number of updates")
    _check_optimiser(state["optimiser"], own["optimiser"], learner)
    _check_plain(state["scaler"], own["scaler"], "the scale of float16")
    gradients = state.get("gradients")
    if gradients is not None:
        parameters = trained_parameters(learner.optimiser)
        _require(isinstance(gradients, list) and len(gradients) == len(parameters), "gradients of other weights")
        for gradient, parameter in zip(gradients, parameters, strict=True):
            _require(gradient is None or _is_like(gradient, parameter), "gradients of other shapes")


def check_inside(state: Mapping[str, Any], learner: Learner, batches: int, device: torch.device) -> None:
    """Raise ValueError unless this is a state inside an epoch of so many batches."""
    check_learner(state["learner"], learner)
    _require(type(state["batches"]) is int and 0 < state["batches"] <= batches, "the number of batches")
    _require(_is_number(state["train_s"]) and 0.0 <= state["train_s"] < 1e12, "the time of training")
    means = state["means"]
    _require(isinstance(means, dict) and {"count", "names", "sums"} <= means.keys(), "the sums of the epoch")
    names, sums = means["names"], means["sums"]
    _require(type(means["count"]) is int and 0 < means["count"] < _MAX_COUNT, "the number of samples")
    _require(names == _names_of_means(learner), "the names of the figures")
    plain = isinstance(sums, Tensor) and _is_plain(sums) and sums.is_floating_point()
    _require(plain and sums.shape == (len(names),), "the sums of the figures")
    _check_random(state["random"], device)
    of_ranks = state.get("random_of_ranks", [])
    _require(isinstance(of_ranks, list), "the random numbers of ranks")
    for states in of_ranks:
        _check_random(states, device)


def _names_of_means(learner: Learner) -> list[str]:
    """The figures whose means over an epoch a learner computes (`Objective`)."""
    loss = learner.recipe.loss
    terms = {"loss_ce": loss.ce_weight > 0.0, "loss_logit": loss.needs_logits, "loss_feature": loss.needs_features}
    return ["loss", *(name for name, has in terms.items() if has), *([] if loss.multi_label else ["train_top1"])]


def _check_figures(row: Mapping[str, Any], prefix: str, kind: type[Figures], where: str) -> None:
    figures = {name: row.get(f"{prefix}_{name}") for name in kind.model_fields}
    if figures["n"] is None:
        return
    try:
        kind.model_validate(figures)
    except ValidationError as error:
        raise ValueError(f"{where} has other figures than those of a test") from error


def _check_tensors(given: Any, own: Mapping[str, Any], part: str) -> None:
    _require(isinstance(given, dict) and given.keys() == own.keys(), f"other names of tensors: {part}")
    for name, tensor in own.items():
        if isinstance(tensor, Tensor):
            _require(_is_like(given[name], tensor), f"{part}: '{name}' has another shape or type")
        else:
            _require(type(given[name]) is type(tensor), f"{part}: '{name}' has another type")


def _check_optimiser(given: Any, own: Mapping[str, Any], learner: Learner) -> None:
    what = "the state of the optimiser"
    _require(isinstance(given, dict) and {"state", "param_groups"} <= given.keys(), what)
    groups = given["param_groups"]
    _require(isinstance(groups, list) and len(groups) == len(own["param_groups"]), what)
    for group, known in zip(groups, own["param_groups"], strict=True):
        _require(isinstance(group, dict) and group.get("params") == known["params"], what)
        settings = {name: value for name, value in known.items() if name != "params"}
        _check_plain({name: group.get(name, value) for name, value in settings.items()}, settings, what)
        _require(all(_is_setting(value) for name, value in group.items() if name not in known), what)
    parameters = trained_parameters(learner.optimiser)
    _require(isinstance(given["state"], dict), what)
    for number, values in given["state"].items():
        _require(type(number) is int and 0 <= number < len(parameters) and isinstance(values, dict), what)
        for name, value in values.items():
            one = name == "step" and isinstance(value, Tensor) and _is_plain(value) and value.shape == ()
            fits = value is None or one or _is_like(value, parameters[number])
            _require(isinstance(name, str) and fits, f"{what}: '{name}' has another shape or type")
    kinds = {frozenset(values) for values in given["state"].values()}
    known_names = frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})
    _require(len(kinds) <= 1 and kinds <= {*known_names, frozenset()}, what)


def _check_plain(given: Any, own: Mapping[str, Any], what: str) -> None:
    """Check settings: numbers where there are numbers, the same kind of value everywhere else."""
    _require(isinstance(given, dict) and given.keys() == own.keys(), what)
    for name, value in own.items():
        if isinstance(value, tuple):
            numbers = isinstance(given[name], tuple | list) and len(given[name]) == len(value)
            _require(numbers and all(map(_is_finite, given[name])), f"{what}: {name}")
        elif _is_number(value):
            _require(_is_finite(given[name]), f"{what}: {name}")
        else:
            _require(_is_setting(given[name]), f"{what}: {name}")


def _check_random(states: Any, device: torch.device) -> None:
    what = "the state of the random numbers"
    _require(isinstance(states, list) and 1 <= len(states) <= 2, what)
    _require(all(isinstance(state, Tensor) and _is_plain(state) and state.ndim == 1 for state in states), what)
    generators = [torch.Generator()] if device.type == "cpu" else [torch.Generator(), torch.Generator(device)]
    for state, generator in zip(states, generators, strict=False):
        try:
            generator.set_state(state)  # on a generator of its own, to see whether torch takes it
        except (RuntimeError, TypeError) as error:
            raise ValueError(what) from error


def _is_like(value: Any, own: Tensor) -> bool:
    """Whether a stored tensor can take the place of this one."""
    return isinstance(value, Tensor) and _is_plain(value) and value.shape == own.shape and value.dtype == own.dtype


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has all its numbers, one after the other: it is not sparse, nested, quantised or on `meta`."""
    return (
        type(value) in {Tensor, torch.nn.Parameter, torch.nn.Buffer}
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and value.untyped_storage().nbytes() >= value.nbytes
    )


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_setting(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or _is_finite(value)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)
