"""A view is a function, not a file: (recipe, base seed, view, sample) → integer parameters → pixels.

Counter-based random numbers and integer arithmetic give the same result on every machine, device and library version.
So a cache stores targets only, and training recomputes the teacher's pixels bit for bit. Only `apply` needs torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import PrivateAttr

from cache_tools.errors import DataError
from cache_tools.lazy import np
from cache_tools.philox import sample_words
from cache_tools.views.arguments import one_size, picture_sizes, sample_index, view_number
from cache_tools.views.boxes import BoxOp, evaluation_resize
from cache_tools.views.mix import Mixing, Pairing, mixed_views, pairing
from cache_tools.views.ops import ONE, Identity, Integers, Size, Words
from cache_tools.views.settings import ViewOp, ViewSettings, ViewSizes

__all__ = ["Drawn", "Network", "ViewOp", "ViewRecipe", "ViewSettings", "ViewSizes"]

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    from cache_tools.views.arguments import Index
    from cache_tools.views.loading import Pictures

DRAW_BITS = 8


Network = Literal["student", "teacher", "clip"]


class Drawn(NamedTuple):
    """The parameters of a view, drawn before its pixels are made.

    Attributes:
        shown: the samples whose images are needed (`ViewRecipe.with_partners`).
        boxes: of the crop of version 2; None without one.
        ops: of every other op.
        mix: of the mixing; None if the view does not mix.
    """

    shown: Integers
    boxes: dict[str, Integers] | None
    ops: dict[str, Integers]
    mix: dict[str, Integers] | None


class ViewRecipe(ViewSettings):
    """How a view is made from a sample and the augmentation seed `view`: the fields of `ViewSettings`, drawn and made.

    In version 1 all images have one size: a canvas, to which pictures are resized and cropped before. In version 2 a
    crop may come first, which takes its box from the picture as it was decoded; without one, ops work on the canvas.
    """

    _seen_at: Size | None = PrivateAttr(None)
    _num_samples: int | None = PrivateAttr(None)

    def seen_by(self, network: Network) -> ViewRecipe:
        """The same views at the size that a network gets (`sizes`)."""
        side = getattr(self.sizes, network)
        views = self.model_copy()
        views._seen_at = None if side is None else (side, side)
        return views

    def over(self, num_samples: int) -> ViewRecipe:
        """The same views of so many samples, which decides who is mixed with whom. A cache's recipe knows its own."""
        if self.mix is None:
            return self
        views = self.model_copy()
        views._num_samples = num_samples
        return views

    def mixes(self, view: int) -> bool:
        """Whether the samples of a view are mixed; not if it is the clean one."""
        return self.mix is not None and not (self.clean_first and view_number(view) == 0)

    def pairs(self, view: int) -> Integers:
        """All samples, int64 [num_samples], in an order in which 2k and 2k + 1 are a pair of a view that mixes."""
        pairing = self._pairing(view_number(view))
        return pairing.samples(np.arange(pairing.count))

    def with_partners(self, index: Index, view: int) -> Integers:
        """The samples whose pictures `apply` needs, int64 [M]: `index`, then partners that are mixed in and not in it.

        These are only the samples of `index` where the view does not mix, or where `index` has whole pairs.
        """
        samples, number = sample_index(index), view_number(view)
        if not self.mixes(number):
            return samples
        partners, mixed = self._partners(samples, number)
        return np.concatenate([samples, np.setdiff1d(partners[mixed], samples)])

    def mixing(self, index: Index, view: int, image_size: Size) -> Mixing | None:
        """Whose label each sample has besides its own, and the share of its own; None if the view does not mix.

        Args:
            image_size: (height, width) of the images; of no account in version 2 with a crop.
        """
        samples, number = sample_index(index), view_number(view)
        if not self.mixes(number):
            return None
        drawn = self._draw_mix(samples, number, self._drawn_size(image_size))
        return Mixing(drawn["partner"], drawn["share"] / ONE)

    @property
    def crop_size(self) -> Size | None:
        """(height, width) of what `crop` makes of a picture; None in version 1, or if there is no crop."""
        return None if self.box_op is None else self._seen_at or self.box_op.view_size

    @property
    def canvas_side(self) -> int | None:
        """The canvas from whose centre test images are cut to the student's views; None without a crop of pictures."""
        box = self.box_op
        if box is None:
            return None
        return max(8, evaluation_resize(self.seen_by("student")._seen_at or box.view_size))

    def output_size(self, image_size: Size) -> Size:
        """(height, width) of a view of images of `image_size`.

        Raises:
            RecipeError: an op cannot work on images of this size.
        """
        size = self._drawn_size(image_size)
        return self._seen_at or size

    def parameters(self, index: Index, view: int, image_size: Size | Integers) -> dict[str, Integers]:
        """All random parameters of a view: `POSITION.OP.NAME` → int64 [N], in the order of `index`.

        Args:
            index: sample indices, 0 … 2⁶³−1, in any order; or a single index.
            view: 0 … 2³²−1.
            image_size: (height, width) of the source images. In version 2 also int [N, 2], the size of each picture.

        Raises:
            DataError: an index or the view is negative or not a whole number.
            RecipeError: an op cannot work on images of this size.
        """
        samples = sample_index(index)
        number = view_number(view)
        box = self.box_op
        if box is None:
            size = one_size(image_size)
            drawn = self._draw(samples, number, size)
        else:
            size = box.view_size
            boxes = self._draw_boxes(samples, number, box, picture_sizes(image_size, len(samples)))
            drawn = {f"0.{box.op}.{name}": values for name, values in boxes.items()}
            drawn |= self._draw(samples, number, (0, 0))
        if self.mixes(number):
            mixed = self._draw_mix(samples, number, self._drawn_size(size))
            drawn |= {f"mix.{name}": values for name, values in mixed.items()}
        return drawn

    def parameter_digest(self, index: Index, view: int, image_size: Size) -> int:
        """The digest of a block's parameters that a cache stores: 64 bits of blake2b, never 0.

        It covers the version, the view, the image size, the sample indices, and the name and values of each parameter.
        In version 2 the boxes are those of pictures of the canvas size: a reader of a cache has no pictures.
        """
        samples = sample_index(index)
        drawn = self.parameters(samples, view, image_size)
        header = [self.version, view_number(view), *(int(side) for side in image_size), len(samples), list(drawn)]
        digest = hashlib.blake2b(json.dumps(header, separators=(",", ":")).encode(), digest_size=8)
        for values in (samples, *drawn.values()):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
        return int.from_bytes(digest.digest(), "little") or 1

    def draw(self, index: Index, view: int, image_size: Size) -> Drawn:
        """What `apply` draws for images of one size. Given to it, only pixels are left to make.

        Args:
            index, view: as for `apply`.
            image_size: (height, width) of the images.
        """
        samples, number = sample_index(index), view_number(view)
        shown, box, mix = self.with_partners(samples, number), self.box_op, None
        if self.mixes(number):
            mix = self._draw_mix(samples, number, self._drawn_size(image_size))
        if box is None:
            return Drawn(shown, None, self._draw(shown, number, one_size(image_size)), mix)
        boxes = self._draw_boxes(shown, number, box, picture_sizes(np.array([image_size] * len(shown)), len(shown)))
        return Drawn(shown, boxes, self._draw(shown, number, (0, 0), seen_at=self._seen_at or box.view_size), mix)

    def apply(
        self,
        images_NCHW_u8: torch.Tensor | Sequence[torch.Tensor],
        index: Index,
        view: int,
        drawn: Drawn | None = None,
    ) -> torch.Tensor:
        """The pixels of a view, exactly as the teachers saw them.

        Args:
            images_NCHW_u8: uint8 [N, 3, H, W]; row i is sample `index[i]`. Any device. In version 2 with a crop, the
                decoded pictures; these may also be a list of N uint8 [3, H, W] on the CPU, each of its own size.
                A view that mixes needs the images of `with_partners(index, view)`, in that order.
            index: N sample indices, in any order.
            view: the augmentation seed.
            drawn: of `draw` for the same samples, view and size of images; None to draw now.

        Returns:
            uint8 [N, 3, *output_size] on the same device; never shares memory with the input.

        Raises:
            DataError: the dtype or shape is wrong, or there are not as many images as indices.
            RecipeError: an op cannot work on images of this size.
        """
        samples = sample_index(index)
        if self.mixes(view):
            self._check_partners(len(images_NCHW_u8), samples, view)
        shown = self.with_partners(samples, view) if drawn is None else drawn.shown
        return self.finish(self.crop(images_NCHW_u8, shown, view, drawn), samples, view, drawn)

    def load(self, images: Pictures, rows: npt.NDArray[np.int64] | slice, index: Index, view: int) -> torch.Tensor:
        """What `finish` needs of rows of an image set, on the CPU: their canvases, or the crops of their pictures.

        Args:
            index: the samples that the rows are; of a view that mixes, the rows themselves.
        """
        from cache_tools.views.loading import load_each

        return load_each(images, rows, index, [(self, view)])[0]

    def crop(
        self,
        images_NCHW_u8: torch.Tensor | Sequence[torch.Tensor],
        index: Index,
        view: int,
        drawn: Drawn | None = None,
    ) -> torch.Tensor:
        """The first step of `apply`: the box of each picture at the size of the view. Without a crop, the images."""
        from cache_tools.views import pixels

        self.require_pixels()
        samples, box = sample_index(index), self.box_op
        if box is None:
            pixels.check(images_NCHW_u8, len(samples))
            return images_NCHW_u8  # type: ignore[return-value]
        sizes, boxes = pixels.picture_sizes(images_NCHW_u8, len(samples)), None if drawn is None else drawn.boxes
        if boxes is None:
            boxes = self._draw_boxes(samples, view_number(view), box, picture_sizes(sizes, len(samples)))
        return pixels.crop(images_NCHW_u8, boxes, self._seen_at or box.view_size, box.interpolation)

    def finish(
        self, cropped_NCHW_u8: torch.Tensor, index: Index, view: int, drawn: Drawn | None = None
    ) -> torch.Tensor:
        """The second step of `apply`: every op after the crop, and then the mixing, on any device.

        Args:
            cropped_NCHW_u8: of the samples `with_partners(index, view)`.
            drawn: as for `apply`.
        """
        self.require_pixels()
        samples, number = sample_index(index), view_number(view)
        if not self.mixes(number):
            return self._finish_each(cropped_NCHW_u8, samples, number, drawn)
        self._check_partners(len(cropped_NCHW_u8), samples, number)
        shown = self.with_partners(samples, number) if drawn is None else drawn.shown
        finished = self._finish_each(cropped_NCHW_u8, shown, number, drawn)
        size = self._drawn_size((cropped_NCHW_u8.shape[2], cropped_NCHW_u8.shape[3]))
        mix = None if drawn is None else drawn.mix
        return mixed_views(finished, shown, len(samples), mix or self._draw_mix(samples, number, size), size)

    def _finish_each(
        self, cropped_NCHW_u8: torch.Tensor, samples: Integers, view: int, drawn: Drawn | None
    ) -> torch.Tensor:
        from cache_tools.views import pixels

        box = self.box_op
        pixels.check(cropped_NCHW_u8, len(samples))
        size = (cropped_NCHW_u8.shape[2], cropped_NCHW_u8.shape[3])
        if box is None:
            values = self._draw(samples, view, one_size(size)) if drawn is None else drawn.ops
            return pixels.apply(self.ops, values, self.output_size(size), cropped_NCHW_u8, self.version)
        values = self._draw(samples, view, (0, 0), seen_at=size) if drawn is None else drawn.ops
        return pixels.apply((Identity(), *self.ops[1:]), values, size, cropped_NCHW_u8, self.version)

    def _drawn_size(self, image_size: Size) -> Size:
        """(height, width) of a view for which its parameters are drawn."""
        for op in self.ops:
            image_size = op.output_size(image_size)
        return image_size

    def _pairing(self, view: int) -> Pairing:
        if self._num_samples is None:
            raise DataError(
                "mixed views need the number of samples, from which the pairs are drawn",
                where="views.mix",
                next_step="take the views of an open cache (cache.recipe.views), or views.over(NUM_SAMPLES)",
            )
        return pairing(self.base_seed, view, self._num_samples)

    def _partners(self, samples: Integers, view: int) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """The partner of each sample, int64 [N], and whether the two are mixed."""
        assert self.mix is not None, "only called if the view mixes"
        pairs = self._pairing(view)
        if len(samples) and samples.max() >= pairs.count:
            raise DataError(
                "sample index out of range", expected=f"below {pairs.count:,}, the samples", found=int(samples.max())
            )
        positions = pairs.positions(samples)
        partners = pairs.partners_at(positions)
        return partners, (partners != samples) & self.mix.draw_gate(self.base_seed, view, positions >> 1)

    def _draw_mix(self, samples: Integers, view: int, size: Size) -> dict[str, Integers]:
        """`partner` and the parameters of `MixRecipe.draw` of each sample."""
        assert self.mix is not None, "only called if the view mixes"
        pairs = self._pairing(view)
        positions = pairs.positions(samples)
        partners = pairs.partners_at(positions)
        drawn = self.mix.draw(self.base_seed, view, positions >> 1, size)
        if (alone := partners == samples).any():
            whole = {"own": ONE, "share": ONE}
            drawn = {name: np.where(alone, whole.get(name, 0), values) for name, values in drawn.items()}
        return {"partner": partners} | drawn

    def _check_partners(self, found: int, samples: Integers, view: int) -> None:
        needed = len(self.with_partners(samples, view))
        if found != needed:
            raise DataError(
                "this view mixes each image with its partner, so the images of the partners are needed too",
                where=f"view {view}",
                expected=f"the {needed:,} images of views.with_partners(index, view)",
                found=f"{found:,} images",
                next_step="load the images of views.with_partners(index, view), or batches of whole pairs: views.pairs",
            )

    def _draw_boxes(self, samples: Integers, view: int, box: BoxOp, sizes: Integers) -> dict[str, Integers]:
        if self.clean_first and view == 0:
            return box.clean_boxes(sizes)
        return box.draw_boxes(self._words(samples, view, 0), sizes)

    def _draw(self, samples: Integers, view: int, size: Size, seen_at: Size | None = None) -> dict[str, Integers]:
        """The parameters of every op but the crop of version 2, by position and name.

        Args:
            size: of the images; of no account after a crop.
            seen_at: the size of the view, if it is another than the crop's.
        """
        drawn: dict[str, Integers] = {}
        for position, op in enumerate(self.ops):
            following = op.output_size(size)
            if op is not self.box_op:
                if self.clean_first and view == 0:
                    values = op.neutral(len(samples), size)
                else:
                    values = op.draw(self._words(samples, view, position), size)
                if seen_at is not None and seen_at != size:
                    values = op.rescaled(values, size, seen_at)
                drawn |= {f"{position}.{op.op}.{name}": value for name, value in values.items()}
            size = following
        return drawn

    def _words(self, samples: Integers, view: int, position: int) -> Words:
        index = samples.astype(np.uint64)
        return lambda draw: sample_words(self.base_seed, index, view, position << DRAW_BITS | draw)
