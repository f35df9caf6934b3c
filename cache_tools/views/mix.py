"""Mixed views (MixUp, CutMix): in each view every sample has a partner, whose partner it is, and shows a part of it.

The pairs of a view are neighbours, 2k and 2k + 1, in a keyed permutation of the samples; the last one of an odd number
is its own partner. What the two show of each other is drawn for the pair. Everything is a function of counters, in
integer arithmetic.
"""

from __future__ import annotations

import functools
import math
from decimal import Context, Decimal, localcontext
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from cache_tools.config import Frozen
from cache_tools.config.fields import Number
from cache_tools.lazy import np
from cache_tools.philox import below, chance, philox4x32, sample_words
from cache_tools.views.ops import ONE, Integers, Probability, Size, integer_sqrt, rescaled_box

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# Slots of the counter after those of the ops, whose positions are below 64.
PERMUTATION_SLOT, PAIR_SLOT = 256 << 8, 257 << 8
ROUNDS, ROUNDS_OF_FEW, FEW = 8, 32, 4096  # a small grid needs more of them until every order is equally likely
BINS = 2048  # of a share, in each of which it is uniform
_TERMS = 128  # of the series below 1/2: what is left out is below 2⁻⁹⁰ of the sum

Alpha = Annotated[Number, Field(ge=0.0, le=32.0)]


class Mixing(NamedTuple):
    """The labels of mixed samples: `share` of a sample's own label and 1 − `share` of its partner's.

    Attributes:
        partner: int64 [N], the number of each sample's partner.
        share: float64 [N], multiples of 1/65536.
    """

    partner: Integers
    share: npt.NDArray[np.float64]


