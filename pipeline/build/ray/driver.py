"""The process that talks to Ray for `build_on_ray`: it keeps actors running and hands them the missing blocks.

Every actor has a few groups of blocks in flight, so that it loads, computes and writes at the same time, and fast ones
get more than slow ones. Groups of an actor that is lost go to others. More actors are started while the cluster has
room for them, so nodes may join and leave.
"""

from __future__ import annotations

import importlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cache_tools.errors import StorageError, error_from_data
from cache_tools.format.commits import BlockId
from cache_tools.system.processes import CLAIM
from train.sweep.ray.cluster import reason_of, send, serve

IN_FLIGHT = 3
THREADS = 2 * IN_FLIGHT + 4  # of an actor: for groups, `prepare`, `open_cache` and `leave`
WAIT_S, LOOK_EVERY_S, LEAVE_S = 0.5, 2.0, 60.0
GOODBYE_S = 5.0
MOST_LOSSES = 5
"""So many actors may be lost at the same group, or one after the other before they have computed anything."""

Send = Callable[[Mapping[str, Any]], None]
Group = tuple[BlockId, ...]


def main() -> None:
    """Connect, then build."""
    serve(lambda job: Build(job, send).run(), "build")


@dataclass(eq=False)
class Actor:
    """An actor that is starting or works.

    Attributes:
        handle: of Ray.
        has_begun: it may open the cache, or has opened it.
        is_ready: it takes blocks.
        moved: bytes to and from an object store.
    """

    handle: Any
    has_begun: bool = False
    is_ready: bool = False
    moved: int = 0
    groups: set[Group] = field(default_factory=set)


