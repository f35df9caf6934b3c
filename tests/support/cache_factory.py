"""Tiny caches of random numbers, for tests that need a cache but no teacher."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cache_tools.alignment import make_canaries
from cache_tools.codecs import Float16
from cache_tools.codecs.presets import PresetName, TargetCodecs, resolve_codecs
from cache_tools.format.arrays import constant_shapes, targets
from cache_tools.format.digests import array_digests, constants_digest
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import CacheRecipe, ClipIdentity, FusionRecipe, Preprocessing, TeacherIdentity
from cache_tools.format.stored import DIGESTS_KEY
from cache_tools.images.arrays import ArrayImages
from cache_tools.images.image_set import sample_key
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.store.writer import CacheWriter
from cache_tools.views import Flip, PadCrop, ViewRecipe

PREPROCESSING = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
VIEWS = ViewRecipe(base_seed=7, clean_first=True, ops=(PadCrop(), Flip()))


def tiny_images(num_samples: int = 75, num_classes: int = 5, seed: int = 0) -> ArrayImages:
    """Random 32 × 32 pixels with random labels; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (num_samples, 3, 32, 32), dtype=np.uint8)
    keys = np.frombuffer(b"".join(sample_key(image.tobytes()) for image in pixels), np.uint8).reshape(-1, 16)
    return ArrayImages(
        name="digits",
        split="train",
        class_names=tuple(f"class_{number}" for number in range(num_classes)),
        labels=rng.integers(0, num_classes, num_samples),
        keys=keys,
        image_size=(32, 32),
        pixels=pixels,
    )


def tiny_manifest(
    images: ArrayImages,
    *,
    num_views: int = 3,
    block_rows: int = 16,
    linear_head: bool = True,
    name: str = "tiny",
    canaries: bool = True,
    teacher_dim: int = 12,
    clip_dim: int = 10,
    feature_dim: int = 8,
    teacher_weights: tuple[float, ...] = (1.0,),
    clip_weights: tuple[float, ...] = (1.0,),
    fusion: FusionRecipe | None = None,
    codec: PresetName | TargetCodecs = "float16",
    views: ViewRecipe = VIEWS,
    **recipe: Any,
) -> Manifest:
    """A manifest for `images`; `recipe` goes to CacheRecipe (store, precision).

    There is a network for each of `teacher_weights` and `clip_weights`, one of which may be empty: further ones are
    wider, the second teacher has the other kind of head, further CLIPs have more prompts and a smaller scale. Without
    `canaries` no torch is imported: for subprocesses that must start fast.
    """
    words = tuple(name.replace("_", " ") for name in images.class_names)
    resolved = CacheRecipe(
        dataset=images.identity(),
        views=views,
        teachers=tuple(
            TeacherIdentity(
                architecture="tiny_teacher",
                weights_digest="ab" * 32,
                feature_dim=teacher_dim + 3 * number,
                linear_head=linear_head if number != 1 else not linear_head,
                preprocessing=PREPROCESSING,
                weight=weight,
            )
            for number, weight in enumerate(teacher_weights)
        ),
        clips=tuple(
            ClipIdentity(
                architecture="tiny_clip",
                config_digest="cd" * 32,
                weights_digest="ef" * 32,
                feature_dim=clip_dim + 2 * number,
                logit_scale=100.0 / (1 + number),
                preprocessing=PREPROCESSING,
                templates=("a photo of a {}.", "a scan of a {}.", "a {}.", "the {}.")[: 2 + number],
                class_names=words,
                weight=weight,
            )
            for number, weight in enumerate(clip_weights)
        ),
        fusion=(fusion or FusionRecipe(feature_dim=feature_dim)).for_groups(
            teachers=bool(teacher_weights), clips=bool(clip_weights)
        ),
        codecs=resolve_codecs(codec, len(images.class_names)),
        **recipe,
    )
    manifest = Manifest(
        fingerprint=resolved.fingerprint,
        name=name,
        recipe=resolved,
        dataset=DatasetRecipe(name="digits"),
        num_views=num_views,
        block_rows=block_rows,
        clip_scales=tuple(clip.logit_scale for clip in resolved.clips),
        canaries=make_canaries(views.over(len(images)), images, num_views) if canaries else (),
        provenance={"preflight": {"teacher_top1": 0.75, "clip_top1": 0.5, "n": 64}, "command": "build-cache tiny"},
    )
    constants = tiny_constants(manifest)
    digests = array_digests(images.labels, images.keys, constants)
    return manifest.model_copy(update={"constants_digest": constants_digest(constants), "array_digests": digests})


