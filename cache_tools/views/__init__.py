"""Views: the augmentation of a sample by seed `v`, identical on every machine and library version."""

from cache_tools.views.ops import ColourJitter, Flip, Identity, PadCrop, RandomErasing, RandomResizedCrop, ViewOp
from cache_tools.views.recipe import ViewRecipe

__all__ = [
    "ColourJitter",
    "Flip",
    "Identity",
    "PadCrop",
    "RandomErasing",
    "RandomResizedCrop",
    "ViewOp",
    "ViewRecipe",
]
