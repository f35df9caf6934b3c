"""Leases of students that follow a build: which view each of them needs next.

A lease is a small file in a hidden folder beside the cache, `.NAME.followers/KEY`. Its run writes it when it begins and
after every epoch, and again at each heartbeat. The builder of a rolling cache drops views that all of them have passed.
A run that was killed keeps its lease for as long as the builder allows, and takes it up again when it goes on.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from cache_tools.errors import CacheError, FormatError
from cache_tools.format.rolling import MAX_VIEWS
from cache_tools.places import Place
from cache_tools.places.clock import Clock, Expiry

LEASE_S = 3600.0
HEARTBEAT_S = 15.0

_KEY = re.compile(r"[0-9a-f]{16}")
_MAX_LEASE_BYTES = 1 << 16
_MOST_TEXT = 200


class Lease:
    """The lease of a run. A background thread renews it until `stop`, which leaves the file where it is.

    Args:
        place: the cache.
        key: of the run, 16 hex digits; the same when it goes on after a kill.
        run: names the run for people.
        view: the first view that it needs.
    """

    def __init__(self, place: Place, key: str, run: str, view: int, *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._place, self._key, self._run, self._heartbeat_s = leases_place(place), key, run, heartbeat_s
        self._view, self._lock, self._stop = view, threading.Lock(), threading.Event()
        self._put()
        self._heartbeat = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)
        self._heartbeat.start()

    def move(self, view: int) -> None:
        """The run needs no view before this one any more."""
        self._view = view
        self._put()

    def stop(self) -> None:
        """Stop renewing it: the run may go on later."""
        self._stop.set()
        self._heartbeat.join()

    def end(self) -> None:
        """Give it up: the run has seen all its views."""
        self.stop()
        with suppress(CacheError):  # it expires
            self._place.delete([self._key])
            self._place.tidy()

    def _put(self) -> None:
        with self._lock:
            content = json.dumps({"view": self._view, "run": self._run, "write": uuid.uuid4().hex})
            self._place.put(self._key, content.encode(), durable=False)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with suppress(CacheError):  # again at the next heartbeat; after an epoch the run meets the same error
                self._put()


@dataclass(frozen=True)
class FollowingRun:
    """A run that follows a build, as the builder sees it.

    Attributes:
        view: the first view that it needs.
        run: its name for people.
        age_s: since it last renewed its lease.
    """

    view: int
    run: str
    age_s: float


class Followers:
    """The runs that follow a build, from their leases.

    Args:
        place: the cache.
        lease_s: for how long the lease of a run that does not renew it counts.
    """

    def __init__(self, place: Place, lease_s: float = LEASE_S) -> None:
        self._place = leases_place(place)
        self._expiry = Expiry(Clock(self._place, uuid.uuid4().hex), lease_s)

    def living(self) -> list[FollowingRun]:
        """Those whose leases count. Removes the others."""
        found = []
        for entry in [each for each in self._place.entries() if _KEY.fullmatch(each.key)]:
            if self._expiry.has_expired(entry.key, entry.modified_s):
                self._place.delete([entry.key])
            elif (content := self._read(entry.key)) is not None:
                found.append(FollowingRun(*content, age_s=max(0.0, self._expiry.age_s(entry.modified_s))))
        return found

    def _read(self, key: str) -> tuple[int, str] | None:
        """The view and the name in a lease. One that cannot be read holds everything; None if it is gone."""
        try:
            content = json.loads(self._place.read(key, _MAX_LEASE_BYTES))
            view, run = content["view"], content["run"]
            if type(view) is int and 0 <= view <= MAX_VIEWS and isinstance(run, str):
                return view, run[:_MOST_TEXT]
        except FileNotFoundError:
            return None
        except (FormatError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return 0, f"a damaged lease ({key})"


def slowest(followers: Sequence[FollowingRun]) -> FollowingRun | None:
    """The one that needs the earliest view."""
    return min(followers, key=lambda each: each.view, default=None)


def leases_place(place: Place) -> Place:
    """The folder of leases, beside the cache: other zarr readers warn of unknown files in it."""
    return place.sibling(f".{place.name}.followers")


def remove_leases(place: Place) -> None:
    """Remove all leases of a cache that is gone."""
    with suppress(CacheError, OSError):
        leases = leases_place(place)
        leases.delete(list(leases.keys()))
        leases.tidy()
