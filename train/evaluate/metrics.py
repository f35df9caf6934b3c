"""Accuracy, likelihood and calibration of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cache_tools.decoding.service import load_canvases
from cache_tools.errors import DataError, DivergedError
from cache_tools.format.recipe import Finite, Precision, Preprocessing
from cache_tools.images.image_set import ImageSet
from cache_tools.preprocess import prepare
from cache_tools.system.devices import copy_to, float64_device
from cache_tools.system.joined import Joined

CALIBRATION_BINS = 15
TOP_K = 5
_ROWS = 8192


class Evaluation(Finite):
    """Figures of one classifier on one labelled split.

    Attributes:
        n: samples.
        top1, top5: accuracy in [0, 1]; top5 is None for five classes or fewer, where it would always be 1.
        nll: mean negative log-likelihood of the labels, in nats.
        ece: expected calibration error in [0, 1], with 15 equal bins of the confidence, weighted by their size.
        brier: mean over samples of Σ_c (p_c − y_c)², in [0, 2] (Brier 1950); None in results of earlier versions.
    """

    n: int = Field(ge=0, lt=1 << 53)
    top1: float
    top5: float | None
    nll: float
    ece: float
    brier: float | None = None

    @property
    def headline(self) -> float:
        """The figure that runs are compared by."""
        return self.top1


def evaluate(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 512,
    precision: Precision = "float32",
    ranks: Joined | None = None,
) -> Evaluation:
    """Evaluate a network on a split's clean images (no views).

    The network is evaluated in eval mode; afterwards the mode of every module is restored. The next batch is loaded
    while the current one is computed.

    Args:
        model: on `device`; pixels prepared by `preprocessing` → logits [B, C].
        precision: of the forward passes (autocast); the figures are always computed in float32 and above.
        ranks: that evaluate together: each has a part of the batches, and all return the figures of the whole split.

    Raises:
        DivergedError: logits that are not finite.
        DataError: a split without images, or an image that cannot be decoded.
    """
    meter = Meter(device)
    labels = torch.from_numpy(np.ascontiguousarray(images.labels, dtype=np.int64)).to(device)
    rows = _own_rows(len(images), batch_size, ranks)
    with evaluating(model, device, precision):
        for start, pixels in batches(load_canvases(images), rows, batch_size, device):
            meter.update(model(prepare(pixels, preprocessing)), labels[start : start + len(pixels)])
        if ranks is not None:
            meter = Meter.sum_of(ranks.collect(meter.on_cpu()))
    return meter.compute()


def predict(
    model: nn.Module,
    images: ImageSet,
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 512,
    precision: Precision = "float32",
    advance: Callable[[int], None] | None = None,
    ranks: Joined | None = None,
) -> Tensor:
    """Logits of all clean images of a split, float32 [N, C] on `device`.

    Args:
        advance: called after each batch with its number of images.
        ranks: that share the batches; all return all logits.

    Raises:
        DataError: a split without images, or an image that cannot be decoded.
    """
    if not len(images):
        raise DataError("no images to evaluate on", next_step="choose another test split")
    rows = []
    with evaluating(model, device, precision):
        for _, pixels in batches(load_canvases(images), _own_rows(len(images), batch_size, ranks), batch_size, device):
            rows.append(model(prepare(pixels, preprocessing)).float())
            if advance is not None:
                advance(len(pixels))
    if ranks is not None:
        rows = [part.to(device) for part in ranks.collect(torch.cat(rows).cpu() if rows else None) if part is not None]
    return torch.cat(rows)


def evaluate_logits(logits: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate logits [N, C] (any floating type) against labels int64 [N], both on one device.

    Raises:
        DivergedError: logits that are not finite.
        DataError: no samples.
    """
    meter = Meter(logits.device)
    with torch.inference_mode():
        for start in range(0, len(logits), _ROWS):
            meter.update(logits[start : start + _ROWS], labels[start : start + _ROWS])
    return meter.compute()


