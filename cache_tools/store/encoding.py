"""Encode target rows into the arrays of a cache with each target's codec, and fit codecs to a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.codecs import Codec, FeatureSteps
from cache_tools.errors import FormatError
from cache_tools.format.arrays import TargetSpec, array_name, targets
from cache_tools.format.recipe import CacheRecipe

Rows = npt.NDArray[np.floating[Any]]
Constants = Mapping[str, npt.NDArray[np.float32]]


class Encoder:
    """Encodes and decodes rows of the targets of one cache.

    Args:
        constant: returns a constant of the cache by name (`arrays.constant_shapes`).

    Attributes:
        targets: the targets, by name.
        constants: the constants of each target's codec, by suffix, with its `head_feedback` if it has one.
    """

    def __init__(self, recipe: CacheRecipe, constant: Callable[[str], npt.NDArray[np.float32]]) -> None:
        self.targets = {spec.name: spec for spec in targets(recipe, 1)}
        self.constants: dict[str, dict[str, npt.NDArray[np.float32]]] = {
            name: {key.removeprefix(name): constant(key) for key in spec.constants}
            for name, spec in self.targets.items()
        }
        for name, spec in self.targets.items():
            head = _head_of(recipe, name)
            if isinstance(spec.codec, FeatureSteps) and head is not None:
                self.constants[name] |= spec.codec.head_feedback(constant(head))

    def encode(self, rows: Mapping[str, Rows], *, where: str = "") -> dict[str, npt.NDArray[Any]]:
        """Encode rows of all targets into stored arrays, by name.

        Args:
            rows: floating-point [B, width] for each target, with the same B.
            where: follows the name of the target in messages.

        Raises:
            FormatError: the cache has other targets or shapes; or integers, or numbers that are not finite or out of
                the codec's range.
        """
        if set(rows) != set(self.targets):
            raise FormatError("wrong targets", where=where, expected=sorted(self.targets), found=sorted(rows))
        stored: dict[str, npt.NDArray[Any]] = {}
        for name in self.targets:
            stored |= self.encode_target(name, rows[name], where=where)
        return stored

    def encode_target(self, name: str, rows: Rows, *, where: str = "") -> dict[str, npt.NDArray[Any]]:
        """Encode rows of one target into stored arrays, by name; arguments and errors as for `encode`."""
        spec, values = self.targets[name], np.asarray(rows)
        place = f"{name}, {where}" if where else name
        if values.ndim != 2 or values.shape[1] != spec.width or values.dtype.kind != "f":
            raise FormatError(
                "wrong rows",
                where=place,
                expected=f"floating [rows, {spec.width}]",
                found=f"{values.dtype} {list(values.shape)}",
            )
        parts = spec.codec.encode(values, self.constants[name], where=place)
        return {name + suffix: part for suffix, part in parts.items()}

    def decode(self, stored: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """Decode stored arrays, as a reader does, into rows [B, width] of each target."""
        rows = {}
        for name, spec in self.targets.items():
            parts = {array.suffix: stored[array.name] for array in spec.arrays}
            rows[name] = spec.codec.decode(parts, self.constants[name]).numpy()
        return rows

    def error_bound(self, rows: Mapping[str, Rows]) -> dict[str, npt.NDArray[np.float64]]:
        """The largest errors of decoding `rows` (`Codec.error_bound`), [B, width] for each target."""
        return {
            name: np.broadcast_to(spec.codec.error_bound(rows[name], self.constants[name]), rows[name].shape)
            for name, spec in self.targets.items()
        }


def fitted_targets(recipe: CacheRecipe) -> tuple[TargetSpec, ...]:
    """The targets whose codecs must be fitted to a sample of rows before a block is stored."""
    return tuple(spec for spec in targets(recipe, 1) if spec.constants)


def fit_codecs(recipe: CacheRecipe, sample: Mapping[str, Rows]) -> dict[str, npt.NDArray[np.float32]]:
    """Fit codecs to a sample of rows; returns their constants, by array name.

    Args:
        sample: rows [S, width] of at least the `fitted_targets`, at `fit_rows` of view 0.

    Raises:
        FormatError: rows are all equal or not finite.
    """
    constants: dict[str, npt.NDArray[np.float32]] = {}
    for spec in fitted_targets(recipe):
        parts = spec.codec.fit(np.asarray(sample[spec.name], dtype=np.float32))
        constants |= {spec.name + suffix: part for suffix, part in parts.items()}
    return constants


def fit_rows(recipe: CacheRecipe, num_samples: int) -> npt.NDArray[np.int64]:
    """The samples of view 0 to which the codecs of a cache are fitted."""
    most = [spec.codec.fit_rows for spec in fitted_targets(recipe)]
    return sample_rows(num_samples, max(most, default=Codec.fit_rows))


def sample_rows(num_samples: int, limit: int = Codec.fit_rows) -> npt.NDArray[np.int64]:
    """Up to `limit` evenly spaced sample indices."""
    count = min(limit, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // max(count, 1)


def _head_of(recipe: CacheRecipe, target: str) -> str | None:
    """The constant that turns a target's features into logits: a linear head or class embeddings; None without one."""
    if recipe.store != "components":
        return None
    for number, teacher in enumerate(recipe.teachers):
        if target == array_name("teacher_features", number):
            return array_name("teacher_head_weight", number) if teacher.linear_head else None
    for number in range(len(recipe.clips)):
        if target == array_name("clip_features", number):
            return array_name("class_embeddings", number)
    return None
