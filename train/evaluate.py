"""How good a classifier's logits are: accuracy, likelihood, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_tools.config import Frozen
from cache_tools.errors import DataError, WeightsError
from cache_tools.format import Preprocessing
from cache_tools.images import ImageSet
from cache_tools.preprocess import prepare

CALIBRATION_BINS = 15
TOP_K = 5
_ROWS = 8192


class Evaluation(Frozen):
    """Figures of one classifier on one labelled split.

    Attributes:
        n: samples.
        top1, top5: accuracy in [0, 1]; top5 is None for five classes or fewer, where it would always be 1.
        nll: mean negative log-likelihood of the labels, in nats.
        ece: expected calibration error in [0, 1], 15 equal bins of the confidence, each weighted by its share.
    """

    n: int
    top1: float
    top5: float | None
    nll: float
    ece: float


def evaluate(
    model: nn.Module, images: ImageSet, preprocessing: Preprocessing, device: torch.device, batch_size: int = 512
) -> Evaluation:
    """Evaluate a network on a split's clean images (no views), in float32.

    The network is put into eval mode and every module's own mode is restored afterwards. The next batch is
    loaded while the current one is computed.

    Args:
        model: on `device`; pixels prepared by `preprocessing` → logits [B, C].

    Raises:
        WeightsError: logits that are not finite.
        DataError: a split without images, or an image that cannot be decoded.
    """
    meter = _Meter(device)
    labels = torch.from_numpy(np.ascontiguousarray(images.labels, dtype=np.int64)).to(device)
    with _evaluating(model), torch.inference_mode():
        for start, pixels in _batches(images, batch_size, device):
            logits = model(prepare(pixels, preprocessing))
            meter.update(logits, labels[start : start + len(pixels)])
    return meter.compute()


def evaluate_logits(logits: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate logits [N, C] (any floating type) against labels int64 [N], both on one device.

    Raises:
        WeightsError: logits that are not finite.
        DataError: no samples.
    """
    meter = _Meter(logits.device)
    with torch.inference_mode():
        for start in range(0, len(logits), _ROWS):
            meter.update(logits[start : start + _ROWS], labels[start : start + _ROWS])
    return meter.compute()


class _Meter:
    """torchmetrics' accuracies and calibration error, and the likelihood in float64, batch by batch on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._count = device, 0
        self._nll = torch.zeros((), dtype=torch.float64, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        logits = logits.float()
        if not self._count:
            self._create_metrics(logits.shape[1])
        self._count += len(labels)
        self._finite &= torch.isfinite(logits).all()
        self._nll += F.cross_entropy(logits.double(), labels, reduction="sum")
        # Above 1 by a rounding error would read as logits to torchmetrics.
        probabilities = logits.softmax(dim=1).clamp_max(1.0)
        self._top1.update(logits, labels)
        self._ece.update(probabilities, labels)
        if self._top5 is not None:
            self._top5.update(logits, labels)

    def compute(self) -> Evaluation:
        if not self._count:
            raise DataError("no images to evaluate on", next_step="choose another test split")
        if not bool(self._finite):
            raise WeightsError(
                "the network's logits are not finite",
                expected="numbers",
                found="NaN or infinity",
                next_step="train with a lower learning rate, or without mixed precision",
            )
        return Evaluation(
            n=self._count,
            top1=float(self._top1.compute()),
            top5=None if self._top5 is None else float(self._top5.compute()),
            nll=float(self._nll) / self._count,
            ece=float(self._ece.compute()),
        )

    def _create_metrics(self, num_classes: int) -> None:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

        def accuracy(top_k: int) -> MulticlassAccuracy:
            metric = MulticlassAccuracy(num_classes, top_k=top_k, average="micro", validate_args=False)
            return metric.to(self._device)

        self._top1 = accuracy(1)
        self._top5 = accuracy(TOP_K) if num_classes > TOP_K else None
        calibration = MulticlassCalibrationError(num_classes, n_bins=CALIBRATION_BINS, validate_args=False)
        self._ece = calibration.to(self._device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode it had (a frozen batch norm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _batches(images: ImageSet, batch_size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """(first row, uint8 pixels on the device), in order; one batch is decoded ahead."""

    def load(start: int) -> Tensor:
        pixels = torch.from_numpy(images.load(slice(start, min(start + batch_size, len(images)))))
        return pixels.pin_memory() if device.type == "cuda" else pixels

    starts = range(0, len(images), batch_size)
    with ThreadPoolExecutor(1, thread_name_prefix="evaluate") as pool:
        upcoming = pool.submit(load, 0) if starts else None
        for start in starts:
            assert upcoming is not None
            pixels = upcoming.result()
            if start + batch_size < len(images):
                upcoming = pool.submit(load, start + batch_size)
            yield start, pixels.to(device, non_blocking=True)
