"""Stored students (safetensors with a card as metadata) and the training state that a run resumes from.

All writes are atomic.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cache_tools.config import Extensible
from cache_tools.errors import CacheError, WeightsError
from cache_tools.files import too_large
from cache_tools.format.recipe import Finite, Preprocessing
from cache_tools.images.image_set import Interpolation
from train import own
from train.evaluate.canvas import evaluation_preprocessing
from train.students import create_student
from train.weights import files
from train.weights.names import hub_names, only_named
from train.weights.run_files import file_place, parse_json, write_file

LAST, BEST, EMA = files.LAST, "best.safetensors", "ema.safetensors"

MAX_SIDE, MAX_CLASSES = 4096, 1_000_000  # of images in pixels, as in `DatasetRecipe`; of a student
_MAX_HEADER_BYTES = 64 << 20  # of a safetensors file: names and shapes, class names
_SLACK_BYTES = 64 << 20
MAX_STATE_BYTES = 1 << 40

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Mean = Annotated[float, Field(ge=-1000.0, le=1000.0)]
Std = Annotated[float, Field(gt=0.0, le=1000.0)]


class StudentCard(Extensible, Finite):
    """The description of a stored student: how to build it, prepare its inputs and read its outputs.

    Attributes:
        architecture: its name for `create_student`.
        class_names: in the order of its logits.
        image_size: (height, width) of the views it was trained on.
        test_size: (height, width) of the test images it is given; None for `image_size`.
        crop: the part of a resized test image that the centre crop of this size keeps; None where an earlier version
            did not record it.
        interpolation: of the resize of test images.
        mean, std: per RGB channel on [0, 1].
        dataset: name of the dataset it was trained on.
        recipe_digest: of the run that trained it.
        epoch: finished epochs.
    """

    added = frozenset({"test_size", "interpolation"})

    architecture: str = Field(max_length=1000)
    num_classes: PositiveInt = Field(le=MAX_CLASSES)
    class_names: tuple[str, ...]
    image_size: tuple[Side, Side]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Std, Std, Std]
    dataset: str
    recipe_digest: str = ""
    epoch: int = Field(0, ge=0, le=1 << 53)
    crop: float | None = Field(None, gt=0.0, le=1.0)
    test_size: tuple[Side, Side] | None = None
    interpolation: Interpolation = "bicubic"

    @model_validator(mode="after")
    def _names_all_classes(self) -> StudentCard:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} names of {self.num_classes} classes")
        return self

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the test images it is given."""
        return self.test_size or self.image_size

    def preprocessing(self, canvas_size: tuple[int, int]) -> Preprocessing:
        """The preprocessing of test images on a canvas of (height, width)."""
        normalisation = (self.mean, self.std)
        return evaluation_preprocessing(self.input_size, canvas_size, normalisation, self.crop, self.interpolation)

    def to_metadata(self) -> dict[str, str]:
        """The card as safetensors metadata: strings as they are, everything else as JSON."""
        values = self.model_dump(mode="json")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: Path) -> StudentCard:
        """The card in a file's metadata.

        Raises:
            WeightsError: a file that `train-student` did not write.
        """
        texts = {"architecture", "dataset", "recipe_digest", "interpolation"}
        try:
            known = {key: text for key, text in metadata.items() if key in cls.model_fields}
            return cls(**{key: text if key in texts else parse_json(text) for key, text in known.items()})
        except (ValidationError, ValueError, TypeError) as error:
            missing = sorted({key for key, field in cls.model_fields.items() if field.is_required()} - metadata.keys())
            raise WeightsError(
                "not a student checkpoint",
                where=where,
                expected="the metadata that train-student writes (architecture, class_names, mean, std, …)",
                found=f"no {', '.join(missing)}" if missing else _first_problem(error),
            ) from error


def save_student(path: Path, model: nn.Module, card: StudentCard) -> None:
    """Write weights and buffers as safetensors, with the card as metadata."""
    save_weights(path, model.state_dict(), card)


def save_weights(path: Path, state: dict[str, torch.Tensor], card: StudentCard) -> None:
    """`save_student` from a state dict."""
    # Cloned, because safetensors refuses channels-last layouts and tensors that share memory.
    plain = torch.contiguous_format
    tensors = {key: value.detach().cpu().clone(memory_format=plain) for key, value in state.items()}
    write_file(path, _with_sorted_metadata(save(tensors, card.to_metadata())))


def load_student(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, StudentCard]:
    """Load the student of a checkpoint, or of a run folder's last epoch, in eval mode, and its card.

    Raises:
        WeightsError: a missing or damaged file, no card, or weights that do not fit its architecture.
        RecipeError: a network of someone's own whose code the user has not agreed to import (`train.own`).
    """
    file = student_file(Path(path))
    with _open(file) as stored:
        header = _read_header(stored, file)
        card = StudentCard.from_metadata(_metadata(header, file), file)
        size = _check_size(stored, header, file)
        own.require_consent(card.architecture, file)
        model = create_stored(card, size, file)
        largest = 8 * sum(tensor.numel() for tensor in model.state_dict().values()) + _MAX_HEADER_BYTES
        if size > largest:
            raise too_large(file, largest, size)
        stored.seek(0)
        data = stored.read(size)
    try:
        state = load(data)
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(file, error) from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            "weights do not fit the architecture",
            where=file,
            expected=card.architecture,
            found=str(error).splitlines()[-1],
        ) from error
    return model.to(device).eval(), card


