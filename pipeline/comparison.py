"""Recomputed rows against stored ones: how far apart may they be?

They are never quite the same: batches, devices and library versions sum in another order, and a number near the edge of
a codec's step falls on the other side. A row passes if

    rms(difference) ≤ t · spread + 2 · rms(e)        and        |difference| ≤ 8 t · spread + 2 e  for each number,

with e the error bound of the codec (twice, because both rows were rounded), the spread of that target's numbers, and t
by how precisely the networks ran:

| forward passes | t | unit roundoff |
|---|---|---|
| float32, then and now on a CPU | 10⁻⁴ | 2⁻²⁴ |
| float32 where one of them was a GPU, whose convolutions use TF32; float16 | 2⁻⁴ | 2⁻¹¹ |
| bfloat16 | 2⁻¹ | 2⁻⁸ |

That is 128 roundoffs, more for float32, where more is still strict. EfficientNet-Lite0 amplifies rounding most of the
networks we tried: 12 roundoffs (root mean square over its features) between precisions, 20 between memory layouts. A
wrong row, of another image or of other weights, is off by a good part of the spread, √2 of it where nothing is alike.

Where a cache was fused or recoded, the largest change that the codecs of the caches before it make to a row adds to e.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.cache_recipe import Precision
from cache_tools.codecs import Codec, TopK
from cache_tools.replay_report import Place, TargetReplay

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
        self._largest, self._worst = -1.0, Place(view=0, sample=0, column=0)

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
            self._worst = Place(view=view, sample=int(index[row]), column=int(column))

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
