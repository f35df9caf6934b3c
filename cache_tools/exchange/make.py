"""Make a cache of targets that other tools computed. It can be interrupted: the same command continues."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache_tools.alignment import make_canaries
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.derive.base import CODE_VERSIONS
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.errors import MismatchError, printable
from cache_tools.exchange.images import ImportRecipe
from cache_tools.format.arrays import MAX_BLOCK_ROWS, SEEDS, default_block_rows
from cache_tools.format.manifest import CODE, DECODER, Manifest, check_code_versions
from cache_tools.format.recipe import CacheRecipe, FusionRecipe, Imported, Preprocessing, TeacherIdentity
from cache_tools.home import registry
from cache_tools.images.formats import decoder_versions
from cache_tools.images.image_set import ImageSet
from cache_tools.places import LocalPlace
from cache_tools.places.claims import growing
from cache_tools.store.encoding import Encoder
from cache_tools.store.writer import CacheWriter, check_free
from cache_tools.views.others import OtherViews

AGREEMENT_ROWS = 4096
FLOOR = 1e-6  # of the mass of all classes that a sparse row does not list
UNKNOWN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

Rows = npt.NDArray[np.float32]
Kind = Literal["logits", "tinyvit", "ml-dr"]


class ImportedTargets(ABC):
    """Targets in the files of another tool.

    Attributes:
        num_views: of the cache.
        digest: of everything in the files that determines them.
        averaged: the number of views whose mean is the target of view 0; None if nothing is averaged.
        made_by: the tool that drew the views; None for views of our own.
        most_rows: of a block, for the memory that reading them takes.
        notes: what a user should know.
    """

    kind: Kind
    num_views: int
    digest: str
    averaged: int | None = None
    made_by: OtherViews | None = None
    most_rows: int = MAX_BLOCK_ROWS
    notes: list[str]

    @abstractmethod
    def codecs(self, num_classes: int) -> TargetCodecs:
        """The codecs of a cache if the user chooses none."""

    @abstractmethod
    def logits(self, view: int, samples: npt.NDArray[np.int64]) -> Rows:
        """Logits [B, C] of these samples, whose softmax at temperature 1 is what the teacher said."""

    def seeds(self, view: int, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The seeds from which the tool drew the view, where `made_by.seeds`."""
        raise NotImplementedError


class ImportResult(Frozen):
    """The result of an import.

    Attributes:
        blocks: made now; `blocks_there` existed already.
        agreement: share of the samples whose most probable class is their label, in view 0; None where images may have
            several labels.
    """

    path: Path
    name: str
    fingerprint: str
    kind: str
    num_views: int
    num_samples: int
    blocks: int
    blocks_there: int
    codec: str
    agreement: float | None
    notes: tuple[str, ...]


def import_targets(
    targets: ImportedTargets,
    recipe: ImportRecipe,
    images: ImageSet,
    *,
    teacher: str | None = None,
    codec: str | None = None,
    path: Path | None = None,
    block_rows: int | None = None,
) -> ImportResult:
    """Make a cache of imported targets, or continue it.

    Args:
        images: those of the recipe.
        teacher: what to call the teacher; it is part of the recipe of the cache.
        codec: as for `cache-tools recode`; None for one that suits the files.
        path: folder of the cache; None for its place in the cache home.

    Raises:
        FormatError: numbers that the codec cannot store.
        MismatchError, StorageError: another cache is there, or the disk is full or read-only.
    """
    identity = _identity(targets, recipe, images, teacher)
    if codec is not None:
        identity = identity.model_copy(update={"codecs": codecs_for(codec, identity)})
    path = path or registry.cache_path(recipe.name, identity.fingerprint)
    agreement, notes = _agreement(targets, images)
    writer = _open_or_create(targets, recipe, images, identity, path, block_rows, agreement)
    manifest, missing = writer.manifest, writer.missing_blocks()
    constants: dict[str, Rows] = {}
    encoder = Encoder(identity, constants.__getitem__)
    with growing(LocalPlace(path)), Progress("import", len(missing), "blocks") as progress:
        # All views of a block before the next: files of an image with all its views are then read once.
        for view, block in sorted(missing, key=lambda each: (each.block, each.view)):
            rows = manifest.block(block)
            samples = np.arange(rows.start, rows.stop, dtype=np.int64)
            values = _centred(targets.logits(view, samples), images.multi_label)
            where = f"view {view}, samples {rows.start}–{rows.stop - 1}"
            stored = encoder.encode({"fused_logits": values}, where=where)
            if targets.made_by is not None and targets.made_by.seeds:
                stored[SEEDS] = targets.seeds(view, samples)[:, None]
            digest = identity.views.parameter_digest(samples, view, identity.dataset.image_size)
            writer.write_stored(view, block, stored, digest)
            progress.advance(1)
    if identity.codecs.caution:
        notes.append(identity.codecs.caution)
    return ImportResult(
        path=path,
        name=manifest.name,
        fingerprint=manifest.fingerprint,
        kind=targets.kind,
        num_views=manifest.num_views,
        num_samples=manifest.num_samples,
        blocks=len(missing),
        blocks_there=manifest.num_views * manifest.num_blocks - len(missing),
        codec=identity.codecs.logits.codec,
        agreement=agreement,
        notes=tuple(notes),
    )


