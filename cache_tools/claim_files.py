"""The files that claims are made of: their names, whose they are, and what time it is where they lie."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from cache_tools.place import Place

LOOK_AT_CLOCK_EVERY_S = 60.0
_NAME = re.compile(r"([0-9]+)\.([0-9]+)\.([0-9]+)")
_CLOCK = "now."


@dataclass(frozen=True)
class ClaimFile:
    """A claim on a block (view, block): its generation, and when it was last renewed by the clock of its place (s)."""

    pair: tuple[int, int]
    generation: int
    modified_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.pair[0]}.{self.pair[1]}.{self.generation}"


class Clock:
    """The time of a place, by whose clock its files are dated: clocks of hosts differ.

    It is asked once a minute; in between this host's monotonic clock goes on from there.
    """

    def __init__(self, place: Place, owner: str) -> None:
        self._place, self._key = place, f"{_CLOCK}{owner}"
        self._asked_s, self._ahead_s = float("-inf"), 0.0

    def now_s(self) -> float:
        """Seconds since 1970."""
        if time.monotonic() - self._asked_s > LOOK_AT_CLOCK_EVERY_S:
            self._place.put(self._key, b"", durable=False)
            times = [entry.modified_s for entry in self._place.entries() if entry.key == self._key]
            self._place.delete([self._key])
            self._asked_s = time.monotonic()
            self._ahead_s = (times[0] if times else time.time()) - self._asked_s
        return time.monotonic() + self._ahead_s

    def sweep(self, age_s: float) -> None:
        """Remove the files of others who asked and were killed before they had the answer."""
        strange = [entry for entry in self._place.entries() if entry.key.startswith(_CLOCK)]
        self._place.delete([entry.key for entry in strange if self.now_s() - entry.modified_s > age_s])


def claims_of(place: Place) -> Place:
    """Where the claims on a cache's blocks are: beside it, since other zarr readers warn of strange files in it."""
    return place.sibling(f".{place.name}.claims")


def claim_text(owner: str) -> bytes:
    """What a claim says of its builder: who, and which process of which machine."""
    return json.dumps(
        {"owner": owner, "machine": machine_name(), "pid": os.getpid(), "started": _started(os.getpid())}
    ).encode()


def all_claims(place: Place) -> Iterator[ClaimFile]:
    """Every claim in a folder of claims, also those that were taken over."""
    for entry in place.entries():
        if match := _NAME.fullmatch(entry.key):
            yield ClaimFile((int(match[1]), int(match[2])), int(match[3]), entry.modified_s)


def newest_claims(place: Place) -> dict[tuple[int, int], ClaimFile]:
    """The claim that counts on each block, by (view, block)."""
    newest: dict[tuple[int, int], ClaimFile] = {}
    for claim in all_claims(place):
        if claim.pair not in newest or newest[claim.pair].generation < claim.generation:
            newest[claim.pair] = claim
    return newest


def is_dead(place: Place, claim: ClaimFile) -> bool:
    """Whether a claim is of a process of this machine that is gone: no need to wait until it expires then."""
    try:
        found = json.loads(place.read(claim.key))
        if found["machine"] != machine_name() or os.name == "nt":  # there, asking after a process disturbs it
            return False
        os.kill(int(found["pid"]), 0)
        return bool(_started(int(found["pid"])) != found["started"])
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # gone, half a file of a foreign tool, or another user's


@cache
def machine_name() -> str:
    """Where process numbers mean the same: this boot of this host, this container. Host names alone repeat."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode():012x}"


def _started(pid: int) -> str | None:
    """When a process began, in ticks since the boot: numbers are used again. None if it is dead or cannot be seen."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
