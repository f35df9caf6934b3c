"""Functions on several ranks: forked processes that train together over gloo, as torchrun would start them."""

from __future__ import annotations

import faulthandler
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cache_tools.system.joined import Joined, joined_ranks
from tests.support.child import Child
from train.loop.sums import Sums

CPU = torch.device("cpu")
PATIENCE_S = 300.0
PLAIN = "tests.support.rank_workers:plain_student"


def plain_student(num_classes: int) -> nn.Module:
    """A student without batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )


def on_ranks(count: int, function: Callable[[], Any], logs: Path) -> list[Any]:
    """What a function returns on each of so many ranks, as JSON keeps it; an error of one is raised here.

    What they print goes to `logs/rank-N`.
    """
    answers = answers_of_ranks(count, function, logs)
    failed = [f"rank {number}: {answer}" for number, answer in enumerate(answers) if "result" not in (answer or {})]
    assert not failed, "\n".join(failed).replace("\\n", "\n")[-4000:]
    return [answer["result"] for answer in answers if answer is not None]


def answers_of_ranks(count: int, function: Callable[[], Any], logs: Path) -> list[dict[str, Any] | None]:
    """As `on_ranks`, with the answer of each process as `Child.wait` gives it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for number in range(count):

        def work(number: int = number) -> Any:
            faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # into its log
            torch.set_num_threads(1)
            own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            store_at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # rank 0 listens there
            os.environ |= {name: str(value) for name, value in (own | store_at).items()}
            return function()

        children.append(Child(work, logs / f"rank-{number}"))
    return [child.wait() for child in children]


def joined(function: Callable[[Joined], Any]) -> Callable[[], Any]:
    """A function for `on_ranks` that is given the ranks it runs on."""

    def call() -> Any:
        with joined_ranks(CPU) as ranks:
            assert ranks is not None
            return function(ranks)

    return call


def record_losses() -> list[tuple[int, float]]:
    """From now on, (samples, loss) of every step of this process."""
    steps: list[tuple[int, float]] = []
    add = Sums.add

    def recording(self: Sums, terms: dict[str, torch.Tensor], *rest: Any) -> None:
        steps.append((len(rest[1]), float(terms["loss"].detach())))
        add(self, terms, *rest)

    Sums.add = recording  # type: ignore[method-assign, assignment]
    return steps


def losses_of_batches(of_ranks: list[list[tuple[int, float]]]) -> list[float]:
    """The loss of every whole batch, from what each rank has recorded."""
    return [
        sum(count * loss for count, loss in step) / sum(count for count, _ in step)
        for step in zip(*of_ranks, strict=True)
    ]


def use_double_precision() -> None:
    """All that this process trains has weights and activations in float64."""
    torch.set_default_dtype(torch.float64)
    convert: Any = _inputs_in_double_precision  # torch's type of a hook has no result
    register_module_forward_pre_hook(convert)


def _inputs_in_double_precision(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs)
