"""All teachers and CLIPs of a cache as one function from view pixels to targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from cache_tools.decoding.service import DecodeService, start_loading
from cache_tools.errors import PreflightError
from cache_tools.format.arrays import array_name
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import FusionRecipe, Precision, Preprocessing, Store
from cache_tools.fusion import (
    centre_rows,
    clip_logits,
    fused_features,
    fused_logits,
    mix,
    projection_matrix,
    prompt_embeddings,
    resolve_clip_scale,
)
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.refusion import MATCH_SAMPLES
from cache_tools.system.devices import copy_to
from cache_tools.views.recipe import Network, ViewRecipe
from pipeline.networks.clip import Clip, ClipOutput, load_clip
from pipeline.networks.teachers import Teacher, TeacherOutput, load_teacher
from pipeline.networks.weights import quick_kernels
from pipeline.recipe import ClipSpec, TeacherSpec, listed, shares
from train.evaluate.canvas import ImagesInTest, as_tested

NETWORKS: tuple[Network, Network] = ("teacher", "clip")


class EnsembleOutput(NamedTuple):
    """The outputs of every network for one batch."""

    teachers: tuple[TeacherOutput, ...]
    clips: tuple[ClipOutput, ...]


class TeacherEnsemble:
    """The frozen teachers and CLIPs of a cache (usually one of each, or one of the two alone) on one device.

    Attributes:
        teachers, clips: the networks.
        fusion: how their outputs are fused. CLIP scales are resolved before the first target is computed.
        compiled_rows: the size of batches for which the networks are compiled; None if they are not.
    """

    compiled_rows: int | None = None

    def __init__(self, teachers: Sequence[Teacher], clips: Sequence[Clip], recipe: FusionRecipe, fusion: Fusion):
        self.teachers, self.clips, self.fusion = tuple(teachers), tuple(clips), fusion
        seed, width = recipe.projection_seed, recipe.feature_dim
        self._teacher_projections = [
            self._projection(teacher, width, seed + 2 * number) for number, teacher in enumerate(self.teachers)
        ]
        self._clip_projections = [
            self._projection(clip, width, seed + 2 * number + 1) for number, clip in enumerate(self.clips)
        ]
        self._prompts = None if _uses_class_embeddings(fusion) else [_prompts(clip, fusion) for clip in self.clips]
        # A second stream lets a small teacher fill the gaps that CLIP leaves on a GPU.
        both = self.teachers and self.clips
        self._clip_stream = torch.cuda.Stream(self.device) if both and self.device.type == "cuda" else None

    @property
    def device(self) -> torch.device:
        if self.clips:
            return self.clips[0].class_embeddings.device
        return next(self.teachers[0].parameters()).device

    @property
    def notes(self) -> list[str]:
        """What a user should know about the weights of the teachers, one sentence each."""
        return [note for teacher in self.teachers for note in teacher.notes]

    def constants(self, store: Store) -> dict[str, np.ndarray]:
        """The float32 arrays that a cache stores once. A `components` cache also stores heads and text features."""
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

    def compile_for(self, rows: int) -> None:
        """Compile all networks for batches of `rows` images; from now on no batch has more.

        The compiler runs at the first batch. Outputs differ by rounding from those of the plain networks.
        """
        networks: list[Teacher | Clip] = [*self.teachers, *self.clips]
        for network in networks:
            network.compile_for(rows)
        self.compiled_rows = rows

    @torch.inference_mode()
    def outputs(self, pixels_NCHW_u8: torch.Tensor, clip_pixels_NCHW_u8: torch.Tensor | None = None) -> EnsembleOutput:
        """One forward pass of each network over uint8 view pixels on the ensemble's device.

        Args:
            clip_pixels_NCHW_u8: the same views at the size that CLIP gets, if it is another than the teachers'.
        """
        stream = self._clip_stream
        for_clip = pixels_NCHW_u8 if clip_pixels_NCHW_u8 is None else clip_pixels_NCHW_u8
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with quick_kernels(self.device):
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                clips = tuple(clip(for_clip) for clip in self.clips)
            teachers = tuple(teacher(pixels_NCHW_u8) for teacher in self.teachers)
        if stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in (tensor for clip in clips for tensor in clip):  # made on the side stream, freed on this one
                tensor.record_stream(current)
            for_clip.record_stream(stream)
        return EnsembleOutput(teachers, clips)

    @torch.inference_mode()
    def teacher_logits(self, teachers: Sequence[TeacherOutput]) -> torch.Tensor:
        """z_T [B, C], float32: the weighted mean of the teachers' logits; there must be a teacher."""
        return mix([teacher.logits for teacher in teachers], self.fusion.teacher_weights)

    @torch.inference_mode()
    def clip_logits(self, clips: Sequence[ClipOutput]) -> torch.Tensor:
        """z_C [B, C], float32: the weighted mean of the CLIPs' scaled logits; there must be a CLIP."""
        return mix(self.scaled_logits(clips), self.fusion.clip_weights)

    @property
    def sources(self) -> tuple[str, ...]:
        """`teacher`, `clip` and `fusion`, whose predictions can be compared; the only group if there is just one."""
        if not self.clips:
            return ("teacher",)
        return ("teacher", "clip", "fusion") if self.teachers else ("clip",)

    @torch.inference_mode()
    def source_logits(self, teachers: Sequence[TeacherOutput], clips: Sequence[ClipOutput]) -> list[torch.Tensor]:
        """Logits [B, C] of each of the `sources`, float32."""
        if not self.clips:
            return [self.teacher_logits(teachers)]
        if not self.teachers:
            return [self.clip_logits(clips)]
        fused, _ = self.fuse(teachers, clips)
        return [self.teacher_logits(teachers), self.clip_logits(clips), fused]

    @torch.inference_mode()
    def scaled_logits(self, clips: Sequence[ClipOutput]) -> list[torch.Tensor]:
        """Scaled logits [B, C] of each CLIP over its prompts, float32."""
        scales = self.fusion.clip_scales
        if self._prompts is None:  # the forward pass has computed these cosines already
            return [scale * clip.cosine for clip, scale in zip(clips, scales, strict=True)]
        return [
            clip_logits(clip.features, prompts, scale)
            for clip, prompts, scale in zip(clips, self._prompts, scales, strict=True)
        ]

    @torch.inference_mode()
    def fuse(self, teachers: Sequence[TeacherOutput], clips: Sequence[ClipOutput]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused logits [B, C], rows mean-centred, and fused features [B, D], float32."""
        logits = fused_logits([teacher.logits for teacher in teachers], self.scaled_logits(clips), self.fusion)
        features = fused_features(
            [teacher.features for teacher in teachers],
            self._teacher_projections,
            [clip.features for clip in clips],
            self._clip_projections,
            self.fusion,
        )
        return logits, features

    def targets(
        self, pixels_NCHW_u8: torch.Tensor, store: Store, clip_pixels_NCHW_u8: torch.Tensor | None = None
    ) -> Mapping[str, torch.Tensor]:
        """Float32 rows of a cache's target arrays, by array name (`cache_tools.format.arrays.target_arrays`)."""
        teachers, clips = self.outputs(pixels_NCHW_u8, clip_pixels_NCHW_u8)
        if store == "fused":
            logits, features = self.fuse(teachers, clips)
            return {"fused_logits": logits, "fused_features": features}
        rows = {array_name("clip_features", number): clip.features for number, clip in enumerate(clips)}
        for number, (network, teacher) in enumerate(zip(self.teachers, teachers, strict=True)):
            rows[array_name("teacher_features", number)] = teacher.features
            if network.head is None:
                logits = teacher.logits.float()
                rows[array_name("teacher_logits", number)] = centre_rows(logits) if self.fusion.centred else logits
        return rows

    def use_scales(self, clip_scales: Sequence[float]) -> None:
        """Use the CLIP scales of a manifest: a cache that grows keeps the scales of its first views."""
        assert len(clip_scales) == len(self.clips), "one scale per CLIP"
        self.fusion = replace(self.fusion, clip_scales=tuple(clip_scales))

    def _projection(self, network: Teacher | Clip, width: int, seed: int) -> torch.Tensor:
        return torch.from_numpy(projection_matrix(network.identity.feature_dim, width, seed)).to(self.device)


def load_ensemble(
    teachers: TeacherSpec | Sequence[TeacherSpec] | None,
    clips: ClipSpec | Sequence[ClipSpec] | None,
    recipe: FusionRecipe,
    images: ImageSet,
    dataset: DatasetRecipe,
    device: torch.device,
    precision: Precision,
    *,
    fusion: Fusion | None = None,
    batch_size: int = 256,
    for_timing: bool = False,
) -> TeacherEnsemble:
    """Load all networks for a dataset and resolve how they are fused.

    Args:
        teachers, clips: one network, several or none, as in a build recipe.
        fusion: an already resolved fusion (`Fusion.stored(manifest)`, `FusionChoice(…).resolve(cache)`) that replaces
            the one in `recipe`; its `clip_view` is ignored. None resolves the recipe. The scale `match` is then
            measured on up to 2048 evenly spaced clean samples of `images`.
        for_timing: leave out what takes long: CLIP has one prompt for all classes, and the scale `match` is not
            measured. The outputs take as long as usual, but are of no use.

    Raises:
        WeightsError: weights are missing, or do not fit the architecture, class count or class order.
        RecipeError: the weights of a group do not sum to 1.
    """
    teacher_specs, clip_specs = listed(teachers), listed(clips)
    recipe = recipe.for_groups(teachers=bool(teacher_specs), clips=bool(clip_specs))
    unscaled = Fusion(
        teacher_weight=recipe.teacher_weight,
        feature_weight=recipe.feature_weight,
        teacher_weights=shares(teacher_specs, where="teacher"),
        clip_weights=shares(clip_specs, where="clip"),
        clip_scales=(1.0,) * len(clip_specs),
        prompt_ensemble=recipe.prompt_ensemble,
        centred=not images.multi_label,
    )
    names, size, normalisation = images.class_names, images.image_size, dataset.normalisation
    loaded = [load_teacher(spec, names, device, size, normalisation, precision=precision) for spec in teacher_specs]
    loaded_clips = [load_clip(spec, names, device, precision=precision, for_timing=for_timing) for spec in clip_specs]
    ensemble = TeacherEnsemble(loaded, loaded_clips, recipe, fusion or unscaled)
    if fusion is None and not for_timing:
        ensemble.use_scales(_resolve_scales(ensemble, recipe, images, batch_size))
    return ensemble


def evenly_spaced(images: ImageSet, limit: int) -> np.ndarray:
    """Up to `limit` evenly spaced sample indices."""
    count = min(limit, len(images))
    return np.arange(count, dtype=np.int64) * len(images) // max(count, 1)


def clean_batches(
    images: ImageSet,
    index: np.ndarray,
    batch_size: int,
    device: torch.device,
    tested: Preprocessing | None = None,
    for_clip: ImagesInTest | None = None,
) -> Iterator[tuple[np.ndarray, tuple[torch.Tensor, ...]]]:
    """(sample indices, their clean uint8 pixels on `device`), batch by batch.

    Args:
        tested: the preprocessing of tests, whose part of each canvas is taken; None for whole canvases.
        for_clip: the same images for CLIP, if it gets them at another size; its pixels are then a second tensor.
    """
    for start in range(0, len(index), batch_size):
        rows = index[start : start + batch_size]
        pixels = torch.from_numpy(images.load(rows)).to(device)
        shown = [pixels if tested is None else as_tested(pixels, tested)]
        if for_clip is not None:
            shown.append(as_tested(torch.from_numpy(for_clip.images.load(rows)).to(device), for_clip.preprocessing))
        yield rows, tuple(shown)


def require_finite(ensemble: TeacherEnsemble, output: EnsembleOutput) -> None:
    """Raise PreflightError that names the first network with an output that is NaN or infinite, if there is one."""
    groups: tuple[tuple[str, str, Sequence[Teacher | Clip], Sequence[TeacherOutput | ClipOutput]], ...] = (
        ("the teacher", "teacher", ensemble.teachers, output.teachers),
        ("CLIP", "CLIP", ensemble.clips, output.clips),
    )
    for who, what, networks, results in groups:
        for number, (network, tensors) in enumerate(zip(networks, results, strict=True)):
            if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                continue
            found = "NaN" if any(bool(tensor.isnan().any()) for tensor in tensors) else "infinity"
            which = f", {what} {number + 1} of {len(networks)}" if len(networks) > 1 else ""
            again = "" if network.precision == "float32" else ", or compute them with --precision float32"
            raise PreflightError(
                f"{who}'s outputs are not finite",
                where=network.identity.architecture + which,
                expected="finite numbers",
                found=found,
                next_step=f"check the weights{again}",
            )


class NetworkPixels(NamedTuple):
    """uint8 [B, 3, H, W]: a view as the teachers see it, and as CLIP does; None if that is the same."""

    teacher: torch.Tensor
    clip: torch.Tensor | None

    def to(self, device: torch.device) -> NetworkPixels:
        moved = [None if pixels is None else copy_to(pixels, device) for pixels in self]
        return NetworkPixels(*moved)  # type: ignore[arg-type]


def load_pixels(
    images: ImageSet, views: ViewRecipe, rows: np.ndarray | slice, index: np.ndarray, view: int
) -> NetworkPixels:
    """What `finish_pixels` needs of rows of an image set, on the CPU; every picture is decoded once."""
    (loaded,) = start_loading_pixels(None, images, views, rows, index, [view], pin=False)()
    return loaded


def start_loading_pixels(
    service: DecodeService | None,
    images: ImageSet,
    views: ViewRecipe,
    rows: np.ndarray | slice,
    index: np.ndarray,
    numbers: Sequence[int],
    *,
    pin: bool,
) -> Callable[[], list[NetworkPixels]]:
    """Begin `load_pixels` for each of several views, of which every picture is decoded once; call the result to wait.

    Without a crop all views are made of the same canvases, and share their memory.
    """
    teacher, clip = (views.seen_by(network) for network in NETWORKS)
    seen = (teacher,) if teacher == clip else (teacher, clip)
    wanted = [(recipe, number) for number in numbers for recipe in seen]
    load = start_loading(service, images, rows, index, wanted, pin=pin)

    def wait() -> list[NetworkPixels]:
        loaded = load()
        if len(seen) == 1:
            return [NetworkPixels(pixels, None) for pixels in loaded]
        return [NetworkPixels(*pair) for pair in zip(loaded[::2], loaded[1::2], strict=True)]

    return wait


def finish_pixels(loaded: NetworkPixels, views: ViewRecipe, index: np.ndarray, view: int) -> NetworkPixels:
    """The view of each sample as the networks see it, on the device of what was loaded."""
    teacher, clip = (views.seen_by(network) for network in NETWORKS)
    return NetworkPixels(
        teacher.finish(loaded.teacher, index, view),
        None if loaded.clip is None else clip.finish(loaded.clip, index, view),
    )


def view_pixels(
    images: ImageSet, views: ViewRecipe, index: np.ndarray, view: int, device: torch.device
) -> NetworkPixels:
    """What the networks see of these samples in view `view`, on `device`."""
    return finish_pixels(load_pixels(images, views, index, index, view).to(device), views, index, view)


def _uses_class_embeddings(fusion: Fusion) -> bool:
    """Whether images are compared with the class embeddings, the average of all prompt embeddings."""
    return fusion.prompts is None and fusion.prompt_ensemble == "embedding"


def _prompts(clip: Clip, fusion: Fusion) -> torch.Tensor:
    text_features_PCD = clip.text_features if fusion.prompts is None else clip.text_features[list(fusion.prompts)]
    return prompt_embeddings(text_features_PCD, fusion.prompt_ensemble)


def _resolve_scales(ensemble: TeacherEnsemble, recipe: FusionRecipe, images: ImageSet, batch_size: int) -> list[float]:
    choice, scales = recipe.clip_scale, [clip.identity.logit_scale for clip in ensemble.clips]
    if choice != "match":
        return [resolve_clip_scale(choice, scale) for scale in scales]
    batches = clean_batches(images, evenly_spaced(images, MATCH_SAMPLES), batch_size, ensemble.device)
    outputs = [ensemble.outputs(*pixels) for _, pixels in batches]
    for output in outputs:
        require_finite(ensemble, output)
    teacher_logits = torch.cat([ensemble.teacher_logits(output.teachers) for output in outputs])
    cosines = [torch.cat([output.clips[number].cosine for output in outputs]) for number in range(len(scales))]
    return [
        resolve_clip_scale(choice, scale, teacher_logits, cosine) for scale, cosine in zip(scales, cosines, strict=True)
    ]
