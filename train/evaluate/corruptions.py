"""Read corrupted test images in the layout of CIFAR-10-C.

A folder holds `NAME.npy`, uint8 [5·n, H, W, 3], the five severities one after the other, for each of the 15 test
corruptions of ImageNet-C (Hendrycks & Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations", ICLR 2019), and `labels.npy`, the labels of the n test images (once, or once per severity). Files
are memory-mapped: opening them is instant, and any number of students share the same pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError
from cache_tools.system.arguments import expand_user

# In the paper's order, with the paper's groups.
KINDS: dict[str, str] = {
    "gaussian_noise": "noise",
    "shot_noise": "noise",
    "impulse_noise": "noise",
    "defocus_blur": "blur",
    "glass_blur": "blur",
    "motion_blur": "blur",
    "zoom_blur": "blur",
    "snow": "weather",
    "frost": "weather",
    "fog": "weather",
    "brightness": "weather",
    "contrast": "digital",
    "elastic_transform": "digital",
    "pixelate": "digital",
    "jpeg_compression": "digital",
}
CORRUPTIONS = tuple(KINDS)
SEVERITIES = (1, 2, 3, 4, 5)
LABELS = "labels.npy"


@dataclass(frozen=True, eq=False, kw_only=True)
class Corrupted:
    """Opened corrupted copies of test images.

    Attributes:
        folder: of the files.
        source: the program or files they come from, for reports.
        index: int64 [n], their rows in the test split, rising.
        labels: int64 [n].
        image_size: (height, width).
    """

    folder: Path
    source: str
    index: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    image_size: tuple[int, int]
    _rows: npt.NDArray[np.int64]  # within each severity of a file
    _files: dict[str, npt.NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, name: str, severity: int, rows: slice = slice(None)) -> npt.NDArray[np.uint8]:
        """Pixels uint8 [B, 3, H, W] of images `rows` under a corruption of severity 1 … 5.

        A copy, channels-last in memory as in the file.
        """
        pixels = self._files[name]
        chosen = self._rows[rows] + (severity - 1) * (len(pixels) // len(SEVERITIES))
        if len(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen):  # a slice of the map, not a gather
            pixels = np.array(pixels[chosen[0] : chosen[-1] + 1])
        else:
            pixels = np.asarray(pixels[chosen])
        return pixels.transpose(0, 3, 1, 2)

    def loader(self, name: str, severity: int) -> Callable[[slice], npt.NDArray[np.uint8]]:
        """`load` for one corruption and severity."""
        return partial(self.load, name, severity)


def open_corrupted(
    folder: Path | str,
    labels: npt.NDArray[np.int64],
    samples: int | None = None,
    *,
    index: npt.NDArray[np.int64] | None = None,
    source: str | None = None,
) -> Corrupted:
    """Open a folder of corrupted copies of test images.

    Args:
        labels: int64 [n], the expected labels of the folder's images: for CIFAR-10-C and CIFAR-100-C those of the whole
            test split.
        samples: number of evenly spaced images to use; None for all.
        index: int64 [n], rows of the images in the test split, if the folder does not hold all of it.
        source: see `Corrupted`.

    Raises:
        DataError: a missing or damaged file, a wrong shape, or unexpected labels.
    """
    folder = expand_user(folder)
    missing = [f"{name}.npy" for name in CORRUPTIONS if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise DataError(
            "no corrupted images in the layout of CIFAR-10-C",
            where=folder,
            expected=f"{LABELS} and a file NAME.npy for each of the {len(CORRUPTIONS)} test corruptions of ImageNet-C",
            found="no such folder" if not folder.is_dir() else f"no {', '.join(missing)}",
        )
    _check_labels(folder / LABELS, labels)
    files = {name: _read(folder / f"{name}.npy", len(labels)) for name in CORRUPTIONS}
    sizes = {file.shape[1:3] for file in files.values()}
    if len(sizes) > 1:
        raise DataError("corrupted images of different sizes", where=folder, found=sorted(sizes))
    rows = evenly_spaced(len(labels), samples)
    return Corrupted(
        folder=folder,
        source=source or f"the files in {folder}",
        index=rows if index is None else index[rows],
        labels=labels[rows],
        image_size=sizes.pop(),
        _rows=rows,
        _files=files,
    )


def evenly_spaced(total: int, samples: int | None) -> npt.NDArray[np.int64]:
    """Up to `samples` of `total` rows at equal distances, the same for every student; None for all."""
    count = total if samples is None else min(samples, total)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


def _check_labels(path: Path, expected: npt.NDArray[np.int64]) -> None:
    labels = _load(path)
    severities = len(labels) // max(len(expected), 1) if labels.ndim == 1 and labels.dtype.kind in "iu" else 0
    if severities not in {1, len(SEVERITIES)} or len(labels) != severities * len(expected):
        raise DataError(
            "not the labels of the test images",
            where=path,
            expected=f"{len(expected):,} integers, or {len(SEVERITIES)} times as many",
            found=f"{labels.dtype} {list(labels.shape)}",
        )
    if not np.array_equal(labels, np.tile(expected, severities)):
        different = np.flatnonzero(labels != np.tile(expected, severities))
        raise DataError(
            "the labels differ from those of the test split",
            where=path,
            found=f"{len(different):,} of {len(labels):,} differ, the first at row {different[0]}",
            next_step="use corrupted copies of the dataset that the student was trained on",
        )


def _read(path: Path, count: int) -> npt.NDArray[np.uint8]:
    pixels = _load(path)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) != len(SEVERITIES) * count:
        raise DataError(
            "not corrupted copies of the test images",
            where=path,
            expected=f"uint8 [{len(SEVERITIES)}·{count}, height, width, 3]",
            found=f"{pixels.dtype} {list(pixels.shape)}",
        )
    return pixels


def _load(path: Path) -> npt.NDArray[Any]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            "cannot read an array of corrupted images",
            where=path,
            expected="a whole .npy file",
            found=str(error) or type(error).__name__,
            next_step="download it or make it again",
        ) from error
