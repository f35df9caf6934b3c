"""Weights at a path: a file, a run of train-student, a folder of a hub, or the archive of a paper.

mdistiller publishes its CIFAR-100 teachers as `cifar_teachers.tar`, with `ARCHITECTURE_vanilla/ckpt_epoch_240.pth` for
each. The archive, the folder that it unpacks to, and the folder of one architecture are all accepted.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from cache_tools.config import Frozen, validate
from cache_tools.config.fields import MAX_WIDTH, Count, CountOrZero, Number, Positive
from cache_tools.config.text import parse_json, read_text
from cache_tools.errors import RecipeError, WeightsError
from cache_tools.views.ops import MAX_SIDE
from train.weights.names import SUFFIXES
from train.weights.reading import MAX_PACKING, SLACK_BYTES, WeightsFile, read_weights
from train.weights.text import first_line

LAST = "last.safetensors"  # in the folder of a run
CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20  # the index of a large network names all its tensors
_IN_HUB_FOLDER = ("model.safetensors", "pytorch_model.bin")  # or in parts that an index of the same name lists
MAX_LAYERS, _LAYERS = 1024, ("depth", "layers", "blocks", "repeats", "stages")
Pixels = Annotated[Count, Field(le=MAX_SIDE)]
_CHECKPOINT_IN_TREE = re.compile(r"(?:^|/)(?P<architecture>[^/]+)_vanilla/ckpt_epoch_(?P<epoch>\d+)\.pth$")


class _Inputs(Frozen):
    """What timm's config says about the inputs of a network; all of it may be missing."""

    model_config = ConfigDict(extra="ignore")

    input_size: tuple[Count, Pixels, Pixels] | None = None
    mean: tuple[Number, Number, Number] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    interpolation: str | None = None
    num_classes: CountOrZero | None = None


class HubConfig(_Inputs):
    """The keys of timm's `config.json` that are read, within bounds that no network exceeds."""

    architecture: str
    pretrained_cfg: _Inputs | None = None
    model_args: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _arguments_are_those_of_a_network(self) -> HubConfig:
        for key, value in (self.model_args or {}).items():
            most = MAX_LAYERS if any(word in key for word in _LAYERS) else MAX_WIDTH
            values = value if isinstance(value, list) else [value]
            if len(values) > MAX_LAYERS or any(isinstance(one, int | float) and abs(one) > most for one in values):
                raise ValueError(f"model_args.{key} of at most {most:,}")
        return self


def open_weights(path: Path, architecture: str) -> WeightsFile:
    """Read the weights of an architecture from a path.

    Args:
        path: a file that `read_weights` reads, a run folder of train-student (its last epoch is read), a folder as the
            hubs have them (`model.safetensors`, `pytorch_model.bin`), or an archive or folder of mdistiller's teachers.
        architecture: name of a network, case-insensitive.

    Raises:
        WeightsError: the path is missing or damaged, or has no weights of this architecture.
    """
    if path.is_file():
        return _from_archive(path, architecture) if _is_archive(path) else read_weights(path)
    if not path.is_dir() or (path / LAST).exists():
        return read_weights(path / LAST if path.is_dir() else path)
    if is_hub_folder(path):
        return read_hub_folder(path)
    names = (file.relative_to(path.parent).as_posix() for file in path.rglob("ckpt_epoch_*.pth"))
    return read_weights(path.parent / _chosen(names, architecture, path))


def is_hub_folder(path: Path) -> bool:
    """Whether a folder has weights under the names that hubs give them."""
    return any((path / name).is_file() or (path / f"{name}.index.json").is_file() for name in _IN_HUB_FOLDER)


def read_hub_folder(path: Path) -> WeightsFile:
    """The weights of a folder as the hubs have them, in one file or in parts.

    Raises:
        WeightsError: there are none, or a part is missing.
    """
    for name in _IN_HUB_FOLDER:
        if (path / name).is_file():
            return read_weights(path / name)
        if (index := path / f"{name}.index.json").is_file():
            tensors: dict[str, Any] = {}
            for part in _parts(index):
                checkpoint = read_weights(path / Path(part).name).checkpoint
                if not isinstance(checkpoint, dict):
                    raise WeightsError("a part of the weights is no state dict", where=path / part)
                tensors |= checkpoint
            return WeightsFile(index, tensors, {})
    raise WeightsError("no weights in this folder", where=path, expected=" or ".join(_IN_HUB_FOLDER))


