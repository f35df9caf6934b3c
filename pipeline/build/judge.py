"""Judge a network by its predictions for labelled images: is it better than chance, and in its own class order?

A network is refused only on evidence. Its right answers must be so few that guessing gives as many or more with a
probability above 5 %, and that a useful network gives so few with a probability of at most 1 % (exact binomial tests).
With a small sample both may be possible. Then the network passes, and a note says that the sample decides nothing.
A network without a wrong answer always passes.

Chance is the share of right answers that the network's predictions would have if they were dealt to the images at
random: 1/C for even guesses, and the share of the largest class for a network that always names it. It is at least 1/C,
and exactly 1/C where all images are of one class, because then every network that names it looks like a constant.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.images.class_names import ORDERS

Labels = npt.NDArray[np.int64]
Kind = Literal["teacher", "clip"]

BETTER, REFUSED, OTHER_ORDER = 0.05, 0.01, 0.001  # probabilities, see above and `better_order`
CLIP_IMAGES = 100
MAX_CLASSES = 2000  # for a search over all orders, whose memory and time grow with the square of this and faster


class Judgement(NamedTuple):
    """A network's `right` answers for `n` images.

    Attributes:
        chance: share of right answers without any knowledge.
        needed: the fewest right answers that are not refused.
        better: whether it is better than chance beyond doubt.
    """

    right: int
    n: int
    chance: float
    needed: int
    better: bool

    @property
    def refused(self) -> bool:
        return self.right < self.needed


class Order(NamedTuple):
    """An order of the classes in which a teacher has `right` right answers; `name` is a key of `ORDERS`."""

    name: str
    right: int


def judge(labels: Labels, predicted: Labels, num_classes: int, kind: Kind) -> Judgement:
    """Judge predictions for labelled images.

    Args:
        labels, predicted: int64 [N], classes of the dataset, N ≥ 1.
        kind: a useful teacher has at least half of the way from chance to 100 %. A CLIP, which was not trained on the
            classes, has one and a half times chance, and is never refused on fewer than `CLIP_IMAGES`.
    """
    n, right = len(labels), int((labels == predicted).sum())
    chance = chance_level(labels, predicted, num_classes)
    halfway = (1.0 + chance) / 2.0
    useful = halfway if kind == "teacher" else min(1.5 * chance, halfway)
    above_chance = bisect_left(range(n + 1), True, key=lambda k: at_least(k, n, chance) <= BETTER)
    if kind == "clip" and n < CLIP_IMAGES:
        return Judgement(right, n, chance, 0, right >= above_chance)
    possibly_useful = bisect_left(range(n + 1), True, key=lambda k: 1.0 - at_least(k + 1, n, useful) > REFUSED)
    return Judgement(right, n, chance, min(above_chance, possibly_useful), right >= above_chance)


def chance_level(labels: Labels, predicted: Labels, num_classes: int) -> float:
    """The share of right answers of the same predictions for other images."""
    counts, answers = (np.bincount(values, minlength=num_classes) for values in (labels, predicted))
    if (counts > 0).sum() < 2:
        return 1.0 / num_classes
    return max(1.0 / num_classes, float(counts @ answers) / len(labels) ** 2)


def at_least(count: int, n: int, p: float) -> float:
    """P(X ≥ count) of a binomial X with n trials of probability p."""
    if count <= 0 or p >= 1.0:
        return float(count <= n)
    if p <= 0.0:
        return 0.0
    log_p, log_q, log_n = math.log(p), math.log1p(-p), math.lgamma(n + 1)
    terms = (
        math.exp(log_n - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q)
        for k in range(count, n + 1)
    )
    return min(1.0, math.fsum(terms))


def better_order(
    names: tuple[str, ...], labels: Labels, predicted: Labels, outputs: Sequence[int] | None = None
) -> Order | None:
    """The order of the class names that the teacher was evidently trained with, if it is another one than it runs with.

    Of the images for which only one of the two orders is right, so many are right in the other order that an even coin
    gives as many with a probability of at most 0.1 %. No network is run for this.

    Args:
        names: of the dataset's classes.
        labels, predicted: int64 [N].
        outputs: the teacher's output of each class; None for the order of the classes.
    """
    raw = predicted if outputs is None else np.asarray(outputs, np.int64)[predicted]
    if raw.max(initial=0) >= len(names):  # outputs of a teacher with more classes
        return None
    right, number = predicted == labels, {name: label for label, name in enumerate(names)}
    best: Order | None = None
    for name, arrange in ORDERS.items():
        of_output = np.array([number[own] for own in arrange(names)], np.int64)
        others = of_output[raw] == labels
        gained, lost = int((others & ~right).sum()), int((right & ~others).sum())
        if (
            gained
            and at_least(gained, gained + lost, 0.5) <= OTHER_ORDER
            and (best is None or others.sum() > best.right)
        ):
            best = Order(name, int(others.sum()))
    return best


def share_in_best_order(labels: Labels, predicted: Labels, num_classes: int) -> float | None:
    """Top-1 with the best of all orders of the outputs, if that is beyond chance; None otherwise.

    The order is chosen on every second image and measured on the others, so that it cannot look good by choice alone.
    """
    from scipy.optimize import linear_sum_assignment

    if len(labels) < 4 or num_classes > MAX_CLASSES:
        return None
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (predicted[::2], labels[::2]), 1)
    _, of_output = linear_sum_assignment(matrix, maximize=True)
    right, n = int((of_output[predicted[1::2]] == labels[1::2]).sum()), len(labels[1::2])
    chance = chance_level(labels[1::2], of_output[predicted[1::2]], num_classes)
    return right / n if at_least(right, n, chance) <= OTHER_ORDER else None
