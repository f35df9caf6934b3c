"""The data of a run: images, views and targets, opened and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.alignment import aligned, open_cached, rows_in_cache
from cache_tools.codecs import SparseCodec
from cache_tools.errors import MismatchError, NotFoundError, RecipeError
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import Preprocessing
from cache_tools.home import registry
from cache_tools.images import open_images, part_rows, whole_split
from cache_tools.images.check import check_images, check_new_images
from cache_tools.images.classes import shared_notes, training_notes, with_classes
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.system.ranks import ALONE, Rank
from cache_tools.views.recipe import ViewRecipe
from train.evaluate.canvas import chosen_preprocessing, evaluation_preprocessing, sizes_in_test
from train.feed import CachedTargets, Feed, NoTargets, TargetSource, open_feed
from train.feed.following import Follower, check_rolling, wait_for_cache
from train.labelled import PartialLabels, labelled_rows, partial_labels
from train.losses.contrastive import Components
from train.recipe import TrainRecipe
from train.recipe.evaluation import EvaluationRecipe
from train.recipe.loss import LossRecipe
from train.recipe.mixed import check_mixed_part
from train.recipe.pixels import PixelRecipe

Opener = Callable[[DatasetRecipe, str | None], ImageSet]
"""Opens a split of a dataset, like `open_images`; None for the split that the recipe trains on."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything that a student is trained and evaluated on.

    Attributes:
        images: the training split.
        tests: the test splits; the first one chooses the best epoch.
        evaluation: how test images are prepared.
        samples: int64 [N], the numbers of `images` in the cache; None if they are all samples of the cache in order.
        dataset: the source of both.
        num_views: views to cycle through; None for a new one in every epoch.
        targets: the source of the targets.
        follower: waits for views of a cache that is still being built; None if nothing does.
        target_dim: width of the fused target features; None without targets, or where they are logits alone.
        components: the networks whose own features the loss embeds; None if it uses the fused ones.
        cache: the cache that the targets come from; None for any other source.
        known: the labels, if only a fraction of them may be used; None for all labels of `images`.
    """

    images: ImageSet
    tests: tuple[ImageSet, ...]
    dataset: DatasetRecipe
    views: ViewRecipe
    num_views: int | None
    targets: TargetSource
    target_dim: int | None = None
    components: Components | None = None
    cache: TeacherCache | None = None
    known: PartialLabels | None = None
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    samples: npt.NDArray[np.int64] | None = None
    follower: Follower | None = None

    @property
    def test(self) -> ImageSet | None:
        """The first test split."""
        return self.tests[0] if self.tests else None

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [N], the labels used in training; see `PartialLabels`."""
        return self.images.labels if self.known is None else self.known.labels

    @property
    def real_labels(self) -> npt.NDArray[np.int64]:
        """int64, the labels of the samples that keep theirs."""
        return self.labels if self.known is None else self.labels[self.known.labelled]

    @property
    def preprocessing(self) -> Preprocessing:
        """The student's preprocessing of a view: no resize, the dataset's own mean and std."""
        mean, std = self.dataset.normalisation
        return Preprocessing(mean=mean, std=std)

    @property
    def view_size(self) -> tuple[int, int]:
        """(height, width) of the views, and of the student's input."""
        return self.views.output_size(self.images.image_size)

    @property
    def test_preprocessing(self) -> Preprocessing:
        """The student's preprocessing of test images: as the recipe says, or to the size of the views."""
        normalisation, canvas = self.dataset.normalisation, self.images.image_size
        if self.evaluation.is_default:
            return evaluation_preprocessing(self.view_size, canvas, normalisation)
        size, resize = sizes_in_test(self.evaluation, self.views, canvas)
        canvas = self.tests[0].image_size if self.tests else canvas
        return chosen_preprocessing(size, resize, canvas, normalisation, self.evaluation.interpolation)

    @property
    def test_size(self) -> tuple[int, int]:
        """(height, width) of the student's input in tests."""
        if self.evaluation.is_default:
            return self.view_size
        return sizes_in_test(self.evaluation, self.views, self.images.image_size)[0]

    def identity(self) -> dict[str, str]:
        """Identifies the data of a run. A fingerprint covers images, views and targets, but not the number of views."""
        if self.cache is not None:
            return _identity(self.cache, self.num_views)
        return {"images": self.images.content_digest}

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the images: left-out files, classes without training images, shared images."""
        tests = self.test.notes() if self.test is not None else ()
        return (*self.images.notes(), *tests, *training_notes(self.images), *shared_notes(self.images, *self.tests))

    def labels_only(self) -> TrainingData:
        """The same labelled images and views without targets; images without a label are left out."""
        images = self.images if self.known is None else self.images.subset(np.flatnonzero(self.known.labelled))
        return replace(
            self,
            images=images,
            targets=NoTargets(),
            target_dim=None,
            components=None,
            cache=None,
            known=None,
            samples=None,
            follower=None,
        )

    def feed(
        self, recipe: TrainRecipe, device: torch.device, pixels: PixelRecipe | None = None, rank: Rank = ALONE
    ) -> Feed:
        """The batches of a run.

        Args:
            pixels: where they are kept, if not as the recipe says.
            rank: of several that train together, and have a part of every batch each.
        """
        return open_feed(
            self.images,
            self.views,
            self.num_views,
            self.targets,
            batch_size=recipe.batch_size,
            epochs=recipe.epochs,
            seed=recipe.seed,
            device=device,
            known=self.known,
            samples=self.samples,
            pixels=recipe.pixels if pixels is None else pixels,
            window=recipe.shuffle_window,
            rank=rank,
        )


def open_data(recipe: TrainRecipe, device: torch.device, open_split: Opener = open_images) -> TrainingData:
    """Open and check the data of a recipe.

    Args:
        open_split: opens each split; a sweep passes a function that opens it once for all trials.

    Raises:
        NotFoundError, FormatError: no such cache, or a damaged one.
        IncompleteError: a half-built cache.
        DataError: images that are missing or cannot be read.
        MismatchError: images that are not those of the cache, or settings that differ from it.
        RecipeError: a loss that needs component features, with a cache of fused ones.
    """
    if recipe.loss.needs_targets:
        return _open_cached(recipe, device, open_split)
    return _open_labels_only(recipe, open_split)


def check_labels(recipe: TrainRecipe, images: ImageSet) -> None:
    """Raise RecipeError unless the loss is for images with as many labels as these have: one, or any number."""
    if recipe.loss.multi_label != images.multi_label:
        several, one = "any number of labels", "one label"
        raise RecipeError(
            f"the loss {recipe.loss_name} is for images with {several if recipe.loss.multi_label else one} each",
            where=f"{images.name}, split {images.split}",
            expected="the loss bce, or bce-labels without a cache" if images.multi_label else "a loss other than bce",
            found=f"images with {several if images.multi_label else one}",
            next_step="--loss bce"
            if images.multi_label
            else "give the labels as a table (dataset.labels), or --loss kd",
        )
    if images.multi_label and recipe.label_fraction < 1.0:
        raise RecipeError(
            "a fraction of the labels is drawn class by class, which needs one label per image",
            where=f"label_fraction: {recipe.label_fraction:g}",
            found="images with any number of labels",
        )


def cache_identity(cache: TeacherCache, recipe: TrainRecipe) -> dict[str, str]:
    """`TrainingData.identity` of a recipe with targets from a cache, without opening the images."""
    return _identity(cache, _num_views(cache, recipe))


def with_cached_images(recipe: TrainRecipe) -> TrainRecipe:
    """A run on labels alone that names a cache and no dataset, with the cache's images and views; others unchanged.

    Raises:
        NotFoundError, FormatError: no such cache, or a damaged one.
        MismatchError: settings that differ from the cache.
    """
    if recipe.loss.needs_targets or not recipe.takes_images_of_cache:
        return recipe
    assert recipe.cache is not None, "a recipe without a dataset has a cache"
    return recipe.with_images_of(TeacherCache.open(recipe.cache).manifest)


def _open_labels_only(recipe: TrainRecipe, open_split: Opener) -> TrainingData:
    dataset, views = recipe.own_dataset(), recipe.own_views().seen_by("student")
    views.require_pixels()
    images = open_split(dataset, None)
    check_labels(recipe, images)
    tests = _open_tests(dataset, images, open_split, recipe.evaluation, views)
    check_new_images(images, *tests)
    if recipe.label_fraction < 1.0:
        images = images.subset(labelled_rows(images.labels, recipe.label_fraction, recipe.label_seed))
    return TrainingData(
        images=images,
        tests=tests,
        dataset=dataset,
        views=views.over(len(images)),
        evaluation=recipe.evaluation,
        num_views=recipe.num_views,
        targets=NoTargets(),
    )


def _open_cached(recipe: TrainRecipe, device: torch.device, open_split: Opener) -> TrainingData:
    assert recipe.cache is not None, "a recipe with targets has a cache"
    if recipe.follow:
        cache = wait_for_cache(recipe.cache, partial(TeacherCache.open, recipe.cache))
    else:
        cache = TeacherCache.open(recipe.cache, stage_budget=recipe.stage_budget)
    try:
        return _open_from(cache, recipe, device, open_split)
    except BaseException:
        cache.close()
        raise


def _open_from(cache: TeacherCache, recipe: TrainRecipe, device: torch.device, open_split: Opener) -> TrainingData:
    """The data of a recipe with targets from an open cache."""
    if not recipe.follow:
        cache.require_complete()
    if cache.stage is not None and recipe.fusion.clip_view is not None:
        cache.stage.require_room(3)
    cache.check_arrays()
    if cache.stage is None:
        registry.mark_used(cache.path)
    views, num_views = cache.recipe.views, _num_views(cache, recipe)
    views.require_pixels(cache.path)
    recipe.check_mixed_views(views, num_views, cache.path)
    dataset = recipe.cached_dataset(cache.manifest)
    cached = _open_cached_split(cache, dataset, open_split)
    check_labels(recipe, cached)
    images, samples = _open_part(cache, cached, dataset, open_split)
    if samples is not None:
        check_mixed_part(views, num_views, cache.path, dataset.split)
    opener = _open_parts_of(cached, open_split)
    tests = _open_tests(dataset, images, opener, recipe.evaluation, views.seen_by("student"))
    check_images(*tests)  # the build of the cache decoded all training images
    follower = None
    if recipe.follow:
        check_rolling(cache, recipe.fusion, recipe.epochs, num_views)
        follower = Follower(cache, recipe.fusion)
        if recipe.fusion.clip_scale == "match":
            follower.wait(0)  # the scale is measured on this view
    loss, fusion = recipe.loss, recipe.fusion.resolve(cache)
    components = _components(cache, fusion, loss)
    return TrainingData(
        images=images,
        tests=tests,
        dataset=dataset,
        views=views.seen_by("student"),
        evaluation=recipe.evaluation,
        num_views=num_views,
        targets=CachedTargets(
            cache,
            device,
            logits=loss.needs_logits,
            features=loss.needs_features and components is None,
            components=components is not None,
            fusion=fusion,
            sparse_temperature=_sparse_temperature(cache, loss),
            follower=follower,
        ),
        target_dim=cache.recipe.fusion.feature_dim if cache.recipe.has_features else None,
        components=components,
        cache=cache,
        known=partial_labels(cache, fusion, images.labels, samples, recipe.label_fraction, recipe.label_seed),
        samples=samples,
        follower=follower,
    )


def _open_cached_split(cache: TeacherCache, dataset: DatasetRecipe, open_split: Opener) -> ImageSet:
    """All images of a cache in its order, checked to be those that the teachers saw."""
    images = aligned(cache, open_cached(cache, _at_places_of(dataset, cache.manifest.dataset), open_split))
    cache.check_canaries(images)
    return images


def _at_places_of(dataset: DatasetRecipe, stored: DatasetRecipe) -> DatasetRecipe:
    """The stored dataset, with its own splits, where `dataset` has its files."""
    own = {field: getattr(stored, field) for field in ("split", "test_split", "on_bad_image")}
    return dataset.model_copy(update=own)


def _open_part(
    cache: TeacherCache, cached: ImageSet, dataset: DatasetRecipe, open_split: Opener
) -> tuple[ImageSet, npt.NDArray[np.int64] | None]:
    """The images of a run in the order of the cache, and their numbers there; None for all of them."""
    stored = cache.manifest.dataset
    if dataset.split == stored.split:
        return cached, None
    source, whole = _at_places_of(dataset, stored), whole_split(stored.split)
    if whole_split(dataset.split) != whole:
        samples = rows_in_cache(cache, open_split(source, dataset.split))
    else:
        count = len(cached) if stored.split == whole else len(open_split(source, whole))
        samples = _rows_of_part(cache, stored.split, dataset.split, count)
    return cached.subset(samples, dataset.split), samples


def _open_parts_of(cached: ImageSet, open_split: Opener) -> Opener:
    """Opens parts of the cached split in the order of the cache, so that complements are complements, and others."""

    def open_one(dataset: DatasetRecipe, split: str | None) -> ImageSet:
        if split is None or split == cached.split or whole_split(split) != cached.split:
            return open_split(dataset, split)
        return cached.subset(part_rows(split, len(cached)), split)

    return open_one


def _rows_of_part(cache: TeacherCache, stored: str, wanted: str, count: int) -> npt.NDArray[np.int64]:
    """The numbers in the cache of the samples of a part, where the cache holds another part of the same split.

    Args:
        count: samples of the whole split.
    """
    held, chosen = part_rows(stored, count), part_rows(wanted, count)
    if len(missing := np.setdiff1d(chosen, held)):
        raise MismatchError(
            "the cache does not hold all samples of this part",
            where=f"{cache.path}, dataset.split={wanted}",
            expected=f"samples of {stored}",
            found=f"{len(missing):,} others of {len(chosen):,}, the first one number {missing[0]}",
            next_step="choose a part of what is cached, or build a cache of the whole split",
        )
    return np.searchsorted(held, chosen).astype(np.int64)


def _components(cache: TeacherCache, fusion: Fusion, loss: LossRecipe) -> Components | None:
    """The networks of the cache whose features the feature term embeds; None for the fused features."""
    if cache.recipe.store == "components":
        widths = [teacher.feature_dim for teacher in cache.recipe.teachers]
        widths += [clip.feature_dim for clip in cache.recipe.clips]
        weights = [fusion.feature_weight * share for share in fusion.teacher_weights]
        weights += [(1.0 - fusion.feature_weight) * share for share in fusion.clip_weights]
        return Components(tuple(widths), tuple(weights)) if loss.uses_components else None
    if loss.needs_components:
        raise RecipeError(
            "the loss needs the networks' own features, and this cache has only fused targets",
            where=cache.path,
            expected="a cache with components (loss.feature_source: components)",
            found=", ".join(cache.targets),
            next_step="set loss.feature_source=fused, or build the cache with --store components",
        )
    if loss.needs_features and not cache.recipe.has_features:
        raise RecipeError(
            "the loss needs features, and imported targets are logits alone",
            where=cache.path,
            expected="loss.feature=none",
            found=f"loss.feature={loss.feature}",
            next_step="train on the logits, such as --loss kd",
        )
    return None


def _sparse_temperature(cache: TeacherCache, loss: LossRecipe) -> float | None:
    """The temperature of the cache's sparse targets; None for dense targets.

    Raises:
        RecipeError: a loss of another kind or temperature than the sparse targets allow.
    """
    spec = cache.targets.get("fused_logits")
    if spec is None or not isinstance(spec.codec, SparseCodec) or not loss.needs_logits:
        return None
    stored = spec.codec.temperature
    if loss.kind == "kd" and loss.temperature == stored:
        return stored
    raise RecipeError(
        f"{spec.codec.codec} targets hold the probabilities of some classes, at one temperature",
        where=cache.path,
        expected=f"loss.kind=kd, loss.temperature={stored:g}",
        found=f"loss.kind={loss.kind}, loss.temperature={loss.temperature:g}",
        next_step=f"train with --set loss.kind=kd --set loss.temperature={stored:g}, or use a cache of dense targets",
    )


def _identity(cache: TeacherCache, num_views: int | None) -> dict[str, str]:
    return {"fingerprint": cache.manifest.fingerprint, "num_views": str(num_views)}


def _num_views(cache: TeacherCache, recipe: TrainRecipe) -> int:
    wanted = recipe.num_views or cache.num_views
    if wanted > cache.num_views:
        raise NotFoundError(
            "the cache has fewer views than the run asks for",
            where=cache.path,
            expected=f"{wanted} views",
            found=cache.num_views,
            next_step=f"build the others: the same build-cache command with --views {wanted}",
        )
    return wanted


def _open_tests(
    dataset: DatasetRecipe, images: ImageSet, open_split: Opener, evaluation: EvaluationRecipe, views: ViewRecipe
) -> tuple[ImageSet, ...]:
    tests = [with_classes(open_split(dataset, split), images.class_names) for split in dataset.test_splits]
    if not evaluation.is_default:
        _, resize = sizes_in_test(evaluation, views, images.image_size)
        tests = [test.at(resize, evaluation.interpolation) for test in tests]
    return tuple(tests)
