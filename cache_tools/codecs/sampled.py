"""`sampled`: a few classes of each row, drawn so that their counts are an unbiased estimate of the softmax."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cache_tools.codecs.base import NO_CONSTANTS, Constants, Encoded, Rows, StoredArray
from cache_tools.codecs.sparse import NOTHING, SparseCodec, SparseTargets, class_numbers, class_places, log_softmax
from cache_tools.config.fields import Seed
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

PHASE_TURNS = 2.0  # of the phase, while the projection of a row of logits changes by 1


class Sampled(SparseCodec):
    """`draws` classes per row, drawn by systematic resampling; the stored probability is count / draws.

    For the probabilities p at `temperature`, with cumulative sums F and one number u, uniform in [0, 1), for the row,

        count_c = ⌊draws · F_c + u⌋ − ⌊draws · F_{c−1} + u⌋.

    Counts add up to `draws`, their mean over u is draws · p_c exactly, and count_c is ⌊draws · p_c⌋ or one more. So the
    gradient of `train.losses.tail.kd_tail`, which is linear in the probabilities, is unbiased at any temperature.

    With f the fraction of draws · p_c, the variance of count_c is f (1 − f), at most ¼. Independent draws, as in
    random-sampling KD (arXiv 2503.16870), have draws · p_c (1 − p_c): about the same for classes of which less than one
    draw is expected, and far more for all others. The mass of any run of neighbouring classes, such as ImageNet's dogs,
    is also within one draw of the truth, so they are taken in the order of their numbers.

    The value of the loss is larger than with all classes, by what a sampled distribution lacks in entropy. Its mean
    gradient is the same.

    u depends only on `seed` and the row's logits, not on blocks and batches. It is a phase that turns with a projection
    of the row (`_phases`). A rounding error turns it by as little, so it seldom changes a draw, and then only moves it
    to the next class; a hash of the row would draw all of it again.

    `decode`, for everything but `kd_tail`, gives all classes that were not drawn the mass of half a draw together, in
    equal parts. Such dense logits are biased.

    Stored arrays: ascending class numbers as gaps to the previous class (the first to −1; 0 for no class); counts as
    uint8, 0 for no class.

    Attributes:
        draws: the number of draws per row. More classes are stored the flatter the row is, at most one per draw.
        seed: of the draws. Caches of several seeds of the same targets are independent samples of them.
        temperature: of the probabilities; a loss must use the same.
        num_classes: the number of classes of a row; see `for_width`.
    """

    codec: Literal["sampled"] = "sampled"
    draws: int = Field(32, ge=8, le=255)
    seed: Seed = 0

    def caution(self, temperature: float) -> str | None:
        """A one-sentence warning for this temperature; None at temperature 1 and below."""
        if temperature <= 1.0:
            return None
        return (
            f"sampled targets at temperature {temperature:g}: the gradient is unbiased, but where the softmax is flat "
            "it is mostly noise (for 1000 ImageNet classes and 32 draws, as large as the gradient at temperature 1 and "
            "tens of times as large at 4); dense codecs keep the error below 1 %"
        )

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        stored = min(self.draws, width)
        attributes: dict[str, float | int | str] = {
            "temperature": self.temperature,
            "decode": "p = count / draws; 0: no class",
            "draws": self.draws,
        }
        return (
            StoredArray(width=stored, dtype="uint8", fill_value=0, attributes=attributes),
            StoredArray(suffix="_gaps", width=stored, dtype="int16", fill_value=0, pack="blosc"),
        )

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """A bound for the probabilities of `sparse`, not for logits: the count is one of the two next to draws · p."""
        scaled = self._probabilities(np.asarray(values, dtype=np.float64)) * self.draws
        below = scaled - np.floor(scaled)
        return np.maximum(below, 1.0 - below) / self.draws + 1e-6

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        wide = rows.astype(np.float64)
        counts = systematic_counts(self._probabilities(wide), self._phases(wide), self.draws)
        gaps, row, column, rank = class_places(counts > 0, min(self.draws, self._classes))
        stored = np.zeros(gaps.shape, np.uint8)
        stored[row, rank] = counts[row, column]
        return {"": stored, "_gaps": gaps}

    def _sparse(self, parts: Mapping[str, torch.Tensor]) -> SparseTargets:
        import torch

        counts = parts[""].float()
        classes = torch.where(counts > 0, class_numbers(parts["_gaps"], self._classes), self._classes)
        log_p = torch.log(counts.clamp_min(1.0) / self.draws)
        log_p = torch.where(classes < self._classes, log_p, NOTHING)
        return SparseTargets(classes, log_p, torch.full_like(log_p[:, 0], NOTHING))

    def _log_rest(self, targets: SparseTargets) -> torch.Tensor:
        """Half a draw."""
        import torch

        return torch.full_like(targets.log_tail, float(np.log(0.5 / self.draws)))

    def _probabilities(self, logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.exp(log_softmax(logits / self.temperature))

    def _phases(self, logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """u of each row, [B]: the fraction of a start and PHASE_TURNS · Σ ±(z_c − mean z) / √C.

        The start and the signs come from the seed. So u is uniform over seeds for every row, and over rows whose
        logits differ by a few tenths it is uniform too.
        """
        classes = logits.shape[1]
        stream = hashlib.shake_256(f"sampled {self.seed}".encode()).digest(8 + (classes + 7) // 8)
        start = (int.from_bytes(stream[:8], "little") >> 11) / 2**53
        signs = np.unpackbits(np.frombuffer(stream, np.uint8, offset=8), count=classes) * 2.0 - 1.0
        centred = logits - logits.mean(axis=1, keepdims=True)
        # Not a matrix product: this sums each row in the same order, whatever the batch.
        turns = (centred * signs).sum(axis=1) * (PHASE_TURNS / np.sqrt(classes))
        phases: npt.NDArray[np.float64] = np.mod(start + turns, 1.0)
        return np.where(phases < 1.0, phases, 0.0)  # the fraction of −1e−17 rounds to 1


def systematic_counts(
    probabilities: npt.NDArray[np.float64], phases: npt.NDArray[np.float64], draws: int
) -> npt.NDArray[np.int64]:
    """How often each class is drawn, [B, C], at these phases [B] in [0, 1); every row adds up to `draws`."""
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative *= draws / cumulative[:, -1:]
    marks = np.minimum(np.floor(cumulative + phases[:, None]), draws)
    marks[:, -1] = draws  # also where rounding has lost or gained one
    return np.diff(marks, axis=1, prepend=0.0).astype(np.int64)
