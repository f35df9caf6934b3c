"""Sparse probabilities as TinyViT's `save_logits.py` stores them (microsoft/Cream): a folder for each epoch.

    logits_top100_epoch0/rank0-keys.txt     a line for each image: its number, or its name without ending
    logits_top100_epoch0/rank0-values.bin   a record for each line, one after the other:
                                            int32 seed, int16 classes [100], float16 probabilities [100]

An epoch shows another view of every image, drawn from the record's seed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.codecs import TopK
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.console import Progress
from cache_tools.errors import DataError, FormatError, RecipeError
from cache_tools.exchange.array_file import opened
from cache_tools.exchange.images import rows_of_samples, samples_named, samples_numbered
from cache_tools.exchange.make import ImportedTargets, Kind, Rows, dense_probabilities, sparse_logits
from cache_tools.images.image_set import ImageSet
from cache_tools.views.others import OtherViews

Targets = Literal["mean", "views"]

MAX_EPOCHS = 10_000
MAX_KEY_BYTES = 4096
_FOLDER = re.compile(r"logits_top(?P<k>[1-9][0-9]{0,4})_epoch(?P<epoch>0|[1-9][0-9]{0,4})")
_VALUES = re.compile(r"(?P<rank>rank[0-9]{1,6})-values\.bin")


class _Epoch(NamedTuple):
    """The records of an epoch: of each rank a map of its file, and for every sample its rank and its row."""

    records: Sequence[npt.NDArray[np.void]]
    rank: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]

    def at(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        found = np.empty(len(samples), self.records[0].dtype)
        rank, row = self.rank[samples], self.row[samples]
        for number, records in enumerate(self.records):
            chosen = rank == number
            found[chosen] = records[row[chosen]]
        return found


class TinyViTLogits(ImportedTargets):
    """The targets of TinyViT's files.

    Args:
        path: the folder of the epochs, or of one epoch.
        targets: `mean` for the mean over the epochs as the target of the clean image, `views` for every epoch as it is.
        unmixed: that MixUp and CutMix were off, which the files do not say.

    Raises:
        DataError, FormatError: not such a folder; files of odd sizes, keys of other images, numbers out of range.
        RecipeError: a mean of what may be mixed images.
    """

    kind: Kind = "tinyvit"

    def __init__(self, path: Path, images: ImageSet, targets: Targets, *, unmixed: bool = False) -> None:
        if targets == "mean" and not unmixed:
            raise RecipeError(
                "TinyViT's files do not say whether images were mixed (MixUp, CutMix), and a mean over mixed images is "
                "wrong",
                where=path,
                expected="--unmixed, if AUG.MIXUP and AUG.CUTMIX were 0 in the config of save_logits.py",
                next_step="look it up and say --unmixed; or keep every view with --targets views, which cannot train a "
                "student",
            )
        self._classes = len(images.class_names)
        self._k, folders = _find_epochs(path)
        if self._k > self._classes:
            raise DataError(
                "more classes per image than the dataset has",
                where=path,
                expected=f"at most {self._classes}",
                found=f"top {self._k}",
            )
        self.notes: list[str] = []
        self._epochs = [self._open_epoch(folder, images) for folder in folders]
        self.digest = self._check_all(folders, len(images))
        is_mean = targets == "mean"
        self.averaged = len(folders) if is_mean else None
        self.num_views = 1 if is_mean else len(folders)
        self.made_by = None if is_mean else OtherViews(tool="tinyvit", seeds=True)
        self.notes += [
            f"top {self._k} probabilities of each view, the rest of the mass in equal parts: train at temperature 1",
            f"the target of an image is the mean over {len(folders)} views of it, while a student sees the clean image"
            if is_mean
            else "the views cannot be made again, so no student can be trained from this cache (--targets mean can)",
        ]

    def codecs(self, num_classes: int) -> TargetCodecs:
        return TargetCodecs() if self.made_by is None else TargetCodecs(logits=whole_top_k(self._k))

    def logits(self, view: int, samples: npt.NDArray[np.int64]) -> Rows:
        if self.averaged is None:
            found = self._epochs[view].at(samples)
            return sparse_logits(found["classes"], found["p"], self._classes)
        total = np.zeros((len(samples), self._classes))
        for epoch in self._epochs:
            found = epoch.at(samples)
            total += dense_probabilities(found["classes"], found["p"], self._classes)
        return np.log(total / len(self._epochs)).astype(np.float32)

    def seeds(self, view: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        seeds: npt.NDArray[np.int32] = self._epochs[view].at(samples)["seed"].astype(np.int32)
        return seeds

    def _open_epoch(self, folder: Path, images: ImageSet) -> _Epoch:
        record = np.dtype([("seed", "<i4"), ("classes", "<i2", (self._k,)), ("p", "<f2", (self._k,))])
        ranks = sorted(match["rank"] for name in os.listdir(folder) if (match := _VALUES.fullmatch(name)))
        if not ranks:
            raise DataError("no file of values", where=folder, expected="rank0-keys.txt and rank0-values.bin")
        records, samples, places = [], [], []
        for rank in sorted(ranks, key=lambda name: int(name[4:])):
            keys, values = folder / f"{rank}-keys.txt", folder / f"{rank}-values.bin"
            names = _read_keys(keys, len(images))
            with opened(values) as file:
                size = os.fstat(file.fileno()).st_size
            if size != len(names) * record.itemsize:
                raise FormatError(
                    "a file of values has another size than its keys ask for",
                    where=values,
                    expected=f"{len(names):,} × {record.itemsize} = {len(names) * record.itemsize:,} bytes",
                    found=f"{size:,}",
                    next_step="was it copied completely? Copy it again",
                )
            if not names:
                continue
            records.append(np.memmap(values, dtype=record, mode="r", shape=(len(names),)))
            samples.append(_samples(images, names, keys))
            places.append(np.stack([np.full(len(names), len(records) - 1), np.arange(len(names))], axis=1))
        if not records:
            raise DataError("an epoch without records", where=folder)
        every, place = np.concatenate(samples), np.concatenate(places)
        # Ranks repeat some images, so that all have equally many; the record of the lowest rank counts.
        _, first = np.unique(every, return_index=True)
        rows = rows_of_samples(images, every[first], folder)
        place = place[first][rows]
        return _Epoch(records, place[:, 0], place[:, 1])

    def _check_all(self, folders: list[Path], count: int) -> str:
        """Read every record once: raises FormatError for impossible numbers; returns the digest of all of them."""
        digest = hashlib.blake2b(f"tinyvit {self._k} {self._classes}".encode(), digest_size=16)
        with Progress("check", len(folders) * count, "records") as progress:
            for folder, epoch in zip(folders, self._epochs, strict=True):
                for start in range(0, count, 4096):
                    samples = np.arange(start, min(start + 4096, count), dtype=np.int64)
                    found = epoch.at(samples)
                    self._check(found, samples, folder)
                    digest.update(found.tobytes())
                    progress.advance(len(samples))
        return digest.hexdigest()

    def _check(self, found: npt.NDArray[np.void], samples: npt.NDArray[np.int64], folder: Path) -> None:
        classes, p = found["classes"], found["p"].astype(np.float64)
        ordered = np.sort(classes, axis=1)
        for problem, wrong in (
            (f"classes outside 0 to {self._classes - 1}", ((classes < 0) | (classes >= self._classes)).any(axis=1)),
            ("a class twice", (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)),
            ("a negative seed", found["seed"] < 0),
            (
                "probabilities that are none",
                ~((p >= 0.0) & (p <= 1.001)).all(axis=1) | ~(p.sum(axis=1) <= 1.02) | ~(p.sum(axis=1) > 0.0),
            ),
        ):
            if wrong.any():
                raise FormatError(
                    f"a record has {problem}",
                    where=f"{folder}, sample {int(samples[np.argmax(wrong)])}",
                    expected=f"top {self._k} of {self._classes} classes, as save_logits.py stores them",
                    next_step="are these the logits of this dataset, and was the folder copied completely?",
                )


def whole_top_k(k: int) -> TopK:
    """The codec that keeps all of k classes, whatever their probability."""
    return TopK(min_probability=0.0, max_classes=k)


def _find_epochs(path: Path) -> tuple[int, list[Path]]:
    """The number of classes in a record, and the folders of the epochs in their order."""
    if not path.is_dir():
        raise DataError("no such folder", where=path, expected="a folder with logits_top100_epoch0, …")
    if _FOLDER.fullmatch(path.name):
        found = [path]
    else:
        found = [entry for entry in path.iterdir() if entry.is_dir() and _FOLDER.fullmatch(entry.name)]
    matches = {entry: match for entry in found if (match := _FOLDER.fullmatch(entry.name))}
    sizes = sorted({int(match["k"]) for match in matches.values()})
    if len(sizes) != 1 or len(matches) > MAX_EPOCHS:
        raise DataError(
            "not a folder of TinyViT's logits" if not sizes else "epochs with different numbers of classes",
            where=path,
            expected="folders named logits_top100_epoch0, logits_top100_epoch1, …, of one number of classes",
            found=", ".join(sorted(os.listdir(path))[:4]) or "nothing",
        )
    return sizes[0], sorted(matches, key=lambda entry: int(matches[entry]["epoch"]))


def _read_keys(path: Path, count: int) -> list[str]:
    limit = (count + 1) * MAX_KEY_BYTES
    with opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FormatError("a file of keys is too large", where=path, expected=f"keys of {count:,} images")
    try:
        return [name.strip() for name in data.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise FormatError("keys that are not text in UTF-8", where=path) from error


def _samples(images: ImageSet, names: list[str], where: Path) -> npt.NDArray[np.int64]:
    if all(name.isascii() and name.isdigit() and len(name) < 19 for name in names):
        return samples_numbered(images, np.asarray([int(name) for name in names], dtype=np.int64), where)
    return samples_named(images, names, where)