def sparse_logits(
    classes: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], num_classes: int
) -> Rows:
    """Dense logits [B, C] of rows of which some classes are known, with the rest of the mass in equal parts.

    Args:
        classes, probabilities: [B, K], no class twice in a row.
    """
    return np.log(dense_probabilities(classes, probabilities, num_classes)).astype(np.float32)


def dense_probabilities(
    classes: npt.NDArray[np.integer[Any]], probabilities: npt.NDArray[np.floating[Any]], num_classes: int
) -> npt.NDArray[np.float64]:
    """As `sparse_logits`, the probabilities; none is 0, so that every one has a logarithm."""
    kept = classes.shape[1]
    known = np.asarray(probabilities, dtype=np.float64)
    rest = np.maximum(1.0 - known.sum(axis=1), FLOOR)
    even = rest / max(num_classes - kept, 1)
    dense = np.repeat(even[:, None], num_classes, axis=1)
    np.put_along_axis(dense, classes.astype(np.int64), np.maximum(known, FLOOR / num_classes), axis=1)
    dense /= dense.sum(axis=1, keepdims=True)
    return dense


def _identity(targets: ImportedTargets, recipe: ImportRecipe, images: ImageSet, teacher: str | None) -> CacheRecipe:
    views = recipe.shown
    if targets.made_by is not None:
        views = type(views)(made_by=targets.made_by)
    identity = TeacherIdentity(
        architecture=teacher or f"imported from {targets.kind}",
        weights_digest=targets.digest,
        feature_dim=1,
        linear_head=False,
        preprocessing=UNKNOWN,
    )
    return CacheRecipe(
        dataset=images.identity(),
        views=views,
        teachers=(identity,),
        clips=(),
        fusion=FusionRecipe().for_groups(teachers=True, clips=False),
        store="logits",
        codecs=targets.codecs(len(images.class_names)),
        imported=Imported(kind=targets.kind, digest=targets.digest, averaged=targets.averaged),
    )


def _open_or_create(
    targets: ImportedTargets,
    recipe: ImportRecipe,
    images: ImageSet,
    identity: CacheRecipe,
    path: Path,
    block_rows: int | None,
    agreement: float | None,
) -> CacheWriter:
    if registry.is_cache(path):
        writer = CacheWriter.resume(path, identity.fingerprint)
        if writer.manifest.num_views != targets.num_views:
            raise MismatchError(
                "the cache of another number of views is here",
                where=path,
                expected=f"{targets.num_views} views",
                found=writer.manifest.num_views,
                next_step="choose another --out",
            )
        check_code_versions(writer.manifest, CODE_VERSIONS, path)
        return writer
    check_free(path)
    canaries = make_canaries(identity.views, images, targets.num_views) if targets.made_by is None else ()
    manifest = Manifest(
        fingerprint=identity.fingerprint,
        name=recipe.name,
        recipe=identity,
        dataset=recipe.source.absolute(),
        num_views=targets.num_views,
        block_rows=min(block_rows or default_block_rows(identity), targets.most_rows),
        clip_scales=(),
        canaries=canaries,
        provenance={
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": printable(" ".join(sys.argv)),
            "versions": {name: version(name) for name in ("teacher-cache", "zarr")},
            **({} if images.resident else {DECODER: decoder_versions()}),
            "label_agreement": agreement,
            "notes": list(targets.notes),
            CODE: CODE_VERSIONS,
        },
    )
    return CacheWriter.create(path, manifest, labels=images.labels, sample_keys=images.keys, constants={})


def _agreement(targets: ImportedTargets, images: ImageSet) -> tuple[float | None, list[str]]:
    """How often the most probable class is the label, and the notes of the import."""
    notes = list(targets.notes)
    if images.multi_label:
        return None, notes
    samples = np.unique(np.linspace(0, len(images) - 1, min(AGREEMENT_ROWS, len(images))).astype(np.int64))
    found = targets.logits(0, samples).argmax(axis=1) == images.labels[samples]
    share = float(found.mean())
    if share < max(0.3, 3 / len(images.class_names)) and len(samples) >= 20:
        notes.append(
            f"only {share:.1%} of the targets agree with the labels: are their classes, and their rows, in the order "
            "of this dataset? Training on targets of other images ruins a student"
        )
    return share, notes


def _centred(values: Rows, multi_label: bool) -> Rows:
    if multi_label:
        return values
    centred: Rows = values - values.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return centred
