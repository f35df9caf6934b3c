"""Is the cache of a recipe complete already? Answered without loading a network, or even torch.

A fingerprint is made of what networks are once they are loaded. All of that follows from the recipe, the bytes of the
files that it names, and the code that reads them: a digest over these is in the manifest's provenance, and whoever
finds it there, with the same samples, has found the same recipe. Where it is not there the networks are loaded, and the
fingerprint decides.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_tools.errors import FormatError, NotFoundError, StorageError
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import FORMAT_VERSION
from cache_tools.home import registry
from cache_tools.images.image_set import ImageSet
from cache_tools.places import open_place
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import list_committed
from cache_tools.store.group import read_manifest
from pipeline.build.destination import Destination, destination, names_a_cache
from pipeline.networks.prompts import BUILTIN_SETS
from pipeline.networks.references import FOLDER_PREFIX, HUB_PREFIX, resolve_path
from pipeline.recipe import BuildRecipe, ClipSpec, TeacherSpec

INPUTS = "inputs"  # of the provenance
MAX_BYTES = 4 << 30  # beyond that, loading one file of a tree is faster than reading the tree
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "safetensors", "numpy")
_VALUES = {"views", "teacher", "clip", "fusion", "store", "codec", "precision"}


class Finished(NamedTuple):
    """A complete cache, and where it is."""

    where: Destination
    manifest: Manifest


def find_finished(recipe: BuildRecipe, images: ImageSet) -> Finished | None:
    """The complete cache of these inputs, if one is where the recipe would build it."""
    inputs = inputs_digest(recipe)
    if inputs is None:
        return None
    for found in _candidates(recipe):
        manifest = found.manifest
        if (
            manifest.provenance.get(INPUTS) == inputs
            and manifest.recipe.derived_from is None
            and manifest.recipe.dataset == images.identity()
            and manifest.num_views >= recipe.num_views
            and list_committed(found.where.place) >= set(np.ndindex(manifest.num_views, manifest.num_blocks))
        ):
            return found
    return None


def inputs_digest(recipe: BuildRecipe) -> str | None:
    """32 hex digits over all that networks and values come from, the images apart.

    None where it cannot be told from files alone: weights that a library or a hub looks after.
    """
    files = _files(recipe)
    if files is None or sum(path.stat().st_size for path in files) > MAX_BYTES:
        return None
    chosen = {
        "format_version": FORMAT_VERSION,
        "versions": {name: version(name) for name in LIBRARIES},
        **{key: value for key, value in recipe.model_dump(mode="json").items() if key in _VALUES},
    }
    digest = hashlib.blake2b(json.dumps(chosen, sort_keys=True).encode(), digest_size=16)
    for path in [*files, *_code()]:
        content = hashlib.blake2b(path.read_bytes()).digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


def _candidates(recipe: BuildRecipe) -> Iterator[Finished]:
    """Caches that may be the recipe's, as far as names tell. What is wrong with one, the build will say."""
    if recipe.out is not None and names_a_cache(recipe.out):
        with suppress(NotFoundError, FormatError):
            manifest = manifest_at(open_place(recipe.out))
            yield Finished(destination(recipe, manifest.fingerprint), manifest)
        return
    for fingerprint in _fingerprints(recipe.name):
        with suppress(NotFoundError, FormatError):
            where = destination(recipe, fingerprint)
            yield Finished(where, manifest_at(where.place))


def _fingerprints(name: str) -> Iterator[str]:
    """Of the caches of the home whose names begin so. Most are others', and one of these may be out of reach."""
    for path in sorted(registry.cache_home().glob(f"{name}-*{registry.SUFFIX}")):
        with suppress(NotFoundError, FormatError, StorageError):
            yield read_manifest(path).fingerprint


def _files(recipe: BuildRecipe) -> list[Path] | None:
    """Every file that teachers, CLIPs and prompts are read from, in a fixed order; None if not all are known."""
    found: list[Path] = []
    for path in [*map(_teacher_path, recipe.teachers), *map(_clip_path, recipe.clips)]:
        if path is None or not path.exists():
            return None
        found += [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    named = [clip.templates for clip in recipe.clips if isinstance(clip.templates, str)]
    found += [Path(templates) for templates in named if templates not in BUILTIN_SETS]
    return found if all(path.is_file() for path in found) else None


def _teacher_path(spec: TeacherSpec) -> Path:
    return resolve_path(spec.name if spec.weights is None else spec.weights)


def _clip_path(spec: ClipSpec) -> Path | None:
    if spec.name.startswith(FOLDER_PREFIX):
        return resolve_path(spec.name.removeprefix(FOLDER_PREFIX))
    return None if spec.name.startswith(HUB_PREFIX) or spec.weights is None else resolve_path(spec.weights)


def _code() -> list[Path]:
    """The sources that turn files into networks: another version may read them in another way."""
    root = Path(__file__).parents[2]
    return sorted(path for package in ("cache_tools", "pipeline", "train") for path in root.glob(f"{package}/**/*.py"))