class Meter:
    """The figures of an `Evaluation`, added up batch by batch on the device, in float64.

    Accuracies and calibration error are those of torchmetrics, whose import alone would take seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._count, self._has_top5 = float64_device(device), 0, False
        self._nll, self._brier, self._top1, self._top5 = torch.zeros(4, dtype=torch.float64, device=self._device)
        # Samples, confidences and right answers of each bin; a confidence of exactly 1 has a bin of its own.
        self._bins = torch.zeros(3, CALIBRATION_BINS + 1, dtype=torch.float64, device=self._device)
        self._finite = torch.ones((), dtype=torch.bool, device=self._device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits [B, C] of any floating type with labels int64 [B]."""
        logits, labels = logits.float().to(self._device), labels.to(self._device)
        self._count += len(labels)
        self._finite &= torch.isfinite(logits).all()
        self._nll += F.cross_entropy(logits.double(), labels, reduction="sum")
        # Not above 1, even by a rounding error: the bins end there.
        probabilities = logits.softmax(dim=1).clamp_max(1.0)
        # Σ_c (p_c − y_c)² = Σ_c p_c² − 2 p_label + 1
        of_label = probabilities.gather(1, labels[:, None])[:, 0]
        self._brier += (probabilities.square().sum(1) - 2 * of_label + 1).sum(dtype=torch.float64)
        self._top1 += (logits.argmax(1) == labels).sum()
        self._has_top5 = logits.shape[1] > TOP_K
        if self._has_top5:
            self._top5 += (logits.topk(TOP_K, dim=1).indices == labels[:, None]).sum()
        self._add_to_bins(probabilities, labels)

    def _add_to_bins(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add probabilities [B, C] to the bins of their confidence."""
        confidences, answers = probabilities.max(dim=1)
        edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=confidences.dtype, device=self._device)
        # A confidence that is not a number comes after the last edge.
        own_bin = (torch.bucketize(confidences, edges, right=True) - 1).clamp_max(CALIBRATION_BINS)
        rows = torch.stack([torch.ones_like(confidences), confidences, (answers == labels).to(confidences.dtype)])
        self._bins.index_add_(1, own_bin, rows.double())

    def compute(self) -> Evaluation:
        """The figures of all batches so far.

        Raises:
            DivergedError: logits that are not finite.
            DataError: no samples.
        """
        if not self._count:
            raise DataError("no images to evaluate on", next_step="choose another test split")
        if not bool(self._finite):
            raise DivergedError(
                "the network's logits are not finite",
                expected="numbers",
                found="NaN or infinity",
                next_step="train with a lower learning rate, or without mixed precision",
            )
        return Evaluation(
            n=self._count,
            top1=float(self._top1) / self._count,
            top5=float(self._top5) / self._count if self._has_top5 else None,
            nll=float(self._nll) / self._count,
            # Σ_b n_b/n · |accuracy_b − confidence_b|
            ece=float((self._bins[2] - self._bins[1]).abs().sum()) / self._count,
            brier=float(self._brier) / self._count,
        )

    def on_cpu(self) -> Meter:
        """The same sums on the CPU, from where other processes can take them."""
        self._device = torch.device("cpu")
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self._device))
        return self

    @classmethod
    def sum_of(cls, meters: Sequence[Meter]) -> Meter:
        """The meter of all samples that some meters on the CPU have seen."""
        total, *others = sorted(meters, key=lambda meter: meter._count == 0)  # those without samples last
        for other in others:
            if other._count:
                total._add(other)
        return total

    def _add(self, other: Meter) -> None:
        self._count += other._count
        self._finite = self._finite & other._finite
        for name in ("_nll", "_brier", "_top1", "_top5", "_bins"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@contextmanager
def evaluating(model: nn.Module, device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Inside, the model is in eval mode, without gradients and at this precision; its modes are restored afterwards."""
    modes = {module: module.training for module in model.modules()}  # a frozen batch norm stays frozen
    model.eval()
    dtype: torch.dtype = getattr(torch, precision)
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def batches(
    load: Callable[[slice], np.ndarray], rows: range, batch_size: int, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Batches in order, as (first row, uint8 pixels [B, 3, H, W] on the device); the next one is loaded meanwhile.

    Pixels are channels-last, as in training: convolutions are a third to a half faster, on the CPU too.

    Args:
        load: rows → uint8 [B, 3, H, W]; called in another thread.
        rows: consecutive ones.
    """

    def fetch(start: int) -> Tensor:
        pixels = torch.from_numpy(load(slice(start, min(start + batch_size, rows.stop))))
        return pixels.pin_memory() if device.type == "cuda" else pixels

    starts = range(rows.start, rows.stop, batch_size)
    with ThreadPoolExecutor(1, thread_name_prefix="evaluate") as pool:
        upcoming = pool.submit(fetch, starts[0]) if starts else None
        for start in starts:
            assert upcoming is not None
            pixels = upcoming.result()
            if start + batch_size < rows.stop:
                upcoming = pool.submit(fetch, start + batch_size)
            yield start, copy_to(pixels, device).contiguous(memory_format=torch.channels_last)


def _own_rows(count: int, batch_size: int, ranks: Joined | None) -> range:
    """The rows that this rank evaluates: whole batches, so that each has the logits that one process computes."""
    if ranks is None:
        return range(count)
    first, last = ranks.rank.part(0, -(-count // batch_size))
    return range(first * batch_size, min(last * batch_size, count))
