"""Reinforced datasets of apple/ml-dr: a folder with a file for each image, and one for how they were made.

    config.pth.tar    torch.save of the settings: `reinforce.topk`, `reinforce.image_augmentation`, …
    0.pth.tar         torch.save of (0, [{"params": …, "prob": (probabilities, classes)}, …]), an entry for each view

They are pickles of numbers and lists in zip files. `torch.load(weights_only=True)` cannot read their protocol (4), so
`plain_pickle` does: it takes plain data and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.codecs.presets import TargetCodecs
from cache_tools.console import Progress
from cache_tools.errors import DataError, FormatError
from cache_tools.exchange.array_file import opened
from cache_tools.exchange.make import ImportedTargets, Kind, Rows, dense_probabilities, sparse_logits
from cache_tools.exchange.plain_pickle import PlainDataError, plain_data
from cache_tools.exchange.tinyvit import Targets, whole_top_k
from cache_tools.format.arrays import MIN_BLOCK_ROWS
from cache_tools.images.image_set import ImageSet
from cache_tools.views.others import OtherViews

CONFIG = "config.pth.tar"
ENDING = ".pth.tar"
MAX_BYTES = 64 << 20
MAX_VIEWS = 100_000
_THREADS = 4
_BLOCK_BYTES, _NUMBER_BYTES = 256 << 20, 16  # of the views of a block in memory; of a class and its probability
_UNPACK = "unpack it first: tar -xf reinforced_data.tar.gz"


class _Views(NamedTuple):
    """What a file says of its image: probabilities and classes [V, K], and which views mix in another image."""

    p: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    mixed: npt.NDArray[np.bool_]


class ReinforcedData(ImportedTargets):
    """The targets of a reinforced dataset.

    Args:
        path: the unpacked folder `reinforced_data`.
        targets: `mean` for the mean over the views that mix no other image in, as the target of the clean image;
            `views` for every view as it is.

    Raises:
        DataError, FormatError: not such a folder, files that only unpickling could read, numbers out of range.
    """

    kind: Kind = "ml-dr"

    def __init__(self, path: Path, images: ImageSet, targets: Targets) -> None:
        self._path, self._classes = path, len(images.class_names)
        _check_folder(path, len(images))
        config = _read(path / CONFIG)
        self._has_mixing = _has_mixing(config, path / CONFIG)
        first = self._views(0)
        self._shape = first.p.shape
        is_mean = targets == "mean"
        of_an_image = _NUMBER_BYTES * first.p.size
        self.most_rows = max(MIN_BLOCK_ROWS, 1 << (max(_BLOCK_BYTES // of_an_image, 1).bit_length() - 1))
        self.averaged = self._shape[0] if is_mean else None
        self.num_views = 1 if is_mean else self._shape[0]
        self.made_by = None if is_mean else OtherViews(tool="ml-dr")
        self._last: tuple[int, int, list[_Views]] | None = None
        self.digest, mixed = self._check_all(len(images))
        self.notes = [
            "rows were taken by number: the images of this dataset must be in the order of torchvision's ImageFolder",
            f"top {self._shape[1]} probabilities of each view, the rest of the mass in equal parts: train at "
            "temperature 1",
        ]
        if is_mean:
            self.notes.append(
                f"the target of an image is the mean over its {self._shape[0]} views"
                + (f", without the {mixed:.0%} that mix in another image" if mixed else "")
                + ", while a student sees the clean image"
            )
        else:
            self.notes.append(
                "the views cannot be made again, so no student can be trained from this cache (--targets mean can)"
            )

    def codecs(self, num_classes: int) -> TargetCodecs:
        return TargetCodecs() if self.made_by is None else TargetCodecs(logits=whole_top_k(self._shape[1]))

    def logits(self, view: int, samples: npt.NDArray[np.int64]) -> Rows:
        if self.averaged is None:
            found = self._read_samples(samples)
            classes, p = (np.stack([getattr(each, name)[view] for each in found]) for name in ("classes", "p"))
            return sparse_logits(classes, p, self._classes)
        means = np.empty((len(samples), self._classes))
        for place, sample in enumerate(samples.tolist()):
            each = self._views(sample)
            plain = ~each.mixed
            means[place] = dense_probabilities(each.classes[plain], each.p[plain], self._classes).mean(axis=0)
        return np.log(means).astype(np.float32)

    def _read_samples(self, samples: npt.NDArray[np.int64]) -> list[_Views]:
        """The files of these samples; those of the last call are kept, because each has all views."""
        span = (int(samples[0]), int(samples[-1]))
        if self._last is None or self._last[:2] != span or len(self._last[2]) != len(samples):
            self._last = None
            self._last = (*span, [self._views(sample) for sample in samples.tolist()])
        return self._last[2]

    def _views(self, sample: int) -> _Views:
        file = self._path / f"{sample}{ENDING}"
        data = _read(file)
        if not (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], list) and data[1]):
            raise _odd(file, "(number, list of views)")
        if data[0] != sample:
            raise _odd(file, f"the number {sample}")
        if len(data[1]) > MAX_VIEWS:
            raise _odd(file, f"at most {MAX_VIEWS:,} views")
        rows, classes, mixed = [], [], []
        for entry in data[1]:
            if not isinstance(entry, Mapping) or "prob" not in entry or "params" not in entry:
                raise _odd(file, "views with `params` and `prob`")
            p, chosen = _sparse(entry["prob"], file)
            rows.append(p)
            classes.append(chosen)
            mixed.append(_is_mixed(entry["params"], self._has_mixing))
        if len({len(row) for row in rows}) != 1:
            raise _odd(file, "as many classes in every view")
        views = _Views(np.stack(rows), np.stack(classes), np.asarray(mixed))
        self._check(views, file)
        return views

    def _check(self, views: _Views, file: Path) -> None:
        p, ordered = views.p, np.sort(views.classes, axis=1)
        if ordered.min() < 0 or ordered.max() >= self._classes or (ordered[:, 1:] == ordered[:, :-1]).any():
            raise _odd(file, f"different classes from 0 to {self._classes - 1}, those of the dataset")
        sums = p.sum(axis=1)
        if not (np.isfinite(p).all() and (p >= 0.0).all() and (sums <= 1.02).all() and (sums > 0.0).all()):
            raise _odd(file, "probabilities whose sum is at most 1")

    def _check_all(self, count: int) -> tuple[str, float]:
        """Read every file once. Returns the digest of all of them, and the share of views that mix images."""
        digest, mixed = hashlib.blake2b(f"ml-dr {self._classes}".encode(), digest_size=16), 0
        with Progress("check", count, "images") as progress, ThreadPoolExecutor(_THREADS) as pool:
            for start in range(0, count, 256):
                chosen = range(start, min(start + 256, count))
                for sample, views in zip(chosen, pool.map(self._views, chosen), strict=True):
                    if views.p.shape != self._shape:
                        raise _odd(
                            self._path / f"{sample}{ENDING}", f"{self._shape[0]} views of {self._shape[1]} classes"
                        )
                    if self.averaged is not None and views.mixed.all():
                        raise DataError(
                            "every view of an image mixes in another image, so there is no mean for it alone",
                            where=self._path / f"{sample}{ENDING}",
                            next_step="import a reinforcement without mixing, such as RRC or RA/RE",
                        )
                    mixed += int(views.mixed.sum())
                    for part in (views.classes.astype("<i4"), views.p.astype("<f8"), views.mixed):
                        digest.update(np.ascontiguousarray(part).tobytes())
                progress.advance(len(chosen))
        return digest.hexdigest(), mixed / (count * self._shape[0])


def _check_folder(path: Path, count: int) -> None:
    """Raise DataError unless the folder has a file for each image, none more, and the settings."""
    if not path.is_dir():
        is_archive = path.is_file() and path.name.endswith((".tar", ".tar.gz", ".tgz"))
        raise DataError(
            "this is an archive" if is_archive else "no such folder",
            where=path,
            expected="the unpacked folder reinforced_data",
            next_step=_UNPACK if is_archive else None,
        )
    names = set(os.listdir(path))
    if any(name.endswith((".paug.json", ".pth.gz", ".tar")) and not name.endswith(ENDING) for name in names):
        raise DataError(
            "these are files of MobileCLIP-DR: embeddings of images and captions, without classes or logits",
            where=path,
            expected="a reinforced dataset of apple/ml-dr for classification",
            next_step="build a cache of the images with a CLIP of theirs: build-cache FOLDER --teacher none --clip "
            "MobileCLIP-S2",
        )
    if any(name.endswith(".jb") for name in names) or (CONFIG in names and not (path / f"0{ENDING}").exists()):
        raise DataError(
            "no file 0.pth.tar: these were stored with joblib, or some are missing",
            where=path,
            expected="files of torch.save, as published (reinforce.joblib: false)",
            next_step="joblib files can only be unpickled; convert those that you trust: "
            "torch.save(joblib.load(file), file)",
        )
    numbers = {name.removesuffix(ENDING) for name in names if name.endswith(ENDING) and name != CONFIG}
    missing = [number for number in range(count) if str(number) not in numbers]
    if CONFIG not in names or missing or len(numbers) != count:
        lacks = (
            CONFIG
            if CONFIG not in names
            else f"{len(missing):,} files, the first {missing[0]}{ENDING}"
            if missing
            else None
        )
        raise DataError(
            "not a reinforced dataset of these images",
            where=path,
            expected=f"{CONFIG} and 0{ENDING} to {count - 1}{ENDING}, a file for each image of the split",
            found=f"no {lacks}" if lacks else f"{len(numbers):,} files",
            next_step="choose the dataset and the split that were reinforced",
        )


def _read(path: Path) -> Any:
    """The plain data of a file of torch.save: the member `data.pkl` of a zip file."""
    try:
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            info = next(each for each in archive.infolist() if each.filename.rpartition("/")[2] == "data.pkl")
            if info.file_size > MAX_BYTES:
                raise FormatError(
                    "a file is too large",
                    where=path,
                    expected=f"at most {MAX_BYTES:,} bytes",
                    found=f"{info.file_size:,}",
                )
            return plain_data(archive.read(info))
    except PlainDataError as error:
        raise FormatError(
            "this file holds more than plain data, and nothing else is unpickled",
            where=path,
            expected="numbers, text, lists, tuples and dicts, as ml-dr stores them",
            found=str(error),
            next_step="store it again with lists of numbers: array.tolist() instead of arrays",
        ) from error
    except (zipfile.BadZipFile, StopIteration, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise FormatError("not a file of torch.save", where=path, expected="a zip file with data.pkl") from error
    except OSError as error:
        raise DataError("cannot read the file", where=path, found=error.strerror or str(error)) from error


def _has_mixing(config: Any, where: Path) -> bool:
    """Whether the augmentation mixes images, so that compressed parameters begin with the other image."""
    reinforce = config.get("reinforce") if isinstance(config, Mapping) else None
    ops = reinforce.get("image_augmentation") if isinstance(reinforce, Mapping) else None
    if not isinstance(ops, Mapping):
        raise _odd(where, "settings with reinforce.image_augmentation")
    return any(_is_on(ops.get(name)) for name in ("mixup", "cutmix"))


def _is_on(settings: Any) -> bool:
    return isinstance(settings, Mapping) and settings.get("enable", True) is not False


def _is_mixed(params: Any, has_mixing: bool) -> bool:
    if isinstance(params, Mapping):
        return any(params.get(name) is not None for name in ("mixup", "cutmix"))
    return has_mixing and isinstance(params, list | tuple) and len(params) > 0 and params[0] is not None


def _sparse(prob: Any, file: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(probabilities, classes) of a view: the two lists of ml-dr, or all probabilities."""
    try:
        if isinstance(prob, tuple | list) and len(prob) == 2 and _is_row(prob[0]) and _is_row(prob[1]):
            p, classes = np.asarray(prob[0], dtype=np.float64), np.asarray(prob[1], dtype=np.int64)
        else:
            p = np.asarray(prob, dtype=np.float64)
            classes = np.arange(p.size, dtype=np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _odd(file, "prob: probabilities and classes") from error
    if p.ndim != 1 or p.shape != classes.shape or not len(p):
        raise _odd(file, "prob: as many probabilities as classes")
    return p, classes


def _is_row(values: Any) -> bool:
    return isinstance(values, Iterable) and not isinstance(values, str | bytes)


def _odd(file: Path, expected: str) -> FormatError:
    return FormatError("not a file of a reinforced dataset", where=file, expected=expected)
