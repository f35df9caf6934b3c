"""Fuse the two halves of a component cache in another way than it was built, without a forward pass.

A cache with `store: components` holds what teacher and CLIP said, each for itself, so that weights, scale and the view
that CLIP looks at are free to choose when it is read. Importable without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt

from cache_tools.config import Frozen
from cache_tools.errors import NotFoundError

if TYPE_CHECKING:
    from cache_tools.reader import TeacherCache

MATCH_SAMPLES = 2048


class FusionChoice(Frozen):
    """What is fused differently from the cache's recipe; None keeps what the recipe says.

    Attributes:
        teacher_weight: α of the logits, 1 for the teacher alone, 0 for CLIP alone.
        feature_weight: λ of the features.
        clip_scale: what CLIP's cosines are multiplied with: `model`, `match` or a number (see `FusionRecipe`).
        clip_view: CLIP's targets of this view stand for all views, as in the paper's official code, whose CLIP never
            sees an augmented image; None takes them from the view that the student sees.
    """

    teacher_weight: float | None = Field(None, ge=0.0, le=1.0)
    feature_weight: float | None = Field(None, ge=0.0, le=1.0)
    clip_scale: Literal["model", "match"] | float | None = None
    clip_view: NonNegativeInt | None = None

    def resolve(self, cache: TeacherCache) -> Fusion:
        """The numbers that this choice means for a cache.

        Raises:
            NotFoundError: a fused cache, which keeps no halves to fuse again; or no such `clip_view`.
            PreflightError: `match` where CLIP or the teacher says the same for every class.
        """
        recipe = cache.recipe.fusion
        if self != FusionChoice() and cache.recipe.store != "components":
            asked = ", ".join(name for name, value in self if value is not None)
            raise NotFoundError(
                "this cache cannot be fused in another way",
                where=cache.path,
                expected=f"a cache with components, to change {asked}",
                found=f"fused targets only, teacher weight {recipe.teacher_weight:g}, CLIP scale "
                f"{cache.manifest.clip_scale:g}",
                next_step="build one with --set store=components, or leave the fusion as it is",
            )
        if self.clip_view is not None and self.clip_view >= cache.num_views:
            raise NotFoundError(
                "no such view", where=cache.path, expected=f"0 to {cache.num_views - 1}", found=self.clip_view
            )
        return Fusion(
            teacher_weight=recipe.teacher_weight if self.teacher_weight is None else self.teacher_weight,
            feature_weight=recipe.feature_weight if self.feature_weight is None else self.feature_weight,
            clip_scale=cache.manifest.clip_scale if self.clip_scale is None else _scale(cache, self.clip_scale),
            clip_view=self.clip_view,
        )


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """A resolved `FusionChoice`: plain numbers."""

    teacher_weight: float
    feature_weight: float
    clip_scale: float
    clip_view: int | None = None


def _scale(cache: TeacherCache, choice: Literal["model", "match"] | float) -> float:
    """`match` compares up to 2048 evenly spaced samples of view 0."""
    from cache_tools import fusion

    if choice != "match":
        return fusion.resolve_clip_scale(choice, cache.recipe.clip.logit_scale)
    targets, count = cache.load_view(0), min(MATCH_SAMPLES, cache.num_samples)
    rows = [number * cache.num_samples // count for number in range(count)]
    return fusion.resolve_clip_scale(
        choice, cache.recipe.clip.logit_scale, targets.teacher_logits(rows), targets.cosine(rows)
    )