def tiny_constants(manifest: Manifest, seed: int = 1) -> dict[str, np.ndarray]:
    """Random constants; class embeddings of unit length."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in constant_shapes(manifest.recipe).items()
    }
    for name, array in arrays.items():
        if name.startswith("class_embeddings"):
            array /= np.linalg.norm(array, axis=1, keepdims=True)
        if name.endswith("_steps"):
            array[...] = 0.2
    return arrays


def tiny_targets(manifest: Manifest, seed: int = 2) -> dict[str, np.ndarray]:
    """Random targets [V, N, width], such as float16 holds where the cache stores that."""
    rng = np.random.default_rng(seed)
    shape = (manifest.num_views, manifest.num_samples)
    return {
        spec.name: rng.normal(0, 4, (*shape, spec.width)).astype(
            np.float16 if isinstance(spec.codec, Float16) else np.float32
        )
        for spec in targets(manifest.recipe, manifest.block_rows)
    }


def remove_digests(path: Path) -> Path:
    """Make a cache what earlier versions wrote: without a digest of each of labels, sample keys and constants."""
    group = json.loads((path / "zarr.json").read_text())
    del group["attributes"][DIGESTS_KEY]
    (path / "zarr.json").write_text(json.dumps(group))
    return path


def overwrite(path: Path, name: str) -> None:
    """Change the first number of an array, so that its file is sound and holds other values."""
    array: Any = zarr.open_array(path / name, mode="r+")
    first = (0,) * array.ndim
    array[first] = 0 if array[first] == 1 else 1


def create(path: Path, manifest: Manifest, images: ArrayImages) -> CacheWriter:
    """An empty cache."""
    return CacheWriter.create(
        path, manifest, labels=images.labels, sample_keys=images.keys, constants=tiny_constants(manifest)
    )


def write(writer: CacheWriter, targets: dict[str, np.ndarray], blocks: Iterable[tuple[int, int]] | None = None) -> None:
    """Write `blocks`, or every missing one."""
    manifest = writer.manifest
    for view, block in writer.missing_blocks() if blocks is None else blocks:
        rows = manifest.block(block)
        digest = VIEWS.parameter_digest(np.arange(rows.start, rows.stop), view, manifest.recipe.dataset.image_size)
        writer.write_block(view, block, {name: values[view, rows] for name, values in targets.items()}, digest)


def build(path: Path, manifest: Manifest, images: ArrayImages) -> dict[str, np.ndarray]:
    """A complete cache; gives what was written. A process writes each cache once, and copies its files after that."""
    targets = tiny_targets(manifest)
    recipe = (manifest.model_dump_json(), images.keys.tobytes(), images.labels.tobytes())
    if path.exists() or recipe not in _built:
        write(create(path, manifest, images), targets)
        _built[recipe] = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        return targets
    for name, content in _built[recipe].items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return targets


_built: dict[tuple[str, bytes, bytes], dict[str, bytes]] = {}  # the files of caches, by what they are made from


def write_leaning(path: Path, manifest: Manifest, images: ArrayImages) -> TeacherCache:
    """Targets that lean towards the labels, so that there are right, wrong, confident and unsure answers."""
    targets, rows = tiny_targets(manifest), np.arange(len(images))
    for name in ("teacher_logits", "fused_logits"):
        if name in targets:
            targets[name] = targets[name] / 2
            targets[name][:, rows, images.labels] += 3
    writer = create(path, manifest, images)
    if "clip_features" in targets:
        targets["clip_features"] += 6 * TeacherCache(path).constant("class_embeddings")[images.labels]
    write(writer, targets)
    return TeacherCache(path)
