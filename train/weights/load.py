"""Copy the weights of a checkpoint into a network. It keeps none of its own unless the caller says so."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from cache_tools.errors import WeightsError
from train.weights.choice import Candidate, choose
from train.weights.reading import MAX_PACKING, SLACK_BYTES, WeightsFile, unusable

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_QUANTISED = {"zero_point", "_packed_params", "qweight", "qzeros", "SCB", "absmax"}  # last parts of names
_OF_TRANSFORMERS = re.compile(r"(^|\.)(embedder\.|embeddings\.|encoder\.layers?\.|encoder\.stages\.)")
_OTHER_LIBRARY = (
    "these seem to be names of the transformers library; take the same network in timm's layout, which most models of "
    "the hub also have (timm/NAME)"
)


class Loaded(NamedTuple):
    """What a user should know about loaded weights.

    Attributes:
        key: dotted place in the checkpoint where they were; empty for the whole file.
        notes: one sentence each.
        raw: where the raw weights are, if `key` is the place of their average.
    """

    key: str
    notes: tuple[str, ...]
    raw: str | None


def load_into(
    network: nn.Module,
    checkpoint: Any,
    *,
    where: object,
    num_classes: int,
    key: str | None = None,
    key_name: str = "weights_key",
    new_head: bool = False,
    without_auxiliary: bool = False,
) -> Loaded:
    """Copy every tensor of a checkpoint into the network; names and shapes must be the same on both sides.

    Args:
        checkpoint: a state dict, or nested mappings with one (`train.weights.choice`), in the network's own layout or
            in EfficientNet-PyTorch's for a timm EfficientNet.
        where: file or tag, for messages.
        num_classes: of the dataset, for the message about a checkpoint that differs in nothing else.
        key, key_name: a place in the checkpoint that the user chose, and the setting that holds it.
        new_head: whether a classifier that is missing or for other classes keeps the network's own weights.
        without_auxiliary: leave out auxiliary classifiers (GoogLeNet, Inception), which only serve training.

    Raises:
        WeightsError: another class count, no weights that fit, or several different ones that do.
    """
    wanted = network.state_dict()
    head = head_names(network)
    candidate, notes, raw = choose(
        checkpoint,
        network,
        where=where,
        key=key,
        key_name=key_name,
        may_differ=head if new_head else (),
        ignored=lambda name: without_auxiliary and name.lower().startswith("aux"),
    )
    given = candidate.tensors
    found = f"{where}, {candidate.name}" if candidate.name else where
    misfits = list(candidate.misfits)
    if new_head and misfits and not candidate.surplus and set(misfits) <= head:
        given = {name: value for name, value in given.items() if name not in head}
        classes = _other_classes(misfits, candidate.tensors, wanted, num_classes)
        reason = f"the file's is for {classes} classes" if classes else "the file has none"
        notes = (*notes, f"starts with a new classifier of {num_classes} classes: {reason}")
    else:
        _check_values(candidate.tensors, wanted, found)
        _check_fit(candidate, wanted, head, found, num_classes)
    _check_values(given, wanted, found)
    _check_types(given, wanted, found)
    # Old files lack the batch counters. No frozen network reads them.
    network.load_state_dict({name: given.get(name, value) for name, value in wanted.items()})
    return Loaded(candidate.name, notes, raw)


def require_size(network: nn.Module, file: WeightsFile, where: object) -> None:
    """Check that a network is not far larger than the weights that it is to take, before it takes memory.

    Args:
        network: on the device `meta`.

    Raises:
        WeightsError: it has many times the bytes of the file.
    """
    needed = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    stored = _stored_bytes(file.checkpoint)
    if needed > MAX_PACKING * stored + SLACK_BYTES:
        raise WeightsError(
            "the network is far larger than its weights",
            where=where,
            expected=f"at most {MAX_PACKING} times the {stored:,} bytes of {file.path.name}",
            found=f"{needed:,} bytes",
        )


def _stored_bytes(part: Any) -> int:
    if isinstance(part, torch.Tensor):
        return 0 if part.is_meta else part.untyped_storage().nbytes()
    values = part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
    return sum(map(_stored_bytes, values))


def class_count_error(where: object, num_classes: int, found: int) -> WeightsError:
    """The error for a network that was trained for another number of classes than the dataset has."""
    return WeightsError(
        "the teacher has another class count than the dataset",
        where=where,
        expected=f"{num_classes} classes",
        found=f"{found}",
        next_step="choose weights that were trained on the dataset's classes. If these are among the teacher's, name "
        "all its outputs in order with teacher.classes, a file with one class name per line",
    )


def head_names(network: Any) -> set[str]:
    """Names of the tensors of a network's classifier (or classifiers)."""
    get = getattr(network, "get_classifier", None)
    found = get() if get is not None else None
    heads = [head for head in (found if isinstance(found, tuple | list) else (found,)) if head is not None]
    tensors = {id(tensor) for head in heads for tensor in head.state_dict(keep_vars=True).values()}
    return {key for key, value in network.state_dict(keep_vars=True).items() if id(value) in tensors}


