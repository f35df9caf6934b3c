"""Find the tensors of a checkpoint that are a network's weights.

People nest weights (`state_dict`, `model`, `{"state": {"net": …}}`) and wrappers rename them (`module.`, `_orig_mod.`,
`model.`). No list of names is complete, so the network decides: every part of the checkpoint and every prefix is tried,
and the one whose names and shapes all fit is taken. If several different ones fit, an average of weights (EMA) wins
over the raw weights; anything else is refused, and `weights_key` chooses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from cache_tools.errors import WeightsError
from train.weights.text import several

Tensors = dict[str, torch.Tensor]

_MAX_DEPTH, _MAX_ENTRIES = 6, 64  # of nested parts; deeper ones are no weights
_NO_WEIGHTS = ("optim", "sched", "lr_", "scaler", "loops", "rng")  # beginnings of keys that hold none
# Wrappers of torch that insert a part into the names below them, anywhere.
_INSERTED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
_PARALLEL = "module"  # DataParallel: first, or in the middle if only a part of the network was wrapped
# Tensors that are no weights, by the last part of their names: counters of profilers, of batch norms and of averages,
# and constants that older versions of timm stored.
_PROFILERS = {"total_ops", "total_params", "total_macs"}
_COUNTERS = {"num_batches_tracked", "n_averaged", "steps"}
_NO_PARAMETERS = _PROFILERS | _COUNTERS | {"relative_position_index", "attn_mask"}
_AVERAGED = re.compile(r"swa|shadow|averaged?|avg|(model|net|network|weights?|state)?ema(model|net|weights?|state)?")


@dataclass(frozen=True)
class Candidate:
    """Tensors of a checkpoint that may be the weights of a network.

    Attributes:
        name: dotted: where they are in the checkpoint, and the prefix that was removed; empty for the whole file.
        tensors: under the names of the network, as far as they are known there.
        misfits: names of the network that are missing or have another shape.
        surplus: names that the network does not know.
        ignored: names of counters and constants that were left out.
        outside: names beside the prefix.
    """

    name: str
    tensors: Tensors
    misfits: tuple[str, ...]
    surplus: tuple[str, ...]
    ignored: tuple[str, ...]
    outside: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.misfits and not self.surplus

    @property
    def shown(self) -> str:
        return f"'{self.name}'" if self.name else "the top level"


class Choice(NamedTuple):
    """The chosen weights, what a user should know about the choice, and where the raw ones of an average are."""

    candidate: Candidate
    notes: tuple[str, ...]
    raw: str | None = None


def choose(
    checkpoint: Any,
    network: nn.Module,
    *,
    where: object,
    key: str | None = None,
    key_name: str = "weights_key",
    may_differ: Collection[str] = (),
    ignored: Callable[[str], bool] = lambda name: False,
) -> Choice:
    """The weights of a network in a checkpoint.

    Args:
        checkpoint: nested mappings with tensors.
        where: file and architecture, for messages.
        key: dotted place in the checkpoint, if the user chose one.
        key_name: the setting that holds it, for messages.
        may_differ: names of the network that may be missing or have another first dimension.
        ignored: names that are left out although the network lacks them.

    Raises:
        WeightsError: there are no tensors, none that fit, or different ones that all fit.
    """
    found = candidates(checkpoint, network, ignored)
    if not found:
        raise WeightsError(
            "no state dict in the weights file", where=where, expected="names and tensors", found=_describe(checkpoint)
        )
    if key is not None:
        found = _at(key, found, where, key_name)
    fitting = [candidate for candidate in found if candidate.fits]
    if not fitting and may_differ:
        fitting = [each for each in found if not each.surplus and set(each.misfits) <= set(may_differ)]
    if not fitting:
        return Choice(min(found, key=_distance), ())
    distinct = _distinct(fitting)
    empty = [each for each in distinct if _is_empty_average(each.name, checkpoint)]
    if 0 < len(empty) < len(distinct):
        distinct = [each for each in distinct if each not in empty]
        unused = f"leaves the average at {empty[0].shown} alone, which has averaged nothing (n_averaged: 0)"
    else:
        unused = None
    chosen, note, other = distinct[0], None, None
    if len(distinct) > 1:
        averages = [each for each in distinct if is_average(each.name, checkpoint)]
        raw = [each for each in distinct if each not in averages]
        if len(averages) != 1 or len(raw) != 1:
            raise WeightsError(
                "the checkpoint holds several different weights that all fit the architecture",
                where=where,
                found=" and ".join(each.shown for each in distinct),
                next_step=f"choose one with {key_name}, such as {key_name}={distinct[0].name or '…'}",
            )
        chosen, other = averages[0], raw[0].name
        note = f"takes the averaged weights (EMA) at {chosen.shown}; {key_name}={other} takes the raw ones"
    notes = [note, unused, *_remarks(chosen), _unread_average(chosen, found, checkpoint)]
    return Choice(chosen, tuple(note for note in notes if note), other)


def candidates(
    checkpoint: Any, network: nn.Module, ignored: Callable[[str], bool] = lambda name: False
) -> list[Candidate]:
    """Every part of a checkpoint under every prefix that the network's names suggest; one per state dict at least."""
    wanted = network.state_dict()
    found: list[Candidate] = []
    for path, tensors in _state_dicts(checkpoint, ()):
        for spelling in _spellings(tensors):
            fitting: list[str] = []
            here: list[Candidate] = []
            for prefix in sorted(_prefixes(spelling, wanted), key=len, reverse=True):
                here.append(_candidate(path, prefix, spelling, fitting, network, wanted, ignored))
                if here[-1].fits:
                    fitting.append(prefix)
            near = [each for each in here if _distance(each)[0] <= len(wanted) // 2] or [min(here, key=_distance)]
            # Weights that fit by themselves are other candidates, not something that was left out.
            found += [replace(each, outside=_not_below(fitting, each.outside)) for each in reversed(near)]
            if fitting:
                break
    related = [each for each in found if len(each.misfits) < len(wanted)]
    return related or found


def is_average(name: str, checkpoint: Any = None) -> bool:
    """Whether a place in a checkpoint is that of averaged weights (EMA, SWA), by the words in its name."""
    if _is_swapped(checkpoint):
        return name.split(".")[0] == "state_dict"
    if _is_empty_average(name, checkpoint):
        return False
    return any(_AVERAGED.fullmatch(word) for word in re.split(r"[._\-\s]+", name.lower()))


def _is_empty_average(name: str, checkpoint: Any) -> bool:
    """Whether torch's AveragedModel at this place has averaged nothing yet: it holds the first, untrained weights."""
    part: Any = checkpoint
    counts = [_mapping(part).get("n_averaged")]
    for word in name.split(".") if name else ():
        part = _mapping(part).get(word)
        counts.append(_mapping(part).get("n_averaged"))
    return any(isinstance(count, torch.Tensor) and count.numel() == 1 and count.item() == 0 for count in counts)


def _is_swapped(checkpoint: Any) -> bool:
    """Whether `state_dict` is the average: mmengine and Lightning's WeightAveraging swap the two when they save."""
    top = _mapping(checkpoint)
    return "steps" in _mapping(top.get("ema_state_dict")) or {"averaging_state", "current_model_state"} <= top.keys()


def misfit(tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether a tensor of the network is missing or has another shape. Batch counters, which old files lack, may be."""
    if name not in tensors:
        return not name.endswith("num_batches_tracked")
    return tensors[name].shape != wanted[name].shape


def _distance(candidate: Candidate) -> tuple[int, int, int]:
    """How far a candidate is from the network: names that are missing, names that do not fit, unknown names.

    Of parts that are as far the largest is the closest: single tensors beside the weights are none.
    """
    missing = sum(name not in candidate.tensors for name in candidate.misfits)
    rest = -len(candidate.tensors) if missing else len(candidate.surplus)
    return missing, len(candidate.misfits), rest


def _state_dicts(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """Every mapping of names to tensors, with its place; values that are no tensors are left out."""
    if len(path) > _MAX_DEPTH:
        return
    if isinstance(node, list | tuple):
        node = {str(number): part for number, part in enumerate(node[:_MAX_ENTRIES])}
        named: dict[str, Any] = {key: value for key, value in node.items() if isinstance(value, Mapping)}
    else:
        named = {key: value for key, value in _mapping(node).items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, torch.Tensor)}
    if tensors:
        yield path, tensors
    for key, value in named.items():
        if isinstance(value, Mapping | list | tuple) and not key.lower().startswith(_NO_WEIGHTS):
            yield from _state_dicts(value, (*path, key))


def _spellings(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors under their own names, without what wrappers insert in the middle, and without the first part."""
    plain = _renamed(tensors, lambda parts: [part for part in parts if part not in _INSERTED]) or tensors
    yield plain
    inside = _renamed(plain, lambda parts: [part for part in parts if part != _PARALLEL])
    if inside is not None and inside.keys() != plain.keys():
        yield inside
    # `backbone.` before the trunk and `head.` before the classifier
    if all("." in key for key in plain) and len({key.partition(".")[0] for key in plain}) > 1:
        shorter = _renamed(plain, lambda parts: parts[1:])
        if shorter is not None:
            yield shorter


def _renamed(tensors: Tensors, change: Callable[[list[str]], list[str]]) -> Tensors | None:
    """The tensors under changed names; None if two names become the same."""
    renamed = {".".join(change(key.split("."))): value for key, value in tensors.items()}
    return renamed if len(renamed) == len(tensors) else None


def _prefixes(tensors: Tensors, wanted: Mapping[str, torch.Tensor]) -> set[str]:
    """Prefixes before which names of the network appear; the empty one is always tried."""
    names = [name for name in wanted if not name.endswith("num_batches_tracked")] or list(wanted)
    anchors = {names[0], names[len(names) // 2], names[-1], "_conv_stem.weight"} if names else set()
    return {""} | {key[: -len(anchor)] for key in tensors for anchor in anchors if key.endswith(f".{anchor}")}


def _candidate(
    path: tuple[str, ...],
    prefix: str,
    spelling: Tensors,
    fitting: Sequence[str],
    network: nn.Module,
    wanted: Mapping[str, torch.Tensor],
    ignored: Callable[[str], bool],
) -> Candidate:
    """The candidate of a prefix. Names below longer prefixes that fit by themselves are not its surplus."""
    inside = {key.removeprefix(prefix): value for key, value in spelling.items() if key.startswith(prefix)}
    below = tuple(each.removeprefix(prefix) for each in fitting if each != prefix and each.startswith(prefix))
    own = {key: value for key, value in inside.items() if not (below and key.startswith(below))}
    if "_conv_stem.weight" in own and "conv_stem.weight" in wanted:
        own = _efficientnet_pytorch_to_timm(own, network)
    unknown = [key for key in own if key not in wanted]
    left_out = [key for key in unknown if key.rpartition(".")[2] in _NO_PARAMETERS]
    surplus = [key for key in unknown if key not in set(left_out) and not ignored(key)]
    outside = [key for key in spelling if not key.startswith(prefix)]
    return Candidate(
        name=".".join([*path, *([prefix.rstrip(".")] if prefix else [])]),
        tensors={key: value for key, value in own.items() if key in wanted or key in surplus},
        misfits=tuple(name for name in wanted if misfit(own, wanted, name)),
        surplus=tuple(surplus),
        ignored=tuple(left_out),
        outside=tuple(key for key in outside if key.rpartition(".")[2] not in _NO_PARAMETERS),
    )


def _not_below(prefixes: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if not (prefixes and key.startswith(tuple(prefixes))))


def _distinct(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with different tensors; of equal ones the first."""
    distinct: list[Candidate] = []
    for candidate in fitting:
        if not any(_equal(candidate.tensors, other.tensors) for other in distinct):
            distinct.append(candidate)
    return distinct


def _equal(a: Tensors, b: Tensors) -> bool:
    """Whether two state dicts hold the same values; batch counters do not matter to a frozen network."""
    names = {name for name in {*a, *b} if not name.endswith("num_batches_tracked")}
    if not names <= a.keys() or not names <= b.keys():
        return False
    return all(_equal_tensors(a[name], b[name]) for name in names)


def _equal_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    if a.is_quantized or a.element_size() == 1:  # torch compares the numbers of few of these types
        return not a.is_quantized and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    return torch.equal(a, b)


def _at(key: str, found: Sequence[Candidate], where: object, key_name: str) -> list[Candidate]:
    """The candidates at or below the place that the user chose."""
    here = [candidate for candidate in found if candidate.name == key]
    here = here or [candidate for candidate in found if candidate.name.startswith(f"{key}.")]
    if not here:
        raise WeightsError(
            f"no weights at {key_name}={key}",
            where=where,
            expected=f"one of {', '.join(dict.fromkeys(candidate.shown for candidate in found))}",
        )
    return here


def _remarks(chosen: Candidate) -> list[str]:
    """What was left out of the file beside and within the chosen weights."""
    remarks = []
    if counters := [key for key in chosen.ignored if key.rpartition(".")[2] in _PROFILERS]:
        remarks.append(f"leaves out a profiler's counters: {several(counters)}")
    if chosen.outside:
        remarks.append(f"leaves out what is beside {chosen.shown}: {several(chosen.outside)}")
    return remarks


def _unread_average(chosen: Candidate, found: Sequence[Candidate], checkpoint: Any) -> str | None:
    """A remark if the file holds averaged weights that do not fit, while others do."""
    averages = [each for each in found if is_average(each.name, checkpoint)]
    unread = [] if any(each.fits for each in averages) else averages
    return f"cannot use the averaged weights at {unread[0].shown}: they do not fit" if unread else None


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _describe(checkpoint: Any) -> str:
    if isinstance(checkpoint, Mapping):
        keys = [key if isinstance(key, str) else type(key).__name__ for key in list(checkpoint)[:5]]
        return f"keys {', '.join(keys)}"
    return type(checkpoint).__name__


def _efficientnet_pytorch_to_timm(tensors: Tensors, network: nn.Module) -> Tensors:
    """Rename tensors of the EfficientNet-PyTorch package, which numbers its blocks, for timm, which has stages.

    These weights come from TensorFlow: they need the padding and batch-norm constant of timm's `tf_efficientnet_*`.
    """
    stages: Any = network.blocks
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"} | squeeze
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | squeeze
    inverted |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}

    def translate(key: str) -> str:
        part, _, rest = key.partition(".")
        if part != "_blocks":
            return f"{outside.get(part, part)}.{rest}"
        number, _, rest = rest.partition(".")
        layer, _, rest = rest.partition(".")
        names = inverted if f"_blocks.{number}._expand_conv.weight" in tensors else separable
        known = number.isdigit() and int(number) < len(blocks) and layer in names
        return f"{blocks[int(number)]}.{names[layer]}.{rest}" if known else key

    return {translate(key): value for key, value in tensors.items()}
