"""Students as safetensors that say what they are, and the training state from which a run goes on.

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
from train.students import create_student

LAST, BEST, EMA = "last.safetensors", "best.safetensors", "ema.safetensors"


class StudentCard(Frozen):
    """What a stored student is: enough to build it, feed it and read its outputs.

    Attributes:
        architecture: a name `create_student` knows.
        class_names: in the order of its logits.
        image_size: (height, width) of the canvas it was trained on.
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

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata: strings stay, everything else is JSON."""
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
    """Write weights and buffers as safetensors with the card as metadata, atomically."""
    save_weights(path, model.state_dict(), card)


def save_weights(path: Path, state: dict[str, torch.Tensor], card: StudentCard) -> None:
    """`save_student` from a state dict."""
    # Cloned: safetensors wants plain layouts and no tensor stored twice.
    plain = torch.contiguous_format
    tensors = {key: value.detach().cpu().clone(memory_format=plain) for key, value in state.items()}
    put_durably(path, _in_order(save(tensors, card.to_metadata())))


def load_student(path: Path | str, device: torch.device | str = "cpu") -> tuple[nn.Module, StudentCard]:
    """The student in a checkpoint or run folder (its last epoch), in eval mode, and its card.

    Raises:
        WeightsError: missing or damaged file, no card, or weights that do not fit the architecture it names.
    """
    file = student_file(Path(path))
    card = read_card(file)
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
    """The card of a checkpoint, without its weights.

    Raises:
        WeightsError: missing or damaged file, or no card.
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
    """The checkpoint a path means: a run folder stands for its last epoch."""
    return path / LAST if path.is_dir() else path


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state: tensors and plain values only, so that it loads without running code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    put_durably(path, buffer.getbuffer())


def load_state(path: Path, parts: Collection[str] = ()) -> dict[str, Any] | None:
    """The training state in a file, on the CPU; None if there is none.

    Args:
        parts: what it must have.

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


def _in_order(file: bytes) -> bytes:
    """The same safetensors file with its metadata sorted: safetensors writes them in another order every time, and the
    same student is to be the same file, with the same digest."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    metadata = dict(sorted(header.pop("__metadata__").items()))
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return b"".join([len(text).to_bytes(8, "little"), text, file[8 + size :]])
