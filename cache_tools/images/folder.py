"""A folder of class sub-folders as an image source; `cache_tools.images.open_images` opens it.

Opening reads every file once to hash it, and decodes none. A broken file is never skipped: it raises a DataError that
names the file, while hashing if the damage shows then, otherwise when the image is loaded.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cache_tools.console import Progress
from cache_tools.errors import DataError
from cache_tools.images.class_names import arrange, describe
from cache_tools.images.image_set import KEY_BYTES, ImageSet, sample_key
from cache_tools.images.recipe import DatasetRecipe

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER_IMAGE_SIZE = 224
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
MAX_PIXELS = 178_956_970  # PIL's limit against decompression bombs, enforced even if a program has lifted it
PROGRESS_FROM_FILES = 5000


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderImages(ImageSet):
    """A split whose images are files, decoded on demand in threads (PIL releases the interpreter lock)."""

    files: tuple[Path, ...]

    @property
    def resident(self) -> bool:
        return False

    def load(self, index: np.ndarray | slice) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        pixels = np.empty((len(chosen), 3, *self.image_size), np.uint8)

        def fill(row: int) -> None:
            sample = int(chosen[row])
            data = _read(self.files[sample])
            if sample_key(data) != self.keys[sample].tobytes():
                raise DataError(
                    "image changed since the folder was opened",
                    where=self.files[sample],
                    next_step="run the command again when no program writes to the folder",
                )
            pixels[row] = decode_image(data, self.image_size[0], self.files[sample]).transpose(2, 0, 1)

        with _whole_images_only(), ThreadPoolExecutor(_workers()) as pool:
            for _ in pool.map(fill, range(len(chosen))):  # raises the first error in sample order
                pass
        return pixels

    def _fields_at(self, rows: slice | np.ndarray) -> dict[str, Any]:
        return {"files": tuple(self.files[row] for row in np.arange(len(self))[rows].tolist())}


def open_folder(recipe: DatasetRecipe, split: str) -> FolderImages:
    """Open `data_dir/split/class/**/image`, or `data_dir/class/**/image` without a split folder and test_split.

    Files are sorted by name, and classes are in the recipe's `class_order`. Files without an image extension and hidden
    ones are ignored. Only in the training split does every class folder need an image.

    Raises:
        DataError: the folder is missing, has no classes or an empty class, a file is empty or unreadable, or links
            form a loop.
    """
    root = _split_folder(recipe, split)
    training = split == recipe.split.partition("[")[0]
    classes = arrange(tuple(_class_names(root)), recipe.class_order, complete=training)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(_walk(root / name, ()), key=lambda path: path.parts)
        if not images and training:
            raise DataError(
                "class folder without an image",
                where=root / name,
                expected=f"files ending in {', '.join(sorted(EXTENSIONS))}",
                next_step="fill it, or remove it",
            )
        files += images
        labels += [label] * len(images)
    if not files:
        raise DataError("no image in any class folder", where=root, found=describe(classes))
    size = recipe.image_size or FOLDER_IMAGE_SIZE
    return FolderImages(
        name=recipe.name,
        split=split,
        class_names=classes,
        labels=np.array(labels, np.int64),
        keys=_hash_files(files),
        image_size=(size, size),
        files=tuple(files),
    )


def decode_image(data: bytes, size: int, where: Path) -> np.ndarray:
    """Decode an image to RGB uint8 [size, size, 3].

    16-bit grey keeps its high byte, and alpha is dropped. The image is rotated according to EXIF, its shorter side is
    resized to `size` by antialiased bicubic interpolation, and the centre is cropped, as torchvision's Resize and
    CenterCrop do on PIL images.

    Raises:
        DataError: the data do not decode completely to 8 or 16 bits per channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS}")
            ImageOps.exif_transpose(image, in_place=True)
            return _fit(_as_rgb(image), size)
    except Exception as error:  # decoders raise almost any exception on damaged bytes
        raise DataError(
            "cannot decode an image",
            where=where,
            found=str(error) or type(error).__name__,
            next_step="replace the file, or remove it from the folder",
        ) from error


def _as_rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.int64)  # PIL's own conversion would clip 16-bit values to 255
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"integers from {values.min()} to {values.max()}, not 16-bit")
    return pil.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _fit(image: Image, size: int) -> np.ndarray:
    """Resize and crop in one operation, which computes only the pixels inside the crop."""
    from PIL import Image as pil

    width, height = image.size
    short = min(width, height)
    wide, high = size * width // short, size * height // short
    left, top = round((wide - size) / 2), round((high - size) / 2)
    across, down = width / wide, height / high
    box = (left * across, top * down, min((left + size) * across, width), min((top + size) * down, height))
    return np.asarray(image.resize((size, size), pil.Resampling.BICUBIC, box))


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Refuse truncated images here, even if a library has set PIL to pad them with grey."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _split_folder(recipe: DatasetRecipe, split: str) -> Path:
    assert recipe.data_dir is not None  # validated by the recipe
    root = recipe.data_dir.expanduser()
    if (root / split).is_dir():
        return root / split
    if root.is_dir() and recipe.test_split is None:
        return root
    raise DataError(
        "image folder not found",
        where=root / split,
        expected=f"{root}/{split}/CLASS/IMAGE",
        found="no such folder" if not root.is_dir() else f"{root} without a folder {split}",
        next_step="set data_dir and the splits; with test_split: null the class folders may be in data_dir itself",
    )


def _class_names(root: Path) -> list[str]:
    try:
        names = sorted(name for name in os.listdir(root) if not name.startswith("."))
    except OSError as error:
        raise DataError("cannot read an image folder", where=root, found=error.strerror) from error
    classes = [name for name in names if (root / name).is_dir()]
    stray = next((name for name in names if name not in classes and _is_image_name(name)), None)
    broken = next((name for name in names if not (root / name).exists()), None)
    if not classes or stray or broken:
        found = f"the image {stray} beside the class folders" if stray else f"the broken link {broken}"
        raise DataError(
            "not a folder of class folders",
            where=root,
            expected="one sub-folder per class and every image in one of them",
            found=found if stray or broken else "no sub-folder",
        )
    return classes


def _walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Image files below a folder, links followed; `parents` are the (device, inode) of the folders above."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise DataError("folder contains itself through a link", where=folder, next_step="remove the link")
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = Path(entry.path)
                if path.is_dir():
                    yield from _walk(path, (*parents, identity))
                elif _is_image_name(entry.name) or not path.exists():
                    yield path  # a broken link may be a lost folder; reading it raises
    except OSError as error:
        raise DataError("cannot read a class folder", where=error.filename or folder, found=error.strerror) from error


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _hash_files(files: list[Path]) -> np.ndarray:
    keys = np.empty((len(files), KEY_BYTES), np.uint8)

    def key_of(path: Path) -> bytes:
        return sample_key(_read(path))

    shown = Progress("hash images", len(files), "images") if len(files) >= PROGRESS_FROM_FILES else nullcontext()
    with ThreadPoolExecutor(_workers()) as pool, shown as progress:
        for row, key in enumerate(pool.map(key_of, files)):
            keys[row] = np.frombuffer(key, np.uint8)
            if progress is not None:
                progress.advance(1)
    return keys


def _read(path: Path) -> bytes:
    """Read a regular file; a pipe or device named like an image would block forever."""
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError("cannot read an image", where=path, found=error.strerror) from error
    if not data:
        raise DataError(
            "not an image",
            where=path,
            found="an empty file" if data is not None else "a broken link, a loop of links or no regular file",
            next_step="replace the file, or remove it from the folder",
        )
    return data


def _workers() -> int:
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
