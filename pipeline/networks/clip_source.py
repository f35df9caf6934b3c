"""Find the open_clip config and weights that a recipe names, check them before any download, and load them.

open_clip only warns if weights are missing or do not belong to the config. Here that is an error.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from safetensors.torch import save_file

from cache_tools.config.text import MAX_RECIPE_BYTES, parse_json, read_text
from cache_tools.errors import WeightsError
from pipeline.networks.references import FOLDER_PREFIX, HUB_PREFIX, is_file_reference, resolve_path
from train.weights.files import MAX_LAYERS
from train.weights.names import load_local_first
from train.weights.reading import MAX_PACKING, SLACK_BYTES, check_archive
from train.weights.text import first_line, nearest

_NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}  # numbers that OpenAI stores beside the weights
_MAX_NUMBER = 1 << 21  # of words, pixels or channels
_TOWERS = ("vision_cfg", "text_cfg", "preprocess_cfg")
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pth")  # the files that open_clip looks for in a folder


class ClipSource(NamedTuple):
    """An open_clip model, its weights and its config.

    Attributes:
        model_name: for open_clip, package folders resolved.
        pretrained: tag or file; None if the model name has a prefix.
        architecture: the name in the manifest, without the path of a local folder.
        config: open_clip's model config.
    """

    model_name: str
    pretrained: str | None
    architecture: str
    config: dict[str, Any]


def resolve_source(name: str, weights: str | None) -> ClipSource:
    """Find what a recipe's `clip.name` and `clip.weights` refer to.

    Raises:
        WeightsError: unknown name (the message has the most similar one), unknown tag (the message lists the known
            ones), no weights, a missing file or folder, or OpenAI's weights for a config without QuickGELU (the message
            has the right name).
    """
    prefix = next((p for p in (HUB_PREFIX, FOLDER_PREFIX) if name.startswith(p)), None)
    if prefix is None:
        return _builtin(name.replace("/", "-"), weights)
    if weights is not None:
        raise WeightsError(
            f"a CLIP named by {prefix} already contains its weights",
            where=name,
            expected="no clip.weights",
            found=repr(weights),
            next_step="leave clip.weights out",
        )
    return _folder(name.removeprefix(FOLDER_PREFIX)) if prefix == FOLDER_PREFIX else _hub(name)


def load_network(source: ClipSource) -> Any:
    """The open_clip model on the CPU in float32, with every weight loaded.

    Raises:
        WeightsError: weights cannot be downloaded or read, or do not fit the config.
    """
    where = source.architecture if source.pretrained is None else f"{source.architecture}, {source.pretrained}"
    for file in _files(source):
        if zipfile.is_zipfile(file):
            check_archive(file)
    try:
        with _quiet(), _plain_weights(source.pretrained) as pretrained:

            def load() -> Any:
                return open_clip.create_model(source.model_name, pretrained, require_pretrained=True, weights_only=True)

            return load_local_first(load) if needs_hub(source) else load()
    except Exception as error:  # open_clip, huggingface_hub, safetensors and torch have no common error
        expected, found = _mismatch(error)
        if found is not None:
            raise WeightsError(
                "CLIP weights do not fit the config", where=where, expected=expected, found=found
            ) from error
        raise WeightsError(
            "cannot load CLIP", where=where, found=first_line(error), next_step=_advice(source)
        ) from error


def _files(source: ClipSource) -> list[Path]:
    """The local files that open_clip reads the weights from."""
    if source.model_name.startswith(FOLDER_PREFIX):
        return _weights_in(Path(source.model_name.removeprefix(FOLDER_PREFIX)))
    return [path] if source.pretrained is not None and (path := Path(source.pretrained)).is_file() else []


def _weights_in(folder: Path) -> list[Path]:
    return [path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern) if path.is_file()]


def needs_hub(source: ClipSource) -> bool:
    """Whether weights, text tower or tokenizer may come from the hub."""
    text = source.config.get("text_cfg", {})
    if source.model_name.startswith(FOLDER_PREFIX):
        return "hf_model_name" in text
    local = source.pretrained is not None and Path(source.pretrained).is_file()
    return not local or any(key.startswith("hf_") for key in text) or "siglip" in source.model_name.lower()


def names_in_folder(source: ClipSource) -> list[str]:
    """The networks on the hub that the config in a folder names: text towers and tokenizers."""
    if not source.model_name.startswith(FOLDER_PREFIX):
        return []
    text = source.config.get("text_cfg", {})
    return list(dict.fromkeys(str(text[key]) for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)))


def _builtin(name: str, weights: str | None) -> ClipSource:
    config = open_clip.get_model_config(name)
    if config is None:
        raise WeightsError(
            "no such CLIP",
            where=name,
            expected=f"an open_clip model name, {HUB_PREFIX}ORG/MODEL or {FOLDER_PREFIX}FOLDER",
            next_step=nearest(name, open_clip.list_models()),
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    choices = f"a checkpoint file or one of {', '.join(tags)}" if tags else "a checkpoint file"
    if weights is None:
        raise WeightsError("CLIP has no weights", where=name, expected=choices, next_step="set clip.weights")
    tag = open_clip.get_pretrained_cfg(name, weights)
    if tag:
        # The reverse mismatch has no better config: the only tag of roberta-ViT-B-32 just lacks the entry.
        if tag.get("quick_gelu") and not config.get("quick_gelu"):
            raise _quick_gelu_error(name, weights)
        return ClipSource(name, weights, name, config)
    path = resolve_path(weights)
    if not path.is_file():
        problem = "no such CLIP weights" if is_file_reference(weights) else "no such pretrained tag"
        raise WeightsError(problem, where=f"{name}, {weights}", expected=choices, next_step=nearest(weights, tags))
    if not config.get("quick_gelu") and _is_openai(path):
        raise _quick_gelu_error(name, str(path))
    return ClipSource(name, str(path), name, config)


def _folder(reference: str) -> ClipSource:
    folder = resolve_path(reference)
    config_file = folder / "open_clip_config.json"
    if not config_file.is_file():
        raise WeightsError("no CLIP in that folder", where=folder, expected="open_clip_config.json and its weights")
    config = _config(config_file)
    found = _weights_in(folder)
    if not found:
        raise WeightsError("no CLIP weights in that folder", where=folder, expected="open_clip_model.safetensors")
    if not config.get("quick_gelu") and any(_is_openai(path) for path in found):
        raise _quick_gelu_error(str(config_file), "OpenAI's", is_folder=True)
    _require_size(config, found, config_file)
    return ClipSource(f"{FOLDER_PREFIX}{folder}", None, f"{FOLDER_PREFIX}{folder.resolve().name}", config)


def _config(file: Path) -> dict[str, Any]:
    """The part `model_cfg` of an `open_clip_config.json`."""
    what, expected = "cannot read the CLIP config", "JSON with 'model_cfg'"
    text = read_text(file, what, limit=MAX_RECIPE_BYTES, error=WeightsError, expected=expected)
    content = parse_json(text, what, where=file, error=WeightsError)
    config = content.get("model_cfg") if isinstance(content, dict) else None
    if not isinstance(config, dict) or not all(isinstance(config.get(part, {}), dict) for part in _TOWERS):
        raise WeightsError(what, where=file, expected=expected, found="none, or one of another kind")
    for part in (config, *(config.get(name, {}) for name in _TOWERS)):
        for key, value in part.items():
            most = MAX_LAYERS if key == "layers" else _MAX_NUMBER
            values = value if isinstance(value, list) else [value]
            if len(values) > MAX_LAYERS or any(isinstance(one, int | float) and abs(one) > most for one in values):
                raise WeightsError(what, where=file, expected=f"{key} of at most {most:,}", found=str(value)[:80])
    return config


def _require_size(config: dict[str, Any], files: Sequence[Path], where: object) -> None:
    """Check that a CLIP is not far larger than its weights, before it takes memory."""
    parts = [config.get(name, {}) for name in ("vision_cfg", "text_cfg")]
    numbers = {key: value for part in parts for key, value in part.items() if isinstance(value, int)}
    needed = 4 * int(numbers.get("vocab_size", 0)) * int(numbers.get("width", 0))
    for part in parts:
        width, layers = part.get("width", 0), part.get("layers", 0)
        if isinstance(width, int) and isinstance(layers, int):
            needed += 4 * 12 * layers * width**2  # of a transformer
    stored = sum(file.stat().st_size for file in files)
    if needed > MAX_PACKING * stored + SLACK_BYTES:
        expected, found = f"at most {MAX_PACKING} times the {stored:,} bytes of its weights", f"{needed:,} bytes"
        raise WeightsError("CLIP is far larger than its weights", where=where, expected=expected, found=found)


def _hub(name: str) -> ClipSource:
    try:
        with _quiet():
            config = load_local_first(lambda: open_clip.get_model_config(name))
    except Exception as error:  # huggingface_hub: no network, no such repository, not logged in
        raise WeightsError(
            "cannot download CLIP from the hub",
            where=name,
            found=first_line(error),
            next_step="run once with network access, or use local-dir: with the downloaded folder",
        ) from error
    return ClipSource(name, None, name, config)


def _quick_gelu_error(name: str, weights: str, *, is_folder: bool = False) -> WeightsError:
    """OpenAI's and some other weights were trained with QuickGELU. With GELU they run, but are slightly wrong."""
    right = f"{name}-quickgelu"
    known = right in open_clip.list_models()
    return WeightsError(
        "these CLIP weights need a config with QuickGELU",
        where=f"{name}, {weights}",
        expected=f"clip.name {right}" if known else "a config with quick_gelu true",
        found=f"{'a config' if is_folder else name} without it",
        next_step=f"use {right}" if known else "if these are OpenAI's weights, set quick_gelu in the model's config",
    )


