"""Features in whole steps, which the stored linear head (or the class embeddings) turns into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from cache_tools.codecs.base import (
    FILL_VALUES,
    NO_CONSTANTS,
    Codec,
    Constants,
    Encoded,
    Rows,
    StoredArray,
    finite_rows,
    new_float32,
    round_to_int16,
)
from cache_tools.codecs.dense import FLOAT32_SLACK
from cache_tools.errors import FormatError
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

STEPS, FEEDBACK = "_steps", "_feedback"
_BLOCK = 128


class FeatureSteps(Codec):
    """int16 codes with a step per column, fitted to the deviation of the features: value = code · step.

    Attributes:
        resolution: steps per standard deviation.
        spread: `common`: one step for all columns, from the geometric mean of their deviations. An error changes the
            logits of a linear head about equally in any column, so this gives better logits for the same bytes.
            `column`: a step from each column's own deviation.
        damping: of rounding with feedback (`head_feedback`). Higher values favour the features, lower ones the logits.
        pack: `blosc` or, about a tenth smaller, `pcodec`.
    """

    codec: Literal["feature-steps"] = "feature-steps"
    resolution: float = Field(19.0, gt=0.0, lt=float("inf"))
    spread: Literal["common", "column"] = "common"
    damping: float = Field(0.3, gt=0.0, lt=float("inf"))
    pack: Literal["blosc", "pcodec"] = "blosc"

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        attributes: dict[str, float | int | str] = {"decode": f"code * the steps in the array of this name + '{STEPS}'"}
        return (
            StoredArray(
                width=width, dtype="int16", fill_value=FILL_VALUES["int16"], attributes=attributes, pack=self.pack
            ),
        )

    def constant_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        return {STEPS: (width,)}

    def fit(self, sample: Rows) -> dict[str, Rows]:
        """Compute the steps from a sample [S, width]; a thousand rows are enough.

        Raises:
            FormatError: all rows of the sample are alike, or a number is not finite.
        """
        rows = finite_rows(sample, "sample")
        deviation = rows.astype(np.float64).std(axis=0)
        typical = np.median(deviation[deviation > 0]) if (deviation > 0).any() else 0.0
        if not typical > 0:
            raise FormatError("the sample has no spread to fit steps to", found=f"{len(rows)} equal rows")
        # A column that is constant in the sample may vary elsewhere, so its step must not be tiny.
        deviation = np.maximum(deviation, 0.05 * typical)
        if self.spread == "common":
            deviation = np.full_like(deviation, np.exp(np.log(deviation).mean()))
        return {STEPS: (deviation / self.resolution).astype(np.float32)}

    def head_feedback(self, head_CD: Rows) -> dict[str, Rows]:
        """A constant [width, width] that lets `encode` hide rounding errors from a linear head; it is never stored.

        The rounding error of each column is compensated in the columns after it. The remaining error lies in the
        directions that change the logits least, up to a shift of all logits, which a softmax ignores. This is
        successive interpolation in the metric HᵀH + damping · mean eigenvalue, where H is the head minus its mean row.
        Codes and decoding stay the same.

        Args:
            head_CD: weights of the linear head, or class embeddings, [C, width]; several heads are stacked.
        """
        head = finite_rows(head_CD, "head").astype(np.float64)
        head = head - head.mean(axis=0)
        metric = head.T @ head
        level = np.trace(metric) / len(metric)
        metric += self.damping * (level if level > 0 else 1.0) * np.eye(len(metric))
        upper = np.linalg.cholesky(np.linalg.inv(metric)).T
        return {FEEDBACK: np.ascontiguousarray(upper / np.diag(upper)[:, None], dtype=np.float32)}

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        """Round with feedback if the constants have the matrix of `head_feedback`, otherwise to the nearest code."""
        steps = _steps(constants, where)
        if FEEDBACK in constants:
            scaled = _round_with_feedback(rows, steps, constants[FEEDBACK])
        else:
            scaled = rows / steps.astype(np.float64)
        return {"": round_to_int16(scaled, rows, where, "within 32767 steps of its column")}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        import torch

        codes = parts[""]
        return new_float32(codes).mul_(torch.as_tensor(_steps(constants, "target")).to(codes.device))

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """Half a step, plus, with feedback, the shift that half a step of each earlier column can cause."""
        half: npt.NDArray[np.float64] = _steps(constants, "target").astype(np.float64) / 2
        if FEEDBACK in constants:
            half = np.abs(np.triu(constants[FEEDBACK]).astype(np.float64)).T @ half  # the diagonal is 1
        return half * 1.001 + FLOAT32_SLACK * np.abs(values.astype(np.float64))

    def _width(self, constants: Constants, where: str) -> int:
        return len(_steps(constants, where))


def _steps(constants: Mapping[str, Any], where: str) -> Any:
    if STEPS not in constants:
        raise FormatError(
            "the steps of the features are missing", where=where, expected=f"a constant '{STEPS}', from fit"
        )
    return constants[STEPS]


def _round_with_feedback(rows: Rows, steps: Rows, feedback: Rows) -> npt.NDArray[np.float32]:
    """Round rows to whole numbers [B, D] of steps; the error lies in directions that the head ignores.

    Columns are rounded one after the other, and each error is spread over the later columns. They are processed in
    blocks, so that most of the work is matrix products. The arrays are transposed, so that a column is contiguous.
    """
    pending = np.ascontiguousarray(rows.T)
    codes = np.empty_like(pending)
    for start in range(0, len(pending), _BLOCK):
        stop = min(start + _BLOCK, len(pending))
        errors = np.empty((stop - start, pending.shape[1]), np.float32)
        for column in range(start, stop):
            codes[column] = np.rint(pending[column] / steps[column])
            error = errors[column - start] = pending[column] - codes[column] * steps[column]
            pending[column + 1 : stop] -= feedback[column, column + 1 : stop, None] * error
        pending[stop:] -= feedback[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)
