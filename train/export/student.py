"""Export a trained student to files, and keep them only if they compute the student's logits on test images."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.errors import WeightsError
from cache_tools.files import PARTIAL, SafeFolder, is_partial, output_folder, sync_tree
from cache_tools.format.recipe import Preprocessing
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare, resize_and_crop
from train.checkpoints import StudentCard, load_student
from train.evaluate.corruptions import evenly_spaced
from train.evaluate.metrics import predict
from train.export.config import CONFIG, ExportedFile, ExportReport, config
from train.export.formats import FORMATS, Deployed, Model, Source, require_packages
from train.runs.folder import EXPORT, EXPORT_FILES, check_derived
from train.runs.stored import open_run
from train.weights.run_files import real_folder

_BATCH_SIZE = 128
_CPU = torch.device("cpu")


class ExportOptions(Frozen):
    """Options of an export.

    Attributes:
        weights: None for those of the given checkpoint file, or the last weights of a run folder.
        out: None for the folder `export` in the run folder.
        batch_size: of the graphs; None for any number of images.
        input: `pixels`: uint8 [N, 3, H, W] in RGB, normalised inside; `normalised`: float32, normalised by the caller.
        samples: number of evenly spaced test images for the comparison of every file.
        tolerance: largest difference of a logit, relative to the largest logit (at least 1).
    """

    weights: Literal["last", "best", "ema"] | None = None
    formats: tuple[Literal["safetensors", "torchscript", "torch-export", "onnx"], ...] = Field(
        ("safetensors", "torchscript", "torch-export"), min_length=1
    )
    out: Path | None = None
    batch_size: PositiveInt | None = None
    input: Literal["pixels", "normalised"] = "pixels"
    samples: PositiveInt = 1000
    split: str | None = None
    data_dir: Path | None = None
    tolerance: PositiveFloat = 1e-4


def export_student(path: Path | str, options: ExportOptions | None = None) -> ExportReport:
    """Write a student of train-student in other formats, with a `config.json` that describes it and the comparison.

    Once all files have passed the comparison, they replace an earlier export in the folder.

    Args:
        path: a run folder, or a checkpoint file in one.

    Raises:
        WeightsError: no such checkpoint, a network that a format does not support, or a file with other logits.
        CacheError: a problem with the run, images, options or storage.
    """
    options = options or ExportOptions()
    require_packages(options.formats)
    run, named = open_run(path)
    which = options.weights or named or "last"
    model, card = load_student(run.checkpoint(which))
    files = SafeFolder(output_folder(options.out, "export")) if options.out else real_folder(run.folder, EXPORT)
    folder = files.path
    check_derived(files, EXPORT_FILES)
    test = run.open_test(card, options.split, options.data_dir)
    test = test.subset(evenly_spaced(len(test), options.samples))
    preprocessing = card.preprocessing(test.image_size)
    takes_pixels = options.input == "pixels"
    source = Source(
        module=Deployed(model, preprocessing if takes_pixels else None),
        checkpoint=run.checkpoint(which),
        card=card,
        image_size=card.input_size,
        batch_size=options.batch_size,
        preprocessing=preprocessing,
        takes_pixels=takes_pixels,
    )
    with _staged(files) as staged:
        exported = _export(source, test, options, staged)
        report = ExportReport(
            folder=folder,
            student=card.architecture,
            checkpoint=which,
            epoch=card.epoch,
            recipe_digest=card.recipe_digest,
            input=options.input,
            image_size=source.image_size,
            batch_size=options.batch_size,
            dataset=test.name,
            split=test.split,
            samples=len(test),
            tolerance=options.tolerance,
            files=exported,
        )
        described = config(model, card, report, preprocessing)
        _publish(staged, files, json.dumps(described, indent=2, ensure_ascii=False).encode())
    return report


def _export(source: Source, test: ImageSet, options: ExportOptions, staged: Path) -> tuple[ExportedFile, ...]:
    """Write each format and compare it with the student."""
    formats = tuple(dict.fromkeys(options.formats))
    title = f"export {source.card.architecture}"
    with Progress(title, (1 + len(formats)) * len(test), "images") as progress:
        progress.advance(0, "the student itself")
        expected = predict(source.module.student, test, source.preprocessing, _CPU, advance=progress.advance)
        files = []
        for name in formats:
            path = staged / FORMATS[name].file
            progress.advance(0, f"writing {name}")
            with _exporter_errors(source, name, "written"), torch.no_grad():
                FORMATS[name].write(source, path)
            progress.advance(0, f"comparing {name}")
            with _exporter_errors(source, name, "loaded and run"), torch.inference_mode():
                logits = torch.cat(list(_logits(FORMATS[name].open(path, source), source, test, progress)))
            files.append(_compare(name, path, logits, expected, options.tolerance))
    return tuple(files)


def _logits(model: Model, source: Source, test: ImageSet, progress: Progress) -> Iterator[Tensor]:
    """Logits batch by batch. If the batch size is free, try it: one image first, then large batches, then the rest."""
    start, total = 0, len(test)
    while start < total:
        size = source.batch_size or (1 if start == 0 else _BATCH_SIZE)
        pixels = torch.from_numpy(test.load(slice(start, min(start + size, total))))
        images = resize_and_crop(pixels, source.preprocessing).contiguous()
        count = len(images)
        if source.batch_size:  # fill the last batch
            images = images[torch.arange(size) % count]
        yield model(images if source.takes_pixels else prepare(images, _normalisation(source.card)))[:count]
        progress.advance(count)
        start += count


def _normalisation(card: StudentCard) -> Preprocessing:
    return Preprocessing(mean=card.mean, std=card.std)


def _compare(name: str, path: Path, logits: Tensor, expected: Tensor, tolerance: float) -> ExportedFile:
    """Compare the logits of a file with those of the student.

    Raises:
        WeightsError: they differ.
    """
    if logits.shape != expected.shape:
        difference, agreement = float("nan"), 0.0
    else:
        difference = float((logits - expected).abs().max())
        agreement = float((logits.argmax(1) == expected.argmax(1)).double().mean())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:  # also true for NaN
        raise WeightsError(
            "the exported model computes other logits than the student, so nothing was kept",
            where=f"{name}, {len(expected):,} test images",
            expected=f"a largest difference of at most {allowed:.2g}",
            found=f"{difference:.2g}, with the same top-1 class on {agreement:.2%}",
            next_step="export another format, or raise --tolerance if such a difference does not matter",
        )
    return ExportedFile(
        format=name,
        file=path.name,
        file_bytes=path.stat().st_size,
        max_difference=difference,
        allowed_difference=allowed,
        top1_agreement=agreement,
    )


@contextmanager
def _exporter_errors(source: Source, name: str, done: str) -> Iterator[None]:
    """Turn any error of an exporter or runtime into a WeightsError that names the student and the format."""
    try:
        yield
    except (WeightsError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        alone = "" if source.batch_size else ", or a fixed --batch-size"
        raise WeightsError(
            f"this student cannot be {done} as {name}",
            where=source.card.architecture,
            found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".removesuffix(": "),
            next_step=f"choose other formats with --format{alone}",
        ) from error


@contextmanager
def _staged(folder: SafeFolder) -> Iterator[Path]:
    """A folder on the same disk for unchecked files. It is removed afterwards, as are those of killed processes."""
    folder.remove_partials()
    for entry in folder.entries():
        if entry.is_folder and entry.name.startswith(".") and is_partial(entry.name):
            folder.remove_tree(entry.name)
    name = f".export.{uuid.uuid4().hex}{PARTIAL}"
    folder.make_folder(name)
    try:
        yield folder.path / name
    finally:
        with suppress(OSError):
            folder.remove_tree(name)


def _publish(staged: Path, folder: SafeFolder, config: bytes) -> None:
    """Replace an earlier export by the checked files; `config.json` last, so that it never describes other files."""
    sync_tree(staged)
    names = {path.name for path in staged.iterdir()}
    folder.remove(CONFIG)
    for name in {entry.file for entry in FORMATS.values()} - names:
        folder.remove(name)
    for name in sorted(names):
        folder.rename(f"{staged.name}/{name}", name)
    folder.sync()
    folder.put_durably(CONFIG, config)
