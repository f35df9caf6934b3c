"""Check that a user's transform shows the student the pixels that the teachers saw, where they saw them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch

from teacher_cache.packages import claim

claim("cache_tools")

from cache_tools.errors import RecipeError  # noqa: E402

Transform = Callable[[torch.Tensor], torch.Tensor]

_TRIALS = 32  # of a transform that may be random
_ROUNDING = 0.01  # of the range of values: code for several pixels at once may round in another way than that for one


def refuse_geometry(transform: Transform, image_size: tuple[int, int]) -> None:
    """Raise RecipeError if a transform moves, cuts, resizes or erases pixels.

    It is applied to random images in which each colour is at two random places. A transform of colours gives these two
    the same new colour; a flip, crop, rotation, blur, erasing or noise does not. One call is enough to see that, so
    transforms may have random generators of their own.

    Args:
        image_size: (height, width) of the views.
    """
    height, width = image_size
    generator = torch.Generator().manual_seed(0)
    half = height * width // 2
    for seed in range(_TRIALS):
        colours = torch.randint(0, 256, (2, 3, half), generator=generator, dtype=torch.uint8)
        pixels = torch.zeros((2, 3, height * width), dtype=torch.uint8)
        one, other = torch.randperm(height * width, generator=generator)[: 2 * half].view(2, half)
        pixels[:, :, one] = pixels[:, :, other] = colours
        result = _transformed(transform, pixels.view(2, 3, height, width), seed)
        shape = tuple(result.shape)
        if len(shape) != 4 or shape[0] != 2 or shape[2:] != (height, width):
            raise _moves_pixels("its result has another size", f"[2, …, {height}, {width}]", str([*shape]))
        values = result.flatten(2).double()
        difference = (values[:, :, one] - values[:, :, other]).abs().amax() if half else torch.zeros(())
        if not difference <= _ROUNDING * (values.amax() - values.amin()):
            raise _moves_pixels(
                "pixels of one colour do not stay of one colour",
                "a function of the colour of a pixel, not of its place",
                "a transform that moves, blurs or erases pixels, or adds noise",
            )


def _moves_pixels(what: str, expected: str, found: str) -> RecipeError:
    return RecipeError(
        f"the transform would show other pixels than the teachers saw: {what}",
        where="CachedDataset(transform=…)",
        expected=expected,
        found=found,
        next_step="leave crops, flips, resizing and erasing to the views of the cache (views.ops of its recipe)",
    )


def _transformed(transform: Transform, pixels_NCHW_u8: torch.Tensor, seed: int) -> torch.Tensor:
    """The result with these random numbers. The generators of torch, NumPy and Python are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (transforms use the old generator)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            result: object = transform(pixels_NCHW_u8.clone())
    except Exception as error:
        raise RecipeError(
            "the transform cannot be applied to a batch of views",
            where="CachedDataset(transform=…)",
            expected="a function of uint8 tensors [B, 3, H, W], such as those of torchvision.transforms.v2",
            found=f"{type(error).__name__}: {error}",
        ) from error
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
    if not isinstance(result, torch.Tensor):
        raise RecipeError(
            "the transform does not give a tensor",
            where="CachedDataset(transform=…)",
            expected="a tensor [B, …, H, W]",
            found=type(result).__name__,
        )
    return result
