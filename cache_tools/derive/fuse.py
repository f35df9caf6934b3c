"""Make a fused cache from a component cache, with other weights, scales or prompts and no pass over images.

It stores the targets that training on the component cache with the same choice would see. Its recipe has the weights,
scales and prompts that were used, and the fingerprint of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_tools import fusion, plugins
from cache_tools.console import resolve_device
from cache_tools.derive.base import Convert, Derived, derive, derived_manifest, require_same_constants
from cache_tools.derive.block_reader import BlockReader, Rows, Stored
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.format.arrays import array_name, constant_shapes
from cache_tools.format.manifest import Fusion, Manifest
from cache_tools.format.recipe import CacheRecipe
from cache_tools.home import registry
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice, kept_accuracies, matched_scales
from cache_tools.store.encoding import Encoder, fit_codecs, fit_rows
from cache_tools.store.writer import CacheWriter
from cache_tools.targets import ComponentView, fusion_constants


class Fused(Derived):
    """The result of `fuse`. `manifest` is the new cache's."""

    manifest: Manifest


def fuse(
    cache: TeacherCache,
    choice: FusionChoice,
    *,
    templates: Sequence[str] | None = None,
    codec: str | None = None,
    name: str | None = None,
    out: Path | None = None,
    block_rows: int | None = None,
    device: str = "auto",
) -> Fused:
    """Fuse every block that a component cache has, or continue an earlier run.

    Args:
        choice: what differs from the fusion that the cache was built with; `prompts` picks templates by number.
        templates: prompt templates instead of the cache's. New ones are embedded by its CLIPs, which the plugin
            `text-features` loads.
        codec: how the targets are stored (`codec_spec`), by default as in the source.
        name: of the new cache, by default the source's followed by `-fused`.
        out: folder of the new cache, by default its place in the cache home.
        block_rows: of a new cache; None for the source's.
        device: where to compute.

    Raises:
        NotFoundError: a fused cache, which has no components; no such prompt template.
        RecipeError: not one weight for each network, settings of networks that the cache does not have, a `clip_view`
            (which cache recipes do not have), a bad codec.
        WeightsError: new templates, and a CLIP whose weights are not the cache's.
        IncompleteError: view 0 is not complete, and the CLIP scale is `match` or the codec is fitted to its rows.
        FormatError, MismatchError, StorageError: as `base.derive`.
    """
    resolved, recipe = _resolve(cache, choice, templates), fused_recipe(cache, choice, templates, codec)
    label = name or f"{cache.manifest.name}-fused"
    manifest = derived_manifest(cache, recipe, label, block_rows=block_rows)
    manifest.provenance["preflight"] = _preflight(cache, recipe)
    path = out or registry.cache_path(label, manifest.fingerprint)
    fuser = _Fuser(BlockReader(cache), recipe, resolved, resolve_device(device))
    if not registry.is_cache(path):
        manifest = manifest.model_copy(update={"clip_scales": fuser.choose_scales()})
    done = derive(fuser.source, path, manifest, fuser.constants, fuser.convert, title="fuse")
    return Fused(**done.model_dump(), manifest=TeacherCache(path).manifest)


def fused_recipe(
    cache: TeacherCache, choice: FusionChoice, templates: Sequence[str] | None = None, codec: str | None = None
) -> CacheRecipe:
    """The recipe of the fused cache, without the fingerprint of its source."""
    source = cache.recipe
    fields = ("teacher_weight", "feature_weight", "clip_scale", "prompt_ensemble")
    changes = {key: getattr(choice, key) for key in fields if getattr(choice, key) is not None}
    teacher_weights = choice.teacher_weights or source.teacher_weights
    clip_weights = choice.clip_weights or source.clip_weights
    recipe = source.model_copy(
        update={
            "teachers": tuple(
                teacher.model_copy(update={"weight": weight})
                for teacher, weight in zip(source.teachers, teacher_weights, strict=True)
            ),
            "clips": tuple(
                clip.model_copy(update={"weight": weight, "templates": _templates(clip.templates, choice, templates)})
                for clip, weight in zip(source.clips, clip_weights, strict=True)
            ),
            "fusion": source.fusion.model_copy(update=changes),
            "store": "fused",
        }
    )
    return recipe if codec is None else recipe.model_copy(update={"codecs": codecs_for(codec, recipe)})


