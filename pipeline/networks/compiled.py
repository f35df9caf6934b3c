"""Networks compiled by torch.compile, for batches of one size: shorter ones are filled up, and compile nothing new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NetworkFunction = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
MOST_PROGRAMS = 64


class CompiledNetwork:
    """A function of images, compiled for batches of `rows` images.

    A short batch is filled with copies of its last image, whose outputs are dropped. So the last batch of a block has
    the kernels of all others, and what they round does not depend on its size.
    """

    def __init__(self, function: NetworkFunction, rows: int) -> None:
        # All teachers share the code that calls their networks; equal architectures share a program of it. With more
        # programs than the limit torch would run the rest uncompiled, without a word.
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, MOST_PROGRAMS)
        self._function: NetworkFunction = torch.compile(function, dynamic=False)
        self._rows = rows

    def __call__(self, images_NCHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs of up to `rows` images, each [B, …]."""
        count, shape = len(images_NCHW), images_NCHW.shape[1:]
        assert count <= self._rows, f"{count} images for a network compiled for {self._rows}"
        # One order in memory, whatever the views make: another would be compiled again.
        layout = torch.channels_last if images_NCHW.is_cuda else torch.contiguous_format
        if count == self._rows:
            return self._function(images_NCHW.contiguous(memory_format=layout))
        filled = torch.empty(
            (self._rows, *shape), dtype=images_NCHW.dtype, device=images_NCHW.device, memory_format=layout
        )
        filled[:count] = images_NCHW
        filled[count:] = images_NCHW[-1:]
        return tuple(output[:count] for output in self._function(filled))
