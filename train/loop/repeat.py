"""Settings of torch under which a run repeats, random states, and failures of torch explained."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from cache_tools.errors import RecipeError
from cache_tools.system.compilation import explain_compiler_failure
from cache_tools.system.memory import raise_on_out_of_memory
from train.recipe import TrainRecipe


@contextmanager
def repeatable(device: torch.device, deterministic: bool) -> Iterator[None]:
    """Make torch repeatable inside the context; its settings and random state are restored on exit.

    Runs on the CPU always repeat (same machine, same number of threads). Runs on CUDA repeat only if `deterministic`:
    otherwise cuDNN may choose the quickest algorithm. Where an operation cannot repeat on CUDA, torch then raises an
    error (`explain_failure`).
    """
    cuda = device.type == "cuda"
    strict = deterministic or not cuda
    if cuda and strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    debugging: Any = torch.utils.deterministic
    before_random = random_state(device)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        debugging.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    try:
        torch.use_deterministic_algorithms(strict, warn_only=not cuda)
        debugging.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each tensor
        torch.backends.cudnn.benchmark = not strict
        yield
    finally:
        set_random_state(device, before_random)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        debugging.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]


@contextmanager
def explain_failure(recipe: TrainRecipe, device: torch.device) -> Iterator[None]:
    """Inside, failures of torch that a user can do something about become errors that say what.

    Raises:
        OutOfMemoryError: too little memory; names the student.
        RecipeError: `compile: model`, and the student or the loss cannot be compiled here.
        RecipeError: `deterministic`, and an operation that has no deterministic kernel on CUDA.
    """
    next_step = (
        "train with a smaller --batch-size (--accumulate N keeps updates as large) or student, "
        "or where there is more memory"
    )
    where, compiling = f"{recipe.student} on {device}", nullcontext()
    if recipe.compile == "model":
        what = "the student and its loss cannot be compiled"
        compiling = explain_compiler_failure(what, f"{where}, --compile model")  # type: ignore[assignment]
    try:
        with compiling, raise_on_out_of_memory(where, next_step):
            yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise RecipeError(
            "the run cannot repeat bit for bit: an operation has no deterministic kernel",
            where=f"{recipe.student} on {device}",
            found=str(error).split(" does not ")[0][:200],
            next_step="train with --set deterministic=false, choose another student or loss, or train on the CPU",
        ) from error


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "mps":
        return [*states, torch.mps.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) == 1:  # of the CPU, or of a checkpoint from one
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])
