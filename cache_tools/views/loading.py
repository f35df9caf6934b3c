"""Load what several views are made of from an image set, so that every picture is decoded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from cache_tools.lazy import np
from cache_tools.views.arguments import sample_index
from cache_tools.views.ops import Integers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    from cache_tools.views.arguments import Index
    from cache_tools.views.boxes import Needs
    from cache_tools.views.ops import Size

PICTURES_AT_ONCE = 32  # decoded and in memory


class Pictures(Protocol):
    """The part of an `ImageSet` that views are made of."""

    def __len__(self) -> int: ...

    @property
    def resident(self) -> bool: ...

    def load(self, index: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.uint8]: ...

    def decoded_for(self, needed: Needs | None) -> Pictures: ...

    def pictures(self, index: npt.NDArray[np.int64] | slice) -> list[npt.NDArray[np.uint8]]: ...


class Croppable(Protocol):
    """The part of a `ViewRecipe` that loading needs."""

    @property
    def crop_size(self) -> Size | None: ...

    @property
    def needed(self) -> Needs | None: ...

    def mixes(self, view: int) -> bool: ...

    def with_partners(self, index: Index, view: int) -> Integers: ...

    def crop(self, images_NCHW_u8: torch.Tensor | Sequence[torch.Tensor], index: Index, view: int) -> torch.Tensor: ...


class Needed(NamedTuple):
    """The pictures of which several views are made.

    Attributes:
        rows: of the image set, int64 [P].
        samples: that these rows are, int64 [P].
        places: for each view, which of these it takes in which order, int64 [N]; None for all of them in this order.
    """

    rows: Integers
    samples: Integers
    places: list[Integers | None]


def needed_pictures(rows: Integers, samples: Integers, wanted: Sequence[tuple[Croppable, int]]) -> Needed:
    """The pictures of these samples, and of their partners where a view mixes; there rows and samples are the same."""
    shown = [recipe.with_partners(samples, view) if recipe.mixes(view) else samples for recipe, view in wanted]
    if all(np.array_equal(each, shown[0]) for each in shown):
        alone = rows if shown[0] is samples else shown[0]
        return Needed(alone, shown[0], [None] * len(shown))
    together = np.unique(np.concatenate(shown))
    return Needed(together, together, [np.searchsorted(together, each) for each in shown])


def load_each(
    images: Pictures, rows: npt.NDArray[np.int64] | slice, index: Index, wanted: Sequence[tuple[Croppable, int]]
) -> list[torch.Tensor]:
    """`ViewRecipe.load` for several views and sizes of one recipe; every picture is decoded once.

    Args:
        wanted: (recipe, view) of each; the recipes differ in nothing but `seen_by`.
    """
    import torch

    samples, is_cropped = sample_index(index), wanted[0][0].crop_size is not None
    if not any(recipe.mixes(view) for recipe, view in wanted) and (not is_cropped or images.resident):
        pixels = torch.from_numpy(np.ascontiguousarray(images.load(rows)))  # a slice of a resident set is no copy
        return [recipe.crop(pixels, samples, view) for recipe, view in wanted]
    images = images.decoded_for(wanted[0][0].needed)
    chosen = np.arange(len(images), dtype=np.int64)[rows] if isinstance(rows, slice) else rows
    needed = needed_pictures(chosen, samples, wanted)
    if not is_cropped or images.resident:
        pixels = torch.from_numpy(np.ascontiguousarray(images.load(needed.rows)))
        return [
            recipe.crop(pixels if of_view is None else pixels[of_view], _at(needed.samples, of_view), view)
            for (recipe, view), of_view in zip(wanted, needed.places, strict=True)
        ]
    places = [np.arange(len(needed.rows)) if of_view is None else of_view for of_view in needed.places]
    made = [
        torch.empty((len(of_view), 3, *(recipe.crop_size or ())), dtype=torch.uint8)
        for (recipe, _), of_view in zip(wanted, places, strict=True)
    ]
    for start in range(0, len(needed.rows), PICTURES_AT_ONCE):
        part = needed.rows[start : start + PICTURES_AT_ONCE]
        pictures = [torch.from_numpy(picture) for picture in images.pictures(part)]
        for crops, (recipe, view), of_view in zip(made, wanted, places, strict=True):
            (inside,) = np.nonzero((start <= of_view) & (of_view < start + len(part)))
            some, of_samples = [pictures[place - start] for place in of_view[inside]], needed.samples[of_view[inside]]
            crops[torch.from_numpy(inside)] = recipe.crop(some, of_samples, view)
    return made


def _at(values: Integers, places: Integers | None) -> Integers:
    return values if places is None else values[places]
