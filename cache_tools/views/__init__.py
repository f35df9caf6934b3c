"""Views: the augmentation of a sample by seed `v`, identical on every machine and library version."""

from cache_tools.views.augment import RandAugment, Rotation, ThreeAugment, TrivialAugmentWide
from cache_tools.views.boxes import RandomResizedCrop, ResizeCentreCrop
from cache_tools.views.loading import load_each
from cache_tools.views.mix import Mixing, MixRecipe
from cache_tools.views.ops import ColourJitter, Flip, Identity, PadCrop, RandomErasing
from cache_tools.views.recipe import ViewOp, ViewRecipe, ViewSizes

__all__ = [
    "ColourJitter",
    "Flip",
    "Identity",
    "MixRecipe",
    "Mixing",
    "PadCrop",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "ResizeCentreCrop",
    "Rotation",
    "ThreeAugment",
    "TrivialAugmentWide",
    "ViewOp",
    "ViewRecipe",
    "ViewSizes",
    "load_each",
]