def _parts(index: Path) -> list[str]:
    """The names of the files in the index of weights that are stored in parts."""
    parts = _json(index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) and all(map(_is_text, parts.values())) else set()
    if not names:
        raise WeightsError("cannot read the index of the weights", where=index, expected="weight_map: tensor → file")
    return sorted(names)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder that timm or export-student wrote.

    Raises:
        WeightsError: there is none, it is damaged, or it is another library's.
    """
    file = path / CONFIG
    if not file.is_file():
        raise WeightsError(
            "no model in this folder",
            where=path,
            expected=f"{CONFIG} and {_IN_HUB_FOLDER[0]}, as timm and export-student write them",
            found="no such folder" if not path.is_dir() else f"no {CONFIG}",
        )
    config = _json(file)
    if isinstance(config.get("architecture"), str):
        try:
            validate(HubConfig, config, where=str(file))
        except RecipeError as error:
            found, expected = error.found, error.expected
            raise WeightsError(f"{CONFIG}: {error.what}", where=file, expected=expected, found=found) from error
        return config
    classes = config.get("architectures")
    if classes or "model_type" in config:
        name = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
        raise WeightsError(
            "this is a model of the transformers library, which has other tensors than timm's model of the same name",
            where=file,
            expected="timm's `architecture`",
            found=name,
            next_step="take the same network in timm's layout, which most models of the hub also have (timm/NAME)",
        )
    raise WeightsError("the config names no architecture", where=file, expected="timm's `architecture`")


def _json(file: Path) -> dict[str, Any]:
    what = "cannot read the folder"
    text = read_text(file, what, limit=_MAX_CONFIG_BYTES, error=WeightsError, expected="JSON in UTF-8")
    content = parse_json(text, what, where=file, error=WeightsError)
    if not isinstance(content, dict):
        raise WeightsError("cannot read the folder", where=file, expected="a JSON object", found=type(content).__name__)
    return content


def _is_archive(path: Path) -> bool:
    """Whether a file is a tar archive, plain or compressed, by its content.

    torch.save writes zip files, whatever people call them: `.tar` and `.pth.tar` are common names of checkpoints.
    """
    with path.open("rb") as file:
        head = file.read(512)
    return head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def _from_archive(path: Path, architecture: str) -> WeightsFile:
    """Read one file of an archive without unpacking the rest."""
    try:
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            name = _chosen(members, architecture, path)
            packed, size = path.stat().st_size, members[name].size
            if size > MAX_PACKING * packed + SLACK_BYTES:
                found, expected = f"{size:,} bytes for {name}", f"at most {MAX_PACKING} times its {packed:,} bytes"
                raise WeightsError(
                    "the archive unpacks to far more than its size", where=path, expected=expected, found=found
                )
            stream = archive.extractfile(members[name])
            assert stream is not None, "members are plain files"
            content = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise WeightsError(
            "cannot read the archive", where=path, expected="a tar file", found=first_line(error)
        ) from error
    return read_weights(path / name, io.BytesIO(content))


def _chosen(names: Iterable[str], architecture: str, where: Path) -> str:
    """The checkpoint of an architecture's last epoch among the file names of a tree, or its only checkpoint."""
    names = list(names)
    found = [
        (match["architecture"], int(match["epoch"]), name)
        for name in names
        if (match := _CHECKPOINT_IN_TREE.search(name))
    ]
    fitting = [(epoch, name) for known, epoch, name in found if known.lower() == architecture.lower()]
    if fitting:
        return max(fitting)[1]
    checkpoints = [name for name in names if Path(name).suffix in SUFFIXES]
    if not found and len(checkpoints) == 1:
        return checkpoints[0]
    known = ", ".join(sorted({known for known, _, _ in found}))
    raise WeightsError(
        f"no checkpoint of {architecture}",
        where=where,
        expected=f"{architecture}_vanilla/ckpt_epoch_240.pth as in cifar_teachers.tar, or a run of train-student",
        found=f"checkpoints of {known}" if known else "none",
        next_step="name the file itself, or one of these teachers",
    )
