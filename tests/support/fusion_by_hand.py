"""The fusion of docs/format.md in float64 numpy, one sample, network and prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cache_tools.reader import TeacherCache

Array = np.ndarray[Any, Any]


class ByHand(NamedTuple):
    """Of every sample of a view: z_T, z_C, z_F (centred) [N, C] and f_F [N, D], float64."""

    teacher: Array
    clip: Array
    logits: Array
    features: Array


def fused_by_hand(cache: TeacherCache, view: int, **changes: Any) -> ByHand:
    """The targets of a component cache; `changes` are fields of a `FusionChoice`, with `clip_scales` as numbers."""
    recipe, manifest = cache.recipe, cache.manifest
    choice: dict[str, Any] = {
        "teacher_weight": recipe.fusion.teacher_weight,
        "feature_weight": recipe.fusion.feature_weight,
        "teacher_weights": [teacher.weight for teacher in recipe.teachers],
        "clip_weights": [clip.weight for clip in recipe.clips],
        "clip_scales": list(manifest.clip_scales),
        "prompt_ensemble": recipe.fusion.prompt_ensemble,
        "prompts": None,
        "clip_view": view,
    } | changes

    def constant(name: str, suffix: str) -> Array:
        return cache.constant(name + suffix).astype(np.float64)

    teachers, teacher_features = [], []
    for number, teacher in enumerate(recipe.teachers):
        suffix = f"_{number + 1}" if number else ""
        features = cache.read_array(f"teacher_features{suffix}", view).astype(np.float64)
        if teacher.linear_head:
            head = constant("teacher_head_weight", suffix)
            teachers.append(np.stack([head @ row for row in features]) + constant("teacher_head_bias", suffix))
        else:
            teachers.append(cache.read_array(f"teacher_logits{suffix}", view).astype(np.float64))
        teacher_features.append(unit(features @ constant("teacher_projection", suffix)))
    clips, clip_features = [], []
    for number in range(len(recipe.clips)):
        suffix = f"_{number + 1}" if number else ""
        features = cache.read_array(f"clip_features{suffix}", choice["clip_view"]).astype(np.float64)
        text = constant("text_features", suffix)
        if choice["prompts"] is not None:
            text = np.stack([text[prompt] for prompt in choice["prompts"]])
        embeddings = None if choice["prompts"] is not None else constant("class_embeddings", suffix)
        scale = choice["clip_scales"][number]
        clips.append(np.stack([clip_row(row, text, embeddings, scale, choice["prompt_ensemble"]) for row in features]))
        clip_features.append(unit(features @ constant("clip_projection", suffix)))

    z_teacher, z_clip = mean(teachers, choice["teacher_weights"]), mean(clips, choice["clip_weights"])
    fused = choice["teacher_weight"] * z_teacher + (1 - choice["teacher_weight"]) * z_clip
    f_teacher, f_clip = (  # a missing group, whose weight is 0, is a plain 0
        unit(mean(parts, choice[key])) if parts else np.zeros(())
        for parts, key in ((teacher_features, "teacher_weights"), (clip_features, "clip_weights"))
    )
    mixed = choice["feature_weight"] * f_teacher + (1 - choice["feature_weight"]) * f_clip
    return ByHand(z_teacher, z_clip, fused - fused.mean(axis=1, keepdims=True), mixed)


def clip_row(image: Array, text: Array, embeddings: Array | None, scale: float, ensemble: str) -> Array:
    """Scaled logits [C] of one image; `embeddings` are the stored class embeddings where all prompts are used."""
    image = unit(image)
    if ensemble == "embedding":
        classes = unit(np.mean([unit(prompt) for prompt in text], axis=0)) if embeddings is None else embeddings
        return scale * classes @ image
    per_prompt = [scale * unit(prompt) @ image for prompt in text]
    if ensemble == "logits":
        return np.mean(per_prompt, axis=0)
    shares = [np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() for logits in per_prompt]
    return np.log(np.mean(shares, axis=0))


def mean(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    return np.sum([weight * part for weight, part in zip(weights, parts, strict=True)], axis=0)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
