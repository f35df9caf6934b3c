"""Corrupted copies of test images, made once with the package `imagecorruptions` and stored in the cache home.

The functions and strengths are ImageNet-C's, applied to the canvas as it is. CIFAR-10-C uses weaker strengths for its
32 × 32 images: to compare with published figures, evaluate on its files instead.

Every copy is a function of (image, corruption, severity, seed): the number of processes, an interruption or a smaller
number of images changes no byte of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.console import Progress
from cache_tools.errors import DataError, RecipeError
from cache_tools.files import SafeFolder
from cache_tools.home.registry import cache_home
from cache_tools.images.image_set import ImageSet
from cache_tools.philox import sample_words
from cache_tools.system.processes import process_pool
from train.evaluate.corruptions import CORRUPTIONS, LABELS, SEVERITIES, Corrupted, evenly_spaced, open_corrupted

PACKAGE = "imagecorruptions-imaug"
MIN_SIDE = 32  # the package refuses smaller images
_CHUNK_BYTES = 2 << 20
_RECIPE = "corruptions.json"


def corrupted_copies(images: ImageSet, samples: int | None = None, *, seed: int = 0, workers: int = 1) -> Corrupted:
    """Open corrupted copies of a test split, memory-mapped; make them first if they do not exist.

    They are in `$TEACHER_CACHE_HOME/corruptions/`, in a folder named after everything that determines them. An
    interrupted run resumes after the last finished corruption.

    Args:
        images: at least 32 × 32.
        samples: number of evenly spaced images to copy; None for all.
        seed: of the noise, 0 … 2⁶⁴−1.
        workers: processes that make copies; with more than one the calling script needs the usual
            `if __name__ == "__main__":`.

    Raises:
        DataError: images that are too small.
        RecipeError: the package is not installed.
    """
    if min(images.image_size) < MIN_SIDE:
        raise DataError(
            "the images are too small for the corruptions",
            where=f"{images.name}, split {images.split}",
            expected=f"at least {MIN_SIDE} × {MIN_SIDE}",
            found=f"{images.image_size[0]} × {images.image_size[1]}",
            next_step="pass a folder of corrupted copies with --corruptions",
        )
    whole = _recipe(images, evenly_spaced(len(images), None), seed)
    if samples is not None and samples < len(images):
        if not _is_complete(_folder(whole)):
            index = evenly_spaced(len(images), samples)
            return _open_or_make(images, index, _recipe(images, index, seed), seed, workers)
    else:
        samples = None
    copies = _open_or_make(images, evenly_spaced(len(images), None), whole, seed, workers)
    return open_corrupted(copies.folder, images.labels, samples, source=copies.source)


def corrupt_images(
    pixels_NHWC: npt.NDArray[np.uint8], index: npt.NDArray[np.int64], name: str, severity: int, seed: int = 0
) -> npt.NDArray[np.uint8]:
    """Corrupt images with the package, each with its own random numbers.

    Args:
        pixels_NHWC: uint8 [B, H, W, 3].
        index: int64 [B], their sample indices; the random numbers depend on them and on the other arguments.
        severity: 1 … 5.

    Returns:
        uint8 [B, H, W, 3].
    """
    imagecorruptions = _package()
    words = sample_words(seed, index.astype(np.uint64), severity, CORRUPTIONS.index(name))[0].tolist()
    own_seed = name in {"impulse_noise", "glass_blur"}  # these two do not draw from numpy's global generator
    state = np.random.get_state()  # noqa: NPY002  # the generator that the package uses
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints whenever it crops a layer
            out = np.empty_like(pixels_NHWC)
            for row, word in enumerate(words):
                np.random.seed(word)  # noqa: NPY002
                options = {"seed": word} if own_seed else {}
                out[row] = imagecorruptions.corrupt(pixels_NHWC[row], severity, name, **options)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return out


def _recipe(images: ImageSet, index: npt.NDArray[np.int64], seed: int) -> dict[str, Any]:
    """Everything that determines the copies. The package is not imported, which existing copies do not need."""
    how: str = getattr(images, "interpolation", "bicubic")
    return {
        **({} if how == "bicubic" else {"interpolation": how}),
        "dataset": images.name,
        "split": images.split,
        "content_digest": images.content_digest,
        "image_size": list(images.image_size),
        "samples": len(index),
        "package": PACKAGE,
        "version": _package_version(),
        "severities": list(SEVERITIES),
        "seed": seed,
    }


def _folder(recipe: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{recipe['dataset']}-{recipe['split']}-{recipe['samples']}")
    return cache_home() / "corruptions" / f"{name}-{digest[:12]}"


def _is_complete(folder: Path) -> bool:
    return _files(folder).is_file(LABELS)  # written last


def _files(folder: Path) -> SafeFolder:
    """The folder of copies, entered from the cache home: no link below it is followed."""
    return SafeFolder(cache_home()).below(f"corruptions/{folder.name}")


def _open_or_make(
    images: ImageSet, index: npt.NDArray[np.int64], recipe: dict[str, Any], seed: int, workers: int
) -> Corrupted:
    folder, labels = _folder(recipe), images.labels[index]
    if not _is_complete(folder):
        files = _files(folder)
        files.make_folder()
        files.remove_partials()
        files.put_durably(_RECIPE, json.dumps(recipe | {"made_with": _versions()}, indent=2).encode())
        _make(folder, images, index, seed, workers)
        files.put_durably(LABELS, _npy(np.tile(labels, len(SEVERITIES))))
    source = f"{PACKAGE} {recipe['version']}, seed {seed}"
    return open_corrupted(folder, labels, index=index, source=source)


def _make(folder: Path, images: ImageSet, index: npt.NDArray[np.int64], seed: int, workers: int) -> None:
    missing = [name for name in CORRUPTIONS if not _files(folder).is_file(f"{name}.npy")]
    each = len(SEVERITIES) * len(index)
    done = (len(CORRUPTIONS) - len(missing)) * each
    with (
        Progress("corrupt test images", len(CORRUPTIONS) * each, "images", done=done) as progress,
        _workers(workers) as pool,
    ):
        for name in missing:
            _write(
                _files(folder),
                f"{name}.npy",
                (each, *images.image_size, 3),
                _report_progress(_chunks(images, index, name, seed, pool, workers), progress, name),
            )


def _chunks(
    images: ImageSet,
    index: npt.NDArray[np.int64],
    name: str,
    seed: int,
    pool: ProcessPoolExecutor | None,
    workers: int,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Corrupted images in the order of the file, a few chunks ahead of the reader."""
    height, width = images.image_size
    rows = max(1, _CHUNK_BYTES // (3 * height * width))
    pending: deque[Future[npt.NDArray[np.uint8]]] = deque()
    for severity in SEVERITIES:
        for start in range(0, len(index), rows):
            chosen = index[start : start + rows]
            pixels = np.ascontiguousarray(images.load(chosen).transpose(0, 2, 3, 1))
            if pool is None:
                yield corrupt_images(pixels, chosen, name, severity, seed)
                continue
            pending.append(pool.submit(corrupt_images, pixels, chosen, name, severity, seed))
            while len(pending) > 2 * workers:
                yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _report_progress(
    chunks: Iterator[npt.NDArray[np.uint8]], progress: Progress, note: str
) -> Iterator[npt.NDArray[np.uint8]]:
    for chunk in chunks:
        yield chunk
        progress.advance(len(chunk), note)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of spawned processes, which inherit no threads and no CUDA context; None to work in this process."""
    if count <= 1:
        yield None
        return
    pool = process_pool(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _write(folder: SafeFolder, name: str, shape: tuple[int, ...], chunks: Iterator[npt.NDArray[np.uint8]]) -> None:
    """Write an .npy file atomically. A memory map would be shorter, but on a full disk it crashes the process."""
    with folder.replaced_durably(name) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk).data)


def _npy(array: npt.NDArray[Any]) -> memoryview:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getbuffer()


def _versions() -> dict[str, str]:
    """Versions of all packages that affect the pixels. Only the corruption package's is in the folder's name."""
    names = (PACKAGE, "numpy", "scipy", "scikit-image", "opencv-python", "opencv-python-headless", "pillow", "numba")
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _package_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise _cannot_import(error) from error


def _package() -> Any:
    try:
        import imagecorruptions
    except ImportError as error:  # not installed, or a system library of its OpenCV is missing
        raise _cannot_import(error) from error
    return imagecorruptions


def _cannot_import(error: ImportError) -> RecipeError:
    return RecipeError(
        "cannot import the package that corrupts images",
        where=PACKAGE,
        found=error,
        next_step="pip install 'teacher-cache[robustness]', or pass a folder of corrupted copies with --corruptions",
    )
