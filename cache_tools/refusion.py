"""Fuse a component cache differently from how it was built, without a forward pass.

A cache with `store: components` holds the targets of each teacher and each CLIP. Weights, scale, prompts and the view
that CLIP sees can therefore be chosen when it is read. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cache_tools.config import Frozen
from cache_tools.config.fields import CountOrZero, Number, Share
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.format.manifest import Fusion, Manifest
from cache_tools.format.recipe import CacheRecipe, ClipIdentity, PromptEnsemble

if TYPE_CHECKING:
    from cache_tools.reader import TeacherCache
    from cache_tools.targets import ViewTargets

MATCH_SAMPLES = 2048
SHARE_TOLERANCE = 1e-6


def kept_accuracies(
    preflight: Mapping[str, Any] | None, *, teachers: bool, clips: bool, weight: bool
) -> dict[str, Any] | None:
    """The accuracies of a preflight that another fusion does not change.

    Args:
        teachers, clips: whether the group is mixed as before.
        weight: whether the teacher weight is as before.
    """
    if preflight is None:
        return None
    changed = set() if teachers else {"teacher_top1"}
    changed |= set() if clips else {"clip_top1", "networks"}
    changed |= {"fusion_top1"} if changed or not weight else set()
    return {key: value for key, value in preflight.items() if key not in changed}


class FusionChoice(Frozen):
    """Changes to the fusion of a cache's recipe; None keeps the recipe's choice.

    Attributes:
        teacher_weight: α of the logits, 1 for the teachers alone, 0 for CLIP alone.
        feature_weight: λ of the features.
        teacher_weights, clip_weights: share of each network in its group, in the order of the recipe, summing to 1.
        clip_scale: the factor of CLIP's cosines: `model`, `match` or a number (see `FusionRecipe`).
        prompt_ensemble: `embedding`, `logits` or `probabilities` (see `FusionRecipe`).
        prompts: numbers, from 0, of the prompt templates to use, for every CLIP.
        clip_view: use CLIP's targets of this view for all views, as the paper's official code does, whose CLIP never
            sees an augmented image; None uses those of the view that the student sees.
    """

    teacher_weight: Share | None = None
    feature_weight: Share | None = None
    teacher_weights: tuple[Number, ...] | None = None
    clip_weights: tuple[Number, ...] | None = None
    clip_scale: Literal["model", "match"] | Number | None = None
    prompt_ensemble: PromptEnsemble | None = None
    prompts: tuple[CountOrZero, ...] | None = Field(None, min_length=1)
    clip_view: CountOrZero | None = None

    @model_validator(mode="after")
    def _check_weights_and_prompts(self) -> FusionChoice:
        for key in ("teacher_weights", "clip_weights"):
            weights = getattr(self, key)
            if weights is not None:
                check_shares(weights, where=f"fusion.{key}")
        if self.prompts is not None and len(set(self.prompts)) < len(self.prompts):
            raise RecipeError("a prompt template is named twice", where="fusion.prompts", found=list(self.prompts))
        return self

    def resolve(self, cache: TeacherCache) -> Fusion:
        """This choice in numbers, for one cache.

        Raises:
            NotFoundError: the cache is fused and has no components; or no such `clip_view` or prompt template.
            RecipeError: not one weight for each of the cache's networks, a scale that is not above 0, or a setting of
                networks that the cache does not have.
            PreflightError: the scale is `match`, and CLIP or the teacher gives all classes the same value.
        """
        self.check_groups(cache.recipe)
        if cache.recipe.store != "components":
            if self._differs_from(cache):
                raise self._no_components(cache)
            return Fusion.stored(cache.manifest)
        self._check(cache)
        changes = {name: value for name, value in self if value is not None and name != "clip_scale"}
        fusion = replace(Fusion.stored(cache.manifest), **changes)
        if self.clip_scale is None:
            return fusion
        return replace(fusion, clip_scales=_scales(cache, self.clip_scale, fusion))

    def kept_accuracies(self, cache: TeacherCache) -> dict[str, Any] | None:
        """The accuracies of the cache's preflight that this choice does not change; None if there was no preflight.

        Raises:
            CacheError: as `resolve`.
        """
        stored, chosen = Fusion.stored(cache.manifest), self.resolve(cache)
        of_clips = ("clip_weights", "clip_scales", "prompt_ensemble", "prompts", "clip_view")
        return kept_accuracies(
            cache.manifest.preflight,
            teachers=chosen.teacher_weights == stored.teacher_weights,
            clips=all(getattr(chosen, name) == getattr(stored, name) for name in of_clips),
            weight=chosen.teacher_weight == stored.teacher_weight,
        )

    def check_groups(self, recipe: CacheRecipe) -> None:
        """Raise RecipeError for a setting of networks that a cache does not have."""
        settings = {name: value for name, value in self if value is not None}
        check_groups(settings, teachers=bool(recipe.teachers), clips=bool(recipe.clips), who="the cache")

    def _differs_from(self, cache: TeacherCache) -> bool:
        """Whether a choice is not how the cache was fused."""
        stored, recipe = Fusion.stored(cache.manifest), cache.recipe.fusion
        scales = {recipe.clip_scale, *({stored.clip_scale} if len(set(stored.clip_scales)) == 1 else ())}
        return any(
            value not in scales if name == "clip_scale" else value != getattr(stored, name)
            for name, value in self
            if value is not None
        )

    def _no_components(self, cache: TeacherCache) -> NotFoundError:
        changes = ", ".join(name for name, value in self if value is not None)
        return NotFoundError(
            "this cache cannot be fused differently",
            where=cache.path,
            expected=f"a cache with components, to change {changes}",
            found=f"fused targets only: {describe_fusion(cache.manifest)}",
            next_step="build one with --set store=components, or leave the fusion as it is",
        )

    def _check(self, cache: TeacherCache) -> None:
        recipe = cache.recipe
        if self.clip_scale is not None:
            check_clip_scale(self.clip_scale, where="fusion.clip_scale")
        for key, weights, networks in (
            ("teacher_weights", self.teacher_weights, [teacher.architecture for teacher in recipe.teachers]),
            ("clip_weights", self.clip_weights, [clip.architecture for clip in recipe.clips]),
        ):
            if weights is not None and len(weights) != len(networks):
                raise RecipeError(
                    "not one weight for each network of the cache",
                    where=f"fusion.{key}",
                    expected=f"{len(networks)}, for {', '.join(networks)}",
                    found=list(weights),
                )
        templates = min((len(clip.templates) for clip in recipe.clips), default=0)
        if self.prompts is not None and max(self.prompts) >= templates:
            raise NotFoundError(
                "no such prompt template",
                where=cache.path,
                expected=f"0 to {templates - 1}",
                found=max(self.prompts),
                next_step="see the templates with `cache-tools info --json`",
            )
        if self.clip_view is not None and self.clip_view >= cache.num_views:
            raise NotFoundError(
                "no such view", where=cache.path, expected=f"0 to {cache.num_views - 1}", found=self.clip_view
            )


def check_groups(settings: Mapping[str, Any], *, teachers: bool, clips: bool, who: str) -> None:
    """Raise RecipeError for a setting of the fusion without an effect, because there are no teachers or no CLIPs.

    Args:
        settings: those that the user has made, by name; names of `FusionRecipe` and `FusionChoice`.
        who: has the networks, for messages.
    """
    if teachers and clips:
        return
    only, missing, weight = ("teacher", "CLIP", 1.0) if teachers else ("CLIP", "teacher", 0.0)
    advice = "leave it out"
    if who == "the recipe":
        advice += f" (`build-cache --{missing.lower()} none` also drops the weights in the recipe)"
    of_both = ("teacher_weight", "feature_weight")
    of_clips = ("clip_scale", "prompt_ensemble", "clip_weights", "prompts", "clip_view")
    for name, value in settings.items():
        where = f"fusion.{name}"
        if name in of_both and value != weight:
            raise RecipeError(
                f"{who} has no {missing}, so the {only} has all the weight",
                where=where,
                expected=f"{weight:g}",
                found=value,
                next_step=advice,
            )
        if (name in of_clips and not clips) or (name == "teacher_weights" and not teachers):
            raise RecipeError(
                f"{who} has no {missing}, so this setting has no effect",
                where=where,
                found=list(value) if isinstance(value, tuple) else value,
                next_step="leave it out",
            )
        if name == "clip_scale" and value == "match" and not teachers:
            raise RecipeError(
                f"{who} has no teacher whose spread the scale could match",
                where=where,
                expected="model or a number",
                found=value,
            )


def describe_fusion(manifest: Manifest) -> str:
    """The fusion of a cache in words; weights only if there is something to weigh."""
    recipe, fusion = manifest.recipe, manifest.recipe.fusion
    scales = ", ".join(f"{scale:g}" for scale in manifest.clip_scales)
    parts = [f"CLIP scale {scales} ({fusion.clip_scale})", f"prompt ensemble {fusion.prompt_ensemble}"]
    if recipe.only_group is None:
        weights = f"teacher weight {fusion.teacher_weight:g}, feature weight {fusion.feature_weight:g}"
        return ", ".join([weights, *parts])
    if recipe.only_group == "clip":
        return ", ".join(["CLIP alone", *parts])
    return "the teacher alone" if len(recipe.teachers) == 1 else f"{len(recipe.teachers)} teachers, no CLIP"


def check_shares(weights: Sequence[float], *, where: object) -> None:
    """Raise RecipeError unless these are weights from 0 to 1 that sum to 1 (within 1e-6)."""
    if not (all(0.0 <= weight <= 1.0 for weight in weights) and abs(sum(weights) - 1.0) <= SHARE_TOLERANCE):
        raise RecipeError(
            "the weights of a group of networks do not sum to 1",
            where=where,
            expected="weights from 0 to 1 with the sum 1",
            found=f"{', '.join(f'{weight:g}' for weight in weights)} with the sum {sum(weights):g}",
        )


def check_clip_scale(scale: str | float, *, where: object) -> None:
    """Raise RecipeError unless this is a name or a number above 0: a negative scale reverses CLIP's ranking of classes.

    Recipes do not check this themselves, so that stored ones stay readable.
    """
    if not isinstance(scale, str) and not 0.0 < scale < float("inf"):
        raise RecipeError("bad CLIP scale", where=where, expected="model, match or a number above 0", found=scale)


def matched_scales(targets: ViewTargets, clips: Sequence[ClipIdentity]) -> tuple[float, ...]:
    """The scale `match` of each CLIP, from up to 2048 evenly spaced samples of a component cache's view.

    Raises:
        PreflightError: CLIP or the teacher gives all classes the same value.
    """
    from cache_tools.fusion import resolve_clip_scale

    count = min(MATCH_SAMPLES, len(targets))
    rows = [number * len(targets) // count for number in range(count)]
    teacher_logits = targets.teacher_logits(rows)
    return tuple(
        resolve_clip_scale("match", clip.logit_scale, teacher_logits, targets.cosine(rows, number))
        for number, clip in enumerate(clips)
    )


def _scales(cache: TeacherCache, choice: Literal["model", "match"] | float, fusion: Fusion) -> tuple[float, ...]:
    """One number for each CLIP; `match` takes the teachers' weights and the prompts of `fusion`, on view 0."""
    from cache_tools.fusion import resolve_clip_scale

    clips = cache.recipe.clips
    if choice != "match":
        return tuple(resolve_clip_scale(choice, clip.logit_scale) for clip in clips)
    targets = cache.load_view(0, logits=False, features=False, fusion=replace(fusion, clip_view=None))
    return matched_scales(targets, clips)
