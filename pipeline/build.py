"""The build loop: every missing block of every view through the teachers and CLIPs, once, into the cache.

Three things happen at the same time: a thread loads the next images, the device computes, and a thread encodes,
writes and commits the block before. A block is always computed from its own first row in batches of the same size,
so a resumed build gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import ValidationError

from cache_tools import registry
from cache_tools.arrays import TargetSpec, default_block_rows, targets
from cache_tools.codecs import Float16
from cache_tools.console import Progress, resolve_device
from cache_tools.encoding import Encoder, fit_codecs, sample_rows
from cache_tools.format import CacheRecipe, ClipIdentity, Manifest, TeacherIdentity
from cache_tools.images import ImageSet, open_images
from cache_tools.reader import make_canaries
from cache_tools.target_codecs import resolve_codecs
from cache_tools.writer import CacheWriter, check_free
from pipeline.loader import BatchLoader
from pipeline.preflight import Preflight, run_preflight
from pipeline.recipe import BuildRecipe
from pipeline.targets import TeacherPair, load_pair, view_pixels

Identity = TypeVar("Identity", TeacherIdentity, ClipIdentity)

BLOCKS_IN_FLIGHT = 2


class BuildResult(NamedTuple):
    """What a build did; `images` counts (sample, view) pairs computed in this run, `elapsed_s` the build loop alone."""

    path: Path
    manifest: Manifest
    preflight: Preflight | None
    images: int
    elapsed_s: float


def build_cache(recipe: BuildRecipe, say: Callable[[str], None] = lambda text: None) -> BuildResult:
    """Build the cache of a recipe, or go on with it where an earlier run stopped.

    Args:
        recipe: what to build; `recipe.out` or the cache home says where.
        say: receives one line per milestone.

    Raises:
        CacheError: anything wrong with data, weights, device, storage, or another recipe's cache in the same place.
    """
    device = resolve_device(recipe.device)
    images = open_images(recipe.dataset)
    pair = load_pair(
        recipe.teachers,
        recipe.clips,
        recipe.fusion,
        images,
        recipe.dataset,
        device,
        recipe.precision,
        batch_size=recipe.batch_size,
    )
    identity = resolve(recipe, images, pair)
    if identity.codecs.caution:
        say(f"note: {identity.codecs.caution}")
    path = recipe.out or registry.cache_path(recipe.name, identity.fingerprint)
    writer, preflight = _open_or_create(path, recipe, identity, images, pair, say)
    pair.use_scales(writer.manifest.clip_scales)
    missing = writer.missing_blocks()
    if not missing:
        say(f"{path} is complete: nothing to do")
        return BuildResult(path, writer.manifest, preflight, 0, 0.0)
    say(f"{len(missing)} of {writer.manifest.num_views * writer.manifest.num_blocks} blocks to build in {path}")
    start = time.monotonic()
    count = _build_blocks(writer, missing, images, pair, recipe.batch_size)
    return BuildResult(path, writer.manifest, preflight, count, time.monotonic() - start)


def resolve(recipe: BuildRecipe, images: ImageSet, pair: TeacherPair) -> CacheRecipe:
    """The recipe with every name replaced by what it stands for: content digests, resolved preprocessing, prompts."""
    return CacheRecipe(
        dataset=images.identity(),
        views=recipe.views,
        teachers=_weighted([teacher.identity for teacher in pair.teachers], pair.fusion.teacher_weights),
        clips=_weighted([clip.identity for clip in pair.clips], pair.fusion.clip_weights),
        fusion=recipe.fusion,
        store=recipe.store,
        codecs=resolve_codecs(recipe.codec, len(images.class_names)),
        precision=recipe.precision,
    )


def _weighted(identities: Sequence[Identity], weights: Sequence[float]) -> tuple[Identity, ...]:
    return tuple(
        identity.model_copy(update={"weight": weight}) for identity, weight in zip(identities, weights, strict=True)
    )


def _open_or_create(
    path: Path,
    recipe: BuildRecipe,
    identity: CacheRecipe,
    images: ImageSet,
    pair: TeacherPair,
    say: Callable[[str], None],
) -> tuple[CacheWriter, Preflight | None]:
    if registry.is_cache(path):
        writer = CacheWriter.resume(path, identity.fingerprint)
        if writer.manifest.num_views < recipe.num_views:
            writer = writer.grow(recipe.num_views)
        return writer, _stored_preflight(writer.manifest)
    check_free(path)  # before the preflight, not after it
    preflight = None
    if recipe.preflight_samples:
        preflight = run_preflight(pair, _labelled_split(recipe, images), recipe.preflight_samples, recipe.batch_size)
        say(f"preflight: {preflight}")
    manifest = Manifest(
        fingerprint=identity.fingerprint,
        name=recipe.name,
        recipe=identity,
        dataset=recipe.dataset.absolute(),  # so that it is found from any working directory
        num_views=recipe.num_views,
        block_rows=recipe.block_rows or default_block_rows(identity),
        clip_scales=pair.fusion.clip_scales,
        canaries=make_canaries(recipe.views, images, recipe.num_views),
        build_recipe=recipe.model_dump(mode="json"),
        provenance={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "device": device_name(pair.device),
            "versions": {name: version(name) for name in ("teacher-cache", "torch", "open_clip_torch", "timm", "zarr")},
            "python": platform.python_version(),
            "preflight": preflight.model_dump() if preflight else None,
        },
    )
    writer = CacheWriter.create(
        path,
        manifest,
        labels=images.labels,
        sample_keys=images.keys,
        constants=_constants(recipe, identity, images, pair),
    )
    return writer, preflight


def _constants(
    recipe: BuildRecipe, identity: CacheRecipe, images: ImageSet, pair: TeacherPair
) -> dict[str, np.ndarray]:
    """What holds for all samples and views, codecs fitted. What a codec cannot hold shows here, not hours later."""
    constants = pair.constants(recipe.store)
    if identity.codecs.floating:
        return constants
    index = sample_rows(len(images))
    rows: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(index), recipe.batch_size):
        piece = index[start : start + recipe.batch_size]
        for name, values in pair.targets(
            view_pixels(images, recipe.views, piece, 0, pair.device), recipe.store
        ).items():
            rows.setdefault(name, []).append(values.float().cpu().numpy())
    sample = {name: np.concatenate(parts) for name, parts in rows.items()}
    constants |= fit_codecs(identity, sample)
    Encoder(identity, constants.__getitem__).encode(sample, where="a sample of view 0")
    return constants


def _stored_preflight(manifest: Manifest) -> Preflight | None:
    """What the first build measured; None where a tool wrote something else there."""
    try:
        return Preflight.model_validate(manifest.provenance.get("preflight"))
    except ValidationError:
        return None


def _labelled_split(recipe: BuildRecipe, images: ImageSet) -> ImageSet:
    """The test split where there is one: on its training images a teacher looks better than it is."""
    return open_images(recipe.dataset, recipe.dataset.test_split) if recipe.dataset.test_split else images


def _build_blocks(
    writer: CacheWriter, missing: list[tuple[int, int]], images: ImageSet, pair: TeacherPair, batch_size: int
) -> int:
    manifest = writer.manifest
    specs = targets(manifest.recipe, manifest.block_rows)
    sizes = [_rows(manifest, block) for _, block in missing]
    done_before = manifest.num_views * manifest.num_samples - sum(sizes)
    pending: list[Future[None]] = []
    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer") as pool,
        BatchLoader(images, manifest, missing, batch_size, pin=pair.device.type == "cuda") as batches,
        Progress("build", manifest.num_views * manifest.num_samples, "images", done=done_before) as progress,
    ):
        for (view, block), rows in zip(missing, sizes, strict=True):
            buffers = _host_buffers(specs, rows, pair.device)
            for start in range(0, rows, batch_size):
                index, loaded = next(batches)
                pixels = manifest.recipe.views.apply(loaded.to(pair.device, non_blocking=True), index, view)
                for name, values in pair.targets(pixels, manifest.recipe.store).items():
                    # Converted on the device, so that half-precision rows cross the bus at half the bytes.
                    target = buffers[name][start : start + len(index)]
                    target.copy_(values.to(target.dtype), non_blocking=True)
                progress.advance(len(index))
            pending.append(pool.submit(_write, writer, view, block, buffers, _copied(pair.device)))
            while len(pending) > BLOCKS_IN_FLIGHT:
                pending.pop(0).result()
        for future in pending:
            future.result()
    return sum(sizes)


def _write(
    writer: CacheWriter,
    view: int,
    block: int,
    buffers: dict[str, torch.Tensor],
    copied: torch.cuda.Event | None,
) -> None:
    if copied is not None:
        copied.synchronize()
    manifest = writer.manifest
    rows = manifest.block(block)
    digest = manifest.recipe.views.parameter_digest(
        np.arange(rows.start, rows.stop), view, manifest.recipe.dataset.image_size
    )
    writer.write_block(view, block, {name: buffer.numpy() for name, buffer in buffers.items()}, digest)


def _copied(device: torch.device) -> torch.cuda.Event | None:
    """An event behind the block's last copy to the host; None where copies are immediate."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _host_buffers(specs: tuple[TargetSpec, ...], rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    pin = device.type == "cuda"
    dtypes = {spec.name: torch.float16 if isinstance(spec.codec, Float16) else torch.float32 for spec in specs}
    return {spec.name: torch.empty((rows, spec.width), dtype=dtypes[spec.name], pin_memory=pin) for spec in specs}


def _rows(manifest: Manifest, block: int) -> int:
    rows = manifest.block(block)
    return rows.stop - rows.start


def device_name(device: torch.device) -> str:
    """`cpu`, or the name of the GPU: goes into provenance."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
