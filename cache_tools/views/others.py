"""Views that another tool drew: what the teachers said of them can be stored, but their pixels cannot be made here."""

from __future__ import annotations

from typing import Literal

from cache_tools.config import Frozen
from cache_tools.errors import MismatchError

OtherTool = Literal["tinyvit", "ml-dr"]

WHY_NOT: dict[OtherTool, str] = {
    "tinyvit": "TinyViT's transforms drew them on Pillow images from a seed of its own random generator",
    "ml-dr": "torchvision's transforms made them on Pillow images, whose resize is not that of our views",
}


class OtherViews(Frozen):
    """Views of another tool.

    Attributes:
        tool: which drew them.
        seeds: whether the cache has the tool's own seed of each (view, sample), as `view_seeds`.
    """

    tool: OtherTool
    seeds: bool = False

    def no_pixels(self, where: object = "views.made_by") -> MismatchError:
        """The error for whoever needs their pixels."""
        return MismatchError(
            "the pixels that the teachers saw in these views cannot be made again",
            where=where,
            expected="views that teacher-cache draws",
            found=f"views of {self.tool}: {WHY_NOT[self.tool]}",
            next_step="import the files again with --targets mean: the mean over the views, for the clean image",
        )