class _Fuser:
    """Converts rows of a component cache to rows of a fused cache."""

    def __init__(self, source: BlockReader, recipe: CacheRecipe, resolved: Fusion, device: torch.device) -> None:
        self.source, self.recipe, self._device = source, recipe, device
        self._fusion = resolved
        old, new = source.cache.recipe.clips, recipe.clips
        self._changed = [number for number in range(len(new)) if old[number].templates != new[number].templates]

    def choose_scales(self) -> tuple[float, ...]:
        """Choose the CLIP scales of a new cache, and fuse with them."""
        embeddings = {
            array_name("class_embeddings", number): fusion.class_embeddings(
                torch.from_numpy(self._text_features[array_name("text_features", number)])
            ).numpy()
            for number in self._changed
        }
        self._use(self._text_features | embeddings)
        choice = self.recipe.fusion.clip_scale
        if choice != "match":
            scales = tuple(fusion.resolve_clip_scale(choice, clip.logit_scale) for clip in self.recipe.clips)
        elif self._same_match:
            scales = self.source.cache.manifest.clip_scales
        else:
            scales = matched_scales(self._component_view(0, self._sample), self.recipe.clips)
        self._fusion = replace(self._fusion, clip_scales=scales)
        return scales

    def constants(self) -> Rows:
        """The constants of a new cache. Raises before any block is written if its codec cannot represent the sample."""
        own = self.source.constants | self._prompts
        constants = {name: own[name] for name in constant_shapes(self.recipe) if name in own}
        if not self.recipe.codecs.is_floating:
            rows = self._fused(0, self._sample)
            constants |= fit_codecs(self.recipe, rows)
            Encoder(self.recipe, constants.__getitem__).encode(rows, where="a sample of view 0")
        return constants

    def convert(self, writer: CacheWriter) -> Convert:
        """Fuse with the embeddings and scales of the opened cache, which it keeps from its start."""
        made = BlockReader(TeacherCache(writer.path)).constants
        embeddings = {array_name("class_embeddings", number) for number in self._changed}
        shared = {name for name in made if name.startswith(_FROM_SOURCE)} - embeddings
        require_same_constants(self.source, made, shared, writer.path)
        text = {} if self.recipe.fusion.prompt_ensemble == "embedding" else self._text_features
        self._use(text | {name: made[name] for name in embeddings})
        self._fusion = replace(self._fusion, clip_scales=writer.manifest.clip_scales)
        encoder = Encoder(self.recipe, made.__getitem__)
        return lambda view, rows: encoder.encode(
            self._fused(view, self.source.read(view, rows)), where=f"view {view}, samples {rows.start}–{rows.stop - 1}"
        )

    @property
    def _same_match(self) -> bool:
        """Whether the source already has the scales of `match`: nothing that they depend on has changed."""
        source = self.source.cache.recipe
        same_teachers = source.teacher_weights == self.recipe.teacher_weights
        return source.fusion.clip_scale == "match" and same_teachers and not self._changed

    @cached_property
    def _sample(self) -> Stored:
        """Stored rows of view 0: the scale `match` and the codecs are fitted to them."""
        return self.source.sample(0, fit_rows(self.recipe, self.source.cache.num_samples))

    @cached_property
    def _text_features(self) -> Rows:
        """[P, C, D] of each changed CLIP: from the source if it has all the templates, else embedded by the CLIP."""
        cache, found = self.source.cache, {}
        embedded: list[npt.NDArray[np.float32]] | None = None
        for number in self._changed:
            name, wanted = array_name("text_features", number), self.recipe.clips[number].templates
            stored = cache.recipe.clips[number].templates
            if set(wanted) <= set(stored):
                found[name] = self.source.constants[name][[stored.index(template) for template in wanted]]
                continue
            if embedded is None:
                embed = plugins.load("text-features")
                embedded = embed(cache.manifest, wanted, str(self._device), where=cache.path)
            found[name] = embedded[number]
        return found

    def _use(self, prompts: Rows) -> None:
        """Fuse with these text features and class embeddings in place of the source's."""
        self._prompts, source = prompts, self.source

        def constant(name: str) -> torch.Tensor:
            return torch.from_numpy(prompts[name] if name in prompts else source.constants[name])

        constants = fusion_constants(self._fusion, source.cache.recipe, constant)
        self._tensors = {name: tensor.to(self._device) for name, tensor in constants.items()}

    def _fused(self, view: int, stored: Stored) -> Rows:
        arrays = self._component_view(view, stored).fuse().arrays
        return {name: arrays[name].cpu().numpy() for name in ("fused_logits", "fused_features")}

    def _component_view(self, view: int, stored: Mapping[str, npt.NDArray[Any]]) -> ComponentView:
        arrays = {name: torch.from_numpy(values).to(self._device) for name, values in stored.items()}
        return ComponentView(view, arrays, self._tensors, self.source.cache.targets, self._fusion)


_FROM_SOURCE = ("teacher_projection", "clip_projection", "class_embeddings")


def _resolve(cache: TeacherCache, choice: FusionChoice, templates: Sequence[str] | None) -> Fusion:
    """The fusion of a choice, without scales and prompts: prompts become part of the constants."""
    if cache.recipe.store != "components":
        raise NotFoundError(
            "a fused cache has no components to fuse",
            where=cache.path,
            expected="a component cache",
            next_step="build one with `build-cache --store components`",
        )
    choice.check_groups(cache.recipe)
    if templates is not None and not cache.recipe.clips:
        raise RecipeError(
            "the cache has no CLIP, so there are no prompts to change",
            where=cache.path,
            next_step="leave --prompts out",
        )
    if choice.clip_view is not None:
        raise RecipeError(
            "a fused cache cannot take CLIP's targets from another view",
            where="clip_view",
            found=choice.clip_view,
            next_step="train on the component cache with --set fusion.clip_view",
        )
    return replace(choice.model_copy(update={"clip_scale": None}).resolve(cache), prompts=None)


def _templates(stored: tuple[str, ...], choice: FusionChoice, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is not None:
        return tuple(given)
    return stored if choice.prompts is None else tuple(stored[number] for number in choice.prompts)


def _preflight(cache: TeacherCache, recipe: CacheRecipe) -> dict[str, Any] | None:
    """The accuracies of the source's preflight that this fusion does not change."""
    source, scaled = cache.recipe, (recipe.fusion.clip_scale, recipe.fusion.prompt_ensemble)
    return kept_accuracies(
        cache.manifest.preflight,
        teachers=recipe.teacher_weights == source.teacher_weights,
        clips=recipe.clips == source.clips and scaled == (source.fusion.clip_scale, source.fusion.prompt_ensemble),
        weight=recipe.fusion.teacher_weight == source.fusion.teacher_weight,
    )
