"""Read the run folder of a student: its recipe, its checkpoints and its test images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache_tools.config import Changes, parse_yaml, validate
from cache_tools.errors import CacheError, DataError, NotFoundError, RecipeError, WeightsError
from cache_tools.files import MAX_METADATA_BYTES
from cache_tools.format.manifest import Manifest
from cache_tools.images import open_images
from cache_tools.images.check import check_images
from cache_tools.images.classes import with_classes
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe, as_received
from cache_tools.images.sources import has_image_files
from cache_tools.system.arguments import expand_user
from cache_tools.views.recipe import ViewRecipe
from train import checkpoints
from train.checkpoints import StudentCard
from train.evaluate.canvas import ImagesInTest, network_tests, sizes_in_test
from train.recipe import TrainRecipe
from train.recipe.evaluation import EvaluationRecipe
from train.runs import folder
from train.weights.run_files import has_file, parse_json, read_file

CHECKPOINTS = {"last": checkpoints.LAST, "best": checkpoints.BEST, "ema": checkpoints.EMA}


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run as its folder describes it.

    Attributes:
        dataset: the source of the training and test images.
        manifest: of the cache that the run learned from; None for a run on labels alone.
        cache: the path of that cache, or the URL of a remote one whose local mirror is gone.
    """

    folder: Path
    recipe: TrainRecipe
    dataset: DatasetRecipe
    manifest: Manifest | None
    cache: Path | str | None

    def checkpoint(self, which: str) -> Path:
        """The file of the `last`, `best` or `ema` weights.

        Raises:
            RecipeError: no such kind of checkpoint.
            WeightsError: the run does not have it, or not yet.
        """
        if which not in CHECKPOINTS:
            raise RecipeError("no such checkpoint", where=which, expected=f"one of {', '.join(CHECKPOINTS)}")
        path = self.folder / CHECKPOINTS[which]
        if not has_file(path):
            found = ", ".join(self.checkpoints()) or "none"
            finish = "train it to the end with the same train-student command"
            next_step = "train with --set ema_decay=0.999 to have one" if which == "ema" else finish
            raise WeightsError(
                f"this run has no '{which}' checkpoint", where=self.folder, found=found, next_step=next_step
            )
        return path

    def checkpoints(self) -> list[str]:
        """The kinds of checkpoints that exist, of last, best and ema."""
        return [which for which, name in CHECKPOINTS.items() if has_file(self.folder / name)]

    def labels_only(self) -> Path | None:
        """The folder of the same run on labels alone; None if it was not trained."""
        path = self.folder / folder.LABELS_ONLY
        return path if has_file(path / checkpoints.LAST) else None

    def open_test(
        self,
        card: StudentCard,
        split: str | None = None,
        data_dir: Path | None = None,
        download: bool = False,
        *,
        for_teachers: bool = False,
    ) -> ImageSet:
        """Open the test images of the run.

        Args:
            split: another split than the run's own test split.
            data_dir: another folder of the images than the run's.
            download: fetch missing images; that the run did so does not count.
            for_teachers: on the canvas of the training images, whatever the run's `evaluation` is for the student.

        Raises:
            DataError: no test split, missing or damaged images, or a class that the student does not know.
        """
        wanted = split or next(iter(self.dataset.test_splits), None)
        if wanted is None:
            raise DataError("this run has no test split", where=self.folder, next_step="name one with --split")
        dataset = as_received(self.dataset, self.folder, data_dir=data_dir)
        images = open_images(dataset.located(data_dir, download), wanted)
        views = self._views()
        self._check_size(card, views, images.image_size)
        evaluation = self.recipe.evaluation
        if not (for_teachers or evaluation.is_default):
            images = images.at(sizes_in_test(evaluation, views, images.image_size)[1], evaluation.interpolation)
        check_images(images, skip_setting=None)
        return with_classes(images, card.class_names)

    def tests_of_teachers(self, card: StudentCard, images: ImageSet) -> tuple[ImagesInTest, ImagesInTest | None]:
        """What the teachers and CLIP are measured on: see `network_tests`.

        Args:
            images: test images for teachers.
        """
        assert self.manifest is not None, "a run with teachers has a manifest"
        return network_tests(images, self.manifest.recipe.views, EvaluationRecipe(), (card.mean, card.std))

    def _views(self) -> ViewRecipe:
        """The views as the student sees them."""
        views = self.recipe.own_views() if self.manifest is None else self.manifest.recipe.views
        return views.seen_by("student")

    def _check_size(self, card: StudentCard, views: ViewRecipe, canvas: tuple[int, int]) -> None:
        """Raise WeightsError if a student takes other images than the views of its run: it is of another run."""
        size = views.output_size(canvas)
        if tuple(size) != card.image_size:
            raise WeightsError(
                "the weights are of another run: they take images of another size",
                where=self.folder,
                expected=f"{size[0]} × {size[1]}",
                found=f"{card.image_size[0]} × {card.image_size[1]}",
            )


