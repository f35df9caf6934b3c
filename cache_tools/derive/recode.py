"""Store the targets of a cache with other codecs, without a teacher pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.codecs import Codec, SparseCodec
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.derive.base import Convert, Derived, derive, derived_manifest, require_same_constants
from cache_tools.derive.block_reader import BlockReader, Rows, Stored
from cache_tools.format.arrays import constant_shapes, seed_arrays, targets
from cache_tools.format.recipe import CacheRecipe
from cache_tools.home import registry
from cache_tools.reader import TeacherCache
from cache_tools.store.encoding import Encoder, fit_codecs, fit_rows
from cache_tools.store.writer import CacheWriter


class Recoded(Derived):
    """The result of `recode`. `caution` warns if the new cache looks more precise than it is."""

    caution: str | None = None


def recode(
    cache: TeacherCache,
    codecs: TargetCodecs,
    name: str,
    path: Path | None = None,
    *,
    block_rows: int | None = None,
) -> Recoded:
    """Make a cache of the same targets with other codecs, or continue it, or add what its source has gained.

    Codecs with steps are fitted as a build fits them: to evenly spaced samples of view 0.

    Args:
        name: of a new cache.
        path: folder of the new cache; None for its place in the cache home.
        block_rows: of a new cache; None for the source's.

    Raises:
        IncompleteError: view 0 of the source is not complete.
        FormatError: numbers that a codec cannot represent, in the sample (then nothing is made) or in a block; or a
            damaged block in the source.
        MismatchError, StorageError: as `base.derive`.
    """
    source = BlockReader(cache)
    recipe = cache.recipe.model_copy(update={"codecs": codecs})
    manifest = derived_manifest(cache, recipe, name, block_rows=block_rows)
    path = path or registry.cache_path(name, manifest.fingerprint)
    cautions: list[str | None] = [None]

    def constants() -> Rows:
        sample = fit_sample(source, manifest.recipe)
        recoder = Recoder(source, manifest.recipe, recoded_constants(source, manifest.recipe, lambda: sample))
        recoder.stored(sample, where="a sample of view 0")
        cautions.append(recoder.caution(sample))
        return recoder.constants

    def convert(writer: CacheWriter) -> Convert:
        made = BlockReader(TeacherCache(writer.path)).constants
        shared = made.keys() - _new_constants(source, manifest.recipe)
        require_same_constants(source, made, shared, writer.path)
        recoder = Recoder(source, manifest.recipe, made)
        return lambda view, rows: recoder.stored(
            source.read(view, rows), where=f"view {view}, samples {rows.start}–{rows.stop - 1}"
        )

    derived = derive(source, path, manifest, constants, convert, title="recode")
    return Recoded(**derived.model_dump(), caution=cautions[-1])


class Recoder:
    """Converts the stored rows of a cache to other codecs.

    A target whose codec stays, or changes only its packing, is not rounded again: its arrays are copied.

    Attributes:
        recipe: the source's, with other codecs.
        constants: `recoded_constants` of the new cache.
    """

    def __init__(self, source: BlockReader, recipe: CacheRecipe, constants: Rows) -> None:
        self.recipe, self.constants, self._source = recipe, constants, source
        self._specs = {spec.name: spec for spec in targets(recipe, 1)}
        self._changed = changed_targets(source, recipe)
        self._encoder = Encoder(recipe, constants.__getitem__)

    def stored(self, source: Mapping[str, npt.NDArray[Any]], *, where: str = "") -> Stored:
        """Convert some rows: the new arrays by name, from those of the source.

        Raises:
            FormatError: numbers that a codec cannot represent.
        """
        rows = self._source.decode(source, self._changed)
        found: Stored = {}
        for name, spec in self._specs.items():
            if name in rows:
                found |= self._encoder.encode_target(name, rows[name], where=where)
            else:
                found |= {array.name: source[array.name] for array in spec.arrays}
        return found | {array.name: source[array.name] for array in seed_arrays(self.recipe, 1)}

    def caution(self, sample: Mapping[str, npt.NDArray[Any]]) -> str | None:
        """A warning if the new cache would look more precise than it is; else None.

        Args:
            sample: stored rows of the source.
        """
        finer = []
        for name, rows in self._source.decode(sample, self._changed).items():
            old, new = self._source.cache.targets[name].codec, self._specs[name].codec
            if isinstance(old, SparseCodec) or (not isinstance(new, SparseCodec) and self._is_finer(name, rows)):
                finer.append(f"{name} from {old.codec} to {new.codec}")
        if not finer:
            return None
        return (
            f"{' and '.join(finer)}: the new codec is finer than the stored one. What was lost stays lost; only a new "
            "build from the teachers restores it"
        )

    def _is_finer(self, name: str, rows: npt.NDArray[np.float32]) -> bool:
        """Whether the new codec's error is smaller than the error that these rows already have."""
        old, new = self._source.cache.targets[name], self._specs[name]
        old_constants = {key.removeprefix(name): self._source.constants[key] for key in old.constants}
        new_constants = {key.removeprefix(name): self.constants[key] for key in new.constants}
        old_error = float(old.codec.error_bound(rows, old_constants).mean())
        return float(new.codec.error_bound(rows, new_constants).mean()) < old_error


def changed_targets(source: BlockReader, recipe: CacheRecipe) -> list[str]:
    """The targets whose numbers change under the codecs of `recipe`."""
    old = source.cache.targets
    return [spec.name for spec in targets(recipe, 1) if _numbers(spec.codec) != _numbers(old[spec.name].codec)]


def fit_sample(source: BlockReader, recipe: CacheRecipe) -> Stored:
    """The stored rows that the codecs of `recipe` are fitted to."""
    return source.sample(0, fit_rows(recipe, source.cache.num_samples))


def recoded_constants(source: BlockReader, recipe: CacheRecipe, sample: Callable[[], Stored]) -> Rows:
    """The constants of a cache of `recipe`: the source's, and the fitted steps of new codecs.

    Args:
        sample: returns the rows of `fit_sample`; not called if no codec is fitted.

    Raises:
        FormatError: rows that are all equal.
    """
    new = _new_constants(source, recipe)
    fitted = fit_codecs(recipe, source.decode(sample())) if new else {}
    return {key: fitted[key] if key in new else source.constants[key] for key in constant_shapes(recipe)}


def _new_constants(source: BlockReader, recipe: CacheRecipe) -> set[str]:
    changed = changed_targets(source, recipe)
    return {key for spec in targets(recipe, 1) if spec.name in changed for key in spec.constants}


def _numbers(codec: Codec) -> dict[str, Any]:
    """The fields of a codec that determine its numbers, not their packing."""
    return codec.model_dump(exclude={"pack"})
