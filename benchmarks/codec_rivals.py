"""Alternatives that codecs are compared with: truncated targets of the literature, and codecs that we rejected."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.codecs import StoredArray, TopK

Rows = npt.NDArray[np.float32]
Arrays = list[tuple[StoredArray, npt.NDArray[np.generic]]]
_NAN = float("nan")


def top_smoothed(logits: torch.Tensor, k: int) -> tuple[Arrays, torch.Tensor]:
    """The k largest probabilities (int16 class, float16), the rest spread evenly over all others: ReLabel, FKD."""
    p = logits.double().softmax(dim=1)
    largest = p.topk(k, dim=1)
    kept = largest.values.half()
    rest = (1.0 - kept.double().sum(dim=1, keepdim=True)).clamp_min(1e-12) / (p.shape[1] - k)
    decoded = rest.repeat(1, p.shape[1]).scatter(1, largest.indices, kept.double().clamp_min(1e-12)).log()
    arrays: Arrays = [
        (StoredArray(width=k, dtype="float16", fill_value=_NAN), kept.numpy()),
        (StoredArray(suffix="_class", width=k, dtype="int16", fill_value=-1), largest.indices.short().numpy()),
    ]
    return arrays, decoded.float()


class MassTopK(TopK):
    """Rejected: as many classes per row as are needed to capture a share of its mass."""

    mass: float = 0.85

    def _kept(self, log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        order = np.argsort(-log_p, axis=1, kind="stable")
        sorted_p = np.exp(np.take_along_axis(log_p, order, axis=1))
        needed = np.cumsum(sorted_p, axis=1) - sorted_p < self.mass
        kept = np.empty_like(needed)
        np.put_along_axis(kept, order, needed, axis=1)
        return kept


def rotated(features: Rows, resolution: float) -> tuple[Arrays, Rows]:
    """Rejected: principal components of the same rows, all with one step, as many per deviation as `FeatureSteps`."""
    mean = features.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov((features - mean).T))
    deviation = features.std(axis=0)
    step = np.float32(np.exp(np.log(deviation[deviation > 0]).mean()) / resolution)
    turned = directions.astype(np.float32)
    codes = np.rint((features - mean) @ turned / step).astype(np.int16)
    array = StoredArray(width=features.shape[1], dtype="int16", fill_value=-32768, pack="pcodec")
    return [(array, codes)], (codes * step) @ turned.T + mean


def components_in_steps(sample: Rows, rows: Rows, step: float, width: int = 256) -> tuple[Arrays, Rows]:
    """Not kept: the largest principal components of a sample of logits, all in one step, packed with zstd."""
    mean = sample.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov((sample - mean).T))
    turned = np.ascontiguousarray(directions[:, ::-1][:, :width]).astype(np.float32)
    codes = np.clip(np.rint((rows - mean) @ turned / step), -127, 127).astype(np.int8)
    array = StoredArray(width=width, dtype="int8", fill_value=-128)
    return [(array, codes)], ((codes * np.float32(step)) @ turned.T + mean).astype(np.float32)
