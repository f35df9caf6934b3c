"""Digests of the arrays that hold for a whole cache: labels, sample keys and constants.

Each of them has a digest of its own, beside the manifest in the group's zarr.json. It names the array that is damaged.
Two digests in the manifest cover the same arrays together: the content digest of the dataset covers labels, sample keys
and class names, and `constants_digest` covers all constants. Caches of earlier versions have only these two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cache_tools.errors import FormatError
from cache_tools.format.arrays import constant_shapes
from cache_tools.format.commits import content_digest
from cache_tools.format.manifest import Manifest
from cache_tools.lazy import np

if TYPE_CHECKING:
    import numpy.typing as npt

SAMPLE_ARRAYS = ("sample_keys", "labels")
RESTORE_ARRAY = (
    "replace it: `cache-tools pull` or `copy` of a sound cache into this place restores damaged arrays. "
    "If only the stored digest is damaged, `cache-tools repair` restores that"
)


def whole_arrays(manifest: Manifest) -> tuple[str, ...]:
    """Names of labels, sample keys and constants, in the order in which `WholeArrays` takes them."""
    return (*SAMPLE_ARRAYS, *sorted(constant_shapes(manifest.recipe)))


def array_digest(name: str, values: npt.NDArray[Any]) -> str:
    """32 hex digits over an array's name, shape and numbers; one of `Manifest.array_digests`."""
    digest = hashlib.blake2b(digest_size=16)
    _update(digest, name, values)
    return digest.hexdigest()


def constants_digest(constants: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """32 hex digits over names and numbers of all constants: `Manifest.constants_digest`."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(constants):
        _update(digest, name, constants[name])
    return digest.hexdigest()


def array_digests(
    labels: npt.NDArray[Any], sample_keys: npt.NDArray[Any], constants: Mapping[str, npt.NDArray[Any]]
) -> dict[str, str]:
    """The digest of each array: `Manifest.array_digests`."""
    arrays = {"labels": labels, "sample_keys": sample_keys, **constants}
    return {name: array_digest(name, arrays[name]) for name in sorted(arrays)}


def check_array(manifest: Manifest, name: str, values: npt.NDArray[Any], where: object) -> None:
    """Raise FormatError unless an array has its own digest; does nothing for a cache without these."""
    if manifest.array_digests:
        expected, found = manifest.array_digests[name], array_digest(name, values)
        if found != expected:
            raise Mismatch((name,), expected, found).as_error(where)


class Mismatch(NamedTuple):
    """Arrays whose digest is not the stored one; several if only a digest of all of them is stored.

    `sound` says that another stored digest proves the array sound, so that only its own digest is damaged.
    """

    arrays: tuple[str, ...]
    expected: str
    found: str
    sound: bool = False

    @property
    def what(self) -> str:
        if self.sound:
            return f"the stored digest of {self.arrays[0]} is damaged"
        if len(self.arrays) == 1:
            return f"the array {self.arrays[0]} is damaged: its digest is not the stored one"
        return f"one of the arrays {', '.join(self.arrays)} is damaged: their digest is not the stored one"

    def as_error(self, where: object) -> FormatError:
        """The error for a cache at `where`."""
        place = f"{where}/{self.arrays[0]}" if len(self.arrays) == 1 else where
        return FormatError(
            self.what,
            where=place,
            expected=f"digest {self.expected}",
            found=self.found,
            next_step=RESTORE_ARRAY,
        )


class WholeArrays:
    """Compares the arrays of `whole_arrays` with their digests, one after the other: one at a time is in memory.

    Attributes:
        found: digests of the arrays that were added.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.found: dict[str, str] = {}
        self._manifest = manifest
        self._samples: dict[str, npt.NDArray[Any]] = {}
        self._constants = hashlib.blake2b(digest_size=16)

    def add(self, name: str, values: npt.NDArray[Any]) -> None:
        """Take the next array. Arrays that cannot be read are left out."""
        self.found[name] = array_digest(name, values)
        if name in SAMPLE_ARRAYS:
            self._samples[name] = values
        else:
            _update(self._constants, name, values)

    def mismatch_of(self, name: str) -> Mismatch | None:
        """Whether an array that was added differs from its own digest; None for a cache without these."""
        expected = self._manifest.array_digests.get(name)
        return None if expected in (None, self.found[name]) else Mismatch((name,), str(expected), self.found[name])

    def mismatches(self) -> list[Mismatch]:
        """All differences, once every array was added. Constants come together if they have no digests of their own."""
        recipe, constants = self._manifest.recipe, tuple(sorted(constant_shapes(self._manifest.recipe)))
        found = []
        if all(name in self._samples for name in SAMPLE_ARRAYS):
            digest = content_digest(self._samples["sample_keys"], self._samples["labels"], recipe.dataset.class_names)
            found += self._compare(SAMPLE_ARRAYS, recipe.dataset.content_digest, digest)
        else:
            found += self._own(SAMPLE_ARRAYS)
        if all(name in self.found for name in constants):
            found += self._compare(constants, self._manifest.constants_digest, self._constants.hexdigest())
        else:
            found += self._own(constants)
        return found

    def check(self, where: object) -> None:
        """Raise FormatError for the first difference, once every array was added."""
        for mismatch in self.mismatches():
            raise mismatch.as_error(where)

    def _compare(self, names: tuple[str, ...], expected: str, found: str) -> list[Mismatch]:
        """Differences of arrays that one digest covers together."""
        own = self._own(names)
        if expected == found:
            return [each._replace(sound=True) for each in own]
        return own or [Mismatch(names, expected, found)]

    def _own(self, names: Iterable[str]) -> list[Mismatch]:
        each = (self.mismatch_of(name) for name in names if name in self.found)
        return [mismatch for mismatch in each if mismatch is not None]


def _update(digest: hashlib.blake2b, name: str, values: npt.NDArray[Any]) -> None:
    digest.update(f"{name} {list(values.shape)} ".encode())
    digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
