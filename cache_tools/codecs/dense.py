"""Codecs that store each number of a row separately: floating point, whole steps, companded steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from cache_tools.codecs.base import (
    FILL_VALUES,
    NO_CONSTANTS,
    Codec,
    Constants,
    Encoded,
    Rows,
    StoredArray,
    new_float32,
    reject,
    round_to_int16,
)
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Decoding multiplies in float32, which adds a few units in the last place to the rounding error of the code.
FLOAT32_SLACK = 4 * 2.0**-23  # four times the machine epsilon of float32


class Float16(Codec):
    """Half precision: 11 significant bits that hardly compress."""

    codec: Literal["float16"] = "float16"

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        return (StoredArray(width=width, dtype=self.codec, fill_value=FILL_VALUES[self.codec]),)

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        with np.errstate(over="ignore"):
            halves = rows.astype(np.float16)
        reject(~np.isfinite(halves), rows, where, "within ±65504", "store float32 (--codec float32)")
        return {"": halves}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        return new_float32(parts[""])

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """2⁻¹¹ of the number plus half the smallest subnormal."""
        return _magnitude(values) * 2.0**-11 + 2.0**-25


class Float32(Codec):
    """The numbers themselves."""

    codec: Literal["float32"] = "float32"

    @property
    def lossless(self) -> bool:
        return True

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        return (StoredArray(width=width, dtype=self.codec, fill_value=FILL_VALUES[self.codec]),)

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        return {"": rows}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        return new_float32(parts[""])

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        return np.zeros((1, 1))


class FixedStep(Codec):
    """Whole multiples of one step, int16: value = code · step. Any zarr reader sees the step as `scale_factor`."""

    codec: Literal["fixed-step"] = "fixed-step"
    step: float = Field(1 / 64, gt=0.0, lt=float("inf"))
    pack: Literal["blosc", "pcodec"] = "blosc"

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        attributes: dict[str, float | int | str] = {"scale_factor": self.step}
        return (
            StoredArray(
                width=width, dtype="int16", fill_value=FILL_VALUES["int16"], attributes=attributes, pack=self.pack
            ),
        )

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        limits = f"within ±{self.step * 32767:g}"
        return {"": round_to_int16(rows / np.float64(self.step), rows, where, limits)}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        return new_float32(parts[""]).mul_(self.step)

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """Half a step."""
        return 0.5 * self.step + FLOAT32_SLACK * (_magnitude(values) + self.step)


class RowStep(Codec):
    """int8 codes with a step per row: value = code · scale, scale = largest magnitude of the row / 127."""

    codec: Literal["row-step"] = "row-step"

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        return (
            StoredArray(width=width, dtype="int8", fill_value=FILL_VALUES["int8"]),
            StoredArray(suffix="_scale", width=1, dtype="float32", fill_value=FILL_VALUES["float32"]),
        )

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        scale = self._scale(rows)
        codes = np.rint(rows / scale.astype(np.float64))
        return {"": np.clip(codes, -127, 127).astype(np.int8), "_scale": scale}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        return new_float32(parts[""]).mul_(parts["_scale"])

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """Half the step of the row."""
        scale = self._scale(np.asarray(values, dtype=np.float32)).astype(np.float64)
        return scale * (0.5 + 128 * FLOAT32_SLACK)

    def _scale(self, rows: Rows) -> Rows:
        """[B, 1]; never subnormal, even for a row of zeros, and small enough that 127 times it is finite in float32."""
        limits = np.finfo(np.float32)
        largest: Rows = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        highest = np.nextafter(limits.max / np.float32(127), np.float32(0))
        scale: Rows = np.clip(largest / np.float32(127), limits.tiny, highest)
        return scale


class Companded(Codec):
    """Logits in steps that grow as the logit falls: `step` · e^(−z/spread) for a logit z above the row's reference.

    An error of a logit hardly changes a softmax at temperature T if the probability of the logit, e^(z/T), is small.
    The codec stores u = e^(z/spread) in equal steps of `step/spread`: code = round((u − 1) · spread/step). A `spread`
    between two and four times the temperature suits that temperature and all lower ones.

    Rows are decoded mean-centred; a softmax does not depend on the shift.

    Attributes:
        step: the step of a logit at the reference.
        spread: how many logits below the reference the step has grown e-fold.
        reference: `max`, the largest logit of the row: one byte, best for few classes (spread/step ≤ 256). `mean`: 16
            bits that compress better when there are many classes.
        pack: `blosc` or `pcodec` for 16-bit codes; single bytes are always packed with zstd.
    """

    codec: Literal["companded"] = "companded"
    step: float = Field(1 / 32, gt=0.0, lt=float("inf"))
    spread: float = Field(8.0, gt=0.0, lt=float("inf"))
    reference: Literal["max", "mean"] = "max"
    pack: Literal["blosc", "pcodec"] = "blosc"

    @model_validator(mode="after")
    def _levels_fit(self) -> Companded:
        most = 256 if self.reference == "max" else 16384
        if not 2 <= self.levels <= most:
            raise ValueError(f"spread/step must be 2 to {most} with reference={self.reference}, not {self.levels:g}")
        if self.reference == "max" and self.pack == "pcodec":
            raise ValueError("pcodec packs 16-bit codes: use it with reference=mean")
        return self

    @property
    def levels(self) -> float:
        """The number of codes between the reference and minus infinity."""
        return self.spread / self.step

    @property
    def lowest(self) -> float:
        """The lowest logit that can be stored, relative to the row's reference."""
        return float(self.spread * np.log1p(-(self._largest + 0.49) / self.levels))

    @property
    def highest(self) -> float:
        """The highest logit that can be stored, relative to the row's reference."""
        return 0.0 if self.reference == "max" else float(self.spread * np.log1p(32767 / self.levels))

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        by_max = self.reference == "max"
        meaning = f"logit = spread * log1p({'-' if by_max else ''}code * step / spread), up to a shift of the row"
        return (
            StoredArray(
                width=width,
                dtype="uint8" if by_max else "int16",
                fill_value=FILL_VALUES["uint8"] if by_max else FILL_VALUES["int16"],
                attributes={"step": self.step, "spread": self.spread, "decode": meaning},
                pack="zstd" if by_max else self.pack,
            ),
        )

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        with np.errstate(over="ignore"):  # codes out of range are reported below
            codes = np.rint(self.levels * np.expm1(self._relative(rows) / self.spread))
        wrong = (codes < -self._largest) | (codes > (0 if self.reference == "max" else 32767))
        limits = f"{self.lowest:.1f} to {self.highest:.1f} of the row's {self.reference}"
        reject(wrong, rows, where, limits, "choose a larger spread, or store float16")
        return {"": (-codes).astype(np.uint8) if self.reference == "max" else codes.astype(np.int16)}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        sign = -1.0 if self.reference == "max" else 1.0
        logits = new_float32(parts[""]).mul_(sign / self.levels).log1p_().mul_(self.spread)
        return logits.sub_(logits.mean(dim=1, keepdim=True))

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """Against mean-centred `values`: half a step of u at each logit, plus its mean over the row."""
        u = np.exp(self._relative(np.asarray(values)) / self.spread)
        half_cell = -self.spread * np.log1p(-np.minimum(0.5 / (self.levels * u), 1 - 1e-6))
        slack = FLOAT32_SLACK * (np.abs(values).max(axis=1, keepdims=True) + 8 * self.spread * (1 + 1 / u))
        bound: npt.NDArray[np.float64] = half_cell + half_cell.mean(axis=1, keepdims=True) + slack
        return bound

    @property
    def _largest(self) -> int:
        """The magnitude of the lowest code: u stays above zero, and 255 stays free as the fill value."""
        whole = int(np.ceil(self.levels)) - 1
        return min(whole, 254) if self.reference == "max" else whole

    def _relative(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        wide: npt.NDArray[np.float64] = rows.astype(np.float64)
        reference: npt.NDArray[np.float64] = (wide.max if self.reference == "max" else wide.mean)(axis=1, keepdims=True)
        return wide - reference


def _magnitude(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    magnitude: npt.NDArray[np.float64] = np.abs(values.astype(np.float64))
    return magnitude
