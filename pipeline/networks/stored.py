"""Load the networks of a cache from its build recipe, and check that they are the ones it was built with."""

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
from pipeline.networks.references import names_to_download
from pipeline.networks.teachers import Teacher
from pipeline.recipe import BuildRecipe, ClipSpec, TeacherSpec
from train import own
from train.weights.names import only_named

Identity = TeacherIdentity | ClipIdentity

_COMPARED_KEYS = ("config_digest", "feature_dim", "linear_head", "preprocessing", "outputs")  # beside the weights


def load_stored_ensemble(
    manifest: Manifest,
    images: ImageSet,
    device: torch.device,
    *,
    where: object,
    fusion: Fusion | None = None,
    precision: Precision | None = None,
    alternative: str | None = None,
) -> TeacherEnsemble:
    """Load all networks of a cache, with its prompts, on a device.

    Args:
        images: the networks are loaded for their classes and canvas size.
        where: the cache, for messages.
        fusion: how their outputs are fused; None for the fusion of the cache.
        precision: of the forward passes; None for the cache's own.
        alternative: for messages, what a user without these networks can do.

    Raises:
        NotFoundError: the cache does not record how its networks were loaded.
        RecipeError: a network of someone's own whose code the user has not agreed to import (`train.own`).
        WeightsError: weights are missing, or differ from those of the build, or their preprocessing does; or they have
            to be downloaded, and the user has not named these networks before (`train.weights.names.only_named`).
    """
    recipe, built = _build_recipe(manifest, where, alternative), manifest.recipe

    def load(teachers: Sequence[TeacherSpec]) -> TeacherEnsemble:
        return load_ensemble(
            teachers,
            _with_stored_prompts(recipe, built.clips),
            built.fusion,
            images,
            recipe.dataset,
            device,
            precision or built.precision,
            fusion=fusion or Fusion.stored(manifest),
        )

    with only_named(names_to_download(recipe), where):
        ensemble = load(recipe.teachers)
        raw = _with_raw_weights(recipe, ensemble.teachers, built.teachers)
        if raw != recipe.teachers:
            ensemble = load(raw)
    networks: list[Teacher | Clip] = [*ensemble.teachers, *ensemble.clips]
    identities: list[Identity] = [*built.teachers, *built.clips]
    for network, identity in zip(networks, identities, strict=True):
        _check_identity(network, identity, alternative)
    return ensemble


def load_stored_clips(
    manifest: Manifest, templates: Sequence[str], device: torch.device, *, where: object
) -> list[Clip]:
    """Load the CLIPs of a cache with other prompt templates and the cache's own class words.

    Raises:
        RecipeError: a template does not have exactly one `{}`.
        NotFoundError, WeightsError: as `load_stored_ensemble`.
    """
    recipe, built = _build_recipe(manifest, where, None), manifest.recipe
    clips = []
    for spec, identity in zip(_with_stored_prompts(recipe, built.clips), built.clips, strict=True):
        changed = spec.model_copy(update={"templates": tuple(templates)})
        with only_named(names_to_download(recipe), where):
            clip = load_clip(changed, built.dataset.class_names, device, precision=built.precision)
        _check_identity(clip, identity, None)
        clips.append(clip)
    return clips


def text_features(
    manifest: Manifest, templates: Sequence[str], device: str = "auto", *, where: object = None
) -> list[npt.NDArray[np.float32]]:
    """Unit text embeddings [P, C, D] of every CLIP of a cache: prompt template × class, float32.

    The class words are those of the build.

    Args:
        where: the cache, for messages.

    Raises:
        RecipeError, NotFoundError, WeightsError: as `load_stored_clips`.
    """
    clips = load_stored_clips(manifest, templates, resolve_device(device), where=where)
    return [clip.text_features.float().cpu().numpy() for clip in clips]


def _build_recipe(manifest: Manifest, where: object, alternative: str | None) -> BuildRecipe:
    """The recipe of `build-cache` that filled the cache, or the cache that this one was derived from.

    Keys of older versions are ignored: none of them is about the networks.
    """
    known = {key: value for key, value in manifest.build_recipe.items() if key in BuildRecipe.model_fields}
    try:
        recipe = BuildRecipe.model_validate(known)
        for teacher in recipe.teachers:
            own.require_consent(teacher.name, where)
        return recipe
    except ValidationError as error:
        raise NotFoundError(
            "the cache does not record how its teachers were loaded",
            where=where,
            expected="the recipe of build-cache",
            found=f"{error.error_count()} missing or unknown keys",
            next_step=alternative,
        ) from error


def _with_stored_prompts(recipe: BuildRecipe, clips: Sequence[ClipIdentity]) -> tuple[ClipSpec, ...]:
    """The recipe's CLIPs with the prompts of the manifest: a file may have changed, and a fused copy has its own."""
    return tuple(
        spec.model_copy(update={"templates": clip.templates, "class_names": clip.class_names})
        for spec, clip in zip(recipe.clips, clips, strict=True)
    )


def _with_raw_weights(
    recipe: BuildRecipe, loaded: Sequence[Teacher], built: Sequence[TeacherIdentity]
) -> tuple[TeacherSpec, ...]:
    """The recipe's teachers, with the raw weights where an older version built the cache and saw no average."""
    return tuple(
        spec
        if teacher.raw_key is None or teacher.identity.weights_digest == identity.weights_digest
        else spec.model_copy(update={"weights_key": teacher.raw_key})
        for spec, teacher, identity in zip(recipe.teachers, loaded, built, strict=True)
    )


def _check_identity(network: Teacher | Clip, built: Identity, alternative: str | None) -> None:
    """Raise WeightsError unless a network has the weights, config and preprocessing that the cache was built with."""
    found = network.identity
    if found.weights_digest != built.weights_digest:
        advice = "restore the original weights"
        raise WeightsError(
            "these are not the weights that the cache was built with",
            where=built.architecture,
            expected=built.weights_digest[:12],
            found=found.weights_digest[:12],
            next_step=f"{advice}, or {alternative}" if alternative else advice,
        )
    for key in _COMPARED_KEYS:
        before, now = getattr(built, key, None), getattr(found, key, None)
        if before != now:
            raise WeightsError(
                f"the network differs from the one that the cache was built with: {key.replace('_', ' ')}",
                where=built.architecture,
                expected=before,
                found=now,
                next_step="use the versions of the libraries that `cache-tools info` shows",
            )