class Build:
    """One build.

    Args:
        job: `job` (JSON of `worker.Job`), `cpus` and `gpus` of each actor, and the number of `workers`, None for as
            many as the cluster has room for.
        send: sends messages to the command: `ready`, `rows` with `bytes` and `workers`, and `built`.
    """

    def __init__(self, job: Mapping[str, Any], send: Send) -> None:
        import ray

        self._job, self._send, self._looked_s = job, send, float("-inf")
        resources = {"num_cpus": job["cpus"], "num_gpus": job["gpus"], "max_restarts": 0, "max_concurrency": THREADS}
        self._new_actor = ray.remote(_worker_class()).options(**resources).remote
        self._actors: list[Actor] = []
        self._waiting: deque[Group] = deque()
        self._calls: dict[Any, tuple[Actor, Group | None]] = {}  # a call's reference → its actor, None for `prepare`
        self._losses: Counter[Group] = Counter()
        self._failed_starts = 0
        self._ready: dict[str, Any] | None = None
        self._rows: Sequence[int] = ()
        self._left = self._moved_by_lost = 0

    def run(self) -> None:
        """Build, and tell the command about it."""
        import ray

        try:
            while self._ready is None or self._left:
                self._start_actors()
                done, _ = ray.wait(list(self._calls), num_returns=1, timeout=WAIT_S) if self._calls else ([], [])
                for call in done:
                    self._finish(call)
                self._hand_out()
            self._leave(now=False, patience_s=LEAVE_S)
            self._send({"built": {"bytes": self._moved}})
        finally:
            self._leave(now=True, patience_s=GOODBYE_S)

    @property
    def _moved(self) -> int:
        return self._moved_by_lost + sum(actor.moved for actor in self._actors)

    def _start_actors(self) -> None:
        """Start as many actors as are wanted; those that have no room yet wait in Ray for a node."""
        if time.monotonic() - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        while len(self._actors) < (self._job["workers"] or self._room()):
            actor = Actor(self._new_actor(self._job["job"]))
            self._actors.append(actor)
            self._calls[actor.handle.prepare.remote()] = actor, None
            if self._ready is not None or not any(other.has_begun for other in self._actors):
                self._open_cache(actor)

    def _room(self) -> int:
        """Number of actors that the nodes have room for."""
        import ray

        cpus, gpus = self._job["cpus"], self._job["gpus"]
        rooms = [
            min(node["Resources"].get("CPU", 0.0) // cpus, node["Resources"].get("GPU", 0.0) / gpus if gpus else 1e9)
            for node in ray.nodes()
            if node["Alive"]
        ]
        return sum(map(int, rooms))

    def _open_cache(self, actor: Actor) -> None:
        actor.has_begun = True
        actor.handle.open_cache.remote()

    def _finish(self, call: Any) -> None:
        import ray

        actor, group = self._calls.pop(call)
        try:
            answer = ray.get(call)
        except Exception as error:  # Ray raises many types, and wraps those of the actor
            if actor in self._actors:
                self._lose(actor, error, group)
            return
        if actor not in self._actors:
            return
        if "error" in answer:
            raise error_from_data(answer["error"])
        actor.moved = max(actor.moved, answer["bytes"])
        if group is None:
            self._on_ready(actor, answer)
            return
        actor.groups.discard(group)
        self._failed_starts = 0
        again = {BlockId(*block) for block in answer["again"]}
        if again:
            self._waiting.append(tuple(block for block in group if block in again))
        self._settle(rows for block in group if block not in again for rows in [self._rows[block.block]])

    def _on_ready(self, actor: Actor, answer: dict[str, Any]) -> None:
        actor.is_ready = True
        if self._ready is not None:
            return
        self._ready = answer
        self._rows = answer["rows"]
        at_once = answer["at_once"]
        missing = sorted(map(BlockId._make, answer["missing"]), key=lambda block: (block.view // at_once, block.block))
        for _, blocks in itertools.groupby(missing, lambda block: (block.view // at_once, block.block)):
            self._waiting.append(tuple(sorted(blocks)))
        self._left = sum(self._rows[block.block] for block in missing)
        told = {key: answer[key] for key in ("says", "path", "url", "folders")}
        total = answer["views"] * sum(self._rows)
        self._send({"ready": told | {"total": total, "done": total - self._left}})
        for other in self._actors:
            if not other.has_begun:
                self._open_cache(other)

    def _settle(self, rows: Any) -> None:
        count = sum(rows)
        self._left -= count
        working = sum(each.is_ready for each in self._actors)
        self._send({"rows": count, "bytes": self._moved, "workers": working})

    def _hand_out(self) -> None:
        """Give the next groups to the actors with the fewest in flight."""
        while self._waiting:
            free = [actor for actor in self._actors if actor.is_ready and len(actor.groups) < IN_FLIGHT]
            if not free:
                return
            actor = min(free, key=lambda each: len(each.groups))
            group = self._waiting.popleft()
            actor.groups.add(group)
            self._calls[actor.handle.build.remote([list(block) for block in group])] = actor, group

    def _lose(self, actor: Actor, error: Exception, group: Group | None) -> None:
        """Forget an actor that has died; its groups are handed out again, after those that wait."""
        import ray

        self._actors.remove(actor)
        self._moved_by_lost += actor.moved
        with suppress(Exception):  # it may be on a node that is gone
            ray.kill(actor.handle)
        if group is None:
            self._failed_starts += 1
        for each in actor.groups:
            self._losses[each] += 1
        self._waiting.extend(sorted(actor.groups))
        self._looked_s = float("-inf")
        most = max((self._losses[each] for each in actor.groups), default=0)
        if max(most, self._failed_starts) >= MOST_LOSSES:
            what = f"at block {tuple(group[0])}" if group else "while they loaded networks and images"
            raise StorageError(
                f"{MOST_LOSSES} workers of the Ray cluster were lost {what}",
                where=f"{self._job['cpus']} CPUs and {self._job['gpus']:g} GPUs for each",
                found=reason_of(error),
                next_step="see Ray's logs of these workers (`ray logs`); then run the same command again: committed "
                "blocks are kept",
            )
        if self._ready is None and not any(other.has_begun for other in self._actors) and self._actors:
            self._open_cache(self._actors[0])

    def _leave(self, *, now: bool, patience_s: float) -> None:
        """End the actors: they finish what they have, or stop at once, and release their claims."""
        import ray

        with suppress(Exception):  # of actors that are lost meanwhile
            leaving = [actor.handle.leave.remote(now=now) for actor in self._actors if actor.is_ready]
            if leaving:
                ray.wait(leaving, num_returns=len(leaving), timeout=patience_s)
        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor.handle)
        self._moved_by_lost = self._moved
        self._actors = []


def _worker_class() -> type:
    """`worker.Worker` for a process of Ray; see `train.sweep.ray.cluster._remote_probe`."""
    claim = CLAIM

    class CacheBuilder:
        def __init__(self, job: str) -> None:
            importlib.import_module(claim)
            import ray

            from pipeline.build.ray.worker import Worker

            own = ray.get_runtime_context().get_node_id()
            self._worker = Worker(job, next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own))

        def prepare(self) -> dict[str, Any]:
            return self._worker.prepare()

        def open_cache(self) -> None:
            self._worker.open_cache()

        def build(self, group: list[list[int]]) -> dict[str, Any]:
            return self._worker.build(group)

        def leave(self, now: bool) -> None:
            self._worker.leave(now=now)

    return CacheBuilder
