"""A process that decodes pictures. It reads tasks from standard input and writes pixels into shared memory.

It answers the tasks in order, and ends when its input ends. Contents are compared with their keys; later only where the
state of the file is another one, so that the epochs of a run do not hash the same files again.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.decoding.pixel_file import PackedPicture, read_picture
from cache_tools.errors import CacheError, error_to_data
from cache_tools.images.decode import PixelRules, decode_image, decode_picture, whole_images_only
from cache_tools.images.encoded import check_unchanged
from cache_tools.images.index import UNKNOWN, FileState, read_image
from cache_tools.system.memory import keep_freed_memory
from cache_tools.views.recipe import ViewRecipe

HELD_BYTES = 64 << 20  # of decoded pictures that wait to be cropped together


class Job(NamedTuple):
    """What is made of pictures.

    Attributes:
        canvas: the side of the canvas to which they are resized; None for crops of the original pictures.
        interpolation: of that resize.
        wanted: (recipe, view) of each crop.
        shapes: (N, 3, height, width) of the canvases, or of the crops of each view: the parts of the result.
    """

    rules: PixelRules
    canvas: int | None
    interpolation: str
    wanted: tuple[tuple[ViewRecipe, int], ...]
    shapes: tuple[tuple[int, int, int, int], ...]


class Picture(NamedTuple):
    """A picture of a request.

    Attributes:
        source: its file, its bytes, or its place in a pixel file.
        where: its place, for messages.
        key: of its content.
        known: the file's state when its content was last found to have this key; zeros if it has not been.
        row: its place in the image set.
        rows: of each part of the result that show it.
    """

    source: str | bytes | PackedPicture
    where: str
    key: bytes
    known: FileState
    row: int
    sample: int
    rows: tuple[tuple[int, ...], ...]


class Task(NamedTuple):
    """Some pictures of a request.

    Attributes:
        job: pickled, because it is the same for all tasks of a request.
        region: (offset, bytes) of the request's part of the shared memory.
    """

    job: bytes
    region: tuple[int, int]
    pictures: tuple[Picture, ...]


class Answer(NamedTuple):
    """The states of the files of a task whose contents were found to have their keys; or what went wrong.

    Attributes:
        states: (row of the picture in the image set, state).
        error: `error_to_data`, or `traceback` if it is none of ours.
    """

    states: list[tuple[int, FileState]]
    error: dict[str, Any] | None = None


def parts(memory: npt.NDArray[np.uint8], shapes: Sequence[tuple[int, int, int, int]]) -> list[npt.NDArray[np.uint8]]:
    """The parts of a result in its memory, one after the other."""
    found, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        found.append(memory[start:stop].reshape(shape))
        start = stop
    return found


def main() -> None:
    """Answer tasks until the input ends. Only the parent reacts to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    keep_freed_memory()
    shared = _Shared(pickle.load(sys.stdin.buffer))
    with whole_images_only():
        for task in _tasks():
            pickle.dump(_answer(task, shared), answers)
            answers.flush()


class _Shared:
    """The shared memory, region by region; a region keeps its size as long as the service runs."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._regions: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def __getitem__(self, region: tuple[int, int]) -> npt.NDArray[np.uint8]:
        if region not in self._regions:
            start, size = region
            self._regions[region] = np.frombuffer(mmap.mmap(self._file, size, offset=start), np.uint8)
        return self._regions[region]


def _tasks() -> Iterator[Task]:
    while True:
        try:
            yield pickle.load(sys.stdin.buffer)
        except EOFError:
            return


def _answer(task: Task, shared: _Shared) -> Answer:
    try:
        return Answer(_load(task, _job(task.job), shared[task.region]))
    except CacheError as error:
        return Answer([], error_to_data(error))
    except Exception:
        return Answer([], {"traceback": traceback.format_exc()})


@lru_cache(maxsize=16)
def _job(data: bytes) -> Job:
    job: Job = pickle.loads(data)
    if job.canvas is None:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to a decoded picture
    return job


def _load(task: Task, job: Job, memory: npt.NDArray[np.uint8]) -> list[tuple[int, FileState]]:
    made, states = parts(memory, job.shapes), []
    waiting: list[tuple[Picture, npt.NDArray[np.uint8]]] = []
    for picture in task.pictures:
        if job.canvas is not None:
            data, state = _read(picture)
            (rows,) = picture.rows
            pixels = decode_image(data, job.canvas, picture.where, job.rules, job.interpolation)
            made[0][list(rows)] = pixels.transpose(2, 0, 1)
        else:
            pixels, state = _read_pixels(picture, job)
            waiting.append((picture, pixels.transpose(2, 0, 1)))
        if state is not None:
            states.append((picture.row, state))
        if sum(pixels.nbytes for _, pixels in waiting) > HELD_BYTES:
            _crop(waiting, job, made)
            waiting = []
    if waiting:
        _crop(waiting, job, made)
    return states


def _read_pixels(picture: Picture, job: Job) -> tuple[npt.NDArray[np.uint8], FileState | None]:
    """A picture at its own size, uint8 [H, W, 3], and the state of its file as `_read` gives it."""
    if isinstance(picture.source, PackedPicture):
        return read_picture(picture.source, picture.known)
    data, state = _read(picture)
    return decode_picture(data, picture.where, job.rules, writable=False), state


def _read(picture: Picture) -> tuple[bytes, FileState | None]:
    """The bytes of a picture, and the state of its file if they have just been checked and it can be told apart."""
    assert not isinstance(picture.source, PackedPicture), "it has no bytes"
    if isinstance(picture.source, bytes):
        check_unchanged(picture.source, picture.key, picture.where)
        return picture.source, None
    data = read_image(Path(picture.source))
    try:
        state = FileState.of(os.stat(picture.source))  # afterwards: a change during reading shows
    except OSError:
        state = UNKNOWN
    if state == picture.known:
        return data, None
    check_unchanged(data, picture.key, picture.where)
    return data, state if state != UNKNOWN and state.is_settled else None


def _crop(
    pictures: Sequence[tuple[Picture, npt.NDArray[np.uint8]]], job: Job, made: Sequence[npt.NDArray[np.uint8]]
) -> None:
    import torch

    tensors = [torch.from_numpy(pixels) for _, pixels in pictures]
    for part, (target, (recipe, view)) in enumerate(zip(made, job.wanted, strict=True)):
        shown = [(row, number) for number, (picture, _) in enumerate(pictures) for row in picture.rows[part]]
        if shown:
            samples = np.array([pictures[number][0].sample for _, number in shown], np.int64)
            crops = recipe.crop([tensors[number] for _, number in shown], samples, view)
            target[[row for row, _ in shown]] = crops.numpy()
