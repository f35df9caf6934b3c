"""The most probable classes and the exact mass of all others: for temperature 1, where few classes matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cache_tools.codecs.base import FILL_VALUES, NO_CONSTANTS, Constants, Encoded, Rows, StoredArray
from cache_tools.codecs.sparse import (
    MAX_CLASSES,
    NOTHING,
    SparseCodec,
    SparseTargets,
    class_numbers,
    class_places,
    log_softmax,
    log_sum,
)
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

PAD = 255


class TopK(SparseCodec):
    """The classes with at least `min_probability`, at most `max_classes` of them, and the mass of all others.

    Opt-in: at temperatures above 1 most of the mass lies in the tail, and the student gets no gradient from how the
    teacher spread it (see `caution`). Use the loss `train.losses.kd_tail`; for all other losses `decode` gives dense
    logits with an even tail.

    For a given total number of kept classes, one threshold for all rows keeps more of the gradient than a fixed share
    of mass per row: rows with a wide spread need the most classes and add the least. The error is the same each time,
    a bias; `sampled` has none, and noise instead.

    Stored arrays: ascending class numbers as gaps to the previous class (the first to −1; 0 for no class);
    log-probabilities as uint8 companded steps, code = round((1 − p^(1/spread)) · spread/step), 255 for no class; the
    tail's log-sum-exp minus that of all classes, as float32.

    Attributes:
        min_probability: the smallest probability of a kept class, at `temperature`.
        max_classes: the width of the arrays; rows with more such classes keep the most probable.
        step, spread: of the log-probabilities: the step is `step` at p = 1 and e-fold larger every `spread` below.
        temperature: of the probabilities; a loss must use the same.
        num_classes: the number of classes of a row; see `for_width`.
    """

    codec: Literal["top-k"] = "top-k"
    min_probability: float = Field(5e-4, ge=0.0, le=1.0)
    max_classes: PositiveInt = Field(512, le=MAX_CLASSES)
    step: float = Field(1 / 80, gt=0.0, lt=float("inf"))
    spread: float = Field(2.0, gt=0.0, lt=float("inf"))

    @model_validator(mode="after")
    def _levels_fit(self) -> TopK:
        if not 2 <= self._levels <= 256:
            raise ValueError(f"spread/step must be 2 to 256, not {self._levels:g}")
        return self

    def caution(self, temperature: float) -> str | None:
        """A one-sentence warning for this temperature; None at temperature 1 and below."""
        if temperature <= 1.0:
            return None
        return (
            f"top-k targets at temperature {temperature:g}: the stored classes hold little of the mass, the rest is one"
            " number (for 1000 ImageNet classes the gradient is off by about 5 % at temperature 1, and by tens of per "
            "cent at 4); dense codecs keep both below 1 %"
        )

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        stored = min(self.max_classes, width)
        attributes: dict[str, float | int | str] = {
            "temperature": self.temperature,
            "decode": "log p = spread * log1p(-code * step / spread); 255: no class",
            "step": self.step,
            "spread": self.spread,
        }
        return (
            StoredArray(width=stored, dtype="uint8", fill_value=PAD, attributes=attributes),
            StoredArray(suffix="_gaps", width=stored, dtype="int16", fill_value=0, pack="blosc"),
            StoredArray(suffix="_tail", width=1, dtype="float32", fill_value=FILL_VALUES["float32"]),
        )

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        log_p = log_softmax(rows.astype(np.float64) / self.temperature)
        kept = self._kept(log_p)
        log_tail = log_sum(np.where(kept, NOTHING, log_p))
        codes = np.minimum(np.rint(-self._levels * np.expm1(log_p / self.spread)), self._largest)
        width = min(self.max_classes, self._classes)
        gaps, row, column, rank = class_places(kept, width)
        stored = np.full((len(rows), width), PAD, np.uint8)
        stored[row, rank] = codes[row, column]
        return {"": stored, "_gaps": gaps, "_tail": log_tail.astype(np.float32)}

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """A bound for the probabilities of `sparse`, not for logits: half a step for a kept class, p for any other."""
        log_p = log_softmax(np.asarray(values, dtype=np.float64) / self.temperature)
        root = np.exp(log_p / self.spread)
        half_cell = (root + 0.5 / self._levels) ** self.spread - root**self.spread
        clamped = ((self._levels - self._largest + 0.5) / self._levels) ** self.spread
        return np.where(self._kept(log_p), np.maximum(half_cell * 1.001, clamped) + 1e-5, np.exp(log_p))

    def _sparse(self, parts: Mapping[str, torch.Tensor]) -> SparseTargets:
        import torch

        classes = class_numbers(parts["_gaps"], self._classes)
        log_p = torch.log1p(parts[""].float() / -self._levels) * self.spread
        log_p = torch.where(classes < self._classes, log_p, NOTHING)
        return SparseTargets(classes, log_p, parts["_tail"].float().squeeze(1))

    def _log_rest(self, targets: SparseTargets) -> torch.Tensor:
        """The stored mass of the tail, so that softmax(logits / temperature) are the probabilities."""
        return targets.log_tail

    @property
    def _levels(self) -> float:
        return self.spread / self.step

    @property
    def _largest(self) -> int:
        """The largest code of a class: below `levels`, which stands for probability 0 and the logarithm −inf."""
        return min(int(np.ceil(self._levels)) - 1, PAD - 1)

    def _kept(self, log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """bool [B, C]: the largest class, and those above the threshold among the `max_classes` largest."""
        order = np.argsort(-log_p, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(log_p.shape[1])[None], axis=1)
        enough = log_p >= (np.log(self.min_probability) if self.min_probability > 0 else -np.inf)
        kept: npt.NDArray[np.bool_] = (rank == 0) | (enough & (rank < self.max_classes))
        return kept
