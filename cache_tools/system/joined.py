"""What the ranks of a run do together: sums, rows of all ranks, values of rank 0, and the gradients of a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache_tools.errors import CacheError, DeviceError, RankLostError, error_from_data, error_to_data
from cache_tools.system.ranks import Meeting, Rank, own_rank, store_of_attempt

Value = TypeVar("Value")
PATIENCE = timedelta(hours=12)
"""How long a rank waits for another, such as one that decodes pictures for all. torchrun ends those of a dead one."""


@contextmanager
def failing_together() -> Iterator[None]:
    """Before ranks are joined: an error of one of them is raised on all that wait in `joined_ranks`."""
    try:
        yield
    except CacheError as error:
        if not (rank := own_rank()).is_alone:
            Meeting(rank, "joining").fail(error)
        raise


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Joined | None]:
    """Join the other ranks of this process, over gloo on the CPU and NCCL on CUDA; None if it is alone.

    Raises:
        DeviceError: a device on which ranks cannot compute together.
        RankLostError: another rank has ended.
        CacheError: that of another rank in `failing_together`.
    """
    rank = own_rank()
    if rank.is_alone:
        yield None
        return
    if device.type == "mps":
        raise DeviceError(
            "several ranks need the CPU or CUDA devices", where="--device mps", next_step="use one process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    meeting = Meeting(rank, "joining")
    meeting.announce("ready")
    for number in range(rank.count):  # torch's own wait would neither hear a signal nor that a rank has failed
        meeting.wait_for("ready", number, or_failure=True)
    try:
        store = store_of_attempt(rank, "joined")
        dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank.number, world_size=rank.count)
        yield Joined(rank)
        dist.destroy_process_group()
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLostError(
            "another process of this run has ended",
            where=f"rank {rank.number} of {rank.count}",
            next_step="see why in its output; torchrun --max-restarts N starts all of them again",
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch says that another rank has ended."""
    names = {"DistBackendError", "DistNetworkError", "DistStoreError"}
    text = str(error)[:2000]
    return type(error).__name__ in names or "gloo" in text or "onnection closed by peer" in text


class Joined:
    """The ranks that train together. Each calls the same methods in the same order.

    Attributes:
        rank: of this process.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self._vote: tuple[Tensor, Any] | None = None

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all ranks, in their order; gradients go back to the rank that each row came from.

        Args:
            sizes: the number of rows of every rank.
        """
        gathered: Tensor = _Gathered.apply(rows, self.rank.number, tuple(sizes))
        return gathered

    def add(self, tensor: Tensor) -> Tensor:
        """Make a tensor the sum of those of all ranks, without gradients. Returns it."""
        dist.all_reduce(tensor)
        return tensor

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes. Tensors in it are on the CPU."""
        values = [make() if self.rank.is_first else None]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]  # type: ignore[return-value]

    def collect(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. Tensors in them have to be on the CPU."""
        values: list[Any] = [None] * self.rank.count
        dist.all_gather_object(values, value)
        return values

    def vote(self, wanted: int) -> int:
        """The largest number that any rank gave in the call before this one; 0 in the first call.

        So nobody waits: the answer to this call travels while the next step is computed.
        """
        decided = self._decided()
        ballot = torch.tensor([wanted], dtype=torch.int32)
        self._vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)
        return decided

    def close_vote(self) -> None:
        """Forget the last call of `vote`."""
        self._decided()

    @contextmanager
    def first_here_before_others(self) -> Iterator[None]:
        """Inside, the first rank of each machine is done before the others begin: it downloads and makes files."""
        if self.rank.local == 0:
            try:
                yield
            except CacheError:
                self.collect(None)  # the others may succeed, or meet the same error
                raise
            self.collect(None)
        else:
            self.collect(None)
            yield

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise an error that one rank meets inside on all of them, so that none waits for it in what follows.

        What is inside may make ranks wait for each other in `first_here_before_others` only.
        """
        failure: CacheError | None = None
        try:
            yield
        except CacheError as error:
            failure = error
        for found in self.collect(None if failure is None else error_to_data(failure)):
            if found is not None:
                raise failure or error_from_data(found)

    def parallel(self, module: nn.Module, *, some_unused: bool) -> nn.parallel.DistributedDataParallel:
        """A module whose gradients are the means over all ranks, from the weights and buffers of rank 0.

        Args:
            some_unused: some of its parameters get no gradient.
        """
        kind = nn.parallel.DistributedDataParallel
        known = inspect.signature(kind).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # until torch 2.13
        return kind(module, find_unused_parameters=some_unused, **cast(Any, {buffers: False}))

    def _decided(self) -> int:
        if self._vote is None:
            return 0
        (ballot, work), self._vote = self._vote, None
        work.wait()
        return int(ballot)


class _Gathered(torch.autograd.Function):
    """Rows of all ranks. A rank's gradient is the sum of what all ranks' losses say about its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int, sizes: tuple[int, ...]) -> Tensor:
        ctx.number, ctx.sizes = number, sizes
        most = max(sizes)
        own = rows.detach().contiguous()
        if len(own) < most:  # the backends gather tensors of one shape
            own = torch.cat([own, own.new_zeros((most - len(own), *own.shape[1:]))])
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        start = sum(ctx.sizes[: ctx.number])
        return total[start : start + ctx.sizes[ctx.number]], None, None
