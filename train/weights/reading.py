"""Read a checkpoint of any kind, recognised by its content, without running code that is in it."""

from __future__ import annotations

import argparse
import datetime
import io
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors
from torch.serialization import safe_globals

from cache_tools.errors import WeightsError
from train.weights.outline import Outline, outline
from train.weights.text import first_line, several

# Types that training scripts store beside the weights and that run no code: options, times, paths, and numpy numbers
# and arrays such as a decayed learning rate. numpy 2 moved the functions that create its own, Python 3.13 its paths.
_NUMBER, _ARRAY = np.float64(0.0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_PATHS = ("pathlib", "pathlib._local")
_SAFE: list[Any] = [
    argparse.Namespace,
    datetime.datetime,
    datetime.date,
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")),
    *((_NUMBER, f"{module}.scalar") for module in _NUMPY),
    *((_ARRAY, f"{module}._reconstruct") for module in _NUMPY),
    *((pathlib.PurePosixPath, f"{module}.{name}") for module in _PATHS for name in ("PosixPath", "PurePosixPath")),
    *(
        (pathlib.PureWindowsPath, f"{module}.{name}")
        for module in _PATHS
        for name in ("WindowsPath", "PureWindowsPath")
    ),
]
MAX_PARTS, MAX_PARTS_DEPTH = 2_000_000, 100
MAX_PACKING, SLACK_BYTES = 8, 64 << 20  # how much larger the content of an archive may be
MAX_HEADER_BYTES = 32 << 20  # of a safetensors file, whose reader takes many times that

# What people mistake for weights, by the first bytes of the file.
_OTHER_KINDS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the weights themselves", "fetch them with `git lfs pull`"),
    b"<": ("a web page or XML", "download the file itself"),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "convert the weights to PyTorch"),
    b"\x1f\x8b": ("a gzip file", "unpack it"),
}


class WeightsFile(NamedTuple):
    """A checkpoint as it was stored, and its safetensors metadata (empty for other formats)."""

    path: Path
    checkpoint: Any
    metadata: dict[str, str]


def read_weights(path: Path, content: IO[bytes] | None = None) -> WeightsFile:
    """Read a safetensors file or a file of torch.save, new or old, whatever its name. No code in the file is run.

    Its parts form a tree of at most MAX_PARTS parts. A tensor without plain numbers in memory (sparse, nested, of
    another class, …) becomes an empty one of the same shape on the device `meta`; `train.weights.load` refuses it where
    the network needs it.

    Args:
        content: the content of a file inside an archive; `path` then only names it in messages.

    Raises:
        WeightsError: the file is missing, unreadable, of another kind, or holds objects that only code could read.
    """
    if content is None and not path.is_file():
        raise WeightsError("no such weights", where=path, expected="a file of torch.save or safetensors")
    data = content.read() if content is not None else None
    try:
        if _is_safetensors(path, data):
            return _read_safetensors(path, data)
        head = _head(path, data, 64)
        _refuse_other_kinds(path, head.lstrip() if head.lstrip()[:1] == b"<" else head, data)
        checkpoint = _read_torch(path, data)
        _check_parts(checkpoint, path)
        return WeightsFile(path, checkpoint, {})
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can make a reader raise anything
        found = "an empty file" if not _head(path, data, 1) else first_line(error)
        raise WeightsError(
            "cannot read the weights",
            where=path,
            expected="a safetensors file, or a state dict saved by torch.save",
            found=found,
        ) from error


def _head(path: Path, data: bytes | None, length: int) -> bytes:
    if data is not None:
        return data[:length]
    with path.open("rb") as file:
        return file.read(length)


def _is_safetensors(path: Path, data: bytes | None) -> bool:
    head = _head(path, data, 9)
    size = path.stat().st_size if data is None else len(data)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size


def _read_safetensors(path: Path, data: bytes | None) -> WeightsFile:
    if data is not None:
        return WeightsFile(path, load_safetensors(data), {})
    length = int.from_bytes(_head(path, data, 8), "little")
    if length > MAX_HEADER_BYTES:
        expected = f"a header of at most {MAX_HEADER_BYTES:,} bytes"
        raise WeightsError("cannot read the weights", where=path, expected=expected, found=f"{length:,}")
    with safe_open(path, framework="pt", device="cpu") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # not a dict
        return WeightsFile(path, tensors, stored.metadata() or {})