class MixRecipe(Frozen):
    """How the two samples of a pair are mixed: λ ~ Beta(α, α), as in timm's `Mixup` with `mode="pair"`.

    MixUp shows λ · own picture + (1 − λ) · partner's. CutMix puts a box of the partner's picture in the same place; the
    box has about 1 − λ of the area, less where it crosses the edge, and labels are mixed by what remains.

    Attributes:
        mixup_alpha, cutmix_alpha: α of each, 0 for none.
        probability: that a pair is mixed.
        cutmix_probability: that a mixed pair is mixed by CutMix, where both have an α.
    """

    mixup_alpha: Alpha = 0.0
    cutmix_alpha: Alpha = 0.0
    probability: Probability = 1.0
    cutmix_probability: Probability = 0.5

    @model_validator(mode="after")
    def _mixes(self) -> MixRecipe:
        alphas = [alpha for alpha in (self.mixup_alpha, self.cutmix_alpha) if alpha > 0.0]
        if not alphas:
            raise ValueError("an alpha above 0 for mixup_alpha, cutmix_alpha or both")
        if min(alphas) < 0.01:
            raise ValueError("an alpha of 0, or of 0.01 to 32")
        if len(alphas) < 2 and self.cutmix_probability != 0.5:
            raise ValueError("cutmix_probability only where mixup_alpha and cutmix_alpha are both above 0")
        return self

    def draw_gate(self, seed: int, view: int, pairs: Integers) -> npt.NDArray[np.bool_]:
        """Whether each pair is mixed: word 0 of draw 0."""
        return chance(_pair_words(seed, view, pairs, 0)[0], self.probability)

    def draw(self, seed: int, view: int, pairs: Integers, size: Size) -> dict[str, Integers]:
        """What each pair shows of the other picture, for views of `size`: name → int64 [N].

        Draw 0 has the gate, MixUp or CutMix, and λ; draw 1 the centre of the box.

        Returns:
            `own`: the weight of the own picture outside the box, in 1/65536; inside the box it is 0. `top`, `left`,
            `height`, `width`: the box, of height 0 for none. `share`: of the own label, in 1/65536.
        """
        gate, choice, lambda_word, _ = _pair_words(seed, view, pairs, 0)
        down, across, _, _ = _pair_words(seed, view, pairs, 1)
        mixed = chance(gate, self.probability)
        if self.mixup_alpha > 0.0 and self.cutmix_alpha > 0.0:
            cut = chance(choice, self.cutmix_probability)
        else:
            cut = np.full(len(pairs), self.cutmix_alpha > 0.0)
        shares = [
            beta_share(lambda_word, alpha) if alpha > 0.0 else 0 for alpha in (self.mixup_alpha, self.cutmix_alpha)
        ]
        box = draw_cut(shares[1] * np.ones_like(pairs), down, across, size)
        box = {name: values * (cut & mixed) for name, values in box.items()}
        own = np.where(mixed & ~cut, shares[0], ONE)
        area, whole = box["height"] * box["width"], size[0] * size[1]
        return {"own": own, **box, "share": np.where(cut, ONE - (2 * ONE * area + whole) // (2 * whole), own)}


class Pairing:
    """The pairs of one view of `count` samples, by a keyed permutation of their numbers.

    A number is row · columns + column of a grid just large enough. Each round adds, modulo the grid, a random number of
    the column to the row, or of the row to the column; what falls outside the samples goes round again. So any sample's
    partner is found alone, without the order of the others.
    """

    def __init__(self, seed: int, view: int, count: int) -> None:
        self.count = count
        self._rows = math.isqrt(count - 1) + 1
        self._columns = -(-count // self._rows)
        rounds = PERMUTATION_SLOT | np.arange(ROUNDS_OF_FEW if count < FEW else ROUNDS)[:, None]
        words = philox4x32((np.arange(max(self._rows, self._columns)), 0, view, rounds), seed)[0]
        self._steps = [below(row, self._columns if k % 2 else self._rows) for k, row in enumerate(words)]

    def positions(self, samples: Integers) -> Integers:
        """The position of each sample in the permutation; positions 2k and 2k + 1 are pair k."""
        return self._walk(samples, 1)

    def samples(self, positions: Integers) -> Integers:
        """The sample at each position."""
        return self._walk(positions, -1)

    def partners(self, samples: Integers) -> Integers:
        """The other sample of each sample's pair; the sample itself at the last position of an odd number."""
        return self.partners_at(self.positions(samples))

    def partners_at(self, positions: Integers) -> Integers:
        """The partner of the sample at each position."""
        other = positions ^ 1
        return self.samples(np.where(other == self.count, positions, other))

    def _walk(self, numbers: Integers, direction: int) -> Integers:
        numbers = self._shuffle(numbers, direction)
        while len(outside := np.flatnonzero(numbers >= self.count)):
            numbers[outside] = self._shuffle(numbers[outside], direction)
        return numbers

    def _shuffle(self, numbers: Integers, direction: int) -> Integers:
        row, column = np.divmod(numbers, self._columns)
        for number in range(len(self._steps))[::direction]:
            if number % 2:
                column = (column + direction * self._steps[number][row]) % self._columns
            else:
                row = (row + direction * self._steps[number][column]) % self._rows
        return row * self._columns + column


@functools.lru_cache(maxsize=16)
def pairing(seed: int, view: int, count: int) -> Pairing:
    """The pairs of a view; one of the last views is not made again."""
    return Pairing(seed, view, count)


def beta_share(words: npt.NDArray[np.uint32], alpha: float) -> Integers:
    """λ ~ Beta(alpha, alpha) in 1/65536, from one word each: the bin by `beta_bins`, then uniform inside the bin."""
    ends = beta_bins(alpha)
    values = words.astype(np.int64)
    number = np.searchsorted(ends, values, side="right") - 1
    low, high = ends[number], ends[number + 1]
    steps = ONE // BINS
    return number * steps + (values - low) * steps // (high - low)


@functools.cache
def beta_bins(alpha: float) -> Integers:
    """round(2³² · F(k / 2048)) for k = 0 … 2048, with F the distribution function of Beta(alpha, alpha).

    For x ≤ 1/2, F(x) = B(x) / (2 B(1/2)) with B(x) = x^α Σ_n (1 − α)_n x^n / (n! (α + n)). Decimal numbers of 50
    digits, whose exp and ln are correctly rounded, give the same table on every machine.
    """
    with localcontext(Context(prec=50)):
        exponent, rising, coefficients = Decimal(repr(float(alpha))), Decimal(1), []
        for n in range(_TERMS):
            coefficients.append(rising / (exponent + n))
            rising *= (n + 1 - exponent) / (n + 1)
        half = [_incomplete(Decimal(k) / BINS, exponent, coefficients) for k in range(1, BINS // 2 + 1)]
        lower = [0, *(int((value * (1 << 31) / half[-1]).to_integral_value()) for value in half)]
    return np.array(lower + [(1 << 32) - value for value in lower[-2::-1]], dtype=np.int64)


def mixed_views(
    finished_NCHW: torch.Tensor, shown: Integers, count: int, drawn: dict[str, Integers], drawn_for: Size
) -> torch.Tensor:
    """The views of the first `count` of the samples `shown`, from their finished views.

    Args:
        drawn: of `MixRecipe.draw`, for pictures of (height, width) `drawn_for`.
    """
    import torch

    from cache_tools.views.pixels import rows_at_once

    size = (finished_NCHW.shape[2], finished_NCHW.shape[3])
    if size != drawn_for:
        drawn = rescaled_box(drawn, drawn_for, size)
    order = np.argsort(shown, kind="stable")
    place = np.searchsorted(shown[order], drawn["partner"]).clip(max=len(shown) - 1)
    place = np.where(drawn["own"] * (drawn["height"] == 0) == ONE, np.arange(count), order[place])
    partners = finished_NCHW[torch.from_numpy(place).to(finished_NCHW.device)]
    return blend(finished_NCHW[:count], partners, drawn, rows_at_once(finished_NCHW))


def blend(
    own_NCHW: torch.Tensor, partner_NCHW: torch.Tensor, drawn: dict[str, Integers], rows_at_once: int
) -> torch.Tensor:
    """The mixed pictures, uint8 [N, 3, H, W]: rounded weighted means of the two, exact on any device.

    All numbers are whole and below 2²⁴, so float32, which is faster, computes the same as integers.

    Args:
        drawn: of `MixRecipe.draw`, for pictures of this size.
    """
    import torch

    made, device = own_NCHW.clone(), own_NCHW.device
    weighted, boxed = np.flatnonzero(drawn["own"] < ONE), np.flatnonzero(drawn["height"] * drawn["width"] > 0)
    for start in range(0, len(weighted), rows_at_once):
        chosen = weighted[start : start + rows_at_once]
        rows, weight = torch.from_numpy(chosen).to(device), torch.from_numpy(drawn["own"][chosen]).to(device)
        weight = weight.float()[:, None, None, None]
        mixed = own_NCHW[rows].float().mul_(weight).add_(partner_NCHW[rows].float().mul_(ONE - weight))
        made[rows] = mixed.add_(ONE // 2).mul_(1 / ONE).to(torch.uint8)
    for row in boxed.tolist():
        top, left, height, width = (int(drawn[name][row]) for name in ("top", "left", "height", "width"))
        made[row, :, top : top + height, left : left + width] = partner_NCHW[
            row, :, top : top + height, left : left + width
        ]
    return made


def _incomplete(x: Decimal, exponent: Decimal, coefficients: list[Decimal]) -> Decimal:
    total = Decimal(0)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return (exponent * x.ln()).exp() * total


def draw_cut(share: Integers, down: Any, across: Any, size: Size) -> dict[str, Integers]:
    """timm's box of CutMix: √(1 − λ) of each side, about a centre that is uniform over the view, cut at its edges."""
    box: dict[str, Integers] = {}
    for word, length, start, extent in zip((down, across), size, ("top", "left"), ("height", "width"), strict=True):
        cut = integer_sqrt((ONE - share) * (length * length) >> 16)
        centre = below(word, length)
        first, end = np.maximum(centre - cut // 2, 0), np.minimum(centre + (cut + 1) // 2, length)
        box |= {start: first, extent: end - first}
    return box


def _pair_words(seed: int, view: int, pairs: Integers, draw: int) -> npt.NDArray[np.uint32]:
    return sample_words(seed, pairs.astype(np.uint64), view, PAIR_SLOT | draw)
