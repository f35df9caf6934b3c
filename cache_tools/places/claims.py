"""Share the blocks of one build among builders, on one host or several, over a shared disk or an object store.

A claim is a small file in a hidden folder beside the cache, `.NAME.claims/VIEW.BLOCK.GENERATION`. It is created only if
it does not exist yet, which disks and object stores decide atomically. Its builder rewrites it at each heartbeat. A
claim that was not rewritten for a minute has expired: another builder takes the block over by creating the next
generation. So a crash leaves no lock behind, only claims that expire. Claims save double work; it is commits that keep
a cache correct.

`Expiry` says when a claim has expired, also where the clock of its place is set.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType

from cache_tools.errors import CacheError, FormatError, StorageError, UnsafeFileError
from cache_tools.format.commits import BlockId
from cache_tools.places import Place
from cache_tools.places.clock import Clock, Expiry

__all__ = ["EXPIRE_S", "GROW", "Claims", "claims_place", "growing", "if_permitted", "remove_dead_claims"]

EXPIRE_S = 60.0
HEARTBEAT_S = 15.0
LIST_COMMITS_EVERY_S = 10.0  # how often a busy builder lists what the others have committed
FIRST_POLL_S, POLL_S = 0.05, 1.0

# No cache has this many views, so these claims are on no block, and are not removed with claims on committed blocks.
GROW = BlockId(1 << 31, 1)  # held while a builder creates or grows a cache
_IN_USE_VIEW = (1 << 31) + 1
_MARKED_VIEWS = 1 << 32  # marks on views follow: view 3 is this plus 3

_CLAIM_NAME = re.compile(r"([0-9]+)\.([0-9]+)\.([0-9]+)")
_MAX_CLAIM_BYTES = 1 << 16


class Claims:
    """The blocks that this builder is working on. A context manager: leaving it releases what is still claimed.

    Args:
        place: the cache; the claims are beside it.
        expire_s: a claim that was not renewed for this long has expired, by the clock of the place.
        heartbeat_s: how often a background thread renews this builder's claims.

    Attributes:
        done_by_others: blocks that `share` left out because other builders committed them, in the order noticed.
    """

    def __init__(self, place: Place, *, expire_s: float = EXPIRE_S, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._place, self._expire_s, self._heartbeat_s = claims_place(place), expire_s, heartbeat_s
        self.owner = uuid.uuid4().hex
        self.done_by_others: list[BlockId] = []
        self._content, self._clock = claim_content(self.owner), Clock(self._place, self.owner)
        self._expiry = Expiry(self._clock, expire_s)
        self._committed: set[BlockId] = set()
        self._held: dict[BlockId, ClaimFile] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew_until_stopped, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heartbeat.join()
        with suppress(StorageError):  # claims that cannot be removed expire
            for block in list(self._held):
                self.release(block)
            self._remove_leftovers()
            self._place.tidy()

    @property
    def are_released(self) -> bool:
        """Whether this builder has left the context: it may claim nothing more."""
        return self._stop.is_set()

    def share(
        self,
        missing: Iterable[BlockId],
        list_committed: Callable[[], set[BlockId]],
        is_committed: Callable[[BlockId], bool],
    ) -> Iterator[BlockId]:
        """Yield the blocks of `missing` that this builder is to compute, each just claimed, until all are done.

        Blocks that others work on come last: this builder waits for them, and takes them over if their builders are
        gone. It lists the claims once per block, and the commits every ten seconds.

        Args:
            list_committed: lists all blocks that are committed by now.
            is_committed: checks one block without listing the others.
        """
        for (block,) in self.share_groups(missing, list_committed, is_committed, at_once=1):
            yield block

    def share_groups(
        self,
        missing: Iterable[BlockId],
        list_committed: Callable[[], set[BlockId]],
        is_committed: Callable[[BlockId], bool],
        *,
        at_once: int,
    ) -> Iterator[list[BlockId]]:
        """`share` for up to `at_once` views of the same rows at a time. Lists the claims once per group."""
        left, listed_s, poll_s = list(missing), float("-inf"), FIRST_POLL_S
        while not self._stop.is_set():
            if time.monotonic() - listed_s > LIST_COMMITS_EVERY_S:
                self._committed, listed_s = list_committed(), time.monotonic()
                self.done_by_others += [block for block in left if block in self._committed]
                left = [block for block in left if block not in self._committed]
            if not left:
                return
            claims = newest_claims(self._place)
            block = next((block for block in left if block not in claims), None)
            if block is not None and not self._create_claim(block, 0):
                continue  # another builder was faster
            if block is None:
                block = next((block for block in left if self._take_over(claims[block])), None)
            if block is None:
                self._stop.wait(poll_s)
                listed_s, poll_s = float("-inf"), min(2 * poll_s, POLL_S)
            elif self._stop.is_set():  # between the loop's check and our claim
                self.release(block)
                self._place.tidy()
            elif is_committed(block):  # another builder finished it between our listing and our claim
                self.release(block)
                listed_s = float("-inf")
            else:
                group = [block]
                for other in left:
                    if len(group) < at_once and other.block == block.block and other != block:
                        group += self._claim_beside(other, claims, is_committed)
                left = [each for each in left if each not in set(group)]
                poll_s = FIRST_POLL_S
                yield group

    def _claim_beside(
        self, block: BlockId, claims: Mapping[BlockId, ClaimFile], is_committed: Callable[[BlockId], bool]
    ) -> list[BlockId]:
        """The block if this builder gets it now, for the group of another one; else nothing."""
        is_ours = self._take_over(claims[block]) if block in claims else self._create_claim(block, 0)
        if is_ours and (self._stop.is_set() or is_committed(block)):  # `share_groups` meets it again
            self.release(block)
            is_ours = False
        return [block] if is_ours else []

    def wait(self, seconds: float) -> bool:
        """Wait for something else than a claim. Returns whether this builder gives up meanwhile."""
        return self._stop.wait(seconds)

    def prevent_pruning(self) -> BlockId:
        """Mark the cache as in use without claiming a block. Any number of builders may do so at once."""
        mark = BlockId(_IN_USE_VIEW, uuid.uuid4().int)
        self._create_claim(mark, 0)
        return mark

    def mark_view(self, view: int) -> BlockId:
        """Mark a view as in use without claiming its blocks. Any number of processes may do so; `release` ends it."""
        mark = BlockId(_MARKED_VIEWS + view, uuid.uuid4().int)
        self._create_claim(mark, 0)
        return mark

    def marks(self) -> dict[BlockId, int]:
        """The living marks on views, and of whole caches with −1 for the view; those of this process included."""
        found = {}
        for claim in all_claims(self._place):
            view = -1 if claim.block.view == _IN_USE_VIEW else claim.block.view - _MARKED_VIEWS
            if view >= -1 and not self._is_void(claim):
                found[claim.block] = view
        return found

    @contextmanager
    def holding(self, block: BlockId) -> Iterator[None]:
        """Hold a claim inside a `with` block; wait first while another builder holds it."""
        poll_s = FIRST_POLL_S
        while not self.claim(block):
            time.sleep(poll_s)
            poll_s = min(2 * poll_s, POLL_S)
        try:
            yield
        finally:
            with suppress(StorageError):  # a claim that cannot be removed expires
                self.release(block)

    def claim(self, block: BlockId) -> bool:
        """Claim a block, or take over an expired claim. False if another builder works on it."""
        newest = newest_claims(self._place).get(block)
        return self._create_claim(block, 0) if newest is None else self._take_over(newest)

    def holds(self, block: BlockId) -> bool:
        """Whether a claimed block is still ours: a builder that was suspended for a minute may have lost it."""
        with self._lock:
            own = self._held.get(block)
        newest = newest_claims(self._place).get(block)
        return own is not None and newest is not None and newest.key == own.key

    def release(self, block: BlockId) -> None:
        """Give a block up: after its commit, or so that another builder computes it."""
        with self._lock:
            own = self._held.pop(block, None)
        if own is not None:
            self._delete(
                claim
                for claim in all_claims(self._place)
                if claim.block == block and claim.generation <= own.generation
            )

    def _create_claim(self, block: BlockId, generation: int) -> bool:
        claim = ClaimFile(block, generation)
        if not self._place.put(claim.key, self._content, only_new=True, durable=False):
            return False
        with self._lock:
            self._held[block] = claim
        return True

    def _take_over(self, claim: ClaimFile) -> bool:
        return self._is_void(claim) and self._create_claim(claim.block, claim.generation + 1)

    def _is_void(self, claim: ClaimFile) -> bool:
        return owner_is_gone(self._place, claim) or self._expiry.has_expired(claim.key, claim.modified_s)

    def _remove_leftovers(self) -> None:
        """Remove the claims of killed builders; those on committed blocks at once, since nobody takes them over."""
        self._delete(
            claim for claim in all_claims(self._place) if claim.block in self._committed or self._is_void(claim)
        )
        self._clock.remove_leftovers(self._expire_s)

    def _delete(self, claims: Iterable[ClaimFile]) -> None:
        self._place.delete([claim.key for claim in claims])

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with self._lock:
                held = dict(self._held)
            for block, claim in held.items():
                try:
                    self._place.put(claim.key, self._content, durable=False)
                    with self._lock:
                        released = self._held.get(block) != claim
                    if released:  # during our write, which has just created the file again
                        self._delete([claim])
                except CacheError:  # try again at the next heartbeat; the writer meets the same error and reports it
                    continue


@contextmanager
def growing(place: Place) -> Iterator[None]:
    """Create or grow the cache at a place while no other builder does; wait first while one does."""
    with Claims(place) as claims, claims.holding(GROW):
        yield


@contextmanager
def if_permitted(claim: AbstractContextManager[None]) -> Iterator[None]:
    """Hold a claim, unless files beside the target may not be written, as in a mounted folder."""
    with ExitStack() as stack:
        with suppress(StorageError):
            stack.enter_context(claim)
        yield


def remove_dead_claims(place: Place) -> None:
    """Remove what killed builders left beside a cache, for a command that has nothing to do there.

    Does nothing where files beside the cache cannot be listed or removed.
    """
    with suppress(StorageError, OSError):
        if any(True for _ in claims_place(place).entries()):
            with Claims(place):
                pass


def claims_place(place: Place) -> Place:
    """The folder of claims on a cache's blocks, beside the cache: other zarr readers warn of unknown files in it."""
    return place.sibling(f".{place.name}.claims")


