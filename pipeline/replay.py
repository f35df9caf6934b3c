"""Compute rows of a cache again with its teachers and CLIPs, and compare them with the stored rows.

Checksums show that the bytes are those that were committed. A replay shows that the numbers are the outputs of the
manifest's networks for the cache's images. Recomputed rows go through the same codec as the stored ones. Rows of a
fused or recoded cache go through every cache between it and the networks.

Stored and recomputed rows are never identical: batches, devices and library versions sum in another order, and a number
near the edge of a codec's step can fall on the other side. A row passes if

    rms(difference) ≤ t · spread + 2 · rms(e)        and        |difference| ≤ 8 t · spread + 2 e  for each number,

with e the error bound of the codec (twice, because both rows were rounded), the spread of that target's numbers, and
the tolerance t from the precision of the forward passes:

| forward passes | t | unit roundoff |
|---|---|---|
| float32, then and now on a CPU | 10⁻⁴ | 2⁻²⁴ |
| float32 with a GPU in one of them (its convolutions use TF32); float16 | 2⁻⁴ | 2⁻¹¹ |
| bfloat16 | 2⁻¹ | 2⁻⁸ |

t is 128 roundoffs, and more for float32, where that is still strict. Of the networks we tried, EfficientNet-Lite0
amplifies rounding most: 12 roundoffs (root mean square over its features) between precisions, 20 between memory
layouts. A wrong row, of another image or of other weights, is off by a good part of the spread, √2 of it for unrelated
rows.

For a fused or recoded cache, e also includes the largest change that the codecs of the caches before it make to a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import Codec, SparseCodec
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.console import Progress, device_name, resolve_device
from cache_tools.derive.block_reader import BlockReader, Rows
from cache_tools.derive.lineage import Source, lineage, open_source
from cache_tools.errors import IncompleteError, NotFoundError
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
FLOAT32, TF32, HALF, BFLOAT16 = 1e-4, 2.0**-4, 2.0**-4, 2.0**-1  # t, see above
NUMBER_FACTOR = 8.0

Float64Rows = npt.NDArray[np.float64]


def replay(cache: TeacherCache, images: ImageSet, count: int, *, seed: int = 0, device: str = "auto") -> Replay:
    """Compute up to `count` random rows of the complete views again.

    Args:
        images: the samples of the cache, in its order (`cache_tools.alignment.aligned`).
        seed: of the random choice of rows.
        device: where the networks run.

    Raises:
        IncompleteError: no view is complete.
        NotFoundError: the cache does not record how its networks were loaded, or a source cache with fitted codecs is
            missing.
        WeightsError: networks are missing, or have other weights than the cache's.
    """
    if cache.recipe.imported is not None:
        raise NotFoundError(
            "these targets were imported, so there is no teacher to compute them again",
            where=cache.path,
            expected="a cache of build-cache",
            found=f"an import of {cache.recipe.imported.kind}",
            next_step="leave --replay out: verify checks every stored byte without it",
        )
    torch_device = resolve_device(device)
    drawn = _draw(cache, count, seed)
    sources = lineage(cache.manifest)
    ensemble = load_stored_ensemble(cache.manifest, images, torch_device, where=cache.path)
    recompute = _Recompute(cache, sources, ensemble, images)
    comparisons = {name: Comparison(name, spec.codec) for name, spec in cache.targets.items()}
    reader, total = BlockReader(cache), sum(len(index) for index in drawn.values())
    with Progress("replay", total, "rows") as progress:
        for view, index in drawn.items():
            stored = reader.decode(reader.sample(view, index))
            for start in range(0, len(index), BATCH):
                part = slice(start, start + BATCH)
                recomputed = recompute.rows(view, index[part])
                for name, comparison in comparisons.items():
                    comparison.add(view, index[part], stored[name][part], *recomputed.of(name))
                progress.advance(len(index[part]))
    built_on = cache.manifest.provenance.get("device")
    tolerance = tolerance_of(cache.recipe.precision, torch_device, built_on)
    return Replay(
        rows=total,
        seed=seed,
        device=device_name(torch_device),
        built_on=built_on,
        precision=cache.recipe.precision,
        targets=tuple(comparison.verdict(tolerance) for comparison in comparisons.values()),
    )


def tolerance_of(precision: Precision, device: torch.device, built_on: Any) -> float:
    """The tolerance t of the module's docstring."""
    if precision == "float32":
        return FLOAT32 if device.type == "cpu" and built_on == "cpu" else TF32
    return HALF if precision == "float16" else BFLOAT16


