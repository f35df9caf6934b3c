"""The decode service: processes that read, check, decode and crop pictures, for builds and for training.

Threads of one interpreter do not scale: PIL decodes without the interpreter lock, but opens pictures and hands out
their pixels with it, which is a fifth of the time. So two threads are nearly twice as fast as one
(`benchmarks/decode.py`), but no number of them is more than five times as fast. Processes need a few seconds to start,
so small jobs use threads.

The processes start with the first request, serve every one of this process, and end with it. They write pixels into
shared memory at a fixed place for each picture, so a request costs this process one message for eight pictures and one
copy of the result, into page-locked memory for a GPU. Requests made ahead keep all processes busy: their number bounds
the memory. The pixels are those of `load_each`, bit for bit.
"""

from __future__ import annotations

import atexit
import math
import mmap
import os
import pickle
import queue
import subprocess
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.decoding.packed import PackedImages
from cache_tools.decoding.worker import Answer, Job, Picture, Task, parts
from cache_tools.errors import DataError, error_from_data
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import ImageSet
from cache_tools.images.index import FileState, num_workers
from cache_tools.system.processes import command_for
from cache_tools.views.loading import load_each, needed_pictures
from cache_tools.views.recipe import ViewRecipe

if TYPE_CHECKING:
    import torch

FROM_PICTURES = 10_000  # fewer are decoded in threads before processes have started
PICTURES_PER_TASK = 8
TASKS_PER_WORKER = 2  # one that it works on and the next one
GRACE_S = 5.0

Wanted = Sequence[tuple[ViewRecipe, int]]  # as `load_each` takes it
Rows = npt.NDArray[np.int64]


def service_for(images: ImageSet, pictures: int) -> DecodeService | None:
    """The service of this process for a job that decodes or crops so many pictures; None if threads do.

    It starts no process before the first request.
    """
    if not isinstance(images, EncodedImages) or pictures < FROM_PICTURES or os.name == "nt":
        return None
    if isinstance(images, PackedImages) and images.canvases:  # there is nothing to compute
        return None
    return _service_of(os.getpid())


def start_loading(
    service: DecodeService | None, images: ImageSet, rows: Rows | slice, index: Rows, wanted: Wanted, *, pin: bool
) -> Callable[[], list[torch.Tensor]]:
    """Begin to load what `load_each` does; call the result to wait for it. Without a service it begins at that call.

    Args:
        pin: into page-locked memory, from which a GPU copies without waiting; tensors that are one stay one.
    """
    if service is not None and isinstance(images, EncodedImages):
        chosen = _rows_of(images, rows)
        return partial(service.load(images, chosen, index, wanted).result, pin=pin)

    def load() -> list[torch.Tensor]:
        loaded = load_each(images, rows, index, wanted)
        made = {id(pixels): pixels.pin_memory() if pin else pixels for pixels in loaded}
        return [made[id(pixels)] for pixels in loaded]

    return load


def load_canvases(images: ImageSet) -> Callable[[slice], npt.NDArray[np.uint8]]:
    """`images.load`, through the service of this process if there are many images."""
    service = service_for(images, len(images))
    if service is None:
        return images.load

    def load(rows: slice) -> npt.NDArray[np.uint8]:
        (pixels,) = start_loading(service, images, rows, _rows_of(images, rows), [(ViewRecipe(), 0)], pin=False)()
        return pixels.numpy()

    return load


