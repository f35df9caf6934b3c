"""The formats of an exported student: a writer for each, and a loader to run the written file.

Every file is written from the same module (`Deployed`) and loaded with the loader that its users have.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_tools.errors import RecipeError
from cache_tools.format.recipe import Preprocessing
from cache_tools.preprocess import affine, prepare
from train.checkpoints import MAX_STATE_BYTES, StudentCard, load_student
from train.weights.run_files import read_file

Model = Callable[[Tensor], Tensor]
INPUT, OUTPUT, CARD = "images", "logits", "card.json"


class Deployed(nn.Module):
    """A student in eval mode that takes uint8 pixels; if `preprocessing` is None, the student's own input.

    Mean and std are buffers of the model, so that a caller cannot normalise wrongly.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, student: nn.Module, preprocessing: Preprocessing | None) -> None:
        super().__init__()
        self.student, self._pixels = student, preprocessing is not None
        if preprocessing is not None:
            scale, shift = affine(preprocessing.mean, preprocessing.std, torch.device("cpu"))
            self.register_buffer("scale", scale.clone())
            self.register_buffer("shift", shift.clone())
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W], or the student's own input → logits float32 [N, classes]."""
        logits: Tensor = self.student(images.float() * self.scale + self.shift if self._pixels else images)
        return logits


@dataclass(frozen=True)
class Source:
    """The student to export.

    Attributes:
        module: on the CPU.
        checkpoint: the file with its weights.
        card: written into every file.
        image_size: (height, width).
        batch_size: of the exported graphs; None for any.
        preprocessing: of test images on their canvas.
        takes_pixels: whether the module takes uint8 pixels.
    """

    module: Deployed
    checkpoint: Path
    card: StudentCard
    image_size: tuple[int, int]
    batch_size: int | None
    preprocessing: Preprocessing
    takes_pixels: bool

    @property
    def notes(self) -> dict[str, str]:
        """The card and the kind of input, as text for the metadata of a file."""
        return self.card.to_metadata() | {"input": "pixels" if self.takes_pixels else "normalised"}

    @property
    def extra_files(self) -> dict[str, str]:
        """`notes` as an extra file in torch's archives."""
        return {CARD: json.dumps(self.notes, ensure_ascii=False)}

    def example(self) -> Tensor:
        """An example input. It has two images, because torch.export takes a batch of one for a constant."""
        shape = (self.batch_size or 2, 3, *self.image_size)
        return torch.zeros(shape, dtype=torch.uint8 if self.takes_pixels else torch.float32)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]] | None:
        """`dynamic_shapes` for torch.export: the batch size, if any number is allowed."""
        return None if self.batch_size else ({0: torch.export.Dim("batch", min=1)},)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The graph for both torch.export and ONNX, traced once."""
        return torch.export.export(self.module, (self.example(),), dynamic_shapes=self.dynamic_shapes)


def write_safetensors(source: Source, path: Path) -> None:
    """The checkpoint itself: the weights, with the card as metadata."""
    path.write_bytes(read_file(source.checkpoint, MAX_STATE_BYTES) or b"")


def open_safetensors(path: Path, source: Source) -> Model:
    model, card = load_student(path)
    preprocessing = Preprocessing(mean=card.mean, std=card.std)
    return lambda images: model(prepare(images, preprocessing) if images.dtype == torch.uint8 else images)


def write_torchscript(source: Source, path: Path) -> None:
    """A traced graph, for libtorch and tools that load nothing else. Newer versions of torch deprecate TorchScript."""
    with _quiet():
        traced = torch.jit.trace(source.module, source.example(), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files=source.extra_files)


def open_torchscript(path: Path, source: Source) -> Model:
    with _quiet():
        model: Model = torch.jit.load(str(path), map_location="cpu")
        return model


def write_torch_export(source: Source, path: Path) -> None:
    """torch.export's archive, for Python, AOTInductor and ExecuTorch."""
    torch.export.save(source.program, path, extra_files=source.extra_files)


def open_torch_export(path: Path, source: Source) -> Model:
    return torch.export.load(path).module()


def write_onnx(source: Source, path: Path) -> None:
    """One ONNX file that contains the weights."""
    with _quiet():
        program = torch.onnx.export(
            source.program,
            (source.example(),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=source.dynamic_shapes,
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    assert program is not None, "dynamo returns a program"
    program.model.metadata_props.update(source.notes)
    program.save(str(path), external_data=False)


def open_onnx(path: Path, source: Source) -> Model:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@dataclass(frozen=True)
class Format:
    """A format: its file name in an export folder, its writer and its loader."""

    file: str
    write: Callable[[Source, Path], None]
    open: Callable[[Path, Source], Model]


FORMATS: dict[str, Format] = {
    "safetensors": Format("model.safetensors", write_safetensors, open_safetensors),
    "torchscript": Format("model.torchscript.pt", write_torchscript, open_torchscript),
    "torch-export": Format("model.pt2", write_torch_export, open_torch_export),
    "onnx": Format("model.onnx", write_onnx, open_onnx),
}


def require_packages(formats: tuple[str, ...]) -> None:
    """Check that the packages for these formats are installed.

    Raises:
        RecipeError: a package is missing.
    """
    if "onnx" not in formats:
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            "ONNX needs packages that are not installed",
            where="--format onnx",
            found=error,
            next_step="install them: pip install 'teacher-cache[onnx]', or leave this format out",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about deprecated TorchScript and constants in traces: the result is checked anyway."""
    with warnings.catch_warnings():
        tracer_warning = torch.jit.TracerWarning  # type: ignore[attr-defined]  # public, but not in `__all__`
        for category in (FutureWarning, DeprecationWarning, tracer_warning):
            warnings.simplefilter("ignore", category)
        yield
