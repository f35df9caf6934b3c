"""Teachers and CLIPs as one function from view pixels to targets: for the build, the preflight and online training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cache_tools import fusion
from cache_tools.format.arrays import array_name
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import FusionRecipe, Precision, Store
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.refusion import MATCH_SAMPLES
from cache_tools.views.recipe import ViewRecipe
from pipeline.networks.clip import Clip, ClipOutput, load_clip
from pipeline.networks.teachers import Teacher, TeacherOutput, load_teacher
from pipeline.recipe import ClipSpec, TeacherSpec, shares


class PairOutput(NamedTuple):
    """What every network says about a batch."""

    teachers: tuple[TeacherOutput, ...]
    clips: tuple[ClipOutput, ...]


class TeacherPair:
    """Both groups of networks, conventional teachers and CLIPs (mostly one of each), frozen, on one device.

    Attributes:
        teachers, clips: the networks.
        fusion: how they become one target; its CLIP scales are resolved before the first target is made.
    """

    def __init__(self, teachers: Sequence[Teacher], clips: Sequence[Clip], recipe: FusionRecipe, how: Fusion) -> None:
        self.teachers, self.clips, self.fusion = tuple(teachers), tuple(clips), how
        seed, width = recipe.projection_seed, recipe.feature_dim
        self._teacher_projections = [
            self._projection(teacher, width, seed + 2 * number) for number, teacher in enumerate(self.teachers)
        ]
        self._clip_projections = [
            self._projection(clip, width, seed + 2 * number + 1) for number, clip in enumerate(self.clips)
        ]
        self._prompts = None if _plain_prompts(how) else [_prompts(clip, how) for clip in self.clips]
        # Two streams let a small teacher fill the gaps that CLIP leaves on a GPU.
        self._clip_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        return self.clips[0].class_embeddings.device

    def constants(self, store: Store) -> dict[str, np.ndarray]:
        """The arrays a cache holds once, all float32; with `components` also what turns features into logits."""
        tensors: dict[str, torch.Tensor] = {}
        for number, teacher in enumerate(self.teachers):
            tensors[array_name("teacher_projection", number)] = self._teacher_projections[number]
            if store == "components" and teacher.head is not None:
                for part, tensor in zip(("weight", "bias"), teacher.head, strict=True):
                    tensors[array_name(f"teacher_head_{part}", number)] = tensor
        for number, clip in enumerate(self.clips):
            tensors[array_name("clip_projection", number)] = self._clip_projections[number]
            tensors[array_name("class_embeddings", number)] = clip.class_embeddings
            if store == "components":
                tensors[array_name("text_features", number)] = clip.text_features
        return {name: tensor.detach().float().cpu().contiguous().numpy() for name, tensor in tensors.items()}

    @torch.inference_mode()
    def outputs(self, pixels_NCHW_u8: torch.Tensor) -> PairOutput:
        """One forward pass of each network over uint8 view pixels on this pair's device."""
        stream = self._clip_stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            clips = tuple(clip(pixels_NCHW_u8) for clip in self.clips)
        teachers = tuple(teacher(pixels_NCHW_u8) for teacher in self.teachers)
        if stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in (tensor for clip in clips for tensor in clip):  # made on the side stream, freed on this one
                tensor.record_stream(current)
            pixels_NCHW_u8.record_stream(stream)
        return PairOutput(teachers, clips)

    @torch.inference_mode()
    def teacher_logits(self, teachers: Sequence[TeacherOutput]) -> torch.Tensor:
        """z_T [B, C], float32: the teachers' logits, mixed."""
        return fusion.mix([teacher.logits for teacher in teachers], self.fusion.teacher_weights)

    @torch.inference_mode()
    def clip_logits(self, clips: Sequence[ClipOutput]) -> torch.Tensor:
        """z_C [B, C], float32: the CLIPs' scaled logits, mixed."""
        return fusion.mix(self.scaled_logits(clips), self.fusion.clip_weights)

    @torch.inference_mode()
    def scaled_logits(self, clips: Sequence[ClipOutput]) -> list[torch.Tensor]:
        """Scaled logits [B, C] of each CLIP over its prompts, float32."""
        scales = self.fusion.clip_scales
        if self._prompts is None:  # the forward pass has the cosines already
            return [scale * clip.cosine for clip, scale in zip(clips, scales, strict=True)]
        return [
            fusion.clip_logits(clip.features, prompts, scale)
            for clip, prompts, scale in zip(clips, self._prompts, scales, strict=True)
        ]

    @torch.inference_mode()
    def fuse(self, teachers: Sequence[TeacherOutput], clips: Sequence[ClipOutput]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused logits [B, C], rows mean-centred, and fused features [B, D], float32."""
        logits = fusion.fused_logits([teacher.logits for teacher in teachers], self.scaled_logits(clips), self.fusion)
        features = fusion.fused_features(
            [teacher.features for teacher in teachers],
            self._teacher_projections,
            [clip.features for clip in clips],
            self._clip_projections,
            self.fusion,
        )
        return logits, features

    def targets(self, pixels_NCHW_u8: torch.Tensor, store: Store) -> Mapping[str, torch.Tensor]:
        """Rows for the target arrays of a cache, float32, by array name (`cache_tools.format.arrays.target_arrays`)."""
        teachers, clips = self.outputs(pixels_NCHW_u8)
        if store == "fused":
            logits, features = self.fuse(teachers, clips)
            return {"fused_logits": logits, "fused_features": features}
        rows = {array_name("clip_features", number): clip.features for number, clip in enumerate(clips)}
        for number, (network, teacher) in enumerate(zip(self.teachers, teachers, strict=True)):
            rows[array_name("teacher_features", number)] = teacher.features
            if network.head is None:
                rows[array_name("teacher_logits", number)] = fusion.centre_rows(teacher.logits)
        return rows

    def use_scales(self, clip_scales: Sequence[float]) -> None:
        """Take the scales of a manifest: a cache that grows keeps those that it began with."""
        assert len(clip_scales) == len(self.clips), "one scale per CLIP"
        self.fusion = replace(self.fusion, clip_scales=tuple(clip_scales))

    def _projection(self, network: Teacher | Clip, width: int, seed: int) -> torch.Tensor:
        return torch.from_numpy(fusion.projection_matrix(network.identity.feature_dim, width, seed)).to(self.device)


def load_pair(
    teachers: TeacherSpec | Sequence[TeacherSpec],
    clips: ClipSpec | Sequence[ClipSpec],
    recipe: FusionRecipe,
    images: ImageSet,
    dataset: DatasetRecipe,
    device: torch.device,
    precision: Precision,
    *,
    how: Fusion | None = None,
    batch_size: int = 256,
) -> TeacherPair:
    """Load all networks for a dataset and settle how they are fused.

    Args:
        teachers, clips: one network or several, as in a build recipe.
        how: an already resolved fusion (`Fusion.stored(manifest)`, `FusionChoice(…).resolve(cache)`), used in place of
            `recipe`; its `clip_view` means nothing here. None resolves the recipe, for the scale `match` on up to 2048
            evenly spaced clean samples of `images`.

    Raises:
        WeightsError: weights that are missing or do not fit the architecture, class count or class order.
        RecipeError: weights of a group that do not sum to 1.
    """
    teacher_specs = (teachers,) if isinstance(teachers, TeacherSpec) else tuple(teachers)
    clip_specs = (clips,) if isinstance(clips, ClipSpec) else tuple(clips)
    unscaled = Fusion(
        teacher_weight=recipe.teacher_weight,
        feature_weight=recipe.feature_weight,
        teacher_weights=shares(teacher_specs, where="teacher"),
        clip_weights=shares(clip_specs, where="clip"),
        clip_scales=(1.0,) * len(clip_specs),
        prompt_ensemble=recipe.prompt_ensemble,
    )
    names, size, colours = images.class_names, images.image_size, dataset.normalisation
    loaded = [load_teacher(spec, names, device, size, colours, precision=precision) for spec in teacher_specs]
    loaded_clips = [load_clip(spec, names, device, precision=precision) for spec in clip_specs]
    pair = TeacherPair(loaded, loaded_clips, recipe, how or unscaled)
    if how is None:
        pair.use_scales(_resolve_scales(pair, recipe, images, batch_size))
    return pair


def labelled_sample(images: ImageSet, limit: int) -> np.ndarray:
    """Up to `limit` evenly spaced sample indices."""
    count = min(limit, len(images))
    return np.arange(count, dtype=np.int64) * len(images) // max(count, 1)


def clean_batches(images: ImageSet, index: np.ndarray, batch_size: int, device: torch.device):  # type: ignore[no-untyped-def]
    """Clean uint8 canvases of `index`, batch by batch, on `device`."""
    for start in range(0, len(index), batch_size):
        yield torch.from_numpy(images.load(index[start : start + batch_size])).to(device)


def view_pixels(
    images: ImageSet, views: ViewRecipe, index: np.ndarray, view: int, device: torch.device
) -> torch.Tensor:
    """uint8 [B,3,H,W] on `device`: what every teacher and student sees of these samples in view `view`."""
    return views.apply(torch.from_numpy(images.load(index)).to(device), index, view)


def _plain_prompts(how: Fusion) -> bool:
    """Whether all prompts count, averaged as embeddings: images are then compared with the class embeddings."""
    return how.prompts is None and how.prompt_ensemble == "embedding"


def _prompts(clip: Clip, how: Fusion) -> torch.Tensor:
    text_features_PCD = clip.text_features if how.prompts is None else clip.text_features[list(how.prompts)]
    return fusion.prompt_embeddings(text_features_PCD, how.prompt_ensemble)


def _resolve_scales(pair: TeacherPair, recipe: FusionRecipe, images: ImageSet, batch_size: int) -> list[float]:
    choice, scales = recipe.clip_scale, [clip.identity.logit_scale for clip in pair.clips]
    if choice != "match":
        return [fusion.resolve_clip_scale(choice, scale) for scale in scales]
    index = labelled_sample(images, MATCH_SAMPLES)
    outputs = [pair.outputs(pixels) for pixels in clean_batches(images, index, batch_size, pair.device)]
    teacher_logits = torch.cat([pair.teacher_logits(output.teachers) for output in outputs])
    cosines = [torch.cat([output.clips[number].cosine for output in outputs]) for number in range(len(scales))]
    return [
        fusion.resolve_clip_scale(choice, scale, teacher_logits, cosine)
        for scale, cosine in zip(scales, cosines, strict=True)
    ]
