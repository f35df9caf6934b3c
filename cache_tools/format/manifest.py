"""What a cache says of itself: its recipe, its geometry and where it comes from. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cache_tools.config import Frozen
from cache_tools.format.recipe import FORMAT_VERSION, CacheRecipe, Finite, PromptEnsemble
from cache_tools.images.recipe import DatasetRecipe


class Canary(Frozen):
    """Digest of one view's pixels, replayed before training: a drift in image decoding or view code stops the run."""

    view: int
    index: int
    pixel_digest: str


class Manifest(Finite):
    """Recipe, geometry and provenance; stored as the zarr group's attribute `teacher_cache`.

    `constants_digest` covers the constants, the arrays that hold for all samples and views. Computed on another machine
    they may differ in their last bits, and blocks of caches with different constants must not be mixed. It is empty
    until the cache is created.
    """

    format_version: Literal[2] = FORMAT_VERSION
    fingerprint: str
    name: str
    recipe: CacheRecipe
    dataset: DatasetRecipe
    num_views: PositiveInt
    block_rows: PositiveInt
    clip_scales: tuple[float, ...]
    constants_digest: str = ""
    canaries: tuple[Canary, ...] = ()
    build_recipe: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_scale_per_clip(self) -> Manifest:
        if len(self.clip_scales) != len(self.recipe.clips):
            raise ValueError(f"{len(self.recipe.clips)} CLIPs have {len(self.clip_scales)} scales")
        return self

    @property
    def clip_scale(self) -> float:
        """What the cosines of the first CLIP are multiplied with."""
        return self.clip_scales[0]

    @property
    def preflight(self) -> dict[str, Any] | None:
        """Accuracies that the build measured first, if it did."""
        found = self.provenance.get("preflight")
        return found if isinstance(found, dict) else None

    @property
    def num_samples(self) -> int:
        return self.recipe.dataset.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.recipe.dataset.class_names)

    @property
    def num_blocks(self) -> int:
        """Blocks per view; the last one may be short."""
        return -(-self.num_samples // self.block_rows)

    def block(self, number: int) -> slice:
        """Rows of block `number`."""
        return slice(number * self.block_rows, min((number + 1) * self.block_rows, self.num_samples))


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