def unusable(tensor: torch.Tensor) -> str | None:
    """What a tensor is, if it has no plain numbers in memory that could be copied; None for an ordinary tensor."""
    if tensor.is_meta:
        return str(tensor.__dict__.get("stored_as", "a tensor without values (on the device meta)"))
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a tensor of the class {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"a tensor with the layout {str(tensor.layout).removeprefix('torch.')}"
    return None


def _check_parts(checkpoint: Any, path: Path) -> None:
    """Check that a checkpoint is a tree of a bounded size, with shared parts counted each time, and replace tensors.

    Raises:
        WeightsError: a part contains itself, or there are too many parts.
    """
    sizes: dict[int, int] = {}  # of finished parts; those that are open have 0

    def size(part: Any, depth: int) -> int:
        if not isinstance(part, Mapping | list | tuple):
            return 1
        known = sizes.get(id(part))
        if known == 0 or depth > MAX_PARTS_DEPTH:
            found = "a part that contains itself" if known == 0 else f"more than {MAX_PARTS_DEPTH} levels"
            raise _too_nested(path, found)
        if known is None:
            sizes[id(part)] = 0
            total = 1
            for key, value in list(part.items()) if isinstance(part, Mapping) else enumerate(part):
                total += size(value, depth + 1)
                if total > MAX_PARTS:
                    raise _too_nested(path, f"more than {MAX_PARTS:,} parts")
                if isinstance(value, torch.Tensor) and isinstance(part, MutableMapping | list):
                    _replace_unusable(part, key, value)
            sizes[id(part)] = total
        return sizes[id(part)]

    size(checkpoint, 0)


def _replace_unusable(part: Any, key: Any, tensor: torch.Tensor) -> None:
    if (kind := unusable(tensor)) is None:
        return
    try:
        shape = tuple(tensor.shape)
    except RuntimeError:  # a nested tensor has none
        shape = ()
    part[key] = torch.empty(shape, device="meta")
    part[key].__dict__["stored_as"] = kind


def _too_nested(path: Path, found: str) -> WeightsError:
    expected = f"names and tensors in at most {MAX_PARTS_DEPTH} levels, {MAX_PARTS:,} parts in all"
    return WeightsError(
        "cannot read the weights: the file is nested as no checkpoint is", where=path, expected=expected, found=found
    )


def check_archive(path: Path, data: bytes | None = None) -> None:
    """Raise WeightsError for an archive that unpacks to far more than its size: torch.save does not compress."""
    packed = path.stat().st_size if data is None else len(data)
    try:
        with zipfile.ZipFile(path if data is None else io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        expected = "a whole file of torch.save"
        raise WeightsError("cannot read the weights", where=path, expected=expected, found=first_line(error)) from error
    if unpacked > MAX_PACKING * packed + SLACK_BYTES:
        raise WeightsError(
            "cannot read the weights: the archive unpacks to far more than its size",
            where=path,
            expected=f"at most {MAX_PACKING} times its {packed:,} bytes",
            found=f"{unpacked:,} bytes",
        )


def _read_torch(path: Path, data: bytes | None) -> Any:
    if _head(path, data, 4) == b"PK\x03\x04":
        check_archive(path, data)
    with _allowed():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the pickle protocol
                with path.open("rb") if data is None else io.BytesIO(data) as file:  # torch believes some endings
                    return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = outline(path.read_bytes() if data is None else data, _known())
            if found is not None and (found.classes or found.weights):
                raise _foreign(path, found) from error
            raise


@contextmanager
def _allowed() -> Iterator[None]:
    with safe_globals(_SAFE):
        yield


def _known() -> set[str]:
    """Full names that torch.load accepts within `_allowed`."""
    from torch import _weights_only_unpickler as unpickler

    return {*unpickler._get_allowed_globals(), *unpickler._get_user_allowed_globals()}


def _foreign(path: Path, found: Outline) -> WeightsError:
    """The error for objects that only code in other packages could read."""
    weights = found.weights or "c"
    save = f'c = torch.load("{path.name}", weights_only=False); torch.save({weights}, "weights.pth")'
    if not found.classes:
        return WeightsError(
            "cannot read the weights: torch reads this pickle only by running it",
            where=path,
            expected="names and tensors saved by torch.save",
            next_step=f"if you trust the file, save its weights alone: {save}",
        )
    what = "the file is a whole pickled network" if weights == "c.state_dict()" else "the file holds an object"
    if found.is_module and weights != "c.state_dict()":
        what = "the file holds a whole pickled network"
    return WeightsError(
        f"cannot read the weights: {what} of the class {found.classes[0]}, and reading it would run code",
        where=path,
        expected="a state dict saved by torch.save",
        found=several(found.classes) if len(found.classes) > 1 else None,
        next_step=f"if you trust the file, save its weights alone where that class is installed: {save}",
    )


def _refuse_other_kinds(path: Path, head: bytes, data: bytes | None) -> None:
    """Raise WeightsError for a file that is recognised as something else than a checkpoint."""
    kind, step = next((value for start, value in _OTHER_KINDS.items() if head.startswith(start)), (None, None))
    if head.startswith(b"PK\x03\x04"):
        kind, step = _other_zip(path, data)
    elif head.startswith(b"\x80") and b"torch" not in head and not _is_legacy(head):
        kind, step = "a file of pickle.dump", "save the weights with torch.save"
    if kind is not None:
        raise WeightsError(
            f"cannot read the weights: this is {kind}",
            where=path,
            expected="a safetensors file, or a state dict saved by torch.save",
            next_step=step,
        )


def _is_legacy(head: bytes) -> bool:
    """Whether a pickle begins with the number that torch.save wrote before it wrote zip files."""
    return torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in head


def _other_zip(path: Path, data: bytes | None) -> tuple[str | None, str | None]:
    try:
        with zipfile.ZipFile(path if data is None else io.BytesIO(data)) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
    except zipfile.BadZipFile:
        return "an incomplete or damaged file of torch.save", "copy or download it again"
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        save = f'torch.save(torch.jit.load("{path.name}").state_dict(), "weights.pth")'
        return "a TorchScript program", f"save its weights alone: {save}"
    if "data.pkl" in names:
        return None, None
    if names and all(name.endswith(".npy") for name in names):
        return "a file of numpy.savez", "convert the weights to PyTorch"
    return "a zip archive without a checkpoint of torch.save", "unpack it and name the file inside"
