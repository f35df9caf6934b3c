"""Builds in separate processes, forked from a server that has already imported everything."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from cache_tools.places import Place
from cache_tools.places.transfer import list_committed
from pipeline.build.cache import BuildResult, build_cache
from pipeline.recipe import BuildRecipe
from tests.support.preloaded import CONTEXT

DEADLINE_S = 240.0


class Builder:
    """A process that builds a recipe.

    Args:
        pause_after: the number of blocks it stores before it waits for `go_on`.
        environment: changes to the variables of this process.
    """

    def __init__(self, recipe: BuildRecipe, pause_after: int | None = None, **environment: object) -> None:
        self._answers, sender = CONTEXT.Pipe(duplex=False)
        self._pause = _Pause(pause_after)
        variables = os.environ | {name: str(value) for name, value in environment.items()}
        self.process: Any = CONTEXT.Process(target=_build, args=(recipe, variables, self._pause, sender), daemon=True)
        self.process.start()
        sender.close()

    def wait_until_paused(self) -> None:
        """Wait until it has claimed a block that it has not stored."""
        assert self._pause.reached.wait(DEADLINE_S), "the builder did not reach its pause"

    def go_on(self) -> None:
        self._pause.over.set()

    def result(self) -> BuildResult:
        """Wait for the end of the build and return its result or raise its exception."""
        assert self._answers.poll(DEADLINE_S), "the builder did not end"
        answer = self._answers.recv()
        self.process.join()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def wait_for_blocks(place: Place, count: int) -> int:
    """Wait until at least `count` blocks are committed. Returns their number."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := len(list_committed(place))) < count:
        assert time.monotonic() < deadline, f"{found} of {count} blocks"
        time.sleep(0.005)
    return found


class _Pause:
    """Lets a test pause a builder and wait until it has paused."""

    def __init__(self, after: int | None) -> None:
        self._after = after
        self.reached, self.over = CONTEXT.Event(), CONTEXT.Event()

    def install(self) -> None:
        """Replace the function that stores a block, in the builder's process."""
        if self._after is None:
            return
        from pipeline.build import blocks as build_blocks

        after, store, blocks = self._after, build_blocks._store, itertools.count()

        def pause_then_store(*arguments: Any) -> int:
            if next(blocks) >= after:
                self.reached.set()
                self.over.wait(DEADLINE_S)
            return store(*arguments)

        build_blocks._store = pause_then_store  # type: ignore[assignment]


def _build(recipe: BuildRecipe, environment: Mapping[str, str], pause: _Pause, sender: Connection) -> None:
    import torch

    pause.install()
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    try:
        answer: object = build_cache(recipe)
    except BaseException as error:
        error.__cause__ = error.__context__ = None
        answer = error
    sender.send(answer)
