"""The caches between a derived cache and the teachers, as its provenance records them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cache_tools.codecs.presets import TargetCodecs
from cache_tools.config import Frozen
from cache_tools.errors import NotFoundError
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import Store
from cache_tools.home import registry
from cache_tools.store.group import read_manifest

if TYPE_CHECKING:
    from cache_tools.reader import TeacherCache


class Source(Frozen):
    """The cache that a derived cache was made from: `provenance.source` of its manifest.

    Attributes:
        path: where it was at that time.
        source: the cache that it was made from itself.
    """

    name: str
    fingerprint: str
    path: str
    store: Store
    codecs: TargetCodecs
    source: Source | None = None

    @classmethod
    def of(cls, cache: TeacherCache) -> Source:
        """The record that a cache made from `cache` keeps of it."""
        earlier = lineage(cache.manifest)
        return cls(
            name=cache.manifest.name,
            fingerprint=cache.manifest.fingerprint,
            path=os.path.abspath(cache.path),
            store=cache.recipe.store,
            codecs=cache.recipe.codecs,
            source=earlier[0] if earlier else None,
        )

    def __str__(self) -> str:
        return f"{self.name}, {self.fingerprint[:12]}, {self.store} as {self.codecs} ({self.path})"


def lineage(manifest: Manifest) -> tuple[Source, ...]:
    """The caches between a derived cache and the teachers, the nearest first; none for a cache that was built.

    Raises:
        NotFoundError: a derived cache without a record of its source.
    """
    expected = manifest.recipe.derived_from
    if expected is None:
        return ()
    try:
        source: Source | None = Source.model_validate(manifest.provenance.get("source"))
    except ValidationError as error:
        raise _unknown_source(manifest, "something else") from error
    if source is None or source.fingerprint != expected:
        raise _unknown_source(manifest, "nothing" if source is None else source.fingerprint[:12])
    found = []
    while source is not None:
        found.append(source)
        source = source.source
    return tuple(found)


def open_source(source: Source) -> TeacherCache:
    """Open the source of a derived cache, at its recorded path or in the cache home.

    Raises:
        NotFoundError: in neither place.
    """
    from cache_tools.reader import TeacherCache

    for path in (Path(source.path), *(found.path for found in registry.list_caches() if found.problem is None)):
        if registry.is_cache(path) and read_manifest(path).fingerprint == source.fingerprint:
            return TeacherCache(path)
    raise NotFoundError(
        "the cache that this one was made from is missing",
        where=source.path,
        expected=f"{source.name}, fingerprint {source.fingerprint[:12]}, at this path or in {registry.cache_home()}",
        next_step="copy it into the cache home with `cache-tools pull`",
    )


def _unknown_source(manifest: Manifest, found: str) -> NotFoundError:
    return NotFoundError(
        "the cache does not record what it was made from",
        where=manifest.name,
        expected=f"a cache of fingerprint {str(manifest.recipe.derived_from)[:12]} in its provenance",
        found=found,
    )
