"""The place where the cache of a recipe is built: a folder, or an object store with a local folder as mirror."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cache_tools.home import registry
from cache_tools.places import LocalPlace, Place, local_path, open_place
from pipeline.recipe import BuildRecipe


class Destination(NamedTuple):
    """A folder and, for a cache in an object store, its URL. The folder is then the mirror of blocks built here."""

    path: Path
    url: str | None = None

    def __str__(self) -> str:
        return self.url or str(self.path)

    @property
    def place(self) -> Place:
        """The place where builders and readers find the cache.

        Raises:
            RecipeError: the scheme of the URL is unknown.
            NotFoundError: there is a URL, but obstore is not installed.
        """
        return open_place(self.url) if self.url else LocalPlace(self.path)


def destination(recipe: BuildRecipe, fingerprint: str) -> Destination:
    """The place that `recipe.out` names; by default one in the cache home."""
    if isinstance(recipe.out, Path):
        return Destination(local_path(recipe.out))
    path = registry.cache_path(recipe.name, fingerprint)
    if recipe.out is None:
        return Destination(path)
    url = recipe.out.rstrip("/")
    return Destination(path, url if names_a_cache(url) else f"{url}/{path.name}")


def names_a_cache(out: Path | str) -> bool:
    """Whether `out` is a folder or a URL that ends in `.zarr`. Other URLs hold several caches, named as in the home."""
    return isinstance(out, Path) or out.rstrip("/").endswith(registry.SUFFIX)
