"""Numerics that the losses share: full precision under autocast, and unit vectors that are safe for zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_HALF = {torch.float16, torch.bfloat16}
SHORT = 1e-12


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a loss outside autocast, with half-precision tensors converted to float32 (float64 stays float64).

    Differences of log-probabilities, distances and exp(similarity / 0.07) lose all their digits in float16, which
    autocast would use for the matrix products of the relational and contrastive losses.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        wide_args = [_widen(value) for value in args]
        wide_kwargs = {name: _widen(value) for name, value in kwargs.items()} if kwargs else kwargs
        if not torch.is_autocast_enabled(kind):  # also inside another loss: entering a context takes its time
            return function(*wide_args, **wide_kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*wide_args, **wide_kwargs)

    return wrapper


def unit_rows(vectors: Tensor) -> Tensor:
    """`vectors` [..., D] with every vector scaled to length 1.

    A vector shorter than 1e-12 has no direction and is returned unchanged; otherwise its gradient would be 1e12 times
    too large.
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > SHORT, length, torch.ones_like(length))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
