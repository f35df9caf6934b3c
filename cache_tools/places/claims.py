"""Share the blocks of one build among builders, on one host or several, over a shared disk or an object store.

A claim is a small file in a hidden folder beside the cache, `.NAME.claims/VIEW.BLOCK.GENERATION`, made with "only if it
is not there", which disks and object stores decide atomically. Its builder rewrites it while it works; one that has not
been rewritten for a minute belongs to nobody, and whoever makes the next generation takes the block over. So a crash
leaves no lock behind, only claims that expire. Claims save work; they are not what keeps a cache right: commits are.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType

from cache_tools.errors import StorageError
from cache_tools.places import Place

__all__ = ["EXPIRE_S", "GROW", "Claims", "claims_of", "growing"]

EXPIRE_S = 60.0
HEARTBEAT_S = 15.0
LOOK_EVERY_S = 10.0  # how often a builder with enough to do looks at what the others have finished
FIRST_POLL_S, POLL_S = 0.05, 1.0

Pair = tuple[int, int]

# Claims on what is no block, since no cache has so many views: they are not swept away with those on committed blocks.
GROW: Pair = (1 << 31, 1)  # held by whoever makes or grows a cache
_KEEP = (1 << 31) + 1


class Claims:
    """The blocks that this builder is working on. A context manager: leaving it gives up what is still claimed.

    Args:
        place: of the cache; the claims are beside it.
        expire_s: age from which a claim that is not renewed counts for nothing, by the clock of the place.
        heartbeat_s: how often a background thread renews this builder's claims.

    Attributes:
        elsewhere: blocks that `share` passed over because another builder committed them, in the order it noticed.
    """

    def __init__(self, place: Place, *, expire_s: float = EXPIRE_S, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._place, self._expire_s, self._heartbeat_s = claims_of(place), expire_s, heartbeat_s
        self.owner = uuid.uuid4().hex
        self.elsewhere: list[Pair] = []
        self._text, self._clock = claim_text(self.owner), Clock(self._place, self.owner)
        self._done: set[Pair] = set()
        self._held: dict[Pair, ClaimFile] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heartbeat.join()
        with suppress(StorageError):  # what cannot be removed expires
            for pair in list(self._held):
                self.release(pair)
            self._sweep()
            self._place.tidy()

    def share(
        self, missing: Iterable[Pair], committed: Callable[[], set[Pair]], is_committed: Callable[[Pair], bool]
    ) -> Iterator[Pair]:
        """Blocks of `missing` to compute here, in order, each claimed as it is handed out; ends when all are done.

        Blocks that others work on are waited for in the end, and taken over should their builders be gone. Asks the
        place for its claims once per block, and for its commits every ten seconds.

        Args:
            committed: says which blocks are committed by now.
            is_committed: the same of one block, without a look at the others.
        """
        left, looked_s, poll_s = list(missing), float("-inf"), FIRST_POLL_S
        while not self._stop.is_set():
            if time.monotonic() - looked_s > LOOK_EVERY_S:
                self._done, looked_s = committed(), time.monotonic()
                self.elsewhere += [pair for pair in left if pair in self._done]
                left = [pair for pair in left if pair not in self._done]
            if not left:
                return
            taken = newest_claims(self._place)
            pair = next((pair for pair in left if pair not in taken), None)
            if pair is not None and not self._take(pair, 0):
                continue  # another builder was faster
            if pair is None:
                pair = next((pair for pair in left if self._take_over(taken[pair])), None)
            if pair is None:
                self._stop.wait(poll_s)
                looked_s, poll_s = float("-inf"), min(2 * poll_s, POLL_S)
            elif self._stop.is_set():  # between our last look and our claim
                self.release(pair)
                self._place.tidy()
            elif is_committed(pair):  # another builder finished it in that time
                self.release(pair)
                looked_s = float("-inf")
            else:
                left.remove(pair)
                poll_s = FIRST_POLL_S
                yield pair

    def keep(self) -> None:
        """Show that somebody works here, beside others who do: a claim of one's own, on no block."""
        self._take((_KEEP, uuid.uuid4().int), 0)

    @contextmanager
    def alone(self, pair: Pair) -> Iterator[None]:
        """Hold one claim for the time of a `with` block, after waiting for whoever has it."""
        poll_s = FIRST_POLL_S
        while not self.claim(pair):
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, POLL_S)
        try:
            yield
        finally:
            with suppress(StorageError):  # what cannot be removed expires
                self.release(pair)

    def claim(self, pair: Pair) -> bool:
        """Claim a block, or take over an expired claim. False if another builder works on it."""
        newest = newest_claims(self._place).get(pair)
        return self._take(pair, 0) if newest is None else self._take_over(newest)

    def holds(self, pair: Pair) -> bool:
        """Whether a block is still ours: a builder that stood still for a minute may have lost it to another."""
        with self._lock:
            mine = self._held.get(pair)
        newest = newest_claims(self._place).get(pair)
        return mine is not None and newest is not None and newest.key == mine.key

    def release(self, pair: Pair) -> None:
        """Give a block up, after its commit or for another builder to do."""
        with self._lock:
            mine = self._held.pop(pair, None)
        if mine is not None:
            self._delete(
                claim for claim in all_claims(self._place) if claim.pair == pair and claim.generation <= mine.generation
            )

    def _take(self, pair: Pair, generation: int) -> bool:
        claim = ClaimFile(pair, generation)
        if not self._place.put(claim.key, self._text, only_new=True, durable=False):
            return False
        with self._lock:
            self._held[pair] = claim
        return True

    def _take_over(self, claim: ClaimFile) -> bool:
        return self._is_void(claim) and self._take(claim.pair, claim.generation + 1)

    def _is_void(self, claim: ClaimFile) -> bool:
        return is_dead(self._place, claim) or self._clock.now_s() - claim.modified_s > self._expire_s

    def _sweep(self) -> None:
        """Remove what killed builders left behind; on committed blocks at once, since nobody takes these over."""
        self._delete(claim for claim in all_claims(self._place) if claim.pair in self._done or self._is_void(claim))
        self._clock.sweep(self._expire_s)

    def _delete(self, claims: Iterable[ClaimFile]) -> None:
        self._place.delete([claim.key for claim in claims])

    def _renew(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with self._lock:
                held = dict(self._held)
            for pair, claim in held.items():
                try:
                    self._place.put(claim.key, self._text, durable=False)
                    with self._lock:
                        released = self._held.get(pair) != claim
                    if released:  # while we wrote: it is back now
                        self._delete([claim])
                except StorageError:  # the next beat tries again; the writer meets the same trouble and reports it
                    continue


@contextmanager
def growing(place: Place) -> Iterator[None]:
    """Be the only one who makes or grows the cache at a place, after waiting for whoever does."""
    with Claims(place) as claims, claims.alone(GROW):
        yield


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
