"""Rows of a cache computed again with its teachers and CLIPs, and compared with what is stored.

Checksums say that the bytes are those that were committed; this says that they are what the networks of the manifest
make of its images. Recomputed rows go through the same codec as the stored ones; those of a cache that was
fused or recoded through every cache between it and the networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import Codec, TopK
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.console import Progress, device_name, resolve_device
from cache_tools.derive.block_reader import BlockReader, Rows
from cache_tools.derive.lineage import Source, lineage, open_source
from cache_tools.errors import IncompleteError
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe, Precision, Store
from cache_tools.images.image_set import ImageSet
from cache_tools.integrity.replay import NumberPosition, Replay, TargetReplay
from cache_tools.reader import TeacherCache
from cache_tools.store.encoding import Encoder, fitted_targets
from cache_tools.targets import ComponentView, fusion_constants
from pipeline.networks.ensemble import TeacherEnsemble, view_pixels
from pipeline.networks.stored import load_stored_ensemble

BATCH = 64


def replay(cache: TeacherCache, images: ImageSet, count: int, *, seed: int = 0, device: str = "auto") -> Replay:
    """Compute up to `count` random rows of the complete views again.

    Args:
        images: the samples of the cache, in its order (`verify.aligned`).
        seed: draws the rows.
        device: where the networks run.

    Raises:
        IncompleteError: no complete view.
        NotFoundError: a cache that does not say how its networks were loaded; a derived one whose source has fitted
            codecs and is not here.
        WeightsError: networks that are missing, or have other weights than the cache's.
    """
    chosen = resolve_device(device)
    drawn = _draw(cache, count, seed)
    sources = lineage(cache.manifest)
    ensemble = load_stored_ensemble(cache.manifest, images, chosen, where=cache.path)
    recompute = _Recompute(cache, sources, ensemble, images)
    compared = {name: Comparison(name, spec.codec) for name, spec in cache.targets.items()}
    reader, total = BlockReader(cache), sum(len(index) for index in drawn.values())
    with Progress("replay", total, "rows") as progress:
        for view, index in drawn.items():
            stored = reader.decode(reader.sample(view, index))
            for start in range(0, len(index), BATCH):
                part = slice(start, start + BATCH)
                again = recompute.rows(view, index[part])
                for name, comparison in compared.items():
                    comparison.add(view, index[part], stored[name][part], *again.of(name))
                progress.advance(len(index[part]))
    built_on = cache.manifest.provenance.get("device")
    tolerance = tolerance_of(cache.recipe.precision, chosen, built_on)
    return Replay(
        rows=total,
        seed=seed,
        device=device_name(chosen),
        built_on=built_on,
        precision=cache.recipe.precision,
        targets=tuple(comparison.verdict(tolerance) for comparison in compared.values()),
    )


def _draw(cache: TeacherCache, count: int, seed: int) -> dict[int, npt.NDArray[np.int64]]:
    """View → sample indices, ascending: different (sample, view) pairs, each as likely as any other."""
    views, samples = cache.complete_views, cache.num_samples
    if not views:
        raise IncompleteError("no view of the cache is complete", where=cache.path, next_step="build one, then replay")
    total = len(views) * samples
    drawn = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    numbers = drawn // samples
    return {views[number]: drawn[numbers == number] % samples for number in np.unique(numbers)}


class _Again(NamedTuple):
    """Rows [B, width] of every target, computed again.

    Attributes:
        decoded: as a reader would read them.
        values: as they go into the cache's own codec.
        plain: as they would be if the caches on the way kept every bit.
        bound: how far `decoded` may be from `values`.
    """

    decoded: Rows
    values: Rows
    plain: Rows
    bound: Mapping[str, Wide]

    def of(self, name: str) -> tuple[npt.NDArray[Any], ...]:
        return self.decoded[name], self.values[name], self.plain[name], self.bound[name]


class _Recompute:
    """From (view, samples) to the rows of a cache, through every cache that it was made from."""

    def __init__(
        self, cache: TeacherCache, sources: Sequence[Source], ensemble: TeacherEnsemble, images: ImageSet
    ) -> None:
        self._recipe, self._ensemble, self._images = cache.recipe, ensemble, images
        self._constants: Rows = ensemble.constants("components")
        ways = [(source.store, self._encoder_of(source)) for source in reversed(sources)]
        self._ways = [*ways, (cache.recipe.store, Encoder(cache.recipe, cache.constant))]
        self._how, parts = Fusion.stored(cache.manifest), self._like("components", TargetCodecs())
        self._tensors = fusion_constants(self._how, parts, lambda name: torch.from_numpy(self._constants[name]))

    def rows(self, view: int, index: npt.NDArray[np.int64]) -> _Again:
        pixels = view_pixels(self._images, self._recipe.views, index, view, self._ensemble.device)
        store = self._ways[0][0]
        values = {name: rows.cpu().numpy() for name, rows in self._ensemble.targets(pixels, store).items()}
        plain = values
        for (_, encoder), (following, _) in pairwise(self._ways):
            values = encoder.decode(encoder.encode(values))
            if following != store:
                values, plain, store = self._fuse(view, values), self._fuse(view, plain), following
        encoder = self._ways[-1][1]
        return _Again(encoder.decode(encoder.encode(values)), values, plain, encoder.error_bound(values))

    def _fuse(self, view: int, rows: Rows) -> Rows:
        arrays = {name: torch.from_numpy(values) for name, values in rows.items()}
        fused = ComponentView(view, arrays, self._tensors, {}, self._how).fuse().arrays
        return {name: fused[name].numpy() for name in ("fused_logits", "fused_features")}

    def _like(self, store: Store, codecs: TargetCodecs) -> CacheRecipe:
        return self._recipe.model_copy(update={"store": store, "codecs": codecs})

    def _encoder_of(self, source: Source) -> Encoder:
        """What codecs were fitted to, only the source itself knows."""
        recipe = self._like(source.store, source.codecs)
        if not fitted_targets(recipe):
            return Encoder(recipe, self._constants.__getitem__)
        cache = open_source(source)
        return Encoder(cache.recipe, cache.constant)


FLOAT32, TF32, HALF, BFLOAT16 = 1e-4, 2.0**-4, 2.0**-4, 2.0**-1
NUMBER_FACTOR = 8.0

Wide = npt.NDArray[np.float64]


class Comparison:
    """Differences of one target, batch by batch; the spread, and with it the verdict, is known at the end."""

    def __init__(self, name: str, codec: Codec) -> None:
        self._name, self._codec = name, codec
        self._rows: list[Wide] = []  # [B, 2]: rms and largest difference beyond what the codecs explain
        self._numbers = self._same = 0
        self._sum = self._squares = self._differences = 0.0
        self._largest, self._worst = -1.0, NumberPosition(view=0, sample=0, column=0)

    def add(
        self,
        view: int,
        index: npt.NDArray[np.int64],
        stored: npt.NDArray[np.float32],
        decoded: npt.NDArray[np.float32],
        values: npt.NDArray[np.float32],
        plain: npt.NDArray[np.float32],
        bound: Wide,
    ) -> None:
        was, now, said = self._measured(stored), self._measured(decoded), self._measured(values)
        difference = np.abs(now - was)
        error = bound + np.abs(said - self._measured(plain)).max(axis=1, keepdims=True)
        self._rows.append(np.stack([_rms(difference) - 2 * _rms(error), (difference - 2 * error).max(axis=1)], axis=1))
        self._numbers += said.size
        self._same += int((stored == decoded).sum())
        self._sum += float(said.sum())
        self._squares += float((said**2).sum())
        self._differences += float(difference.sum())
        row, column = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[row, column] > self._largest:
            self._largest = float(difference[row, column])
            self._worst = NumberPosition(view=view, sample=int(index[row]), column=int(column))

    def verdict(self, tolerance: float) -> TargetReplay:
        mean = self._sum / self._numbers
        spread = math.sqrt(max(0.0, self._squares / self._numbers - mean**2))
        limits = np.array([tolerance, NUMBER_FACTOR * tolerance]) * spread
        return TargetReplay(
            target=self._name,
            largest=self._largest,
            mean=self._differences / self._numbers,
            spread=spread,
            identical=self._same / self._numbers,
            tolerance=tolerance,
            wrong_rows=int((np.concatenate(self._rows) > limits).any(axis=1).sum()),
            worst=self._worst,
        )

    def _measured(self, rows: npt.NDArray[np.float32]) -> Wide:
        """The numbers themselves; probabilities of a codec that keeps these, and only evens out the tail of logits."""
        wide = rows.astype(np.float64)
        if not isinstance(self._codec, TopK):
            return wide
        powers = np.exp((wide - wide.max(axis=1, keepdims=True)) / self._codec.temperature)
        return powers / powers.sum(axis=1, keepdims=True)


def tolerance_of(precision: Precision, device: torch.device, built_on: Any) -> float:
    """t of the module's docstring."""
    if precision == "float32":
        return FLOAT32 if device.type == "cpu" and built_on == "cpu" else TF32
    return HALF if precision == "float16" else BFLOAT16


def _rms(rows: Wide) -> Wide:
    """Root mean square of each row, [B]."""
    return np.sqrt((rows**2).mean(axis=1))
