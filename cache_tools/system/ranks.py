"""Which of several processes this one is, where torchrun has started them to do one piece of work together.

torchrun says it in the environment: RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. A process without them, and one
of a world of one, is alone, and nothing changes for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, ParamSpec

from cache_tools.errors import CacheError, RankLostError, RecipeError, error_from_data, error_to_data

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

P = ParamSpec("P")
PATIENCE_S = 300.0
STORE_TIMEOUT_S = 5.0
_MOST_RANKS = 1 << 20


@dataclass(frozen=True)
class Rank:
    """One of the processes of a piece of work.

    Attributes:
        number: from 0 to count − 1, over all machines.
        count: of all processes.
        local: number of this process on its machine; it chooses the CUDA device.
        local_count: processes on this machine.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    local_count: int = 1

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.number == 0

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's part of consecutive items, (start, stop). Parts follow each other, and differ by one at most."""
        length = stop - start
        return start + self.number * length // self.count, start + (self.number + 1) * length // self.count

    def sizes(self, length: int) -> tuple[int, ...]:
        """The sizes of the parts of all ranks."""
        bounds = [number * length // self.count for number in range(self.count + 1)]
        return tuple(stop - start for start, stop in pairwise(bounds))


ALONE = Rank()


def own_rank() -> Rank:
    """The rank of this process.

    Raises:
        RecipeError: variables in the environment that make no sense together.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return ALONE
    number, count = _number("RANK"), _number("WORLD_SIZE")
    local, local_count = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if not (number < count <= _MOST_RANKS and local < local_count <= count):
        raise RecipeError(
            "the ranks in the environment make no sense",
            where="RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE",
            expected="RANK below WORLD_SIZE, LOCAL_RANK below LOCAL_WORLD_SIZE",
            found=f"{number}, {count}, {local}, {local_count}",
            next_step="start the processes with torchrun",
        )
    return Rank(number, count, local, local_count) if count > 1 else ALONE


def speaks_for_all(function: Callable[P, None]) -> Callable[P, None]:
    """Decorate a command that several ranks run together: one of them prints.

    Rank 0 prints everything, the others nothing. An error that several ranks meet is printed once, by whoever is first.
    """

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        with one_voice(own_rank()):
            function(*args, **kwargs)

    return wrapper


@contextmanager
def one_voice(rank: Rank) -> Iterator[None]:
    """`speaks_for_all`, as a context."""
    if rank.is_alone:
        yield
        return
    try:
        if rank.is_first:
            yield
        else:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    except CacheError as error:
        if _is_printed(error, rank):
            raise SystemExit(2) from None
        raise
    except KeyboardInterrupt as stopped:
        if rank.is_first:
            raise
        raise SystemExit(128 + getattr(stopped, "number", 2)) from None


class Meeting:
    """Where ranks that work on their own tell each other how far they are, without a group of processes.

    Args:
        rank: of several.
        name: of what they meet for.
    """

    def __init__(self, rank: Rank, name: str = "meeting") -> None:
        self._rank, self._store = rank, store_of_attempt(rank, name)

    def announce(self, name: str, value: str = "") -> None:
        """Tell all others that this rank has done something."""
        self._store.set(f"{name}/{self._rank.number}", value)

    def fail(self, error: CacheError) -> None:
        """Tell all others of an error that ends this rank."""
        self._store.set("failure", json.dumps(error_to_data(error)))

    def wait_for(
        self, name: str, number: int, patience_s: float = float("inf"), *, or_failure: bool = False
    ) -> str | None:
        """What a rank has announced under a name; None if it has not within the time.

        Args:
            or_failure: raise the error of a rank that fails meanwhile.
        """
        key, end_s, pause_s = f"{name}/{number}", time.monotonic() + patience_s, 0.01
        try:
            while not self._store.check([key]):  # its own `wait` would not hear a signal
                if or_failure and self._store.check(["failure"]):
                    raise error_from_data(json.loads(bytes(self._store.get("failure"))))
                if time.monotonic() > end_s:
                    return None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.5)
            return bytes(self._store.get(key)).decode()
        except RuntimeError as error:  # the store was rank 0's
            raise RankLostError(
                "rank 0 has ended",
                where=f"rank {self._rank.number} of {self._rank.count}",
                next_step="see why in its output, then start all ranks again",
            ) from error


def store_of_attempt(rank: Rank, name: str) -> Store:
    """A part of the store that ranks share. Where torchrun starts them again, they find nothing of the last attempt."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(f"{name}/{_attempt()}", _store(rank, PATIENCE_S))


def _attempt() -> str:
    """How often torchrun has started these ranks again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _store(rank: Rank | None, patience_s: float) -> TCPStore:
    """The store of torchrun or, where something else has started the ranks, of rank 0.

    Args:
        rank: None for one that only looks whether there is a store.
    """
    serves = rank is not None and rank.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _served_store(address, port) if serves else _connect(address, port, patience_s)


@cache  # a process listens at a port once
def _served_store(address: str, port: int) -> TCPStore:
    return _connect(address, port, PATIENCE_S, serves=True)


def _connect(address: str, port: int, patience_s: float, *, serves: bool = False) -> TCPStore:
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    timeout = timedelta(seconds=patience_s)
    return TCPStore(address, port, is_master=serves, timeout=timeout, wait_for_workers=False)


def _is_printed(error: CacheError, rank: Rank) -> bool:
    """Whether another rank prints this error, or one that explains it."""
    import hashlib

    attempt, text = _attempt(), hashlib.sha256(str(error).encode()).hexdigest()
    try:
        store = _store(None, STORE_TIMEOUT_S)
        if isinstance(error, RankLostError) and store.add(f"errors/{attempt}", 0):
            return True
        store.add(f"errors/{attempt}", 1)
        return bool(store.add(f"errors/{attempt}/{text}", 1) > 1)
    except (RuntimeError, ValueError, OSError):  # the store was rank 0's, which has ended
        return rank.local > 0


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdecimal():
        raise RecipeError(
            "a rank is a number",
            where=f"{name} in the environment",
            found=text,
            next_step="start the processes with torchrun",
        )
    return int(text[:12])