class Comparison:
    """Collects the differences of one target, batch by batch. The verdict needs the spread, so it comes last."""

    def __init__(self, name: str, codec: Codec) -> None:
        self._name, self._codec = name, codec
        self._rows: list[Float64Rows] = []  # [B, 2]: rms and largest difference beyond what the codecs explain
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
        bound: Float64Rows,
    ) -> None:
        """Compare stored rows with recomputed ones, which are named as in `_RecomputedRows`."""
        before, now, exact = self._comparable(stored), self._comparable(decoded), self._comparable(values)
        difference = np.abs(now - before)
        error = bound + np.abs(exact - self._comparable(plain)).max(axis=1, keepdims=True)
        self._rows.append(np.stack([_rms(difference) - 2 * _rms(error), (difference - 2 * error).max(axis=1)], axis=1))
        self._numbers += exact.size
        self._same += int((stored == decoded).sum())
        self._sum += float(exact.sum())
        self._squares += float((exact**2).sum())
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

    def _comparable(self, rows: npt.NDArray[np.float32]) -> Float64Rows:
        """The numbers themselves; probabilities for sparse codecs, which store few of the logits."""
        wide = rows.astype(np.float64)
        if not isinstance(self._codec, SparseCodec):
            return wide
        powers = np.exp((wide - wide.max(axis=1, keepdims=True)) / self._codec.temperature)
        probabilities: Float64Rows = powers / powers.sum(axis=1, keepdims=True)
        return probabilities


def _draw(cache: TeacherCache, count: int, seed: int) -> dict[int, npt.NDArray[np.int64]]:
    """View → ascending sample indices: distinct (sample, view) pairs, drawn uniformly."""
    views, samples = cache.complete_views, cache.num_samples
    if not views:
        raise IncompleteError("no view of the cache is complete", where=cache.path, next_step="build one, then replay")
    total = len(views) * samples
    drawn = np.sort(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False))
    numbers = drawn // samples
    return {views[number]: drawn[numbers == number] % samples for number in np.unique(numbers)}


class _RecomputedRows(NamedTuple):
    """Recomputed rows [B, width] of every target, by name.

    Attributes:
        decoded: as a reader reads them.
        values: as they enter the cache's own codec.
        plain: as they would be if the caches in between were lossless.
        bound: the largest possible error of `decoded`.
    """

    decoded: Rows
    values: Rows
    plain: Rows
    bound: Mapping[str, Float64Rows]

    def of(self, name: str) -> tuple[npt.NDArray[Any], ...]:
        return self.decoded[name], self.values[name], self.plain[name], self.bound[name]


class _Recompute:
    """Computes the rows of a cache from (view, samples), through every cache that it was made from."""

    def __init__(
        self, cache: TeacherCache, sources: Sequence[Source], ensemble: TeacherEnsemble, images: ImageSet
    ) -> None:
        self._recipe, self._ensemble, self._images = cache.recipe, ensemble, images
        self._constants: Rows = ensemble.constants("components")
        steps = [(source.store, self._encoder_of(source)) for source in reversed(sources)]
        self._steps = [*steps, (cache.recipe.store, Encoder(cache.recipe, cache.constant))]
        self._fusion, components = Fusion.stored(cache.manifest), self._recipe_with("components", TargetCodecs())
        self._tensors = fusion_constants(self._fusion, components, lambda name: torch.from_numpy(self._constants[name]))

    def rows(self, view: int, index: npt.NDArray[np.int64]) -> _RecomputedRows:
        pixels = view_pixels(self._images, self._recipe.views, index, view, self._ensemble.device)
        store = self._steps[0][0]
        targets = self._ensemble.targets(pixels.teacher, store, pixels.clip)
        values = {name: rows.cpu().numpy() for name, rows in targets.items()}
        plain = values
        for (_, encoder), (next_store, _) in pairwise(self._steps):
            values = encoder.decode(encoder.encode(values))
            if next_store != store:
                values, plain, store = self._fuse(view, values), self._fuse(view, plain), next_store
        encoder = self._steps[-1][1]
        return _RecomputedRows(encoder.decode(encoder.encode(values)), values, plain, encoder.error_bound(values))

    def _fuse(self, view: int, rows: Rows) -> Rows:
        arrays = {name: torch.from_numpy(values) for name, values in rows.items()}
        fused = ComponentView(view, arrays, self._tensors, {}, self._fusion).fuse().arrays
        return {name: fused[name].numpy() for name in ("fused_logits", "fused_features")}

    def _recipe_with(self, store: Store, codecs: TargetCodecs) -> CacheRecipe:
        return self._recipe.model_copy(update={"store": store, "codecs": codecs})

    def _encoder_of(self, source: Source) -> Encoder:
        """The encoder of a source cache; only the source itself has the constants of fitted codecs."""
        recipe = self._recipe_with(source.store, source.codecs)
        if not fitted_targets(recipe):
            return Encoder(recipe, self._constants.__getitem__)
        cache = open_source(source)
        return Encoder(cache.recipe, cache.constant)


def _rms(rows: Float64Rows) -> Float64Rows:
    """Root mean square of each row, [B]."""
    rms: Float64Rows = np.sqrt((rows**2).mean(axis=1))
    return rms
