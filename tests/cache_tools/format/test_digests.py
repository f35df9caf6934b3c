"""Digests of labels, sample keys and constants."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cache_tools.errors import FormatError
from cache_tools.format.digests import (
    WholeArrays,
    array_digest,
    array_digests,
    check_array,
    constants_digest,
    whole_arrays,
)
from cache_tools.format.manifest import Manifest
from cache_tools.format.stored import group_attributes, manifest_attribute, parse_group
from tests.support.cache_factory import tiny_constants, tiny_images, tiny_manifest

IMAGES = tiny_images(20)
MANIFEST = tiny_manifest(IMAGES, store="components", canaries=False)
BARE = MANIFEST.model_copy(update={"array_digests": {}})
CONSTANTS = tiny_constants(MANIFEST)
DIGESTS = array_digests(IMAGES.labels, IMAGES.keys, CONSTANTS)
VALUES = {"labels": IMAGES.labels, "sample_keys": IMAGES.keys, **CONSTANTS}


def test_known_digests() -> None:
    """`docs/format.md` has the first."""
    assert array_digest("labels", np.array([1, 0])) == "9757c100db400212f4b9f91225b5f3a8"
    plain = hashlib.blake2b(b"steps [2] " + np.array([0.5, 2.0], "<f4").tobytes(), digest_size=16)
    assert array_digest("steps", np.array([0.5, 2.0], ">f4")) == plain.hexdigest()
    assert array_digest("steps", np.array([[0.5, 2.0]], "<f4")) != plain.hexdigest()
    assert constants_digest({"steps": np.array([0.5, 2.0], "<f4")}) == plain.hexdigest()


def added(manifest: Manifest, **changed: np.ndarray) -> WholeArrays:
    arrays = WholeArrays(manifest)
    for name in whole_arrays(manifest):
        arrays.add(name, changed.get(name, VALUES[name]))
    return arrays


@pytest.mark.parametrize("manifest", [MANIFEST, BARE], ids=["each", "together"])
def test_sound_arrays_have_their_digests(manifest: Manifest) -> None:
    arrays = added(manifest)
    assert arrays.mismatches() == []
    assert arrays.found == DIGESTS


@pytest.mark.parametrize("name", DIGESTS)
def test_a_damaged_array_is_named_with_both_digests(name: str) -> None:
    other = VALUES[name].copy()
    other.flat[3] = 0 if other.flat[3] == 1 else 1
    (found,) = added(MANIFEST, **{name: other}).mismatches()
    assert (found.arrays, found.expected, found.sound) == ((name,), DIGESTS[name], False)
    with pytest.raises(FormatError) as caught:
        check_array(MANIFEST, name, other, "here")
    for part in (name, DIGESTS[name], array_digest(name, other), "cache-tools pull", "repair"):
        assert part in str(caught.value)
    (found,) = added(BARE, **{name: other}).mismatches()  # a cache of an earlier version
    assert name in found.arrays
    assert len(found.arrays) > 1
    with pytest.raises(FormatError, match=f"one of the arrays .*{name}"):
        raise found.as_error("here")


def test_a_damaged_digest_is_told_from_a_damaged_array() -> None:
    manifest = MANIFEST.model_copy(update={"array_digests": {**DIGESTS, "labels": "0" * 32}})
    (found,) = added(manifest).mismatches()
    assert (found.arrays, found.sound) == (("labels",), True)


def test_digests_are_stored_beside_the_manifest() -> None:
    attributes = group_attributes(MANIFEST)
    assert attributes["array_digests"] == DIGESTS
    assert attributes["teacher_cache"] == manifest_attribute(MANIFEST) == manifest_attribute(BARE)
    assert parse_group(attributes, where="here") == MANIFEST
    assert parse_group(group_attributes(BARE), where="here") == BARE


@pytest.mark.parametrize(
    "digests",
    [None, [], {}, {"labels": "0" * 32}, {**DIGESTS, "labels": 7}, {**DIGESTS, "labels": "x"}, {**DIGESTS, "more": ""}],
)
def test_damaged_digests_are_one_clear_error(digests: object) -> None:
    with pytest.raises(FormatError, match="damaged digests of arrays"):
        parse_group({**group_attributes(MANIFEST), "array_digests": digests}, where="here")
