"""`config.json` of an exported student: timm's keys, which other tools read, and a section of our own."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from cache_tools.config import Frozen
from cache_tools.format.recipe import Preprocessing
from train.checkpoints import StudentCard
from train.cost import count_flops, count_parameters
from train.own import is_own

CONFIG = "config.json"
_FROM_TIMM = ("first_conv", "classifier", "pool_size", "fixed_input_size")


class ExportedFile(Frozen):
    """An exported file and its comparison with the student.

    Attributes:
        max_difference: largest absolute difference of a logit over the test images.
        allowed_difference: upper limit of `max_difference`.
        top1_agreement: fraction of images with the same top-1 class, in [0, 1].
    """

    format: str
    file: str
    file_bytes: int
    max_difference: float
    allowed_difference: float
    top1_agreement: float


class ExportReport(Frozen):
    """The report of an export.

    Attributes:
        checkpoint: last, best or ema.
        epoch: number of finished epochs.
        input: of the graphs: pixels (uint8, normalised inside) or normalised (float32).
        batch_size: None for any.
        dataset, split, samples: the test images of the comparison.
    """

    folder: Path
    student: str
    checkpoint: str
    epoch: int
    recipe_digest: str
    input: str
    image_size: tuple[int, int]
    batch_size: int | None
    dataset: str
    split: str
    samples: int
    tolerance: float
    files: tuple[ExportedFile, ...]


def config(model: nn.Module, card: StudentCard, report: ExportReport, preprocessing: Preprocessing) -> dict[str, Any]:
    """The contents of `config.json`.

    `preprocessing` is that of test images.

    `architecture`, `num_classes`, `num_features`, `label_names` and `pretrained_cfg` are timm's keys. If the student is
    from timm, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the folder. `library` names the library of
    the architecture.
    """
    library, architecture, of_timm = _origin(model, card)
    height, width = report.image_size
    student: Any = model
    return {
        "architecture": architecture,
        "library": library,
        "num_classes": card.num_classes,
        "num_features": student.num_features,
        "label_names": list(card.class_names),
        "pretrained_cfg": {
            **of_timm,
            "num_classes": card.num_classes,
            "input_size": [3, height, width],
            "mean": list(card.mean),
            "std": list(card.std),
            "interpolation": preprocessing.interpolation,  # resize, then crop the centre
            "crop_pct": preprocessing.crop,
            "crop_mode": "center",
        },
        "teacher_cache": {
            "student": card.architecture,
            "dataset": card.dataset,
            "parameters": count_parameters(model),
            "flops": count_flops(model, report.image_size),
            "versions": {package: version(package) for package in ("teacher-cache", "torch", "timm")},
            "export": report.model_dump(mode="json", exclude={"folder", "student", "image_size"}),
        },
    }


def _origin(model: nn.Module, card: StudentCard) -> tuple[str, str, dict[str, Any]]:
    """(library, its name of the architecture, keys of timm's `pretrained_cfg`)."""
    source, separator, name = card.architecture.partition(":")
    if not separator:
        return "teacher-cache", card.architecture, {}
    if source.lower() != "timm":
        return source if is_own(card.architecture) else source.lower(), name, {}
    known: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = known.get("architecture") or name.partition(".")[0]
    return "timm", architecture, {key: known[key] for key in _FROM_TIMM if known.get(key) is not None}
