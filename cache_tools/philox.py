"""Philox4x32-10, the counter-based generator behind every random choice that a cache depends on.

A counter of four 32-bit words and a 64-bit key give four random words, independent of state, order and library
version (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11). Everything is unsigned
integer arithmetic, so the words are the same on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt

WORD_BITS = 32
_MASK = 0xFFFFFFFF
_SHIFT = 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BATCH = 16_384  # the nine temporaries of a batch stay in the L2 cache

Word: TypeAlias = "npt.ArrayLike"


def philox4x32(counter: tuple[Word, Word, Word, Word], key: int) -> npt.NDArray[np.uint32]:
    """Four random words for each counter.

    Args:
        counter: four integers or integer arrays in 0 … 2³²−1, broadcast against each other.
        key: 0 … 2⁶⁴−1; its low half is the first key word.

    Returns:
        uint32 [4, *broadcast shape].
    """
    assert 0 <= key < 1 << 64, "the key has 64 bits"
    words = np.broadcast_arrays(*(np.asarray(word, dtype=np.uint64) for word in counter))
    shape = words[0].shape
    flat = [word.reshape(-1) for word in words]
    out = np.empty((4, flat[0].size), dtype=np.uint32)
    for start in range(0, out.shape[1], _BATCH):
        part = slice(start, start + _BATCH)
        out[:, part] = _rounds([word[part] for word in flat], key & 0xFFFFFFFF, key >> 32)
    return out.reshape(4, *shape)


def sample_words(seed: int, index: npt.NDArray[np.uint64], view: int, slot: int) -> npt.NDArray[np.uint32]:
    """Words [4, N] for samples `index` of a view: counter = (index low, index high, view, slot), key = seed."""
    index = np.asarray(index, dtype=np.uint64)
    return philox4x32((index & _MASK, index >> _SHIFT, view, slot), seed)


def below(words: npt.NDArray[np.uint32], limit: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integers in 0 … limit−1 by multiply-high, ⌊word · limit / 2³²⌋; 1 ≤ limit ≤ 2³¹, one or one per word.

    The probability of each value is off by less than limit / 2³² of itself: about 10⁻⁷ for the ranges of a view.
    """
    return ((words.astype(np.uint64) * np.asarray(limit, dtype=np.uint64)) >> _SHIFT).astype(np.int64)


def chance(words: npt.NDArray[np.uint32], probability: float) -> npt.NDArray[np.bool_]:
    """True with `probability`: word < round(probability · 2³²). For one half, that is a clear top bit."""
    return words.astype(np.uint64) < np.uint64(round(probability * (1 << WORD_BITS)))


def _rounds(counter: list[npt.NDArray[np.uint64]], k0: int, k1: int) -> tuple[npt.NDArray[np.uint64], ...]:
    c0, c1, c2, c3 = counter
    mask, shift, first_multiplier, second_multiplier = map(np.uint64, (_MASK, _SHIFT, *_MULTIPLIERS))
    for number in range(_ROUNDS):
        first, second = c0 * first_multiplier, c2 * second_multiplier
        round_k0 = np.uint64((k0 + number * _WEYL[0]) & _MASK)
        round_k1 = np.uint64((k1 + number * _WEYL[1]) & _MASK)
        c0, c1, c2, c3 = (
            (second >> shift) ^ c1 ^ round_k0,
            second & mask,
            (first >> shift) ^ c3 ^ round_k1,
            first & mask,
        )
    return c0, c1, c2, c3
