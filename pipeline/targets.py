"""Teacher and CLIP as one function from view pixels to targets: for the build, the preflight and online training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch

from cache_tools import fusion
from cache_tools.format import FusionRecipe, Precision, Store
from cache_tools.images import DatasetRecipe, ImageSet
from cache_tools.views import ViewRecipe
from pipeline.clip import Clip, ClipOutput, load_clip
from pipeline.recipe import ClipSpec, TeacherSpec
from pipeline.teachers import Teacher, TeacherOutput, load_teacher


class TeacherPair:
    """A conventional teacher and CLIP, frozen, on one device, with the fixed projections of the fused features.

    `clip_scale` is what the cosines are multiplied with (resolved from the recipe's choice before the first target).
    """

    def __init__(self, teacher: Teacher, clip: Clip, recipe: FusionRecipe, clip_scale: float) -> None:
        self.teacher, self.clip, self.recipe, self.clip_scale = teacher, clip, recipe, clip_scale
        width = recipe.feature_dim
        self._projections = {
            "teacher_projection": fusion.projection_matrix(teacher.identity.feature_dim, width, recipe.projection_seed),
            "clip_projection": fusion.projection_matrix(clip.identity.feature_dim, width, recipe.projection_seed + 1),
        }
        device = clip.class_embeddings.device
        self._on_device = {name: torch.from_numpy(value).to(device) for name, value in self._projections.items()}
        # Two streams let a small teacher fill the gaps that CLIP leaves on a GPU.
        self._clip_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        return self.clip.class_embeddings.device

    def constants(self, store: Store) -> dict[str, np.ndarray]:
        """The arrays a cache holds once, all float32; with `components` also what turns features into logits."""
        arrays = dict(self._projections)
        arrays["class_embeddings"] = _numpy(self.clip.class_embeddings)
        if store == "components":
            arrays["text_features"] = _numpy(self.clip.text_features)
            if self.teacher.head is not None:
                weight, bias = self.teacher.head
                arrays["teacher_head_weight"], arrays["teacher_head_bias"] = _numpy(weight), _numpy(bias)
        return arrays

    @torch.inference_mode()
    def outputs(self, pixels_NCHW_u8: torch.Tensor) -> tuple[TeacherOutput, ClipOutput]:
        """One forward pass of each network over uint8 view pixels on this pair's device."""
        stream = self._clip_stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            clip_output = self.clip(pixels_NCHW_u8)
        teacher_output = self.teacher(pixels_NCHW_u8)
        if stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in clip_output:  # made on the side stream, freed on the current one
                tensor.record_stream(current)
            pixels_NCHW_u8.record_stream(stream)
        return teacher_output, clip_output

    @torch.inference_mode()
    def fuse(self, teacher: TeacherOutput, clip: ClipOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused logits [B, C], rows mean-centred, and fused features [B, D], float32."""
        return fusion.fuse_targets(
            teacher.logits,
            teacher.features,
            clip.cosine,
            clip.features,
            teacher_projection=self._on_device["teacher_projection"],
            clip_projection=self._on_device["clip_projection"],
            teacher_weight=self.recipe.teacher_weight,
            feature_weight=self.recipe.feature_weight,
            clip_scale=self.clip_scale,
        )

    def targets(self, pixels_NCHW_u8: torch.Tensor, store: Store) -> Mapping[str, torch.Tensor]:
        """Rows for the target arrays of a cache, float32, by array name (`cache_tools.format.target_arrays`)."""
        teacher, clip = self.outputs(pixels_NCHW_u8)
        if store == "fused":
            logits, features = self.fuse(teacher, clip)
            return {"fused_logits": logits, "fused_features": features}
        rows = {"teacher_features": teacher.features, "clip_features": clip.features}
        if self.teacher.head is None:
            rows["teacher_logits"] = fusion.centre_rows(teacher.logits)
        return rows


def load_pair(
    teacher: TeacherSpec,
    clip: ClipSpec,
    recipe: FusionRecipe,
    images: ImageSet,
    dataset: DatasetRecipe,
    device: torch.device,
    precision: Precision,
    *,
    clip_scale: float | None = None,
    batch_size: int = 256,
) -> TeacherPair:
    """Load both networks for a dataset and settle the CLIP scale.

    Args:
        clip_scale: an already resolved scale (from a manifest); None resolves the recipe's choice, for `match` on up to
            2048 evenly spaced clean samples of `images`.

    Raises:
        WeightsError: weights that are missing or do not fit the architecture, class count or class order.
    """
    pair = TeacherPair(
        load_teacher(
            teacher, images.class_names, device, images.image_size, dataset.normalisation, precision=precision
        ),
        load_clip(clip, images.class_names, device, precision=precision),
        recipe,
        clip_scale if clip_scale is not None else 1.0,
    )
    if clip_scale is None:
        pair.clip_scale = _resolve_scale(pair, images, batch_size)
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


def _resolve_scale(pair: TeacherPair, images: ImageSet, batch_size: int) -> float:
    choice = pair.recipe.clip_scale
    if choice != "match":
        return fusion.resolve_clip_scale(choice, pair.clip.identity.logit_scale, None, None)
    outputs = [
        pair.outputs(pixels) for pixels in clean_batches(images, labelled_sample(images, 2048), batch_size, pair.device)
    ]
    teacher_logits = torch.cat([teacher.logits for teacher, _ in outputs])
    cosine = torch.cat([clip.cosine for _, clip in outputs])
    return fusion.resolve_clip_scale(choice, pair.clip.identity.logit_scale, teacher_logits, cosine)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy()
