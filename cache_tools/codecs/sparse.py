"""What the codecs that store only some classes of a row have in common: `top-k` and `sampled`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pydantic import Field, PositiveInt

from cache_tools.codecs.base import Codec, Constants, Stored, gather
from cache_tools.errors import FormatError
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

NOTHING = -1e30  # the logarithm of probability 0: finite, and its exp is 0 in every precision
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


class SparseCodec(Codec):
    """Logits as the probabilities of some classes, at one temperature.

    Train with `train.losses.tail.kd_tail`, whose arguments `sparse` returns. For everything else `decode` gives dense
    logits.

    Attributes:
        temperature: of the probabilities; a loss must use the same.
        num_classes: the number of classes of a row; see `for_width`.
    """

    codec: str
    temperature: float = Field(1.0, gt=0.0, lt=float("inf"))
    num_classes: PositiveInt | None = Field(None, le=MAX_CLASSES)

    def for_width(self, width: int) -> Self:
        """The codec of rows of `width` classes.

        Raises:
            FormatError: int16 gaps cannot number so many classes.
        """
        if width > MAX_CLASSES:
            raise FormatError(
                f"too many classes for {self.codec}",
                where="codec",
                expected=f"at most {MAX_CLASSES:,}",
                found=f"{width:,}",
                next_step="choose another codec, such as compact",
            )
        return type(self).model_validate(self.model_dump() | {"num_classes": width})

    def sparse(self, stored: Stored, index: Any = None, *, temperature: float | None = None) -> SparseTargets:
        """The arguments of `train.losses.tail.kd_tail` for the rows at `index`, or all.

        Args:
            temperature: of the loss; None for the codec's.

        Raises:
            FormatError: the temperature is not the codec's, at which the probabilities were computed.
        """
        if temperature is not None and temperature != self.temperature:
            raise FormatError(
                f"{self.codec} targets are for one temperature",
                expected=self.temperature,
                found=temperature,
                next_step="train at that temperature, or store dense targets",
            )
        return self._sparse(gather(stored, index))

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        """Mean-centred logits [B, C]: the stored classes, and all others alike."""
        targets = self._sparse(parts)
        missing = (self._classes - (targets.classes < self._classes).sum(dim=1)).clamp_min(1)
        even = self._log_rest(targets) - missing.log()
        dense = even[:, None].repeat(1, self._classes + 1)
        logits = dense.scatter_(1, targets.classes, targets.log_p)[:, :-1] * self.temperature
        return logits - logits.mean(dim=1, keepdim=True)

    @abstractmethod
    def _sparse(self, parts: Mapping[str, torch.Tensor]) -> SparseTargets:
        """The stored classes and their probabilities."""

    @abstractmethod
    def _log_rest(self, targets: SparseTargets) -> torch.Tensor:
        """[B]: the logarithm of the mass that dense logits give to all classes that are not stored."""

    def _width(self, constants: Constants, where: str) -> int:
        return self._classes

    @property
    def _classes(self) -> int:
        assert self.num_classes is not None, f"{self.codec} needs for_width"
        return self.num_classes


class Places(NamedTuple):
    """Where the chosen classes of rows go in narrow arrays: `(row, column)` moves to `(row, rank)`.

    Attributes:
        gaps: int16 [B, width]: ascending class numbers as gaps to the previous one (the first to −1); 0 for no class.
    """

    gaps: npt.NDArray[np.int16]
    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]


def class_places(chosen: npt.NDArray[np.bool_], width: int) -> Places:
    """The places of the chosen classes, bool [B, C], of which no row has more than `width`."""
    row, column = np.nonzero(chosen)  # ordered by row, then by class
    rank = (np.cumsum(chosen, axis=1) - 1)[row, column]
    gaps = np.zeros((len(chosen), width), np.int16)
    gaps[row, rank] = column - np.where(rank == 0, -1, np.concatenate([[-1], column[:-1]]))
    return Places(gaps, row, column, rank)


def class_numbers(gaps: torch.Tensor, num_classes: int) -> torch.Tensor:
    """int64 [B, K]: the classes of stored gaps; `num_classes` where there is none, or a number that no class has."""
    import torch

    wide = gaps.long()
    classes = wide.cumsum(dim=1) - 1
    return torch.where((wide > 0) & (classes >= 0) & (classes < num_classes), classes, num_classes)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities [B, C] of each row."""
    return logits - log_sum(logits)


def log_sum(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-sum-exp of each row, [B, 1]; NOTHING for a row of NOTHING."""
    largest = logits.max(axis=1, keepdims=True)
    total = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    return np.where(largest <= NOTHING, NOTHING, total)
