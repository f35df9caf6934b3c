"""Find out whether the cache of a recipe is complete already, without loading a network or importing torch.

The fingerprint of a cache can only be computed from loaded networks. But everything in it follows from the recipe, the
files that the recipe names, and the code and libraries that read them. `inputs_digest` covers these, and a build stores
it in the manifest's provenance. A complete cache with the same digest and the same samples is the cache of the recipe.
Otherwise the networks are loaded, and the fingerprint decides.

Rule: a change of code that changes what is stored or how a network is identified raises the version constant beside
that code (`CODE_VERSIONS`). Changes of docstrings, messages or speed do not.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache_tools.codecs import CODECS_VERSION
from cache_tools.errors import FormatError, NotFoundError, StorageError
from cache_tools.files import SafeFolder
from cache_tools.format.manifest import Manifest
from cache_tools.format.recipe import FORMAT_VERSION, FUSION_VERSION, PREPROCESSING_VERSION
from cache_tools.home import registry
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import IMAGES_VERSION
from cache_tools.places import open_place
from cache_tools.places.metadata import manifest_at
from cache_tools.places.transfer import list_committed
from cache_tools.store.group import read_manifest
from pipeline.build.destination import Destination, destination, names_a_cache
from pipeline.networks import NETWORKS_VERSION
from pipeline.networks.prompts import BUILTIN_SETS
from pipeline.networks.references import FOLDER_PREFIX, HUB_PREFIX, class_files, resolve_path
from pipeline.recipe import BuildRecipe, ClipSpec, TeacherSpec
from train.own import is_own
from train.zoo import ZOO_VERSION

INPUTS = "inputs"  # the key in the provenance
MAX_BYTES = 4 << 30  # hashing larger files takes longer than loading the networks
CODE_VERSIONS = {  # the views have theirs in their recipe
    "format": FORMAT_VERSION,
    "images": IMAGES_VERSION,
    "preprocessing": PREPROCESSING_VERSION,
    "networks": NETWORKS_VERSION,
    "zoo": ZOO_VERSION,
    "fusion": FUSION_VERSION,
    "codecs": CODECS_VERSION,
}
LIBRARIES = ("torch", "torchvision", "open_clip_torch", "timm", "safetensors", "numpy", "pillow")
_VALUE_FIELDS = {"views", "teacher", "clip", "fusion", "store", "codec", "precision"}


class Finished(NamedTuple):
    """A complete cache, and where it is."""

    where: Destination
    manifest: Manifest


def find_finished(recipe: BuildRecipe, images: ImageSet) -> Finished | None:
    """The complete cache of this recipe, if it is where the recipe would build it."""
    inputs = inputs_digest(recipe)
    if inputs is None:
        return None
    for candidate in _candidates(recipe):
        manifest = candidate.manifest
        if (
            manifest.provenance.get(INPUTS) == inputs
            and manifest.recipe.derived_from is None
            and manifest.recipe.dataset == images.identity()
            and manifest.num_views >= recipe.num_views
            and list_committed(candidate.where.place) >= _blocks_to_have(manifest)
        ):
            return candidate
    return None


def _blocks_to_have(manifest: Manifest) -> set[tuple[int, ...]]:
    """All blocks but those of dropped views."""
    blocks = np.ndindex(manifest.num_views, manifest.num_blocks)
    return {block for block in blocks if block[0] >= manifest.num_dropped}


def inputs_digest(recipe: BuildRecipe) -> str | None:
    """32 hex digits over everything that determines networks and values, except the images.

    None where files do not determine it: weights that a library or a hub manages.
    """
    files = _files(recipe)
    if files is None or sum(path.stat().st_size for path in files) > MAX_BYTES:
        return None
    inputs = {
        "code": CODE_VERSIONS,
        "libraries": _versions(),
        "recipe": recipe.model_dump(mode="json", include=_VALUE_FIELDS),
    }
    digest = hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16)
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.blake2b(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache  # each looks for the metadata of a package in every folder of sys.path
def _versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def _candidates(recipe: BuildRecipe) -> Iterator[Finished]:
    """The cache that `out` names, else those in its folder named `NAME-…`. The build reports unreadable ones."""
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
    """Fingerprints of the caches in the cache home whose names begin with `name`, unreadable ones left out."""
    for path in sorted(registry.cache_home().glob(f"{name}-*{registry.SUFFIX}")):
        with suppress(NotFoundError, FormatError, StorageError):
            yield read_manifest(path).fingerprint


def _files(recipe: BuildRecipe) -> list[Path] | None:
    """Every file that teachers, CLIPs and prompts are read from, in a fixed order; None if any of them is unknown."""
    found: list[Path] = []
    for path in [*map(_teacher_path, recipe.teachers), *map(_clip_path, recipe.clips)]:
        if path is None or not path.exists():
            return None
        if path.is_file():
            found += [path, *class_files(path)]
            continue
        entries = list(SafeFolder(path).walk())
        if not all(entry.is_file for entry in entries):
            return None  # links lead to files that this folder does not determine
        found += sorted(path / entry.name for entry in entries)
    named = [clip.templates for clip in recipe.clips if isinstance(clip.templates, str)]
    found += [Path(templates) for templates in named if templates not in BUILTIN_SETS]
    return found if all(path.is_file() for path in found) else None


def _teacher_path(spec: TeacherSpec) -> Path | None:
    if is_own(spec.name):
        return None  # its code determines the values too, and imports what it likes
    return resolve_path((spec.name if spec.weights is None else spec.weights).removeprefix(FOLDER_PREFIX))


def _clip_path(spec: ClipSpec) -> Path | None:
    if spec.name.startswith(FOLDER_PREFIX):
        folder = resolve_path(spec.name.removeprefix(FOLDER_PREFIX))
        return None if _reads_from_hub(folder / "open_clip_config.json") else folder
    return None if spec.name.startswith(HUB_PREFIX) or spec.weights is None else resolve_path(spec.weights)


def _reads_from_hub(config: Path) -> bool:
    """Whether open_clip takes the tokenizer or the text tower from the hub: keys such as `hf_tokenizer_name`."""
    return config.is_file() and b'"hf_' in config.read_bytes()
