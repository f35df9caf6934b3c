"""Measure a codec on rows of a cache: pack them as a real cache does, count the bytes, decode and compare.

The decoded parts of a component cache are fused according to its recipe, so every figure is about the logits and
features that training would use.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from cache_tools.analysis import fidelity
from cache_tools.analysis.fidelity import fit_student
from cache_tools.codecs import Sampled, SparseCodec, SparseTargets, TopK
from cache_tools.codecs.presets import TargetCodecs, target_kind
from cache_tools.config import Frozen
from cache_tools.derive.block_reader import BlockReader, Rows, Stored
from cache_tools.derive.recode import Recoder, fit_sample, recoded_constants
from cache_tools.errors import FormatError
from cache_tools.format.arrays import ArraySpec, TargetSpec, targets
from cache_tools.format.layout import target_layout
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe
from cache_tools.fusion import centre_rows
from cache_tools.store.create import add_array
from cache_tools.store.encoding import fit_rows, sample_rows
from cache_tools.targets import ComponentView, FusedView, ViewTargets, fusion_constants

STAGES = (100, 200)
RESAMPLINGS = 32  # of a sampled codec; of at most so many rows and numbers
RESAMPLED_ROWS, RESAMPLED_NUMBERS = 1024, 1 << 20
EVERYTHING = slice(None)


class TargetCost(Frozen):
    """The cost of one stored target: bytes per (image, view), and errors of the decoded numbers.

    Attributes:
        bytes: of the files of all its arrays, checksums included.
        error: ‖decoded − cache‖ / ‖cache − mean of each column‖, rows of logits centred.
        largest_error: of a single number.
    """

    codec: dict[str, Any]
    bytes: float
    error: float
    largest_error: float


class CodecCost(Frozen):
    """The cost of one way to store the cache. Figures are None or empty if unknown (see `problem`) or not applicable.

    Attributes:
        spec: as typed by the user.
        problem: why the cache cannot be stored with these codecs.
        bytes: per (image, view), of all targets.
        g: relative error of the KD gradient with respect to the student's logits, by `STEPS@TEMPERATURE`. For top-k and
            sampled, that of their own loss (`train.losses.tail.kd_tail`), which exists only at the codec's temperature.
        g_even_tail: for top-k and sampled, g of a dense loss on logits with an even tail.
        g_bias, g_noise: the two parts of g of their own loss: the error of the mean gradient over all seeds, and the
            standard deviation around it. For top-k all of g is bias. For sampled, both come from `resamplings` seeds on
            at most 1024 rows, and `g_bias_error` is the bias that so few seeds show by chance if there is none.
        kl: KL(cache ‖ decoded) by temperature, in nats.
        feature_error, largest_feature_error: of the fused features, as in `TargetCost`.
        classes_kept: for top-k and sampled, mean over rows; captured_mass: of these classes, for top-k.
        caution: a warning about these codecs at these temperatures.
    """

    spec: str
    codecs: TargetCodecs
    problem: str | None = None
    bytes: float | None = None
    targets: dict[str, TargetCost] = Field(default_factory=dict)
    g: dict[str, float] = Field(default_factory=dict)
    g_even_tail: dict[str, float] = Field(default_factory=dict)
    g_bias: dict[str, float] = Field(default_factory=dict)
    g_bias_error: dict[str, float] = Field(default_factory=dict)
    g_noise: dict[str, float] = Field(default_factory=dict)
    resamplings: int | None = None
    kl: dict[str, float] = Field(default_factory=dict)
    top1_agreement: float | None = None
    feature_error: float | None = None
    largest_feature_error: float | None = None
    captured_mass: float | None = None
    classes_kept: float | None = None
    caution: str | None = None


class Bench:
    """Rows of one view of a cache, and a student that was briefly fitted to them.

    Attributes:
        index: the samples, evenly spaced.
        logits, features: the fused targets of training, [S, C] and [S, D].
        students: the logits [S, C] of a linear student on the fused features, after each number of steps.
    """

    def __init__(self, source: BlockReader, view: int, rows: int, temperatures: Sequence[float]) -> None:
        self.source, self.view, self.temperatures = source, view, tuple(temperatures)
        self.index = sample_rows(source.cache.num_samples, rows)
        self._fit_samples: dict[int, Stored] = {}  # by their number
        self._stored = source.sample(view, self.index)
        self._decoded = source.decode(self._stored)
        self.logits, self.features = self._fused(source.cache.recipe, self._stored, source.constants)
        self.students = fit_student(self.features, self.logits, STAGES, temperatures=self.temperatures)

    def cost(self, spec: str, codecs: TargetCodecs) -> CodecCost:
        """Measure the cost of storing the cache with these codecs."""
        recipe = self.source.cache.recipe.model_copy(update={"codecs": codecs})
        caution = _caution(codecs.logits, recipe, self.temperatures)
        try:
            constants = recoded_constants(self.source, recipe, lambda: self._fit_sample(recipe))
            with warnings.catch_warnings():  # the table has the same caution
                warnings.filterwarnings("ignore", "(top-k|sampled) targets at temperature")
                stored = Recoder(self.source, recipe, constants).stored(self._stored)
        except FormatError as error:
            return CodecCost(spec=spec, codecs=codecs, problem=str(error), caution=caution)
        logits, features = self._fused(recipe, stored, constants)
        costs = self._target_costs(recipe, stored, constants)
        return CodecCost(
            spec=spec,
            codecs=codecs,
            bytes=sum(cost.bytes for cost in costs.values()),
            targets=costs,
            kl={f"{t:g}": fidelity.divergence(self.logits, logits, t) for t in self.temperatures},
            top1_agreement=fidelity.agreement(self.logits, logits),
            feature_error=_relative(features, self.features),
            largest_feature_error=float((features - self.features).abs().max()),
            caution=caution,
            **self._gradients(recipe, stored, logits),
        )

    def _fit_sample(self, recipe: CacheRecipe) -> Stored:
        count = len(fit_rows(recipe, self.source.cache.num_samples))
        if count not in self._fit_samples:
            self._fit_samples[count] = fit_sample(self.source, recipe)
        return self._fit_samples[count]

    def _gradients(self, recipe: CacheRecipe, stored: Stored, logits: torch.Tensor) -> dict[str, Any]:
        dense = {
            f"{stage}@{t:g}": fidelity.gradient_error(self.logits, logits, student, t)
            for stage, student in self.students.items()
            for t in self.temperatures
        }
        for spec in targets(recipe, 1):
            if isinstance(spec.codec, SparseCodec):
                parts = {array.suffix: stored[array.name] for array in spec.arrays}
                return self._sparse_gradients(spec, spec.codec.sparse(parts), dense)
        return {"g": dense}

    def _sparse_gradients(self, spec: TargetSpec, known: SparseTargets, dense: dict[str, float]) -> dict[str, Any]:
        assert isinstance(spec.codec, SparseCodec)
        p_NC = fidelity.sparse_probabilities(known, spec.width)
        kept = float((known.classes < spec.width).double().sum(dim=1).mean())
        figures: dict[str, Any] = {"classes_kept": kept}
        if isinstance(spec.codec, TopK):
            figures["captured_mass"] = float(p_NC.sum(dim=1).mean())
        if spec.name != "fused_logits":  # fused as dense logits
            return {**figures, "g": dense}
        figures["g_even_tail"] = dense
        t = spec.codec.temperature
        if t not in self.temperatures or isinstance(self.source.cache.targets[spec.name].codec, SparseCodec):
            return figures
        own = {
            f"{stage}@{t:g}": fidelity.tail_gradient_error(self.logits, p_NC, student, t)
            for stage, student in self.students.items()
        }
        if isinstance(spec.codec, Sampled):
            return {**figures, "g": own, **self._resampled(spec.codec)}
        nothing = dict.fromkeys(own, 0.0)
        return {**figures, "g": own, "g_bias": own, "g_bias_error": nothing, "g_noise": nothing}

    def _resampled(self, codec: Sampled) -> dict[str, Any]:
        """Bias and noise of a codec's gradient, from draws of several seeds."""
        t, classes = codec.temperature, self.logits.shape[1]
        rows = sample_rows(len(self.logits), max(16, min(RESAMPLED_ROWS, RESAMPLED_NUMBERS // classes)))
        logits = self.logits[rows]
        drawn = (
            fidelity.sparse_probabilities(seeded.sparse(seeded.encode(logits.numpy())), classes)
            for seeded in (codec.model_copy(update={"seed": seed}) for seed in range(RESAMPLINGS))
        )
        spread = fidelity.resampled_spread(drawn, fidelity.softmax(logits, t))
        norms = {
            f"{stage}@{t:g}": fidelity.gradient_norm(logits, student[rows], t)
            for stage, student in self.students.items()
        }
        return {
            "g_bias": {key: spread.bias / norm for key, norm in norms.items()},
            "g_bias_error": {key: spread.bias_error / norm for key, norm in norms.items()},
            "g_noise": {key: spread.noise / norm for key, norm in norms.items()},
            "resamplings": RESAMPLINGS,
        }

    def _target_costs(self, recipe: CacheRecipe, stored: Stored, constants: Rows) -> dict[str, TargetCost]:
        costs, samples = {}, self.source.cache.num_samples
        for spec in targets(recipe, self.source.cache.manifest.block_rows):
            parts = {array.suffix: stored[array.name] for array in spec.arrays}
            fitted = {key.removeprefix(spec.name): constants[key] for key in spec.constants}
            decoded, truth = spec.codec.decode(parts, fitted), torch.from_numpy(self._decoded[spec.name])
            if target_kind(spec.name) == "logits":
                decoded, truth = centre_rows(decoded), centre_rows(truth)
            size = sum(stored_bytes(spec, array, stored[array.name], samples) for array in spec.arrays)
            costs[spec.name] = TargetCost(
                codec=spec.codec.model_dump(mode="json"),
                bytes=size / len(self.index),
                error=_relative(decoded, truth),
                largest_error=float((decoded - truth).abs().max()),
            )
        return costs

    def _fused(self, recipe: CacheRecipe, stored: Stored, constants: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and features that a student would be trained on."""
        specs = {spec.name: spec for spec in targets(recipe, 1)}
        arrays = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in stored.items()}
        tensors = {name: torch.from_numpy(values) for name, values in constants.items()}
        view: ViewTargets
        if recipe.store == "fused":
            view = FusedView(self.view, arrays, tensors, specs)
        else:
            fusion = Fusion.stored(self.source.cache.manifest)
            constants_of_fusion = fusion_constants(fusion, recipe, tensors.__getitem__)
            view = ComponentView(self.view, arrays, constants_of_fusion, specs, fusion).fuse()
        return centre_rows(view.logits(EVERYTHING)), view.features(EVERYTHING)


def stored_bytes(target: TargetSpec, array: ArraySpec, values: npt.NDArray[Any], num_samples: int) -> int:
    """The bytes of the chunk files of an array that holds these rows [S, width] of a view.

    Chunks have the size of the cache's if the rows are all of its samples; otherwise they are no longer than the rows.
    """
    from zarr import create_group
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    if len(values) < num_samples:
        array = array.model_copy(update={"chunk_rows": min(array.chunk_rows, len(values))})
    made = add_array(create_group(MemoryStore(files)), array.name, target_layout(target, array, (1, len(values))))
    made[0] = values
    return sum(len(data) for key, data in files.items() if key.startswith(f"{array.name}/c"))


def _relative(decoded: torch.Tensor, truth: torch.Tensor) -> float:
    spread = (truth - truth.mean(dim=0)).double().norm()
    return float((decoded - truth).double().norm() / spread.clamp_min(1e-30))


def _caution(codec: Any, recipe: CacheRecipe, temperatures: Sequence[float]) -> str | None:
    used = any(target_kind(spec.name) == "logits" for spec in targets(recipe, 1))
    return codec.caution(max(temperatures)) if used else None
