"""What several ranks need that train one run together: settings that fit, states without devices, and a part each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cache_tools.errors import RecipeError
from cache_tools.system.joined import Joined
from cache_tools.system.ranks import Rank, own_rank
from train.loop import EpochState
from train.loop.batch_norm import has_batch_norm, is_synchronised
from train.recipe import TrainRecipe


def check_ranks(recipe: TrainRecipe, device: torch.device) -> None:
    """Raise RecipeError for settings with which several ranks cannot train one run. One process accepts them."""
    rank = own_rank()
    if rank.is_alone:
        return
    if recipe.compile in {"model", "step"}:
        raise RecipeError(
            "several processes train one student operation by operation",
            where=f"--compile {recipe.compile}, {rank.count} processes",
            next_step="use --compile off",
        )
    if recipe.batch_size % rank.count:
        fits = max(recipe.batch_size - recipe.batch_size % rank.count, rank.count)
        raise RecipeError(
            "the processes cannot share a batch equally",
            where=f"--batch-size {recipe.batch_size}",
            expected=f"a multiple of {rank.count}, the number of processes",
            next_step=f"use --batch-size {fits} (the result changes), or another number of processes",
        )
    if device.type == "cuda" and ":" in recipe.device and rank.local_count > 1:
        raise RecipeError(
            "each process needs a GPU of its own",
            where=f"--device {recipe.device}",
            found=f"{rank.local_count} processes on this machine",
            next_step="use --device cuda",
        )


def check_same_run(settings: dict[str, Any], ranks: Joined) -> None:
    """Raise RecipeError on every rank if their settings differ: each would train on samples of another order."""
    recipes = ranks.collect(settings)
    for number, values in enumerate(recipes):
        differing = sorted(name for name in {*recipes[0], *values} if recipes[0].get(name) != values.get(name))
        if differing:
            raise RecipeError(
                "the processes of a run have different settings",
                where=f"{', '.join(differing)} of ranks 0 and {number}",
                expected="the same command on every rank",
                found="; ".join(f"{name}: {recipes[0].get(name)} and {values.get(name)}" for name in differing)[:300],
            )


def check_batches(bounds: Sequence[tuple[int, int]], student: nn.Module, rank: Rank) -> None:
    """Raise RecipeError if a rank would have no samples of a batch, or too few for statistics of its own."""
    needed = 2 if has_batch_norm(student) and not is_synchronised(student) else 1
    fewest = min(min(rank.sizes(stop - start)) for start, stop in bounds)
    if fewest >= needed:
        return
    smallest = min(stop - start for start, stop in bounds)
    raise RecipeError(
        "a process would have too few samples of a batch" if fewest else "a process would have no samples of a batch",
        where=f"a batch of {smallest}, the smallest of an epoch, on {rank.count} processes",
        expected="one sample or more" if needed == 1 else "two or more, for the statistics of batch norm",
        found=fewest,
        next_step="choose another --batch-size or fewer processes"
        + ("" if needed == 1 else ", or --sync-batchnorm, for statistics of whole batches"),
    )


def environment_of_ranks(ranks: Joined | None, student: nn.Module) -> dict[str, str]:
    """What a result says about the ranks that made it; nothing for one process."""
    if ranks is None:
        return {}
    own = {} if not has_batch_norm(student) or is_synchronised(student) else {"batch norm": "statistics of each rank"}
    return {"ranks": str(ranks.rank.count), **own}


def tensors_on_cpu(value: Any) -> Any:
    """Plain data with every tensor on the CPU, from where other processes can take it."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: tensors_on_cpu(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(tensors_on_cpu(each) for each in value)
    return value


def part_of_rank(begun: EpochState, rank: Rank) -> EpochState:
    """What a rank continues from of a state inside an epoch. Rank 0 has the sums so far, for all.

    The random numbers are those of the rank, if as many ranks stored them; otherwise they begin again with the epoch's.
    """
    states = begun.get("random_of_ranks", [])
    if len(states) == rank.count:
        random = states[rank.number]
    else:
        random = begun["random"] if rank.is_first else None
    means = begun["means"]
    if not rank.is_first:
        means = {**means, "count": 0, "sums": torch.zeros_like(means["sums"])}
    return {**begun, "random": random, "means": means}
