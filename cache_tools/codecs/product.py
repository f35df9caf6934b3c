"""`product`: logits as a byte for each of several groups of principal components, from codebooks fitted to a sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from cache_tools.codecs.base import (
    FILL_VALUES,
    NO_CONSTANTS,
    Codec,
    Constants,
    Encoded,
    Rows,
    StoredArray,
    finite_rows,
)
from cache_tools.codecs.dense import FLOAT32_SLACK
from cache_tools.config.fields import Seed
from cache_tools.errors import FormatError
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

MEAN, BASIS, CODEBOOKS = "_mean", "_basis", "_codebooks"
MAX_CLASSES = 4096
ENTRIES, CODES = 256, 255  # the last entry stands for a missing chunk and is never stored
ROUNDS = 20
TIE = 1.04  # squared distances: within 2 %
_BATCH = 4096  # rows whose distances are computed at once


class Product(Codec):
    """A product quantiser: `parts` bytes per row, each the nearest of 255 centroids of `width` principal components.

    `fit` takes the largest parts · width principal components of a sample of rows, spreads them over the parts so that
    the products of their variances are about equal (the parametric rotation of Ge et al., "Optimized product
    quantization", CVPR 2013), and runs k-means in each part. A row is decoded as

        mean + Σ_parts codebook[part][code] · (the part's components).

    What lies outside of these components is lost, so the error has a floor that no larger codebook removes, and rows
    unlike the sample are stored worse. Opt-in, for caches whose bytes matter more (`caution`).

    Where the rows are narrower than parts · width, there are fewer parts.

    Attributes:
        parts: bytes per row.
        width: principal components in each part.
        seed: of k-means.
    """

    codec: Literal["product"] = "product"
    parts: PositiveInt = Field(32, le=256)
    width: PositiveInt = Field(4, le=16)
    seed: Seed = 0

    fit_rows: ClassVar[int] = 8192

    def caution(self, temperature: float) -> str | None:
        """A one-sentence warning, at any temperature."""
        return (
            "product-quantised targets: the gradient is off by tens of per cent (for 1000 ImageNet classes in 32 bytes "
            "by 53 % at temperature 4 and 87 % at 1, and by far more for images unlike those of the fit); dense codecs "
            "keep the error below 1 %"
        )

    def for_width(self, width: int) -> Product:
        """Itself.

        Raises:
            FormatError: the components of so many classes take too long to compute.
        """
        if width > MAX_CLASSES:
            raise FormatError(
                "too many classes for product",
                where="codec",
                expected=f"at most {MAX_CLASSES:,}",
                found=f"{width:,}",
                next_step="choose another codec, such as compact",
            )
        return self

    def arrays(self, width: int) -> tuple[StoredArray, ...]:
        decode = f"mean + sum over parts of the rows of '{CODEBOOKS}', times '{BASIS}'; see docs/format.md"
        return (
            StoredArray(
                width=self._shape(width)[0],
                dtype="uint8",
                fill_value=FILL_VALUES["uint8"],
                attributes={"decode": decode},
            ),
        )

    def constant_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        parts, each = self._shape(width)
        return {MEAN: (width,), BASIS: (parts * each, width), CODEBOOKS: (parts, ENTRIES, each)}

    def fit(self, sample: Rows) -> dict[str, Rows]:
        """Compute the mean, the components and the codebooks from a sample [S, width].

        Raises:
            FormatError: all rows of the sample are alike, or a number is not finite.
        """
        rows = finite_rows(sample, "sample").astype(np.float64)
        parts, each = self._shape(rows.shape[1])
        mean = rows.mean(axis=0)
        centred = rows - mean
        variances, directions = np.linalg.eigh(centred.T @ centred / len(rows))
        if not variances[-1] > 0:
            raise FormatError("the sample has no spread to fit codebooks to", found=f"{len(rows)} equal rows")
        order = np.argsort(-variances, kind="stable")[: parts * each]
        groups = _balanced(variances[order], parts, each)
        basis = np.ascontiguousarray(directions[:, order[groups.reshape(-1)]].T)
        # The sign of an eigenvector is arbitrary: the largest number of each is positive.
        basis *= np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(axis=1)])[:, None]
        basis = basis.astype(np.float32)
        turned = (centred @ basis.T.astype(np.float64)).reshape(len(rows), parts, each)
        generator = np.random.default_rng(self.seed)
        codebooks = np.zeros((parts, ENTRIES, each), np.float32)
        for part in range(parts):
            codebooks[part, :CODES] = _centroids(np.ascontiguousarray(turned[:, part]), generator)
        return {MEAN: mean.astype(np.float32), BASIS: basis, CODEBOOKS: codebooks}

    def _encode(self, rows: Rows, constants: Constants, where: str) -> Encoded:
        mean, basis, codebooks = _fitted(constants, where)
        stored = np.empty((len(rows), len(codebooks)), np.uint8)
        for start in range(0, len(rows), _BATCH):
            some = slice(start, start + _BATCH)
            # In double precision, so that the nearest centroid does not depend on the rows that share a product.
            turned = (rows[some].astype(np.float64) - mean) @ basis.astype(np.float64).T
            for part, codebook in enumerate(codebooks.astype(np.float64)):
                width = codebook.shape[1]
                stored[some, part] = _nearest(turned[:, part * width : (part + 1) * width], codebook[:CODES])
        return {"": stored}

    def _decode(self, parts: Mapping[str, torch.Tensor], constants: Constants) -> torch.Tensor:
        import torch

        codes = parts[""]
        mean, basis, codebooks = (torch.as_tensor(array).to(codes.device) for array in _fitted(constants, "target"))
        part = torch.arange(len(codebooks), device=codes.device)
        turned = codebooks[part, codes.long()]  # [B, parts, width]; every byte is an entry
        with torch.autocast(codes.device.type, enabled=False):  # the caller's must not change a target
            return torch.addmm(mean, turned.reshape(len(codes), -1), basis)

    def error_bound(self, values: npt.NDArray[Any], constants: Constants = NO_CONSTANTS) -> npt.NDArray[np.float64]:
        """The error itself, [B, width], and what it may be where another centroid is nearly as near.

        There a rounding error in `values` decides, so a row that is computed again may be stored as either.
        """
        mean, basis, codebooks = (np.asarray(array, np.float64) for array in _fitted(constants, "target"))
        wide = np.asarray(values, dtype=np.float32).astype(np.float64)
        turned = (wide - mean) @ basis.T
        decoded, either = np.empty_like(turned), np.zeros_like(wide)
        for part, codebook in enumerate(codebooks[:, :CODES]):
            columns = slice(part * codebook.shape[1], (part + 1) * codebook.shape[1])
            apart = np.square(turned[:, None, columns] - codebook).sum(axis=2)
            two = np.argpartition(apart, 1, axis=1)[:, :2]  # the nearest first
            first, second = two.T
            nearest, next_nearest = np.split(np.take_along_axis(apart, two, axis=1), 2, axis=1)
            decoded[:, columns] = codebook[first]
            either += (next_nearest <= nearest * TIE) * np.abs((codebook[second] - codebook[first]) @ basis[columns])
        bound: npt.NDArray[np.float64] = np.abs(decoded @ basis + mean - wide) + either
        return bound * 1.001 + 64 * FLOAT32_SLACK * np.abs(wide).max(axis=1, keepdims=True)

    def _width(self, constants: Constants, where: str) -> int:
        return len(_fitted(constants, where)[0])

    def _shape(self, width: int) -> tuple[int, int]:
        """Parts and components in each, for rows of `width` numbers."""
        each = min(self.width, width)
        return min(self.parts, width // each), each


def _fitted(constants: Constants, where: str) -> tuple[Any, Any, Any]:
    missing = [name for name in (MEAN, BASIS, CODEBOOKS) if name not in constants]
    if missing:
        raise FormatError(
            "the codebooks of the logits are missing", where=where, expected=f"a constant '{missing[0]}', from fit"
        )
    return constants[MEAN], constants[BASIS], constants[CODEBOOKS]


def _balanced(variances: npt.NDArray[np.float64], parts: int, each: int) -> npt.NDArray[np.int64]:
    """Positions [parts, each] of descending variances: each goes to the part with the smallest product so far."""
    logs = np.log(np.maximum(variances, 1e-12 * variances[0]))
    logs -= logs.min()
    groups: list[list[int]] = [[] for _ in range(parts)]
    totals = np.zeros(parts)
    for position, log in enumerate(logs):
        part = min((part for part in range(parts) if len(groups[part]) < each), key=lambda part: totals[part])
        groups[part].append(position)
        totals[part] += log
    return np.array(groups, dtype=np.int64)


def _centroids(rows: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """k-means: 255 centroids of rows [S, width]. Of fewer rows, each is one, and the first is repeated."""
    if len(rows) <= CODES:
        return np.concatenate([rows, np.repeat(rows[:1], CODES - len(rows), axis=0)])
    centroids = rows[np.sort(generator.choice(len(rows), CODES, replace=False))]
    before = None
    for _ in range(ROUNDS):
        nearest = np.concatenate([_nearest(rows[at : at + _BATCH], centroids) for at in range(0, len(rows), _BATCH)])
        if before is not None and np.array_equal(nearest, before):
            break
        before = nearest
        counts = np.bincount(nearest, minlength=CODES)
        sums = np.stack([np.bincount(nearest, column, minlength=CODES) for column in rows.T], axis=1)
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        if (empty := np.flatnonzero(counts == 0)).size:  # they go to the rows that are stored worst
            farthest = np.argsort(-np.square(rows - centroids[nearest]).sum(axis=1), kind="stable")
            centroids[empty] = rows[farthest[: len(empty)]]
    return centroids


def _nearest(rows: npt.NDArray[np.float64], centroids: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The number of the nearest centroid of each row, the first of equals."""
    found: npt.NDArray[np.int64] = (np.square(centroids).sum(axis=1) - 2.0 * (rows @ centroids.T)).argmin(axis=1)
    return found
