"""How a student sees test images. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache_tools.config import Frozen
from cache_tools.config.fields import Whole

EvaluationSide = Annotated[Whole, Field(ge=1, le=4096)]


class EvaluationRecipe(Frozen):
    """The transform of test images: resize the shorter side, crop the centre, as timm and torchvision do.

    Attributes:
        resize: of the shorter side; by default `crop` / 0.875 where views crop, and else the images as they are, or as
            `evaluation_preprocessing` brings them to the size of the views.
        crop: what the student is given: the side of a square, or (height, width); None for the size of the views.
        interpolation: of the resize.
    """

    resize: EvaluationSide | None = None
    crop: EvaluationSide | tuple[EvaluationSide, EvaluationSide] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"

    @model_validator(mode="after")
    def _crop_is_not_larger(self) -> EvaluationRecipe:
        if self.resize is not None and (size := self.crop_size) is not None and max(size) > self.resize:
            raise ValueError(f"a resize of at least the crop, {max(size)}")
        return self

    @property
    def crop_size(self) -> tuple[int, int] | None:
        """(height, width) of the crop."""
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    @property
    def is_default(self) -> bool:
        """Whether test images are prepared by the rule for the views alone."""
        return self == EvaluationRecipe()
