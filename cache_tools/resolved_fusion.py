"""How the parts of a cache become its targets, in plain numbers. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from cache_tools.cache_recipe import PromptEnsemble
from cache_tools.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How teachers and CLIPs are fused, in plain numbers: a recipe or a `FusionChoice` with everything resolved.

    Attributes:
        teacher_weight, feature_weight: α and λ.
        teacher_weights, clip_weights: share of each network in its group, summing to 1.
        clip_scales: what the cosines of each CLIP are multiplied with.
        prompt_ensemble: what is averaged over the prompt templates.
        prompts: numbers of the templates that are used; None for all.
        clip_view: the view that CLIP is taken from; None for the view that is loaded.
    """

    teacher_weight: float
    feature_weight: float
    teacher_weights: tuple[float, ...]
    clip_weights: tuple[float, ...]
    clip_scales: tuple[float, ...]
    prompt_ensemble: PromptEnsemble = "embedding"
    prompts: tuple[int, ...] | None = None
    clip_view: int | None = None

    @classmethod
    def stored(cls, manifest: Manifest) -> Fusion:
        """As the cache was built."""
        recipe = manifest.recipe
        return cls(
            teacher_weight=recipe.fusion.teacher_weight,
            feature_weight=recipe.fusion.feature_weight,
            teacher_weights=recipe.teacher_weights,
            clip_weights=recipe.clip_weights,
            clip_scales=manifest.clip_scales,
            prompt_ensemble=recipe.fusion.prompt_ensemble,
        )

    @property
    def clip_scale(self) -> float:
        """Of the first CLIP."""
        return self.clip_scales[0]
