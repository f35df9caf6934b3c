"""`product` against a slow reference, its constants, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cache_tools.codecs import Product, parse_codec
from cache_tools.codecs.product import BASIS, CODEBOOKS, CODES, MEAN
from cache_tools.errors import FormatError, RecipeError

CODEC = Product(parts=4, width=2)


def rows_of(count: int, classes: int = 20, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(classes, classes)) * 0.8 ** np.arange(classes)[:, None]
    return (generator.normal(size=(count, classes)) @ mixing).astype(np.float32)


@pytest.fixture(scope="module")
def constants() -> dict[str, np.ndarray]:
    return CODEC.fit(rows_of(600))


def test_each_part_has_the_nearest_entry_and_decodes_to_it(constants: dict[str, np.ndarray]) -> None:
    rows = rows_of(40, seed=1)
    stored = CODEC.encode(rows, constants)[""]
    assert stored.shape == (40, 4)
    assert stored.max() < CODES, "255 marks a missing chunk"
    mean, basis, codebooks = (constants[name].astype(np.float64) for name in (MEAN, BASIS, CODEBOOKS))
    decoded = CODEC.decode({"": stored}, constants).numpy()
    for row, codes, got in zip(rows, stored, decoded, strict=True):
        turned, expected = basis @ (row - mean), mean.copy()
        for part, code in enumerate(codes):
            own = turned[2 * part : 2 * part + 2]
            apart = [float(np.sum((own - entry) ** 2)) for entry in codebooks[part, :CODES]]
            assert apart[code] == pytest.approx(min(apart), abs=1e-9)
            expected += codebooks[part, code] @ basis[2 * part : 2 * part + 2]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_codes_depend_on_the_row_alone(constants: dict[str, np.ndarray]) -> None:
    rows = rows_of(333, seed=2)
    whole = CODEC.encode(rows, constants)[""]
    for start, stop in itertools.pairwise((0, 1, 50, 333)):
        np.testing.assert_array_equal(CODEC.encode(rows[start:stop], constants)[""], whole[start:stop])
    index = torch.tensor([7, 3, 300])
    torch.testing.assert_close(
        CODEC.decode({"": whole}, constants, index), CODEC.decode({"": whole}, constants)[index], rtol=0, atol=1e-5
    )


def test_components_are_the_largest_in_balanced_parts(constants: dict[str, np.ndarray]) -> None:
    basis = constants[BASIS].astype(np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-5)
    rows = rows_of(600).astype(np.float64)
    variances = np.sort(np.linalg.eigvalsh(np.cov(rows, rowvar=False, bias=True)))[::-1]
    products = (rows @ basis.T).var(axis=0).reshape(4, 2)
    np.testing.assert_allclose(np.sort(products.reshape(-1))[::-1], variances[:8], rtol=1e-4)
    assert np.log(products.prod(axis=1)).std() < np.log(variances[:8].reshape(4, 2).prod(axis=1)).std()


def test_fitting_is_repeatable_and_fewer_bytes_are_worse() -> None:
    sample, rows = rows_of(600), rows_of(200, seed=3)
    for name, values in CODEC.fit(sample).items():
        np.testing.assert_array_equal(values, CODEC.fit(sample)[name])
        assert values.shape == CODEC.constant_shapes(20)[name]
    assert not np.array_equal(Product(parts=4, width=2, seed=1).fit(sample)[CODEBOOKS], CODEC.fit(sample)[CODEBOOKS])
    errors = []
    for parts in (1, 2, 4, 8):
        codec = Product(parts=parts, width=2)
        constants = codec.fit(sample)
        decoded = codec.decode(codec.encode(rows, constants), constants).numpy()
        assert (np.abs(decoded - rows) <= codec.error_bound(rows, constants)).all()
        errors.append(float(np.square(decoded - rows).mean()))
    assert errors == sorted(errors, reverse=True)


def test_the_bound_holds_where_another_centroid_becomes_the_nearest(constants: dict[str, np.ndarray]) -> None:
    rows = rows_of(2000, seed=4)
    moved = rows + np.random.default_rng(5).normal(scale=1e-3, size=rows.shape).astype(np.float32)
    (before, after) = (CODEC.encode(each, constants)[""] for each in (rows, moved))
    changed = (before != after).any(axis=1)
    assert changed.any()
    apart = np.abs(CODEC.decode({"": after}, constants).numpy() - rows)
    assert (apart <= CODEC.error_bound(rows, constants) + 0.01)[changed].all()


def test_autocast_does_not_change_the_targets(constants: dict[str, np.ndarray]) -> None:
    stored = CODEC.encode(rows_of(20, seed=6), constants)
    with torch.autocast("cpu", torch.bfloat16):
        under = CODEC.decode(stored, constants)
    assert under.dtype == torch.float32
    torch.testing.assert_close(under, CODEC.decode(stored, constants), rtol=0, atol=0)


def test_narrow_rows_and_few_rows() -> None:
    codec = Product()
    assert codec.constant_shapes(10) == {MEAN: (10,), BASIS: (8, 10), CODEBOOKS: (2, 256, 4)}
    sample = rows_of(30, classes=10)
    constants = codec.fit(sample)
    decoded = codec.decode(codec.encode(sample, constants), constants).numpy()
    known = constants[BASIS].astype(np.float64)
    projected = (sample - constants[MEAN]) @ known.T @ known + constants[MEAN]
    np.testing.assert_allclose(decoded, projected, atol=1e-4)


def test_every_stored_byte_decodes(constants: dict[str, np.ndarray]) -> None:
    """A received cache may have any bytes."""
    stored = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 4))
    assert torch.isfinite(CODEC.decode({"": stored}, constants)).all()


def test_what_is_refused() -> None:
    with pytest.raises(FormatError, match="no spread to fit codebooks to"):
        CODEC.fit(np.ones((50, 20), np.float32))
    with pytest.raises(FormatError, match="codebooks of the logits are missing"):
        CODEC.encode(rows_of(3))
    with pytest.raises(FormatError, match="too many classes for product"):
        CODEC.for_width(5000)
    for wrong in ({"parts": 0}, {"parts": 257}, {"width": 17}, {"entries": 16}):
        with pytest.raises(RecipeError):
            parse_codec({"codec": "product", **wrong})
