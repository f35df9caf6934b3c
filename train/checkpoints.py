"""Stored students (safetensors with a card as metadata) and the training state that a run resumes from.

All writes are atomic.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from cache_tools.config import Frozen
from cache_tools.errors import WeightsError
from cache_tools.files import put_durably
from cache_tools.format.recipe import Preprocessing
from train import own
from train.evaluate.canvas import evaluation_preprocessing
from train.students import create_student
from train.weights import files

LAST, BEST, EMA = files.LAST, "best.safetensors", "ema.safetensors"


class StudentCard(Frozen):
    """The description of a stored student: how to build it, prepare its inputs and read its outputs.

    Attributes:
        architecture: its name for `create_student`.
        class_names: in the order of its logits.
        image_size: (height, width) of the views it was trained on, and of the images it is given.
        crop: the part of a resized test image that the centre crop of this size keeps; None where an earlier version
            did not record it.
        mean, std: per RGB channel on [0, 1].
        dataset: name of the dataset it was trained on.
        recipe_digest: of the run that trained it.
        epoch: finished epochs.
    """

    architecture: str
    num_classes: PositiveInt
    class_names: tuple[str, ...]
    image_size: tuple[PositiveInt, PositiveInt]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dataset: str
    recipe_digest: str = ""
    epoch: int = 0
    crop: float | None = None

    def preprocessing(self, canvas_size: tuple[int, int]) -> Preprocessing:
        """The preprocessing of test images on a canvas of (height, width)."""
        return evaluation_preprocessing(self.image_size, canvas_size, (self.mean, self.std), self.crop)

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
        texts = {"architecture", "dataset", "recipe_digest"}
        try:
            known = {key: text for key, text in metadata.items() if key in cls.model_fields}
            return cls(**{key: text if key in texts else json.loads(text) for key, text in known.items()})
        except (ValidationError, ValueError) as error:
            raise WeightsError(
                "not a student checkpoint",
                where=where,
                expected="the metadata that train-student writes (architecture, class_names, mean, std, …)",
                found=", ".join(sorted(metadata)) or "none",
            ) from error


def save_student(path: Path, model: nn.Module, card: StudentCard) -> None:
    """Write weights and buffers as safetensors, with the card as metadata."""
    save_weights(path, model.state_dict(), card)


def save_weights(path: Path, state: dict[str, torch.Tensor], card: StudentCard) -> None:
    """`save_student` from a state dict."""
    # Cloned, because safetensors refuses channels-last layouts and tensors that share memory.
    plain = torch.contiguous_format
    tensors = {key: value.detach().cpu().clone(memory_format=plain) for key, value in state.items()}
    put_durably(path, _with_sorted_metadata(save(tensors, card.to_metadata())))


def load_student(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, StudentCard]:
    """Load the student of a checkpoint, or of a run folder's last epoch, in eval mode, and its card.

    Raises:
        WeightsError: a missing or damaged file, no card, or weights that do not fit its architecture.
        RecipeError: a network of someone's own whose code the user has not agreed to import (`train.own`).
    """
    file = student_file(Path(path))
    card = read_card(file)
    own.require_consent(card.architecture, file)
    model = create_student(card.architecture, card.num_classes)
    with safe_open(file, framework="pt", device="cpu") as stored:
        state = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # not a dict
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


def read_card(path: Path) -> StudentCard:
    """Read the card of a checkpoint without its weights.

    Raises:
        WeightsError: a missing or damaged file, or no card.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as stored:
            metadata = stored.metadata() or {}
    except FileNotFoundError as error:
        raise WeightsError("no such checkpoint", where=path) from error
    except (SafetensorError, OSError) as error:
        raise WeightsError("damaged checkpoint", where=path, expected="a safetensors file", found=error) from error
    return StudentCard.from_metadata(metadata, path)


def student_file(path: Path) -> Path:
    """The checkpoint file of a path: in a run folder, that of the last epoch."""
    return path / LAST if path.is_dir() else path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state. It holds only tensors and plain values, so that loading it runs no code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    put_durably(path, buffer.getbuffer())


def load_state(path: Path, parts: Collection[str] = ()) -> dict[str, Any] | None:
    """Load a training state to the CPU; None without a file.

    Args:
        parts: keys that it must have.

    Raises:
        WeightsError: a damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if missing := set(parts) - set(state):
            raise KeyError(*missing)
        return state
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            "damaged training state", where=path, next_step="start this run again with --overwrite"
        ) from error


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
