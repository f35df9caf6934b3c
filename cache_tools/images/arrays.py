"""Image sources that fit in memory: the digits of scikit-learn, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN and STL-10.

`cache_tools.images.open_images` opens them. All images are 32 × 32, but those of STL-10 are 96 × 96.
"""

from __future__ import annotations

import gzip
import zlib
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.errors import DataError
from cache_tools.images.image_set import ImageSet, sample_key
from cache_tools.images.recipe import DatasetRecipe, default_data_dir
from cache_tools.system.arguments import expand_user

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SYSTEM_FASHION_DIR = Path("/usr/share/datasets/fashion-mnist")
_MAX_IDX_BYTES = 1 << 28
_IDX_MAGIC = {1: 0x0801, 3: 0x0803}  # uint8, by number of dimensions


@dataclass(frozen=True, eq=False, kw_only=True)
class ArrayImages(ImageSet):
    """A split whose pixels, uint8 [N, 3, H, W], are one array in memory."""

    pixels: np.ndarray

    @property
    def resident(self) -> bool:
        return True

    def load(self, index: np.ndarray | slice) -> np.ndarray:
        return self.pixels[index]

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"pixels": self.pixels[rows]}


def open_digits(recipe: DatasetRecipe, split: str) -> ArrayImages:
    """The 1797 handwritten digits of scikit-learn; every fifth one (index % 5 == 4) is the test split.

    Exact integer bilinear interpolation enlarges the 8 × 8 scans to 32 × 32 and scales their levels 0…16 to 0…255.
    """
    train = _check_split(recipe, split)
    table = _digits_table()
    chosen = (np.arange(len(table)) % 5 != 4) == train
    scans, labels = table[chosen, :-1].reshape(-1, 8, 8).astype(np.uint8), table[chosen, -1].astype(np.int64)
    return array_images(recipe, split, DIGIT_NAMES, labels, scans, _enlarge(scans)[:, None])


def open_fashion_mnist(recipe: DatasetRecipe, split: str) -> ArrayImages:
    """Fashion-MNIST from its IDX files, plain or gzipped; the 28 × 28 scans are zero-padded by two pixels."""
    prefix = "train" if _check_split(recipe, split) else "t10k"
    root = _data_dir(recipe)
    folders = [root, root / "FashionMNIST" / "raw", SYSTEM_FASHION_DIR]
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    if recipe.download and not all(_find(folders, name) for name in names):
        _download("FashionMNIST", root)
    scans, labels = (_read_idx(_require(folders, name), dims) for name, dims in zip(names, (3, 1), strict=True))
    if len(scans) != len(labels) or scans.shape[1:] != (28, 28) or labels.max(initial=0) >= len(FASHION_NAMES):
        raise DataError(
            "Fashion-MNIST images and labels do not match",
            where=_require(folders, names[0]).parent,
            expected="as many labels 0…9 as images of 28 × 28",
            found=f"images {scans.shape}, {len(labels)} labels up to {labels.max(initial=0)}",
        )
    canvas = np.pad(scans, ((0, 0), (2, 2), (2, 2)))[:, None]
    return array_images(recipe, split, FASHION_NAMES, labels, scans, canvas)


def open_cifar(recipe: DatasetRecipe, split: str) -> ArrayImages:
    """CIFAR-10 or CIFAR-100 (fine labels) from torchvision's files, whose MD5 sums torchvision checks."""
    train = _check_split(recipe, split)
    from torchvision import datasets

    cls: Any = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[recipe.name]
    root = _data_dir(recipe)
    if root.name == cls.base_folder:  # the user gave the folder that holds the batches
        root = root.parent
    folder = root / cls.base_folder
    if recipe.download:
        _download(cls.__name__, root)
    try:
        dataset = cls(root, train=train)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{recipe.name} is damaged" if folder.is_dir() else f"{recipe.name} not found",
            where=folder,
            expected="the unpacked python version with the published MD5 sums",
            next_step=_next_step(f"a --data-dir that contains {cls.base_folder}"),
        ) from error
    pixels = np.ascontiguousarray(dataset.data.transpose(0, 3, 1, 2))
    return array_images(recipe, split, tuple(dataset.classes), np.array(dataset.targets), pixels, pixels)


def open_stl10(recipe: DatasetRecipe, split: str) -> ArrayImages:
    """STL-10 from torchvision's files, whose MD5 sums torchvision checks; 96 × 96, without the unlabelled images."""
    _check_split(recipe, split)
    found = _torchvision(recipe, "STL10", "stl10_binary", split)
    names = tuple(getattr(found, "classes", ())) or STL10_NAMES
    pixels = np.ascontiguousarray(found.data)
    return array_images(recipe, split, names, found.labels, pixels, pixels)


def open_svhn(recipe: DatasetRecipe, split: str) -> ArrayImages:
    """SVHN's cropped digits from torchvision's files, whose MD5 sums torchvision checks. `extra` is a split too."""
    if split != "extra":
        _check_split(recipe, split)
    found = _torchvision(recipe, "SVHN", None, split)
    pixels = np.ascontiguousarray(found.data)
    return array_images(recipe, split, DIGIT_NAMES, found.labels, pixels, pixels)


