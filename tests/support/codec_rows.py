"""Rows of logits, codecs over them, and float64 references for the tests of codecs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.codecs import Codec

WIDTH = 12


def described(codec: Codec) -> str:
    """The id of a codec in a parametrised test."""
    return "-".join(str(value) for value in codec.model_dump().values())


def logits(rows: int = 40, width: int = WIDTH, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 3).astype(np.float32)


def constants(codec: Codec, width: int = WIDTH) -> dict[str, npt.NDArray[np.float32]]:
    """The constants of a codec, fitted to other rows of `logits`."""
    return codec.fit(logits(200, width, seed=1))


def centred(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide - wide.mean(axis=1, keepdims=True)


def softmax(rows: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    scaled = rows.astype(np.float64) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
