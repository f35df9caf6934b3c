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
from types import TracebackType

from cache_tools.errors import StorageError
from cache_tools.place import Entry, Place

EXPIRE_S = 60.0
HEARTBEAT_S = 15.0
POLL_S = 1.0

Pair = tuple[int, int]
_NAME = re.compile(r"([0-9]+)\.([0-9]+)\.([0-9]+)")


class Claims:
    """The blocks that this builder is working on. A context manager: leaving it gives up what is still claimed.

    Args:
        place: of the cache; the claims are beside it.
        expire_s: age from which a claim that is not renewed counts for nothing, by the clock of the place.
        heartbeat_s: how often a background thread renews this builder's claims.
    """

    def __init__(self, place: Place, *, expire_s: float = EXPIRE_S, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._place, self._expire_s, self._heartbeat_s = claims_of(place), expire_s, heartbeat_s
        self.owner = uuid.uuid4().hex
        self._text = json.dumps({"owner": self.owner, "host": socket.gethostname(), "pid": os.getpid()}).encode()
        self._held: dict[Pair, str] = {}
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
        for pair in list(self._held):
            self.release(pair)
        self._place.tidy()

    def share(self, missing: Iterable[Pair], committed: Callable[[], set[Pair]]) -> Iterator[Pair]:
        """Blocks of `missing` to compute here, in order, each claimed as it is handed out; ends when all are done.

        Blocks that others work on are waited for in the end, and taken over should their claims expire.

        Args:
            committed: says which blocks are committed by now.
        """
        left = list(missing)
        while left and not self._stop.is_set():
            done, others = committed(), []
            for pair in left:
                if self._stop.is_set():
                    return
                if pair in done:
                    continue
                if not self.claim(pair):
                    others.append(pair)
                elif pair in committed():  # by another, between our look and our claim
                    self.release(pair)
                else:
                    yield pair
            left = others
            if left:
                self._stop.wait(POLL_S)

    def claim(self, pair: Pair) -> bool:
        """Claim a block, or take over an expired claim. False if another builder works on it."""
        found = self._of(pair)
        newest = max(found, key=lambda entry: _generation(entry.key), default=None)
        if newest is not None and not self._expired(newest):
            return False
        generation = 0 if newest is None else _generation(newest.key) + 1
        key = f"{pair[0]}.{pair[1]}.{generation}"
        if not self._place.put(key, self._text, only_new=True):
            return False
        with self._lock:
            self._held[pair] = key
        return True

    def release(self, pair: Pair) -> None:
        """Give a block up, after its commit or for another builder to do."""
        with self._lock:
            if self._held.pop(pair, None) is None:
                return
        self._place.delete([entry.key for entry in self._of(pair)])

    def _of(self, pair: Pair) -> list[Entry]:
        return [entry for entry in self._place.entries() if _pair(entry.key) == pair]

    def _expired(self, entry: Entry) -> bool:
        return self._dead(entry.key) or self._now() - entry.modified_s > self._expire_s

    def _dead(self, key: str) -> bool:
        """Whether the claim is of a process of this host that is gone: no need to wait then."""
        try:
            claim = json.loads(self._place.read(key))
            if claim["host"] != socket.gethostname():
                return False
            os.kill(int(claim["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError, TypeError):  # gone, half a file of a foreign tool, or another user's
            return False
        return False

    def _now(self) -> float:
        """The place's own time: clocks of hosts differ."""
        key = f"now.{self.owner}"
        self._place.put(key, b"")
        times = [entry.modified_s for entry in self._place.entries() if entry.key == key]
        self._place.delete([key])
        return times[0] if times else time.time()

    def _renew(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with self._lock:
                keys = list(self._held.values())
            for key in keys:
                try:
                    self._place.put(key, self._text)
                except StorageError:  # the next beat tries again; the writer meets the same trouble and reports it
                    continue


def claims_of(place: Place) -> Place:
    """Where the claims on a cache's blocks are: beside it, since other zarr readers warn of strange files in it."""
    return place.sibling(f".{place.name}.claims")


def _pair(key: str) -> Pair | None:
    match = _NAME.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def _generation(key: str) -> int:
    match = _NAME.fullmatch(key)
    assert match is not None, "only names of claims are asked"
    return int(match[3])
