"""The judgement of a network by its predictions: exact bounds, chance, and other orders of the classes."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.build.judge import Kind, at_least, better_order, chance_level, judge, share_in_best_order


def exact(count: int, n: int, p: Fraction) -> float:
    return float(sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(max(count, 0), n + 1)))


@pytest.mark.parametrize(("count", "n", "p"), [(3, 4, (1, 2)), (0, 7, (1, 3)), (20, 200, (1, 20)), (5, 4, (1, 2))])
def test_the_binomial_tail_is_exact(count: int, n: int, p: tuple[int, int]) -> None:
    assert at_least(count, n, p[0] / p[1]) == pytest.approx(exact(count, n, Fraction(*p)), rel=1e-12)


@pytest.mark.parametrize("n", [1, 60, 2000, 50_000])
def test_the_binomial_tail_of_many_images(n: int) -> None:
    for p in (0.0, 1e-3, 0.1, 0.5, 0.97, 1.0):
        for count in {0, 1, n // 3, int(n * p) + 1, n}:
            assert at_least(count, n, p) == pytest.approx(binom.sf(count - 1, n, p), rel=1e-9, abs=1e-300)


def balanced(num_classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(num_classes), each)


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 0, 1, 1]),  # 4 images of 2 classes: guessing gets all of them in 1 of 16 cases
        np.array([0]),
        np.array([4, 4, 4]),  # one class only
        np.array([0] * 99 + [1]),
        balanced(5, 10),
        balanced(1000, 2),
    ],
    ids=lambda labels: f"{len(labels)} images",
)
@pytest.mark.parametrize("kind", ["teacher", "clip"])
def test_a_perfect_network_always_passes(labels: np.ndarray, kind: Kind) -> None:
    found = judge(labels, labels, max(2, int(labels.max()) + 1), kind)
    assert not found.refused
    assert found.right == found.n == len(labels)


@pytest.mark.parametrize(("num_classes", "each"), [(2, 20), (5, 8), (10, 30), (100, 2)])
def test_a_constant_teacher_is_refused_with_a_reachable_figure(num_classes: int, each: int) -> None:
    labels = balanced(num_classes, each)
    found = judge(labels, np.full_like(labels, num_classes - 1), num_classes, "teacher")
    assert (found.right, found.chance) == (each, 1 / num_classes)
    assert found.refused
    assert each < found.needed < found.n / 2 + found.n / num_classes
    reached = labels.copy()
    reached[: found.n - found.needed] = (reached[: found.n - found.needed] + 1) % num_classes
    assert not judge(labels, reached, num_classes, "teacher").refused


def test_a_guessing_teacher_is_refused() -> None:
    """And if it never names a class of the test split."""
    rng = np.random.default_rng(0)
    labels = balanced(10, 50)
    assert judge(labels, rng.integers(0, 10, 500), 10, "teacher").refused
    assert judge(balanced(3, 10), np.full(30, 7), 10, "teacher").refused


def test_the_largest_class_is_what_a_constant_teacher_gets() -> None:
    labels = np.array([0] * 900 + [1] * 100)
    constant = judge(labels, np.zeros_like(labels), 2, "teacher")
    assert (constant.right, constant.chance) == (900, 0.9)
    assert constant.refused
    # Right for 90 % of each class is no more of the whole, but it is knowledge.
    skilled = labels.copy()
    skilled[:90], skilled[-10:] = 1, 0
    found = judge(labels, skilled, 2, "teacher")
    assert found.right == 900
    assert found.chance == pytest.approx((0.9 * 820 + 0.1 * 180) / 1000)
    assert found.better
    assert not found.refused


def test_one_class_says_nothing_about_a_constant() -> None:
    labels = np.zeros(100, np.int64)
    assert chance_level(labels, labels, 5) == 0.2
    half = np.array([0, 3] * 50)
    assert judge(labels, half, 5, "teacher").better  # 50 of 100, where guessing gets 20
    assert judge(labels, np.arange(100) % 5, 5, "teacher").refused


@pytest.mark.parametrize(("right", "n"), [(2, 4), (1, 1), (3, 6), (1, 3)])
def test_few_images_decide_nothing(right: int, n: int) -> None:
    labels = np.arange(n) % 2
    found = judge(labels, np.where(np.arange(n) < right, labels, 1 - labels), 2, "teacher")
    assert not found.refused
    assert not found.better


def test_the_needed_answers_by_hand() -> None:
    """20 images of 4 classes: 25 % by chance, 62.5 % if useful. Guessing gets 9 or more in 4.1 % of the cases, and a
    useful teacher 7 or fewer in 1.2 %, 6 or fewer in 0.3 %: below 7 is refused."""
    labels = balanced(4, 5)
    found = judge(labels, np.zeros_like(labels), 4, "teacher")
    by_hand = [
        k for k in range(21) if exact(k, 20, Fraction(1, 4)) > 0.05 and 1 - exact(k + 1, 20, Fraction(5, 8)) <= 0.01
    ]
    assert by_hand == list(range(found.needed))
    assert found.needed == 7


def test_clip_may_be_weaker_than_a_teacher() -> None:
    """30 % where chance is 20 %: too little for a teacher, and evidence of nothing for a CLIP."""
    labels = balanced(5, 10)
    answers = (labels + np.tile([0, 0, 0, 1, 1, 2, 2, 3, 3, 4], 5)) % 5
    teacher, clip = (judge(labels, answers, 5, kind) for kind in ("teacher", "clip"))
    assert (teacher.right, teacher.chance) == (15, 0.2)
    assert not teacher.better or not teacher.refused
    assert clip.needed < teacher.needed
    many = np.tile(labels, 20)
    assert judge(many, np.zeros_like(many), 5, "clip").refused
    assert not judge(many[:99], np.full(99, 4), 5, "clip").refused  # 99 images are too few, whatever it says


# Orders


def predictions_in(own: tuple[str, ...], names: tuple[str, ...], labels: np.ndarray, wrong: int = 0) -> np.ndarray:
    """What a teacher with its outputs in the order `own` predicts if they are read in the order `names`."""
    answers = np.array([own.index(names[label]) for label in labels])
    answers[:wrong] = (answers[:wrong] + 1) % len(names)
    return answers


DIGITS = tuple(map(str, range(20)))


@pytest.mark.parametrize(
    ("own", "order"),
    [
        (DIGITS, "natural"),
        (tuple(f"IMG {number}" for number in (1, 2, 9, 10, 11, 100)), "natural"),
        (("ant", "Bee", "cat", "Dog", "elk"), "natural"),  # the same as case-blind here
        (("a10", "a9", "B1", "c"), "case-blind"),
        (("zebra", "yak", "lion", "cat", "ant"), "reversed"),
    ],
)
def test_the_order_of_the_teacher_is_found(own: tuple[str, ...], order: str) -> None:
    names = tuple(sorted(own))
    labels = balanced(len(names), 10)
    predicted = predictions_in(own, names, labels, wrong=2)
    found = better_order(names, labels, predicted)
    assert found is not None
    assert (found.name, found.right) == (order, len(labels) - 2)
    assert (predicted == labels).mean() < 0.5


def test_a_dataset_in_natural_order_and_a_teacher_in_sorted_order() -> None:
    labels = balanced(20, 5)
    found = better_order(DIGITS, labels, predictions_in(tuple(sorted(DIGITS)), DIGITS, labels))
    assert found == ("sorted", 100)


def test_two_swapped_classes_are_enough_evidence() -> None:
    own = (*(f"c{number:02}" for number in range(50)), "d9", "d10")
    names = tuple(sorted(own))
    labels = balanced(52, 20)
    predicted = predictions_in(own, names, labels)
    assert (predicted == labels).mean() > 0.96
    assert better_order(names, labels, predicted) == ("natural", len(labels))


def test_a_good_teacher_and_a_guessing_one_have_no_other_order() -> None:
    rng = np.random.default_rng(1)
    names = tuple(sorted(DIGITS))
    labels = balanced(20, 20)
    noisy = np.where(rng.random(400) < 0.4, rng.integers(0, 20, 400), labels)
    assert better_order(names, labels, noisy) is None
    assert better_order(names, labels, rng.integers(0, 20, 400)) is None
    assert better_order(names, labels[:3], predictions_in(DIGITS, names, labels[:3])) is None


def test_a_teacher_that_runs_in_a_wrong_order() -> None:
    """`outputs` says which output is read for each class: here natural, where the teacher's own order is sorted."""
    names = tuple(sorted(DIGITS))
    labels = balanced(20, 5)
    outputs = [DIGITS.index(name) for name in names]
    predicted = np.array([outputs.index(label) for label in labels])  # raw outputs are the labels
    assert better_order(names, labels, predicted, outputs) == ("sorted", 100)
    assert better_order(names, labels, labels, [output + 1 for output in outputs]) is None  # of a larger teacher


def test_any_order_is_recognised_but_not_by_choice() -> None:
    rng = np.random.default_rng(2)
    labels = balanced(12, 20)
    shuffled = rng.permutation(12)[labels]
    assert share_in_best_order(labels, shuffled, 12) == 1.0
    assert share_in_best_order(labels, rng.integers(0, 12, 240), 12) is None
    assert share_in_best_order(labels[:2], shuffled[:2], 12) is None
    assert share_in_best_order(labels, shuffled, 21_841) is None  # too many to search
