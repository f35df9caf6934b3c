"""Which trial of a sweep starts next, and on which GPU, so that the trials of a GPU fit into its memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.recipe import TrainRecipe

# Settings that change no memory: neither do fractions such as rates, weights and temperatures.
_WITHOUT_MEMORY = {"name", "seed", "epochs", "schedule", "out", "loggers", "label_seed", "evaluate_every"}
_WITHOUT_MEMORY |= {"checkpoint_every_minutes", "max_minutes", "deterministic", "download", "stage_budget"}
_PACKED_LESS = 0.9
"""After a trial has run out of memory, its GPU takes so much of what ran there by the estimates."""


class Start(NamedTuple):
    """A trial that starts now."""

    trial: int
    gpu: str


@dataclass
class _Running:
    """A running trial. One that is not measured yet, or is tried again alone, takes all the room that it found.

    Attributes:
        had_company: whether others have run on its GPU at the same time.
    """

    gpu: str
    room: int
    is_measured: bool = False
    is_alone: bool = False
    had_company: bool = False


class Packing:
    """Packs trials onto GPUs by the most memory that trials like them have held.

    A trial like no other before takes all the room that is left on a GPU, at least half of it, until it is measured.
    Then other trials join it there. Trials that ran out of memory are tried again at the end, each alone on a GPU.

    Args:
        keys: for each trial what decides its memory (`memory_key`). Trials are named by their places in this list.
        budgets: bytes of each GPU that trials may take.
        peaks: key → bytes, of earlier trials.
        most: number of trials that run at a time, on all GPUs together.
    """

    def __init__(self, keys: Sequence[str], budgets: Mapping[str, int], peaks: Mapping[str, int], most: int) -> None:
        self.keys, self.budgets, self.peaks, self._most = keys, dict(budgets), dict(peaks), most
        self._waiting = list(range(len(keys)))
        self._alone: list[int] = []
        self._running: dict[int, _Running] = {}

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""
        return not (self._waiting or self._alone or self._running)

    def used(self, gpu: str) -> int:
        """Bytes of a GPU that its trials take, by the estimates."""
        return sum(self._estimate(trial) for trial, running in self._running.items() if running.gpu == gpu)

    def start(self) -> Start | None:
        """The next trial that may start now; None if one has to end, or to be measured, first."""
        if len(self._running) >= self._most:
            return None
        return self._start_unmeasured() or self._start_measured() or self._start_alone()

    def measure(self, trial: int, num_bytes: int) -> None:
        """Record how much memory a trial has held at most, so far."""
        key = self.keys[trial]
        self.peaks[key] = max(num_bytes, self.peaks.get(key, 0))
        self._running[trial].is_measured = True

    def end(self, trial: int) -> None:
        """A running trial has ended."""
        del self._running[trial]

    def retry(self, trial: int) -> bool:
        """Let a running trial, whose process has died, start again at the end, alone on a GPU.

        Returns:
            False if it was tried again already: then it has ended.
        """
        is_first_time = not self._running.pop(trial).is_alone
        if is_first_time:
            self._alone.append(trial)
        return is_first_time

    def retry_with_more_memory(self, trial: int) -> bool:
        """`retry` of a trial that has run out of memory beside others. Its GPU is packed less from now on.

        Returns:
            False if it had the GPU for itself: then it has ended.
        """
        running = self._running[trial]
        if not running.had_company:
            self.end(trial)
            return False
        self.budgets[running.gpu] = min(self.budgets[running.gpu], int(_PACKED_LESS * self.used(running.gpu)))
        return self.retry(trial)

    def _start_unmeasured(self) -> Start | None:
        """Start a trial like no other before; one like a trial that is being measured needs an idle GPU."""
        new = [trial for trial in self._waiting if self.keys[trial] not in self.peaks]
        if not new:
            return None
        in_progress = {self.keys[trial] for trial in self._running}
        trial = min(new, key=lambda trial: self.keys[trial] in in_progress)  # the first of equals
        gpu, room = self._most_room(self.budgets)
        if 2 * room < self.budgets[gpu] or (self.keys[trial] in in_progress and self._trials_on(gpu)):
            return None
        return self._begin(self._waiting, trial, _Running(gpu, room))

    def _start_measured(self) -> Start | None:
        known = [trial for trial in self._waiting if self.keys[trial] in self.peaks]
        gpus = list(self.budgets)
        if len(known) < len(self._waiting):  # the emptiest GPU is for a trial like no other before
            gpus.remove(self._most_room(gpus)[0])
        for trial in known:
            need = self.peaks[self.keys[trial]]
            if need > max(self.budgets.values()):
                self._waiting.remove(trial)
                self._alone.append(trial)
            elif gpus and self._most_room(gpus)[1] >= need:
                return self._begin(self._waiting, trial, _Running(self._most_room(gpus)[0], need, is_measured=True))
        return None

    def _start_alone(self) -> Start | None:
        idle = [gpu for gpu in self.budgets if not self._trials_on(gpu)]
        if not idle or not self._alone or self._waiting:
            return None
        gpu, room = self._most_room(idle)
        return self._begin(self._alone, self._alone[0], _Running(gpu, room, is_alone=True))

    def _begin(self, queue: list[int], trial: int, running: _Running) -> Start:
        queue.remove(trial)
        for other in self._running.values():
            if other.gpu == running.gpu:
                other.had_company = running.had_company = True
        self._running[trial] = running
        return Start(trial, running.gpu)

    def _trials_on(self, gpu: str) -> int:
        return sum(running.gpu == gpu for running in self._running.values())

    def _most_room(self, gpus: Collection[str]) -> tuple[str, int]:
        """The GPU with the most room, the first of equals, and its room."""
        gpu = max(gpus, key=self._room)
        return gpu, self._room(gpu)

    def _room(self, gpu: str) -> int:
        return self.budgets[gpu] - self.used(gpu)

    def _estimate(self, trial: int) -> int:
        running = self._running[trial]
        return self.peaks[self.keys[trial]] if running.is_measured and not running.is_alone else running.room


def memory_key(recipe: TrainRecipe) -> str:
    """The student's name and a digest of all settings that decide how much memory a run takes."""
    data: dict[str, Any] = recipe.model_dump(mode="json", exclude=_WITHOUT_MEMORY)
    data["ema_decay"] = recipe.ema_decay is not None
    for part in ("loss", "optimiser"):
        data[part] = {key: value for key, value in data[part].items() if not isinstance(value, float)}
    data["label_fraction"] = recipe.label_fraction < 1.0
    digest = hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{recipe.student} {digest}"