def open_run(path: Path | str) -> tuple[StoredRun, str | None]:
    """Open a run folder, or the folder of a checkpoint file.

    Returns:
        The run, and the kind of the checkpoint file; None for a folder.

    Raises:
        NotFoundError: no run at this path.
        FormatError, RecipeError: a recipe or manifest that is damaged or from a newer version.
    """
    path = expand_user(path)
    which = next((kind for kind, name in CHECKPOINTS.items() if name == path.name and path.is_file()), None)
    root = path.parent if which else path
    recipe = read_recipe_of(root)
    if recipe is None:
        if (root / "sweep.yaml").is_file():
            raise NotFoundError(
                "this folder is a sweep, which has a run for each trial",
                where=path,
                expected="the folder of one run",
                next_step=f"name one of {root / 'trials'}/…; report-students {root} lists them",
            )
        raise NotFoundError(
            "no run of train-student here",
            where=path,
            expected=f"a run folder, or {', '.join(CHECKPOINTS.values())} in one",
            found="nothing" if not path.exists() else f"no {folder.RECIPE} in {root}",
        )
    manifest, cache = _read_cache(root / folder.CACHE) if recipe.loss.needs_targets else (None, None)
    if manifest is not None:
        dataset = _cached_dataset(recipe, manifest)
    elif isinstance(recipe.dataset, DatasetRecipe) and isinstance(recipe.views, ViewRecipe):
        dataset = recipe.own_dataset()
    else:
        raise RecipeError(
            "damaged recipe", where=root / folder.RECIPE, expected="the dataset and views of a run on labels alone"
        )
    run = StoredRun(folder=root, recipe=recipe, dataset=dataset, manifest=manifest, cache=cache)
    return run, which


def read_recipe_of(run: Path) -> TrainRecipe | None:
    """The recipe of a run; None if its folder has none.

    Raises:
        RecipeError: it is damaged, or from a newer version.
    """
    file = run / folder.RECIPE
    text = recipe_text(run)
    return (
        None if text is None else validate(TrainRecipe, parse_yaml(text, "damaged recipe", where=file), where=str(file))
    )


def recipe_text(run: Path) -> str | None:
    """The YAML of a run's recipe; None if its folder has none. Raises RecipeError if it is no text."""
    data = read_file(run / folder.RECIPE)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError("damaged recipe", where=run / folder.RECIPE, found=error) from error


def read_manifest(run: Path) -> Manifest | None:
    """The run's copy of the manifest of its cache; None for a run on labels alone, and if the copy cannot be read."""
    try:
        return _read_cache(run / folder.CACHE)[0]
    except CacheError:
        return None


def data_name(run: Path, default: str) -> str:
    """What to call the images of a run: its cache's name, or the dataset's if it learned from labels alone.

    A recipe's name does not say what the images are: one recipe serves many caches.

    Args:
        default: the name if the folder does not tell.
    """
    if (manifest := read_manifest(run)) is not None:
        return manifest.data_name
    dataset = (folder.stored_identity(run) or {"recipe": {}})["recipe"].get("dataset")
    name = dataset.get("name") if dataset else None
    if not isinstance(name, str):
        return default
    if not has_image_files(name):
        return name
    try:  # the identity has no data_dir
        recipe = parse_yaml(recipe_text(run) or "", "damaged recipe", where=run)
        return DatasetRecipe.model_validate(recipe["dataset"]).title
    except (CacheError, ValueError, LookupError, TypeError):
        return default


def _cached_dataset(recipe: TrainRecipe, manifest: Manifest) -> DatasetRecipe:
    """The dataset of a run with a cache. Earlier versions stored a dataset with a name, which the cache replaced."""
    if isinstance(recipe.dataset, Changes) and "name" in recipe.dataset.values:
        recipe = recipe.model_copy(update={"dataset": None})
    return recipe.model_copy(update={"views": None}).cached_dataset(manifest)


def _read_cache(path: Path) -> tuple[Manifest, Path | str]:
    """The run's copy of the manifest, and the place of the cache, which may no longer exist."""
    data = read_file(path, MAX_METADATA_BYTES)
    if data is None:
        raise NotFoundError("this run does not record its cache", where=path)
    try:
        stored = parse_json(data)
        cache, url = Path(stored["path"]), stored.get("url")
        return Manifest.model_validate(stored["manifest"]), cache if url is None or _exists(cache) else str(url)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError("damaged record of the cache", where=path, found=str(error).splitlines()[0]) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False