class DecodeService:
    """Processes that decode pictures.

    Args:
        workers: their number.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = _SharedMemory()
        self._tasks: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._states: weakref.WeakKeyDictionary[EncodedImages, Rows] = weakref.WeakKeyDictionary()

    def load(self, images: EncodedImages, rows: Rows, index: Rows, wanted: Wanted) -> Loading:
        """Begin to load what `load_each` does. Any thread may ask; requests are worked on in order."""
        needed = needed_pictures(rows, index, wanted)
        count = len(needed.rows)
        canvas = images.image_size[0] if wanted[0][0].crop_size is None else None
        # Canvases are made once and shared out in `Loading.result`; crops are made for each view where they belong.
        taken = [None] if canvas is not None else needed.places
        lengths = [count if places is None else len(places) for places in taken]
        sizes = [recipe.crop_size or images.image_size for recipe, _ in wanted]
        shapes = [(length, 3, *size) for length, size in zip(lengths, sizes, strict=False)]
        crops = () if canvas is not None else tuple(wanted)
        decoded = images.decoded_for(wanted[0][0].needed)
        if isinstance(images, PackedImages):
            images = decoded  # without the file, if this holds pictures of another size
        job = Job(decoded.rules, canvas, images.interpolation, crops, tuple(shapes))
        region = self._memory.take(sum(map(math.prod, shapes)))
        loading = Loading(job, needed.places, region, self._memory)
        data, shown, states = pickle.dumps(job), _rows_of_each(count, taken), self._states_of(images)
        for start in range(0, count, PICTURES_PER_TASK):
            part = slice(start, start + PICTURES_PER_TASK)
            pictures = list(zip(needed.rows[part].tolist(), needed.samples[part].tolist(), shown[part], strict=True))
            task = _Queued(loading, data, images, states, pictures, Future())
            loading.futures.append(task.future)
            self._tasks.put(task)
        self._start()
        return loading

    def close(self) -> None:
        """End the processes; what they have not begun is given up."""
        with self._lock:
            threads, self._threads = self._threads, []
            with suppress(queue.Empty):
                while (queued := self._tasks.get_nowait()) is not None:
                    queued.future.set_exception(CancelledError())
            for _ in threads:
                self._tasks.put(None)
        for thread in threads:
            thread.join()

    def _states_of(self, images: EncodedImages) -> Rows:
        """The `FileState` of each image whose content was checked, int64 [N, 5]; zeros for the others."""
        with self._lock:
            return self._states.setdefault(images, np.zeros((len(images), len(FileState._fields)), np.int64))

    def _start(self) -> None:
        with self._lock:
            while len(self._threads) < self.workers:
                # A process ends with the thread that has started it, so each has a thread of its own.
                worker = _Worker(self._tasks, self._memory.file)
                thread = threading.Thread(target=worker.run, name=f"decode-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()


class Loading:
    """Pixels that are being loaded. Their memory is free again when nobody holds this and no process works on it."""

    def __init__(self, job: Job, places: Sequence[Rows | None], region: _Region, memory: _SharedMemory) -> None:
        self.job, self.region, self._places = job, region, places
        self.futures: list[Future[None]] = []
        self._give_back = weakref.finalize(self, memory.give_back, region)

    def result(self, *, pin: bool = False) -> list[torch.Tensor]:
        """Wait for the pixels, uint8 [B, 3, H, W] for each that is wanted; a canvas is one tensor for all of them.

        Raises:
            DataError: the first picture, in their order, that cannot be read or decoded.
        """
        import torch

        wait(self.futures)
        for future in self.futures:
            future.result()
        made = []
        for pixels in parts(self.region.memory, self.job.shapes):
            made.append(torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pin))
            made[-1].copy_(torch.from_numpy(pixels))
        self._give_back()
        if self.job.canvas is None:
            return made
        taken = [made[0] if places is None else made[0][torch.from_numpy(places)] for places in self._places]
        return [pixels.pin_memory() if pin else pixels for pixels in taken]


class _Region(NamedTuple):
    """A part of the shared memory."""

    start: int
    size: int
    memory: npt.NDArray[np.uint8]


class _SharedMemory:
    """Memory of all processes: a file without a name, which is gone when the last of them has ended."""

    def __init__(self) -> None:
        self.file = os.memfd_create("pictures") if hasattr(os, "memfd_create") else _unnamed_file()
        self._size = 0
        self._free: list[_Region] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> _Region:
        """A free region of at least this size: the smallest one, or new memory."""
        with self._lock:
            fitting = [region for region in self._free if region.size >= size]
            if fitting:
                best = min(fitting, key=lambda region: region.size)
                self._free = [region for region in self._free if region is not best]
                return best
            start, size = self._size, max(1, -(-size // mmap.ALLOCATIONGRANULARITY)) * mmap.ALLOCATIONGRANULARITY
            os.ftruncate(self.file, start + size)
            self._size = start + size
            return _Region(start, size, np.frombuffer(mmap.mmap(self.file, size, offset=start), np.uint8))

    def give_back(self, region: _Region) -> None:
        with self._lock:
            self._free.append(region)


@dataclass(frozen=True, eq=False)
class _Queued:
    """Some pictures of a request, each with its row, its sample number and the rows of the result that show it."""

    loading: Loading
    job: bytes
    images: EncodedImages
    states: Rows
    pictures: list[tuple[int, int, tuple[tuple[int, ...], ...]]]
    future: Future[None]

    def task(self) -> Task:
        """The message to a process. Pictures that are not files are read here, in the thread of that process.

        Raises:
            DataError: they cannot be read.
        """
        images, region = self.images, self.loading.region
        pictures = [
            Picture(
                images.place_in_file(row) if isinstance(images, PackedImages) else images.source_of(row),
                images.place_of(row),
                images.keys[row].tobytes(),
                FileState._make(self.states[row].tolist()),
                row,
                sample,
                shown,
            )
            for row, sample, shown in self.pictures
        ]
        return Task(self.job, (region.start, region.size), tuple(pictures))

    def one_by_one(self) -> list[_Queued]:
        """The same pictures as tasks of their own; the last one to end settles the future of this one."""
        left = len(self.pictures)
        lock = threading.Lock()

        def settle(one: Future[None]) -> None:
            nonlocal left
            with lock:
                left -= 1
                is_last = left == 0
            error = one.exception()
            if not self.future.done() and (error is not None or is_last):
                self.future.set_exception(error) if error is not None else self.future.set_result(None)

        tasks = [replace(self, pictures=[picture], future=Future()) for picture in self.pictures]
        for task in tasks:
            task.future.add_done_callback(settle)
        return tasks


class _Worker:
    """One process, and the thread that talks to it. A process that dies is replaced."""

    def __init__(self, tasks: queue.SimpleQueue[_Queued | None], file: int) -> None:
        self._tasks, self._file = tasks, file
        self._sent: deque[_Queued] = deque()

    def run(self) -> None:
        process = self._start()
        try:
            while self._send_next(process) or self._sent:
                try:
                    answer = pickle.load(process.stdout)  # type: ignore[arg-type]
                except (EOFError, pickle.UnpicklingError, OSError):
                    self._give_up(process)
                    process = self._start()
                    continue
                _settle(self._sent.popleft(), answer)
        finally:
            _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command_for("cache_tools.decoding.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._file,),
            process_group=0,  # Ctrl-C is for this process, which then ends the other
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        with suppress(OSError):
            _write(process, self._file)
        return process

    def _send_next(self, process: subprocess.Popen[bytes]) -> bool:
        """Fill up what the process has to do. Waits for a task only if it has none; False if there will be none."""
        while len(self._sent) < TASKS_PER_WORKER:
            try:
                queued = self._tasks.get(block=not self._sent)
            except queue.Empty:
                return True
            if queued is None:
                if self._sent:
                    self._tasks.put(None)  # after the answers
                    return True
                return False
            try:
                task = queued.task()
            except Exception as error:
                queued.future.set_exception(error)
                continue
            self._sent.append(queued)
            with suppress(OSError):  # it has died: reading its answer says so
                _write(process, task)
        return True

    def _give_up(self, process: subprocess.Popen[bytes]) -> None:
        """Ask for the tasks of a dead process again, picture by picture. A picture that was alone is the culprit."""
        _end(process)
        sent, self._sent = self._sent, deque()
        for number, queued in enumerate(sent):
            if number == 0 and len(queued.pictures) == 1:
                code = process.returncode
                end = f"signal {-code}" if code < 0 else f"exit status {code}"
                queued.future.set_exception(
                    DataError(
                        "decoding an image ended the process that decoded it",
                        where=queued.images.place_of(queued.pictures[0][0]),
                        found=f"{end}{', probably for lack of memory' if code == -9 else ''}",
                        next_step="replace the file, or remove it from the folder",
                    )
                )
            else:
                for one in queued.one_by_one() if number == 0 else [queued]:
                    self._tasks.put(one)


def _rows_of(images: ImageSet, rows: Rows | slice) -> Rows:
    return np.arange(len(images), dtype=np.int64)[rows] if isinstance(rows, slice) else rows


def _rows_of_each(count: int, taken: Sequence[Rows | None]) -> list[tuple[tuple[int, ...], ...]]:
    """For each of `count` pictures and each part of the result: the rows that show the picture."""
    found: list[list[list[int]]] = [[[] for _ in taken] for _ in range(count)]
    for part, places in enumerate(taken):
        for row, place in enumerate(range(count) if places is None else places.tolist()):
            found[place][part].append(row)
    return [tuple(map(tuple, of_picture)) for of_picture in found]


def _settle(queued: _Queued, answer: Answer) -> None:
    for row, state in answer.states:
        queued.states[row] = state
    if answer.error is None:
        queued.future.set_result(None)
    elif "traceback" in answer.error:
        queued.future.set_exception(RuntimeError(answer.error["traceback"]))
    else:
        queued.future.set_exception(error_from_data(answer.error))


def _write(process: subprocess.Popen[bytes], message: object) -> None:
    assert process.stdin is not None, "asked for a pipe"
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes of a process, which ends it, and wait for its end."""
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


_services: dict[int, DecodeService] = {}


def _service_of(process: int) -> DecodeService:
    """One service for all jobs of this process; a forked process has none yet."""
    if process not in _services:
        _services[process] = DecodeService(num_workers())
        atexit.register(_services[process].close)
    return _services[process]
