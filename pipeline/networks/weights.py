"""Read, check, load and fingerprint weights. No network keeps any random initial weight."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from cache_tools.errors import WeightsError
from cache_tools.format.recipe import Precision

LINE_LIMIT = 160
_WRAPPERS = ("state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")  # DataParallel, torch.compile
# Types that training scripts store beside the weights and that run no code: their options, and numpy numbers such as a
# decayed learning rate in the optimiser's state. numpy 2 moved the function that creates these numbers.
_NUMBER = np.float64(0.0).__reduce__()[0]
_SAFE: list[Any] = [
    argparse.Namespace,
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]
_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class WeightsFile(NamedTuple):
    """Tensors of a checkpoint by name, and its safetensors metadata (empty for other formats)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def read_weights(path: Path, content: IO[bytes] | None = None) -> WeightsFile:
    """Read `.safetensors` or a file of torch.save: a state dict, bare or under `model`, `state_dict` or `net`.

    The prefixes that DataParallel and torch.compile put before every key are removed. No code in the file is run.

    Args:
        content: the content of a torch.save file inside an archive; `path` then only names it in messages.

    Raises:
        WeightsError: the file is missing, unreadable, or has no state dict.
    """
    if content is None and not path.is_file():
        raise WeightsError("no such weights", where=path, expected="a .safetensors or .pth file")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as stored:
                metadata = stored.metadata() or {}
                checkpoint: Any = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # not a dict
        else:
            with torch.serialization.safe_globals(_SAFE):
                checkpoint = torch.load(content or path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make a reader raise anything
        raise WeightsError(
            "cannot read the weights",
            where=path,
            expected="a safetensors file, or a state dict saved by torch.save",
            found=first_line(error),
        ) from error
    return WeightsFile(path, _state_dict(checkpoint, path), metadata)


def load_into(network: nn.Module, tensors: Mapping[str, torch.Tensor], *, where: object, num_classes: int) -> None:
    """Copy every tensor into the network; names and shapes must be the same on both sides.

    Args:
        tensors: in the network's own layout, or in EfficientNet-PyTorch's for a timm EfficientNet.
        where: file or tag, for messages.
        num_classes: of the dataset, for the message about a checkpoint that differs in nothing else.

    Raises:
        WeightsError: another class count, or the first name or shape that does not fit.
    """
    wanted = network.state_dict()
    given = dict(tensors)
    if "_conv_stem.weight" in given and "conv_stem.weight" in wanted:
        given = _efficientnet_pytorch_to_timm(given, network)
    # Old files lack the batch counters. No frozen network reads them.
    given |= {key: wanted[key] for key in wanted if key.endswith("num_batches_tracked") and key not in given}
    wrong = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
    other_classes = {_other_class_count(key, wanted, given, num_classes) for key in wrong}
    if len(other_classes) == 1 and None not in other_classes:
        raise class_count_error(where, num_classes, int(other_classes.pop() or 0))
    if wrong:
        key = wrong[0]
        found = f"shape {list(given[key].shape)}" if key in given else _instead(given, wanted)
        raise WeightsError(
            "weights do not fit the architecture",
            where=where,
            expected=f"'{key}' of shape {list(wanted[key].shape)}",
            found=f"{found} ({len(wrong)} of {len(wanted)} tensors do not fit)",
        )
    extra = [key for key in given if key not in wanted]
    if extra:
        raise WeightsError(
            "weights have tensors that the architecture lacks",
            where=where,
            expected=f"{len(wanted)} tensors",
            found=f"{len(extra)} more, first '{extra[0]}' of shape {list(given[extra[0]].shape)}",
        )
    network.load_state_dict(given)


def class_count_error(where: object, num_classes: int, found: int) -> WeightsError:
    """The error for a network that was trained for another number of classes than the dataset has."""
    return WeightsError(
        "the teacher has another class count than the dataset",
        where=where,
        expected=f"{num_classes} classes",
        found=f"{found}",
        next_step="choose weights that were trained on the dataset's classes",
    )


def check_class_names(metadata: Mapping[str, str], class_names: tuple[str, ...], where: object) -> None:
    """Compare the class names in a checkpoint's metadata (a JSON list under `class_names`, if any) with the dataset's.

    Raises:
        WeightsError: the count, the names or their order differ.
    """
    if "class_names" not in metadata:
        return
    try:
        stored = tuple(str(name) for name in json.loads(metadata["class_names"]))
    except (ValueError, TypeError) as error:
        raise WeightsError(
            "cannot read class_names in the weights' metadata", where=where, expected="a JSON list"
        ) from error
    if len(stored) != len(class_names):
        raise class_count_error(where, len(class_names), len(stored))
    if stored == class_names:
        return
    position = next(i for i, (a, b) in enumerate(zip(class_names, stored, strict=True)) if a != b)
    same = sorted(stored) == sorted(class_names)
    raise WeightsError(
        f"the teacher has {'another class order' if same else 'other classes'} than the dataset",
        where=where,
        expected=f"class {position} to be '{class_names[position]}'",
        found=f"'{stored[position]}'",
        next_step="choose weights that were trained on the dataset's classes, in its order",
    )


def weights_digest(network: nn.Module) -> str:
    """64 hex digits of sha256 over names, dtypes, shapes and bytes of all tensors, whatever the file format."""
    digest = hashlib.sha256()
    state = network.state_dict()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network on the device in eval mode, without gradients; channels last on CUDA, for faster convolutions."""
    network = network.eval().requires_grad_(False).to(device)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def as_network_input(images_NCHW: torch.Tensor) -> torch.Tensor:
    """The images in the memory format that `freeze` chose for the weights."""
    return images_NCHW.contiguous(memory_format=torch.channels_last) if images_NCHW.is_cuda else images_NCHW


def mixed_precision(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast for a forward pass; `float32` switches it off even if the caller has it on."""
    enabled = precision != "float32"
    return torch.autocast(device.type, dtype=_DTYPES[precision] if enabled else None, enabled=enabled)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """A message's next step that suggests the most similar name; None if no name is similar."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"did you mean '{by_lower[close[0]]}'?" if close else None


def first_line(error: BaseException) -> str:
    """Type and first line of a library's exception, cut to fit into a one-line message."""
    lines = str(error).strip().splitlines() or [""]
    text = lines[0] if len(lines[0]) <= LINE_LIMIT else f"{lines[0][:LINE_LIMIT]}…"
    return f"{type(error).__name__}: {text}".removesuffix(": ").rstrip(".")


def _state_dict(checkpoint: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in _WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    if (
        not isinstance(checkpoint, Mapping)
        or not checkpoint
        or not all(isinstance(v, torch.Tensor) for v in checkpoint.values())
    ):
        found = (
            f"keys {', '.join(map(str, list(checkpoint)[:5]))}"
            if isinstance(checkpoint, Mapping)
            else type(checkpoint).__name__
        )
        raise WeightsError("no state dict in the weights file", where=path, expected="names and tensors", found=found)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in checkpoint):
            checkpoint = {key.removeprefix(prefix): value for key, value in checkpoint.items()}
    return dict(checkpoint)


def _instead(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Describe what a file has instead of a missing tensor."""
    other = next((key for key in given if key not in wanted), None)
    return "no such tensor" + (f", but '{other}' of shape {list(given[other].shape)}" if other else "")


def _other_class_count(
    key: str, wanted: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], num_classes: int
) -> int | None:
    """The class count of the file, if this tensor is a head that differs only in that."""
    if key not in given or wanted[key].ndim == 0 or given[key].ndim != wanted[key].ndim:
        return None
    same_rest = given[key].shape[1:] == wanted[key].shape[1:]
    return given[key].shape[0] if same_rest and wanted[key].shape[0] == num_classes else None


def _efficientnet_pytorch_to_timm(tensors: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
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
        known = int(number) < len(blocks) and layer in names
        return f"{blocks[int(number)]}.{names[layer]}.{rest}" if known else key

    return {translate(key): value for key, value in tensors.items()}
