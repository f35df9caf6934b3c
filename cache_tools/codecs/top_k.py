"""The most probable classes and the exact mass of all others: for temperature 1, where few classes matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt, model_validator

from cache_tools.codecs.base import (
    FILL_VALUES,
    NO_CONSTANTS,
    Codec,
    Constants,
    Encoded,
    Rows,
    Stored,
    StoredArray,
    gather,
)
from cache_tools.errors import FormatError
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

NOTHING = -1e30  # the logarithm of probability 0: finite, and its exp is 0 in every precision
PAD = 255
MAX_CLASSES = 32767


class SparseTargets(NamedTuple):
    """Rows of teacher distributions at the codec's temperature, with the probabilities of some classes.

    Attributes:
        classes: int64 [B, K], ascending; C where a row has fewer than K.
        log_p: float32 [B, K], log-probabilities; −1e30 where a row has fewer.
        log_tail: float32 [B], log of the probability of all other classes together; −1e30 where there are none.
    """

    classes: torch.Tensor
    log_p: torch.Tensor
    log_tail: torch.Tensor


class TopK(Codec):
    """The classes with at least `min_probability`, at most `max_classes` of them, and the mass of all others.

    Opt-in: at temperatures above 1 most of the mass lies in the tail, and the student gets no gradient from how the
    teacher spread it (see `caution`). Use the loss `train.losses.kd_tail`; for all other losses `decode` gives dense
    logits with an even tail.

    For a given total number of kept classes, one threshold for all rows keeps more of the gradient than a fixed share
    of mass per row: rows with a wide spread need the most classes and add the least.

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
    temperature: float = Field(1.0, gt=0.0, lt=float("inf"))
    num_classes: PositiveInt | None = Field(None, le=MAX_CLASSES)

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

    def for_width(self, width: int) -> TopK:
        """The codec of rows of `width` classes.

        Raises:
            FormatError: int16 gaps cannot number so many classes.
        """
        if width > MAX_CLASSES:
            raise FormatError(
                "too many classes for top-k",
                where="codec",
                expected=f"at most {MAX_CLASSES:,}",
                found=f"{width:,}",
                next_step="choose another codec, such as compact",
            )
        return TopK.model_validate(self.model_dump() | {"num_classes": width})

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
        log_p = _log_softmax(rows.astype(np.float64) / self.temperature)
        kept = self._kept(log_p)
        log_tail = _log_sum(np.where(kept, NOTHING, log_p))
        codes = np.minimum(np.rint(-self._levels * np.expm1(log_p / self.spread)), self._largest)
        width = min(self.max_classes, self._classes)
        gaps = np.zeros((len(rows), width), np.int16)
        stored = np.full((len(rows), width), PAD, np.uint8)
        row, column = np.nonzero(kept)  # ordered by row, then by class
        rank = (np.cumsum(kept, axis=1) - 1)[row, column]
        before = np.where(rank == 0, -1, np.concatenate([[-1], column[:-1]]))
        gaps[row, rank] = column - before
        stored[row, rank] = codes[row, column]
        return {"": stored, "_gaps": gaps, "_tail": log_tail.astype(np.float32)}

    def sparse(self, stored: Stored, index: Any = None, *, temperature: float | None = None) -> SparseTargets:
        """The arguments of `train.losses.kd_tail` for the rows at `index`, or all.

        Args:
            temperature: of the loss; None for the codec's.

        Raises:
            FormatError: the temperature is not the codec's, so the mass of the tail is unknown.
        """
        if temperature is not None and temperature != self.temperature:
            raise FormatError(
                "top-k targets are for one temperature",
                expected=self.temperature,
                found=temperature,
                next_step="train at that temperature, or store dense targets",
            )
        return self._sparse(gather(stored, index))

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        """Mean-centred logits [B, C] with an even tail: softmax(logits / temperature) are the probabilities."""
        targets = self._sparse(parts)
        missing = (self._classes - (targets.classes < self._classes).sum(dim=1)).clamp_min(1)
        even = targets.log_tail - missing.log()
        dense = even[:, None].repeat(1, self._classes + 1)
        logits = dense.scatter_(1, targets.classes, targets.log_p)[:, :-1] * self.temperature
        return logits - logits.mean(dim=1, keepdim=True)

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """A bound for the probabilities of `sparse`, not for logits: half a step for a kept class, p for any other."""
        log_p = _log_softmax(np.asarray(values, dtype=np.float64) / self.temperature)
        root = np.exp(log_p / self.spread)
        half_cell = (root + 0.5 / self._levels) ** self.spread - root**self.spread
        clamped = ((self._levels - self._largest + 0.5) / self._levels) ** self.spread
        return np.where(self._kept(log_p), np.maximum(half_cell * 1.001, clamped) + 1e-5, np.exp(log_p))

    def _sparse(self, parts: Mapping[str, torch.Tensor]) -> SparseTargets:
        import torch

        gaps = parts["_gaps"].long()
        classes = torch.where(gaps > 0, gaps.cumsum(dim=1) - 1, self._classes)
        log_p = torch.log1p(parts[""].float() / -self._levels) * self.spread
        return SparseTargets(classes, torch.where(gaps > 0, log_p, NOTHING), parts["_tail"].float().squeeze(1))

    def _width(self, constants: Constants, where: str) -> int:
        return self._classes

    @property
    def _classes(self) -> int:
        assert self.num_classes is not None, "top-k needs for_width"
        return self.num_classes

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


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return logits - _log_sum(logits)


def _log_sum(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-sum-exp of each row, [B, 1]; NOTHING for a row of NOTHING."""
    largest = logits.max(axis=1, keepdims=True)
    total = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return np.where(largest <= NOTHING, NOTHING, total)
