"""Views: what augmentation seed `v` makes of a sample, the same on every machine and library version."""

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