@dataclass(frozen=True)
class ClaimFile:
    """A claim on a block, its generation, and when it was last renewed by the clock of its place (s)."""

    block: BlockId
    generation: int
    modified_s: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.block.view}.{self.block.block}.{self.generation}"


def claim_content(owner: str) -> bytes:
    """The content of a claim file: its builder, and the builder's machine and process."""
    return json.dumps(
        {"owner": owner, "machine": machine_name(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    ).encode()


def all_claims(place: Place) -> Iterator[ClaimFile]:
    """Every claim in a folder of claims, also those that were taken over."""
    for entry in place.entries():
        if match := _CLAIM_NAME.fullmatch(entry.key):
            view, block, generation = map(int, match.groups())
            yield ClaimFile(BlockId(view, block), generation, entry.modified_s)


def newest_claims(place: Place) -> dict[BlockId, ClaimFile]:
    """The claim of the newest generation on each block: the one that counts."""
    newest: dict[BlockId, ClaimFile] = {}
    for claim in all_claims(place):
        if claim.block not in newest or newest[claim.block].generation < claim.generation:
            newest[claim.block] = claim
    return newest


def owner_is_gone(place: Place, claim: ClaimFile) -> bool:
    """Whether a claim is of a process of this machine that has ended: then nobody need wait until it expires."""
    try:
        content = json.loads(place.read(claim.key, _MAX_CLAIM_BYTES))
        if content["machine"] != machine_name() or os.name == "nt":  # there, os.kill(pid, 0) disturbs the process
            return False
        os.kill(int(content["pid"]), 0)
        return bool(_start_time(int(content["pid"])) != content["started"])
    except ProcessLookupError:
        return True
    except UnsafeFileError:
        raise
    except (OSError, FormatError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # the claim is gone or damaged, or the process is another user's


@cache
def machine_name() -> str:
    """Name of the scope of process ids: this boot of this host, this container. Host names alone are not unique."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode():012x}"


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since the boot: process ids are reused. None if it has ended or is hidden."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
