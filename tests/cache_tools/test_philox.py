"""Philox4x32-10 against the published vectors and an element-by-element reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_tools import philox

WORD = st.integers(0, 2**32 - 1)


def reference(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """The definition, on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: int, expected: tuple[int, int, int, int]) -> None:
    assert tuple(philox.philox4x32(counter, key).tolist()) == expected
    assert reference(counter, key) == expected


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=20), st.integers(0, 2**64 - 1))
def test_equals_the_reference(counters: list[tuple[int, int, int, int]], key: int) -> None:
    first, second, third, fourth = (np.array(column) for column in zip(*counters, strict=True))
    words = philox.philox4x32((first, second, third, fourth), key)
    assert words.dtype == np.uint32
    assert [tuple(column) for column in words.T.tolist()] == [reference(counter, key) for counter in counters]


def test_batches_and_shapes_do_not_matter() -> None:
    count = 2 * philox._BATCH + 3
    many = philox.philox4x32((np.arange(count), 1, 2, 3), 4)
    assert many.shape == (4, count)
    for index in (0, philox._BATCH - 1, philox._BATCH, count - 1):
        assert tuple(many[:, index].tolist()) == reference((index, 1, 2, 3), 4)
    grid = philox.philox4x32((np.arange(6).reshape(2, 3), np.array([1, 1, 1]), 2, 3), 4)
    np.testing.assert_array_equal(grid.reshape(4, 6), many[:, :6])
    assert philox.philox4x32((np.empty(0, dtype=np.int64), 0, 0, 0), 0).shape == (4, 0)


def test_sample_words_splits_the_index_and_names_the_slot() -> None:
    index = np.array([5, 2**32 + 7, 2**63 - 1], dtype=np.uint64)
    words = philox.sample_words(99, index, view=3, slot=0x201)
    expected = [reference((int(i) & 0xFFFFFFFF, int(i) >> 32, 3, 0x201), 99) for i in index]
    assert [tuple(column) for column in words.T.tolist()] == expected


@given(st.lists(WORD, min_size=1, max_size=20), st.integers(1, 2**31))
def test_below_is_multiply_high(words: list[int], limit: int) -> None:
    drawn = philox.below(np.array(words, dtype=np.uint32), limit)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == [word * limit >> 32 for word in words]
    assert all(0 <= value < limit for value in drawn.tolist())


def test_below_takes_a_limit_per_word() -> None:
    words = np.array([0, 2**31, 2**32 - 1], dtype=np.uint32)
    assert philox.below(words, np.array([1, 10, 1000])).tolist() == [0, 5, 999]


@given(WORD)
def test_chance_is_a_threshold(word: int) -> None:
    words = np.array([word], dtype=np.uint32)
    assert philox.chance(words, 1.0).all()
    assert not philox.chance(words, 0.0).any()
    assert bool(philox.chance(words, 0.5)[0]) == (word >> 31 == 0)
    assert bool(philox.chance(words, 0.3)[0]) == (word < round(0.3 * 2**32))


def test_words_are_uniform_and_independent_enough() -> None:
    """χ² of 16 cells for each of the four words, and of 8 × 8 cells for neighbouring samples, views and slots."""
    index = np.arange(64_000, dtype=np.uint64)
    words = philox.sample_words(0, index, 0, 0)
    for row in words:
        counts = np.bincount(row >> 28, minlength=16)
        assert ((counts - 4000) ** 2 / 4000).sum() < 37.7  # 0.1 % of 15 degrees of freedom
    others = {
        "next sample": philox.sample_words(0, index + np.uint64(1), 0, 0),
        "next view": philox.sample_words(0, index, 1, 0),
        "next slot": philox.sample_words(0, index, 0, 1),
        "next seed": philox.sample_words(1, index, 0, 0),
    }
    for name, other in others.items():
        pairs = np.bincount((words[0] >> 29) * 8 + (other[0] >> 29), minlength=64)
        assert ((pairs - 1000) ** 2 / 1000).sum() < 103.5, name  # 0.1 % of 63
