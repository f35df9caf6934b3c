"""The networks of a cache again: loaded as its build recipe says, and checked to be those that filled it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from cache_tools.console import resolve_device
from cache_tools.errors import NotFoundError, WeightsError
from cache_tools.format.manifest import Fusion, Manifest
from cache_tools.format.recipe import ClipIdentity, Precision, TeacherIdentity
from cache_tools.images.image_set import ImageSet
from pipeline.networks.clip import Clip, load_clip
from pipeline.networks.ensemble import TeacherEnsemble, load_ensemble
from pipeline.networks.teachers import Teacher
from pipeline.recipe import BuildRecipe, ClipSpec

Identity = TeacherIdentity | ClipIdentity

_USE = ("config_digest", "feature_dim", "linear_head", "preprocessing")


def load_stored_ensemble(
    manifest: Manifest,
    images: ImageSet,
    device: torch.device,
    *,
    where: object,
    fusion: Fusion | None = None,
    precision: Precision | None = None,
    otherwise: str | None = None,
) -> TeacherEnsemble:
    """All networks of a cache with its prompts, on a device.

    Args:
        images: whose classes and canvas the networks are loaded for.
        where: the cache, for messages.
        fusion: how their outputs are fused; None for the fusion of the cache.
        precision: of the forward passes, the cache's own if None.
        otherwise: what a user can do who has not these networks, for messages.

    Raises:
        NotFoundError: a cache that does not say how its networks were loaded.
        WeightsError: weights that are missing, or not those the cache was built with; another preprocessing.
    """
    recipe, built = _build_recipe(manifest, where, otherwise), manifest.recipe
    ensemble = load_ensemble(
        recipe.teachers,
        _with_stored_prompts(recipe, built.clips),
        built.fusion,
        images,
        recipe.dataset,
        device,
        precision or built.precision,
        fusion=fusion or Fusion.stored(manifest),
    )
    networks: list[Teacher | Clip] = [*ensemble.teachers, *ensemble.clips]
    identities: list[Identity] = [*built.teachers, *built.clips]
    for network, identity in zip(networks, identities, strict=True):
        _check_identity(network, identity, otherwise)
    return ensemble


def load_stored_clips(
    manifest: Manifest, templates: Sequence[str], device: torch.device, *, where: object
) -> list[Clip]:
    """The CLIPs of a cache with other prompt templates, and the class words that they had.

    Raises:
        As `load_stored_ensemble`, and RecipeError for templates without exactly one `{}`.
    """
    recipe, built = _build_recipe(manifest, where, None), manifest.recipe
    clips = []
    for spec, identity in zip(_with_stored_prompts(recipe, built.clips), built.clips, strict=True):
        changed = spec.model_copy(update={"templates": tuple(templates)})
        clip = load_clip(changed, built.dataset.class_names, device, precision=built.precision)
        _check_identity(clip, identity, None)
        clips.append(clip)
    return clips


def _build_recipe(manifest: Manifest, where: object, otherwise: str | None) -> BuildRecipe:
    """What `build-cache` was asked for when it filled the cache, or the one that this was derived from.

    Keys that older versions had say nothing about the networks.
    """
    known = {key: value for key, value in manifest.build_recipe.items() if key in BuildRecipe.model_fields}
    try:
        return BuildRecipe.model_validate(known)
    except ValidationError as error:
        raise NotFoundError(
            "the cache does not say how its teachers were loaded",
            where=where,
            expected="the recipe of build-cache",
            found=f"{error.error_count()} missing or unknown keys",
            next_step=otherwise,
        ) from error


def _with_stored_prompts(recipe: BuildRecipe, clips: Sequence[ClipIdentity]) -> tuple[ClipSpec, ...]:
    """With the templates and class words of the manifest: a file may have changed, a fused copy has its own."""
    return tuple(
        spec.model_copy(update={"templates": clip.templates, "class_names": clip.class_names})
        for spec, clip in zip(recipe.clips, clips, strict=True)
    )


def _check_identity(network: Teacher | Clip, built: Identity, otherwise: str | None) -> None:
    """Raise WeightsError unless a network has the weights that the cache was built with, and is used as it was."""
    found = network.identity
    if found.weights_digest != built.weights_digest:
        advice = "put the weights of that time back"
        raise WeightsError(
            "these are not the weights that the cache was built with",
            where=built.architecture,
            expected=built.weights_digest[:12],
            found=found.weights_digest[:12],
            next_step=f"{advice}, or {otherwise}" if otherwise else advice,
        )
    for key in _USE:
        expected, now = getattr(built, key, None), getattr(found, key, None)
        if expected != now:
            raise WeightsError(
                f"the network would not be used as it was for the cache: {key.replace('_', ' ')}",
                where=built.architecture,
                expected=expected,
                found=now,
                next_step="use the versions of the libraries that `cache-tools info` shows",
            )


def text_features(
    manifest: Manifest, templates: Sequence[str], device: str = "auto", *, where: object = None
) -> list[npt.NDArray[np.float32]]:
    """Unit text embeddings [P, C, D] of every CLIP of a cache: prompt template × class, float32.

    The classes are called what they were called when the cache was built.

    Args:
        where: the cache, for messages.

    Raises:
        NotFoundError: a cache that does not say how its networks were loaded.
        WeightsError: a CLIP that is missing, or has other weights than the cache's.
        RecipeError: templates without exactly one `{}`.
    """
    clips = load_stored_clips(manifest, templates, resolve_device(device), where=where)
    return [clip.text_features.float().cpu().numpy() for clip in clips]
