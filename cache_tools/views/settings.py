"""What a recipe of views says: its fields, the ops it may have, and which version of the views needs which of them."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from cache_tools.config import Extensible, Frozen
from cache_tools.config.fields import Whole
from cache_tools.views.augment import RandAugment, Rotation, ThreeAugment, TrivialAugmentWide
from cache_tools.views.boxes import BoxOp, Needs, RandomResizedCrop, ResizeCentreCrop
from cache_tools.views.mix import MixRecipe
from cache_tools.views.ops import ColourJitter, Flip, Identity, PadCrop, RandomErasing, Side
from cache_tools.views.others import OtherViews

MAX_OPS = 64


def _op_of_name(op: Any) -> Any:
    """Accept `flip` for `{op: flip}`: in YAML an op without options may be its name alone."""
    return {"op": op} if isinstance(op, str) else op


ViewOp = Annotated[
    Annotated[
        Identity
        | PadCrop
        | Flip
        | ColourJitter
        | RandomResizedCrop
        | ResizeCentreCrop
        | RandAugment
        | TrivialAugmentWide
        | ThreeAugment
        | Rotation
        | RandomErasing,
        Field(discriminator="op"),
    ],
    BeforeValidator(_op_of_name),
]
# The ops that only version 2 has.
_SECOND = (ResizeCentreCrop, RandAugment, TrivialAugmentWide, ThreeAugment, Rotation)


class ViewSizes(Frozen):
    """The side of the square view that each network gets, of the same box; None for the size of the crop."""

    student: Side | None = None
    teacher: Side | None = None
    clip: Side | None = None


class ViewSettings(Extensible):
    """The fields of a `ViewRecipe`, which are part of the fingerprint of a cache.

    Attributes:
        version: of the drawing rules and the pixel arithmetic; a change of either is a new version. By default 1, or 2
            with an op or a setting that version 1 does not have.
        base_seed: the Philox key.
        clean_first: whether view 0 is the clean image: every op gets its neutral parameters. A random resized crop
            resizes the whole image in version 1, and in version 2 the centre that students are tested on.
        ops: applied in this order. The op at position p takes its k-th four words from the counter (sample index low,
            sample index high, view, p · 256 + k).
        sizes: larger or smaller views of the same box for some networks, in version 2 with a crop.
        decoding: `scaled` decodes JPEG files at 1/2, 1/4 or 1/8 of their size, in version 2 with a crop, where every
            box that the crop can choose stays as large as the largest view (`needed`). Boxes are then in pixels of the
            picture as it was decoded.
        mix: mixes the samples in pairs after the last op, in version 2; None for none. It needs the number of samples
            (`over`), and the pictures of both samples of a pair (`with_partners`).
        made_by: the tool that drew these views, if it was another; then there are no ops, and no pixels.
    """

    added: ClassVar[frozenset[str]] = frozenset({"sizes", "mix", "made_by", "decoding"})

    version: Literal[1, 2] = 1
    base_seed: Annotated[Whole, Field(ge=0, lt=1 << 64)] = 0
    clean_first: bool = False
    ops: Annotated[tuple[ViewOp, ...], Field(max_length=MAX_OPS)] = ()
    sizes: ViewSizes = ViewSizes()
    mix: MixRecipe | None = None
    made_by: OtherViews | None = None
    decoding: Literal["full", "scaled"] = "full"

    @model_validator(mode="before")
    @classmethod
    def _version_of_the_ops(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("version") is None and _needs_second(data):
            return data | {"version": 2}
        return data

    @model_validator(mode="after")
    def _ops_fit_the_version(self) -> Self:
        if self.version == 1 and self.mix is not None:
            raise ValueError("mix is for version 2 of the views, not for version 1")
        for position, op in enumerate(self.ops):
            if self.version == 1 and _is_second(op):
                raise ValueError(f"{op.op} with these settings is for version 2 of the views, not for version 1")
            if self.version == 2 and position and isinstance(op, BoxOp):
                raise ValueError(f"{op.op} takes its box from the original picture, so it must be the first op")
            if self.sizes != ViewSizes() and isinstance(op, PadCrop):
                raise ValueError("sizes are for views of a crop and not for pad-crop, which moves by whole pixels")
        if self.sizes != ViewSizes() and self.box_op is None:
            raise ValueError("sizes need views of version 2 whose first op is a crop")
        if self.made_by is not None and (self.ops or self.mix is not None or self.clean_first):
            raise ValueError("views of another tool (made_by) have no ops, no mix and no clean view")
        if self.decoding == "scaled" and self.box_op is None:
            raise ValueError(
                "decoding: scaled needs views of version 2 whose first op is a crop; others are made of a canvas, for "
                "which pictures are decoded at their whole size"
            )
        return self

    @property
    def box_op(self) -> RandomResizedCrop | ResizeCentreCrop | None:
        """The crop of the original picture, the first op of version 2; None in version 1, or if there is none."""
        first = self.ops[0] if self.ops else None
        return first if self.version == 2 and isinstance(first, RandomResizedCrop | ResizeCentreCrop) else None

    @property
    def needed(self) -> Needs | None:
        """What pictures need so that they may be decoded at a part of their size; None for their whole size.

        All networks get the same, so that one decoding serves them.
        """
        box = self.box_op
        if box is None or self.decoding == "full":
            return None
        sides = [side for side in (self.sizes.student, self.sizes.teacher, self.sizes.clip) if side is not None]
        height, width = box.view_size
        return box.needs((max([height, *sides]), max([width, *sides])))

    def require_pixels(self, where: object = "views.made_by") -> None:
        """Raise MismatchError if another tool drew these views, so that their pixels cannot be made here."""
        if self.made_by is not None:
            raise self.made_by.no_pixels(where)


def _needs_second(data: dict[str, Any]) -> bool:
    """Whether a recipe as plain data uses what only version 2 has."""
    if data.get("mix") is not None or data.get("decoding") == "scaled":
        return True
    sizes = data.get("sizes")
    if isinstance(sizes, ViewSizes):
        sizes = sizes.model_dump()
    if isinstance(sizes, dict) and any(sizes.values()):
        return True
    ops = data.get("ops")
    names = {cls.model_fields["op"].default for cls in _SECOND}
    for op in ops if isinstance(ops, list | tuple) else ():
        if isinstance(op, BaseModel):
            if _is_second(op):
                return True
        elif isinstance(op, str):
            if op in names:
                return True
        elif isinstance(op, dict) and (op.get("op") in names or op.get("interpolation") == "bicubic"):
            return True
    return False


def _is_second(op: BaseModel) -> bool:
    return isinstance(op, _SECOND) or (isinstance(op, RandomResizedCrop) and op.interpolation != "bilinear")