def _torchvision(recipe: DatasetRecipe, class_name: str, folder: str | None, split: str) -> Any:
    """A data set that torchvision has opened."""
    from torchvision import datasets

    root = _data_dir(recipe)
    if root.name == folder:  # the user gave the folder that holds the files
        root = root.parent
    try:
        with redirect_stdout(StringIO()):
            return getattr(datasets, class_name)(root, split=split, download=recipe.download)
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{recipe.name} not found, or damaged",
            where=root,
            expected="its files with the published MD5 sums",
            next_step=_next_step(f"a --data-dir that contains {folder or 'train_32x32.mat and test_32x32.mat'}"),
        ) from error


def array_images(
    recipe: DatasetRecipe,
    split: str,
    class_names: tuple[str, ...],
    labels: np.ndarray,
    originals: np.ndarray,
    canvas: np.ndarray,
) -> ArrayImages:
    """An ArrayImages whose keys come from `originals` (uint8 [N, …]), not from the canvas; grey becomes RGB."""
    keys = b"".join(sample_key(row.data) for row in np.ascontiguousarray(originals))
    pixels = canvas if canvas.shape[1] == 3 else np.repeat(canvas, 3, axis=1)
    return ArrayImages(
        name=recipe.name,
        split=split,
        class_names=class_names,
        labels=labels.astype(np.int64),
        keys=np.frombuffer(bytearray(keys), np.uint8).reshape(len(labels), -1),
        image_size=(pixels.shape[2], pixels.shape[3]),
        pixels=pixels,
    )


def _enlarge(scans: np.ndarray) -> np.ndarray:
    """uint8 [N, 8, 8] in 0…16 → uint8 [N, 32, 32] in 0…255, half-pixel bilinear with clamped borders.

    Weights are whole eighths per axis, so integer arithmetic gives the same pixels on every machine.
    """
    weights = np.zeros((32, 8), np.int64)
    for row in range(32):
        eighths = 2 * row + 1 - 4  # source position (row + ½)/4 − ½, times eight
        low, fraction = eighths >> 3, eighths & 7
        weights[row, max(low, 0)] += 8 - fraction
        weights[row, min(low + 1, 7)] += fraction
    sums = weights @ scans.astype(np.int64) @ weights.T  # 0 … 16·64
    return ((sums * 255 + 512) >> 10).astype(np.uint8)


def _digits_table() -> np.ndarray:
    """[1797, 65]: the levels of 8 × 8 pixels, then the digit. Reads scikit-learn's file: its import takes a second."""
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])


def _data_dir(recipe: DatasetRecipe) -> Path:
    return default_data_dir() if recipe.data_dir is None else expand_user(recipe.data_dir)


def _find(folders: list[Path], name: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _require(folders: list[Path], name: str) -> Path:
    path = _find(folders, name)
    if path is None:
        raise DataError(
            "Fashion-MNIST not found",
            where=f"{name}[.gz]",
            found=f"nothing in {', '.join(str(folder) for folder in folders)}",
            next_step=_next_step("a --data-dir that contains the four files"),
        )
    return path


def _next_step(place: str) -> str:
    return f"give {place}, or add --download"


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """An IDX file of unsigned bytes (yann.lecun.com's format) with `dims` dimensions."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_MAX_IDX_BYTES + 1)  # a small file may unpack to any size
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("cannot read an IDX file", where=path, found=str(error)) from error
    header = np.frombuffer(data[: 4 + 4 * dims], ">u4") if len(data) >= 4 + 4 * dims else np.zeros(1, ">u4")
    shape = tuple(int(length) for length in header[1:])
    if header[0] != _IDX_MAGIC[dims] or len(data) != header.nbytes + int(np.prod(shape)):
        raise DataError(
            "not a complete IDX file",
            where=path,
            expected=f"magic 0x{_IDX_MAGIC[dims]:04x} and as many bytes as its header says",
            found=f"magic 0x{int(header[0]):04x}, {len(data)} bytes",
            next_step="fetch the file again",
        )
    return np.frombuffer(data, np.uint8, offset=header.nbytes).reshape(shape)


def _download(class_name: str, root: Path) -> None:
    """Let torchvision download and check a dataset below `root`, unless it is there already."""
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        getattr(datasets, class_name)(root, download=True)
    except (RuntimeError, OSError, EOFError) as error:  # no network, a wrong checksum, a full disk
        raise DataError(
            f"cannot download {class_name}",
            where=root,
            found=str(error) or type(error).__name__,
            next_step="check the network, or fetch the files elsewhere and give their folder as --data-dir",
        ) from error


def _check_split(recipe: DatasetRecipe, split: str) -> bool:
    """Return True for `train` and False for `test`.

    Raises:
        DataError: the split is neither.
    """
    if split not in {"train", "test"}:
        raise DataError(
            f"{recipe.name} has no such split", where=split, expected="train or test, or a part such as train[:1000]"
        )
    return split == "train"