def create_stored(card: StudentCard, stored_bytes: int, where: object, num_classes: int | None = None) -> nn.Module:
    """Build the network of a card, unless it is far larger than its stored weights.

    Args:
        stored_bytes: size of the stored weights.
        num_classes: None for those of the card.

    Raises:
        WeightsError: the network is larger, or on a hub, and the user has not named it before.
        RecipeError: no such network.
    """
    budget = _Budget(4 * stored_bytes + _SLACK_BYTES)
    try:
        with budget, only_named(hub_names(card.architecture), where):
            return create_student(card.architecture, num_classes or card.num_classes)
    except (CacheError, MemoryError, RuntimeError) as error:
        if not budget.is_exceeded and isinstance(error, CacheError):
            raise
        raise WeightsError(
            "weights do not fit the architecture",
            where=where,
            expected=f"the weights of {card.architecture} with {num_classes or card.num_classes:,} classes",
            found=f"{stored_bytes:,} bytes",
        ) from error


def read_card(path: Path) -> StudentCard:
    """Read the card of a checkpoint without its weights.

    Raises:
        WeightsError: a missing or damaged file, or no card.
        FormatError: a link, pipe or device.
    """
    with _open(path) as file:
        return StudentCard.from_metadata(_metadata(_read_header(file, path), path), path)


def student_file(path: Path) -> Path:
    """The checkpoint file of a path: in a run folder, that of the last epoch."""
    return path / LAST if path.is_dir() else path


def check_student_file(path: Path) -> None:
    """Check the place and the size of a checkpoint, without reading its weights.

    Raises:
        WeightsError: a missing or damaged file, or no card.
        FormatError: a link, pipe or device.
    """
    with _open(path) as file:
        _check_size(file, _read_header(file, path), path)


def _open(path: Path) -> BinaryIO:
    folder, name = file_place(path)
    try:
        return folder.open_read(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError("no such checkpoint", where=path) from error


def _read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """The header of a safetensors file: name → type, shape and place of a tensor, and `__metadata__`."""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    try:
        header = parse_json(text) if len(text) == length else None
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(header, dict):
        raise _damaged(path, "no header")
    return header


def _check_size(file: BinaryIO, header: dict[str, Any], path: Path) -> int:
    """Check that a file ends where its last tensor does; its size."""
    start, size = file.tell(), file.seek(0, io.SEEK_END)
    ends = [_end(entry, path) for name, entry in header.items() if name != "__metadata__"]
    if size != start + max(ends, default=0):
        raise _damaged(path, f"{size:,} bytes of {start + max(ends, default=0):,}")
    return size


def _metadata(header: dict[str, Any], path: Path) -> dict[str, str]:
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "metadata that are not text")
    return metadata


def _end(entry: Any, path: Path) -> int:
    """The end of a tensor in its file, counted from the end of the header."""
    try:
        end = entry["data_offsets"][1]
    except (TypeError, LookupError) as error:
        raise _damaged(path, "a tensor without a place in the file") from error
    if not isinstance(end, int) or end < 0:
        raise _damaged(path, "a tensor without a place in the file")
    return end


def _damaged(path: Path, found: object) -> WeightsError:
    text = str(found).partition("\n")[0]
    return WeightsError("damaged checkpoint", where=path, expected="a safetensors file", found=text)


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_input=False, include_url=False)[0]
        return ": ".join([".".join(map(str, problem["loc"])), problem["msg"]]).removeprefix(": ")
    return str(error).partition("\n")[0]


class _Budget(TorchFunctionMode):
    """Stops the building of a network when its tensors take more bytes than they may, before they are filled."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._left, self.is_exceeded = limit_bytes, False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _FACTORIES and isinstance(result, Tensor):
            self._left -= result.numel() * result.element_size()
            if self._left < 0:
                self.is_exceeded = True
                raise MemoryError("the network is larger than its stored weights")
        return result


_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor, torch.arange}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state. It holds only tensors and plain values, so that loading it runs no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def load_state(path: Path, parts: Collection[str] = (), *, max_bytes: int = MAX_STATE_BYTES) -> dict[str, Any] | None:
    """Load a training state to the CPU; None without a file.

    Args:
        parts: keys that it must have.
        max_bytes: the file may not be larger.

    Raises:
        WeightsError: a damaged file.
        FormatError: a link, pipe or device, or a file that is too large.
    """
    folder, name = file_place(path)
    try:
        file = folder.open_read(name, max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with file:
        try:
            _check_archive(file)
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or (missing := set(parts) - set(state)):
                raise ValueError(f"no {', '.join(sorted(missing))}" if isinstance(state, dict) else "no names")
            return state
        except Exception as error:  # a damaged file can make a reader raise anything
            raise damaged_state(path, error) from error


def damaged_state(path: Path, found: object) -> WeightsError:
    """The error for a training state that cannot be resumed from."""
    return WeightsError(
        "damaged training state",
        where=path,
        found=(str(found) or type(found).__name__).partition("\n")[0],
        next_step="start this run again with --overwrite",
    )


def _check_archive(file: BinaryIO) -> None:
    """Raise ValueError unless this is an archive of torch.save whose parts are stored as they are, within the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise ValueError("not a file of torch.save") from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError("compressed parts")
    size = file.seek(0, io.SEEK_END)
    if sum(part.file_size for part in parts) > size:
        raise ValueError("parts that are larger than the file")
    file.seek(0)


def _with_sorted_metadata(file: bytes) -> bytes:
    """The same safetensors file with sorted metadata.

    safetensors writes metadata in random order; sorted, the same student is always the same file with the same digest.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return b"".join([len(text).to_bytes(8, "little"), text, file[8 + size :]])
