"""Builders as real processes, for tests: forked from a server that has imported everything, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from cache_tools.place import Place
from cache_tools.transfer import committed
from pipeline.build import BuildResult, build_cache
from pipeline.recipe import BuildRecipe

DEADLINE_S = 240.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["pipeline.build_blocks", "pipeline.open_output", "tests.tiny_build"])


class Builder:
    """A process that builds a recipe. `environment` is laid over this process's own."""

    def __init__(self, recipe: BuildRecipe, **environment: object) -> None:
        self._answers, sender = _CONTEXT.Pipe(duplex=False)
        wanted = os.environ | {name: str(value) for name, value in environment.items()}
        self.process: Any = _CONTEXT.Process(target=_build, args=(recipe, wanted, sender), daemon=True)
        self.process.start()
        sender.close()

    def result(self) -> BuildResult:
        """Wait for the end; raises what the build raised."""
        assert self._answers.poll(DEADLINE_S), "the builder does not come to an end"
        answer = self._answers.recv()
        self.process.join()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def wait_for_blocks(place: Place, count: int) -> int:
    """Wait until so many blocks are committed; gives how many there are."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := len(committed(place))) < count:
        assert time.monotonic() < deadline, f"{found} of {count} blocks"
        time.sleep(0.005)
    return found


def _build(recipe: BuildRecipe, environment: Mapping[str, str], sender: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    try:
        answer: object = build_cache(recipe)
    except BaseException as error:
        error.__cause__ = error.__context__ = None
        answer = error
    sender.send(answer)