def _check_fit(
    candidate: Candidate, wanted: Mapping[str, torch.Tensor], head: Collection[str], where: object, num_classes: int
) -> None:
    given, misfits = candidate.tensors, candidate.misfits
    if (classes := _other_classes(misfits, given, wanted, num_classes)) is not None:
        raise class_count_error(where, num_classes, classes)
    if misfits and set(misfits) <= set(head) and not any(name in given for name in misfits):
        raise WeightsError(
            "the weights have no classifier, so they can teach nothing yet",
            where=where,
            expected=f"'{misfits[0]}' of shape {list(wanted[misfits[0]].shape)}",
            found=_instead(candidate, wanted),
            next_step="fine-tune them first: train-student --loss ce --student NAME --student-weights FILE",
        )
    others = [*candidate.surplus, *candidate.outside]
    if misfits and any(name.rpartition(".")[2] in _QUANTISED for name in others):
        raise _quantised(where, misfits[0], "scales and packed integers")
    if misfits:
        key = misfits[0]
        found = f"shape {list(given[key].shape)}" if key in given else _instead(candidate, wanted)
        raise WeightsError(
            "weights do not fit the architecture",
            where=where,
            expected=f"'{key}' of shape {list(wanted[key].shape)}",
            found=f"{found} ({len(misfits)} of {len(wanted)} tensors do not fit)",
            next_step=_OTHER_LIBRARY if any(_OF_TRANSFORMERS.search(name) for name in others) else None,
        )
    if candidate.surplus:
        extra = candidate.surplus
        raise WeightsError(
            "weights have tensors that the architecture lacks",
            where=where,
            expected=f"{len(wanted)} tensors",
            found=f"{len(extra)} more, first '{extra[0]}' of shape {list(given[extra[0]].shape)}",
        )


def _check_values(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise WeightsError for tensors of the network that have no plain real numbers in the file."""
    for name in wanted:
        if name not in given:
            continue
        kind = unusable(given[name])
        if kind is None and (given[name].is_complex() or given[name].dtype == torch.bool):
            kind = f"numbers of the type {str(given[name].dtype).removeprefix('torch.')}"
        if kind is not None:
            raise WeightsError(
                "the weights are not stored as plain numbers",
                where=where,
                expected=f"'{name}' as a dense tensor of real numbers",
                found=kind,
                next_step="save them again as ordinary tensors, such as with tensor.to_dense()",
            )


def _check_types(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: object) -> None:
    """Raise WeightsError for quantised weights: their numbers mean nothing without their scales."""
    for name, value in wanted.items():
        if name not in given or not value.is_floating_point():
            continue
        if given[name].dtype not in _FLOATS or given[name].is_quantized:
            raise _quantised(where, name, str(given[name].dtype).removeprefix("torch."))


def _quantised(where: object, name: str, found: str) -> WeightsError:
    return WeightsError(
        "the weights are quantised",
        where=where,
        expected=f"'{name}' in floating point",
        found=found,
        next_step="give the weights from before the quantisation",
    )


def _instead(candidate: Candidate, wanted: Mapping[str, torch.Tensor]) -> str:
    """Describe what a file has instead of a missing tensor."""
    names = [*candidate.surplus, *candidate.outside]
    other = next((key for key in names if key not in wanted), None)
    if other is None:
        return "no such tensor"
    shape = f" of shape {list(candidate.tensors[other].shape)}" if other in candidate.tensors else ""
    return f"no such tensor, but '{other}'{shape}"


def _other_classes(
    misfits: Collection[str],
    given: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    num_classes: int,
) -> int | None:
    """The class count of the file, if the tensors that do not fit are heads that differ only in that."""
    counts = {_class_count(name, given, wanted, num_classes) for name in misfits}
    return counts.pop() if len(counts) == 1 else None


def _class_count(
    name: str, given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], num_classes: int
) -> int | None:
    if name not in given or wanted[name].ndim == 0 or given[name].ndim != wanted[name].ndim:
        return None
    same_rest = given[name].shape[1:] == wanted[name].shape[1:]
    return given[name].shape[0] if same_rest and wanted[name].shape[0] == num_classes else None