def _is_openai(path: Path) -> bool:
    """Whether weights are OpenAI's: a TorchScript archive, or `openai` in the name of file or folder."""
    return _is_torchscript(path) or any("openai" in part.lower() for part in (path.name, path.parent.name))


@contextmanager
def _plain_weights(pretrained: str | None) -> Iterator[str | None]:
    """Convert OpenAI's TorchScript weights to a file that open_clip reads without unpickling.

    `torch.jit.load` creates no Python objects. `torch.load` would, from a file that only looks like TorchScript.
    """
    if pretrained is None or not _is_torchscript(pretrained):
        yield pretrained
        return
    weights = torch.jit.load(pretrained, map_location="cpu").state_dict()
    with tempfile.TemporaryDirectory(prefix="clip-") as folder:
        plain = Path(folder) / "weights.safetensors"
        kept = {name: tensor.detach() for name, tensor in weights.items() if name not in _NOT_WEIGHTS}
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in kept.items()}, plain)
        yield str(plain)


def _is_torchscript(reference: str | Path) -> bool:
    path = Path(reference)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except (zipfile.BadZipFile, ValueError, OSError):  # whoever reads the weights says what is wrong with them
        return False


def _mismatch(error: Exception) -> tuple[str | None, str | None]:
    """(expected, found) of the first tensor that does not fit; (None, None) for an error about something else."""
    message = str(error)
    if isinstance(error, AssertionError):  # open_clip asserts the width of the position embedding
        return None, message.rstrip("!") or None
    shape = re.search(
        r"size mismatch for (\S+): copying a param with shape (.+?) from checkpoint, .+ is (.+?)\.\s", message + "\n"
    )
    if shape:
        return f"'{shape[1]}' of shape {shape[3]}", f"shape {shape[2]}"
    missing = re.search(r'Missing key\(s\) in state_dict: "([^"]+)"', message)
    if missing:
        return f"'{missing[1]}'", "no such tensor"
    extra = re.search(r'Unexpected key\(s\) in state_dict: "([^"]+)"', message)
    return (None, f"a tensor '{extra[1]}' that the config lacks") if extra else (None, None)


def _advice(source: ClipSource) -> str:
    if source.model_name.startswith(FOLDER_PREFIX) or (source.pretrained and Path(source.pretrained).is_file()):
        return "check the file, and that it was written for this config"
    return "run once with network access, or give a checkpoint file or a local-dir: folder"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide open_clip's log messages and warnings: this module raises errors for the ones that matter.

    open_clip logs through the root logger. The first message there would install a handler for the whole process.
    """
    root, placeholder = logging.getLogger(), logging.NullHandler()

    def not_open_clip(record: logging.LogRecord) -> bool:
        return "open_clip" not in record.pathname

    root.addHandler(placeholder)
    root.addFilter(not_open_clip)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(not_open_clip)
        root.removeHandler(placeholder)
