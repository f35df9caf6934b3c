"""What the recipe argument of a command may name: a built-in recipe, a recipe file of either kind, or a folder.

Everything here is plain data, before it becomes a recipe. Importable without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.config import builtin_names, is_recipe_file, read_recipe
from cache_tools.errors import NotFoundError
from cache_tools.images.own_folder import is_folder_argument, read_own_folder
from cache_tools.images.sources import has_image_files

RECIPE, IDENTITY = "recipe.yaml", "run.json"  # of a run folder, see `train.runs.folder`

# The keys that only recipes of `build-cache` have, and those that mean something else there.
_ONLY_BUILD_KEYS = frozenset(
    {
        *("teacher", "clip", "store", "codec", "block_rows", "preflight_samples"),
        *("views_at_once", "keep_views", "lease_minutes"),
    }
)
_OTHER_BUILD_KEYS = frozenset(
    {"fusion", "num_views", "precision", "batch_size", "compile", "max_minutes", "device", "out"}
)

# How a student is trained on a folder of photographs, where no recipe says otherwise.
_FOLDER_SETTINGS: dict[str, Any] = {
    "student": "timm:resnet18",
    "optimiser": {"learning_rate": 0.05, "nesterov": True},
    "schedule": {"warmup_epochs": 1},
    "epochs": 60,
}


class TrainSource(NamedTuple):
    """A recipe of `train-student` as plain data.

    Attributes:
        own: the dotted keys below `dataset` and `views` that the user chose. Those of built-in recipes are for runs on
            labels alone, and do not count with a cache.
        of_a_run: whether it is the stored recipe of a run.
    """

    data: dict[str, Any]
    own: frozenset[str] = frozenset()
    of_a_run: bool = False


def read_train_source(source: str, builtin: Traversable, settings: Iterable[tuple[str, Any]] = ()) -> TrainSource:
    """The recipe that an argument of `train-student` names.

    Args:
        settings: dotted key → value of the user's own settings.

    Raises:
        RecipeError: no such recipe, or a folder of another kind.
        DataError: a folder that is no folder of images.
    """
    if is_folder_argument(source, builtin_names(builtin)):
        folder = read_own_folder(Path(source), settings)
        images = {"name": folder.name, "cache": folder.name, "dataset": folder.dataset, "views": folder.views}
        return TrainSource({**images, **_FOLDER_SETTINGS}, frozenset({"dataset.data_dir"}))
    data = read_recipe(source, builtin)
    if not is_recipe_file(source):
        return TrainSource(data)
    if data.keys() & _ONLY_BUILD_KEYS:
        data = _from_build_recipe(data)
    path = Path(source)
    of_a_run = path.name == RECIPE and (path.parent / IDENTITY).is_file()
    parts = {part: data.get(part) for part in ("dataset", "views")}
    own = (f"{part}.{key}" for part, values in parts.items() if isinstance(values, dict) for key in values)
    return TrainSource(data, frozenset(own), of_a_run)


def _from_build_recipe(data: dict[str, Any]) -> dict[str, Any]:
    """The parts of a recipe of `build-cache` that training shares; its cache is known by its name or its place."""
    shared = {key: value for key, value in data.items() if key not in _ONLY_BUILD_KEYS | _OTHER_BUILD_KEYS}
    out = str(data.get("out") or "")
    of_folder = isinstance(data.get("dataset"), dict) and has_image_files(data["dataset"].get("name"))
    settings = _FOLDER_SETTINGS if of_folder else {}
    return {**settings, **shared, "cache": out if out.rstrip("/").endswith(".zarr") else data.get("name")}


def folder_note(source: str, builtin: Traversable) -> str | None:
    """What was found in a folder that is the argument of a command, for the screen; None for any other argument."""
    return read_own_folder(Path(source)).note if is_folder_argument(source, builtin_names(builtin)) else None


def require_cache_of_folder(source: str, builtin: Traversable, name: str | None) -> None:
    """Raise NotFoundError if the argument of a command is a folder and the cache home has no cache of its name."""
    if name is None or not is_folder_argument(source, builtin_names(builtin)):
        return
    from cache_tools.home import registry

    try:
        registry.find(name)
    except NotFoundError as error:
        if any(found.name == name for found in registry.list_caches()):
            raise NotFoundError(
                "there are several caches of this folder",
                where=source,
                found=error.found,
                next_step="choose one with --cache, by its fingerprint",
            ) from error
        raise NotFoundError(
            "there is no cache of this folder",
            where=source,
            expected=f"a cache named {name} in {registry.cache_home()}",
            found=error.found,
            next_step=f"build one with build-cache {source} --teacher …, name another with --cache, or train on labels "
            "alone with --loss ce",
        ) from error
