"""Large synthetic caches on little disk, for benchmarks of their size.

Everything that a reader sees is that of a real cache: manifest, labels, distinct sample keys, and a commit of each
block with the digests of its rows and of its view parameters. Only the encoded rows repeat: block b has the rows of
block b mod DISTINCT, and its chunk files are hard links to those. So a cache of 10 M × 1000 takes 0.2 GB instead of 13.
Reads come from the page cache; decompressing, hashing and decoding cost the same as for distinct rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from cache_tools.alignment import make_canaries
from cache_tools.codecs.presets import PresetName, resolve_codecs
from cache_tools.console import Progress
from cache_tools.format import commits
from cache_tools.format.arrays import ArraySpec, constant_shapes, default_block_rows, target_arrays, targets
from cache_tools.format.digests import array_digests, constants_digest
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe, FusionRecipe, Preprocessing, TeacherIdentity
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.store.writer import CacheWriter
from cache_tools.views import Flip, PadCrop, ViewRecipe

DISTINCT = 4
SIDE, FEATURE_DIM = 8, 8
VIEWS = ViewRecipe(base_seed=7, ops=(PadCrop(padding=1), Flip()))


class PlainImages(ImageSet):
    """Images of one colour each, made when they are loaded, as decoded pictures are."""

    @property
    def resident(self) -> bool:
        return False

    def load(self, index: npt.NDArray[Any] | slice) -> npt.NDArray[np.uint8]:
        numbers = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        colours = (numbers % 251).astype(np.uint8)
        return np.broadcast_to(colours[:, None, None, None], (len(numbers), 3, *self.image_size)).copy()

    def _fields_at(self, rows: slice | npt.NDArray[Any]) -> dict[str, Any]:
        return {}


def plain_images(rows: int, classes: int, period: int) -> PlainImages:
    """Images with random keys; their labels repeat after `period` samples, as the rows of the cache do."""
    rng = np.random.default_rng(0)
    labels = np.resize(rng.integers(0, classes, period), rows)
    return PlainImages(
        name="plain",
        split="train",
        class_names=tuple(f"class_{number}" for number in range(classes)),
        labels=labels,
        keys=rng.integers(0, 256, (rows, 16), dtype=np.uint8),
        image_size=(SIDE, SIDE),
    )


def images_of(cache: Any) -> PlainImages:
    """The images that a cache of `write_cache` was made of, with labels and keys of their own, as a split has."""
    identity = cache.recipe.dataset
    return PlainImages(
        name=identity.name,
        split=identity.split,
        class_names=identity.class_names,
        labels=cache.labels.copy(),
        keys=cache.sample_keys.copy(),
        image_size=identity.image_size,
    )


def write_cache(path: Path, rows: int, classes: int, *, codec: PresetName = "compact") -> None:
    """Write a fused cache of one view; logits lean towards the labels."""
    recipe = _recipe(plain_images(2, classes, 2), codec)
    sized = recipe.dataset.model_copy(update={"num_samples": rows})
    block_rows = default_block_rows(recipe.model_copy(update={"dataset": sized}))
    block_rows = min(block_rows, 1 << max(6, (rows // (2 * DISTINCT)).bit_length() - 1))  # small caches have blocks too
    images = plain_images(rows, classes, DISTINCT * block_rows)
    manifest, constants = _manifest(images, block_rows, codec)
    writer = CacheWriter.create(path, manifest, labels=images.labels, sample_keys=images.keys, constants=constants)
    written = list(range(min(DISTINCT, manifest.num_blocks)))
    if manifest.num_samples % block_rows and manifest.num_blocks > DISTINCT:
        written.append(manifest.num_blocks - 1)  # the short last block has chunks of its own
    with Progress("write", manifest.num_blocks, "blocks") as progress:
        for block in written:
            place = manifest.block(block)
            writer.write_block(0, block, _targets(manifest, images, place, block), _parameters(manifest, block))
            progress.advance(1)
        linked = sorted(set(range(manifest.num_blocks)) - set(written))
        _link_chunks(path, manifest, linked)
        table: Any = zarr.open_array(path / commits.COMMITS, mode="r+")
        digests = [table[0, block][1:] for block in written]
        for block in linked:
            table[0, block] = np.array([_parameters(manifest, block), *digests[block % DISTINCT]], np.uint64)
            progress.advance(1)


def _targets(
    manifest: Manifest, images: PlainImages, place: slice, block: int
) -> dict[str, npt.NDArray[np.floating[Any]]]:
    rng = np.random.default_rng(1 + block)
    count = place.stop - place.start
    made = {}
    for spec in targets(manifest.recipe, manifest.block_rows):
        values = rng.normal(0, 2, (count, spec.width)).astype(np.float32)
        if spec.name == "fused_logits":
            values[np.arange(count), images.labels[place]] += 7
            values -= values.mean(axis=1, keepdims=True)
        made[spec.name] = values
    return made


def _link_chunks(path: Path, manifest: Manifest, blocks: list[int]) -> None:
    for spec in target_arrays(manifest.recipe, manifest.block_rows):
        for block in blocks:
            for source, link in zip(
                _chunks(manifest, spec, block % DISTINCT), _chunks(manifest, spec, block), strict=True
            ):
                os.link(path / spec.name / source, path / spec.name / link)


def _chunks(manifest: Manifest, spec: ArraySpec, block: int) -> Iterator[str]:
    per_block = manifest.block_rows // spec.chunk_rows
    return (f"c.0.{block * per_block + number}.0" for number in range(per_block))


def _parameters(manifest: Manifest, block: int) -> int:
    place = manifest.block(block)
    return VIEWS.parameter_digest(np.arange(place.start, place.stop), 0, manifest.recipe.dataset.image_size) or 1


def _recipe(images: PlainImages, codec: PresetName) -> CacheRecipe:
    teacher = TeacherIdentity(
        architecture="none",
        weights_digest="00" * 32,
        feature_dim=FEATURE_DIM,
        linear_head=True,
        preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
    )
    return CacheRecipe(
        dataset=images.identity(),
        views=VIEWS,
        teachers=(teacher,),
        clips=(),
        fusion=FusionRecipe(feature_dim=FEATURE_DIM).for_groups(teachers=True, clips=False),
        codecs=resolve_codecs(codec, len(images.class_names)),
    )


def _manifest(
    images: PlainImages, block_rows: int, codec: PresetName
) -> tuple[Manifest, dict[str, npt.NDArray[np.float32]]]:
    recipe = _recipe(images, codec)
    rng = np.random.default_rng(3)
    constants = {name: rng.normal(size=shape).astype(np.float32) for name, shape in constant_shapes(recipe).items()}
    constants |= {name: np.full_like(values, 0.2) for name, values in constants.items() if name.endswith("_steps")}
    manifest = Manifest(
        fingerprint=recipe.fingerprint,
        name="plain",
        recipe=recipe,
        dataset=DatasetRecipe(name="folder", data_dir=Path("plain"), test_split=None),
        num_views=1,
        block_rows=block_rows,
        clip_scales=(),
        canaries=make_canaries(VIEWS, images, 1),
    )
    digests = array_digests(images.labels, images.keys, constants)
    return manifest.model_copy(
        update={"constants_digest": constants_digest(constants), "array_digests": digests}
    ), constants
