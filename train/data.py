"""The data of a run: images, views and targets, opened and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.alignment import aligned
from cache_tools.codecs import TopK
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import Preprocessing
from cache_tools.home import registry
from cache_tools.images import open_images
from cache_tools.images.check import check_images, check_new_images
from cache_tools.images.classes import with_classes
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.views.recipe import ViewRecipe
from train.feed import CachedTargets, Feed, NoTargets, TargetSource, open_feed
from train.labelled import PartialLabels, labelled_rows, partial_labels
from train.losses.contrastive import Components
from train.recipe import LossRecipe, TrainRecipe

Opener = Callable[[DatasetRecipe, str | None], ImageSet]
"""Opens a split of a dataset, like `open_images`; None for the split that the recipe trains on."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Everything that a student is trained and evaluated on.

    Attributes:
        images, test: the training split and the test split, which may be None.
        dataset: the source of both.
        num_views: views to cycle through; None for a new one in every epoch.
        targets: the source of the targets.
        target_dim: width of the fused target features; None without targets.
        components: the networks whose own features the loss embeds; None if it uses the fused ones.
        cache: the cache that the targets come from; None for any other source.
        known: the labels, if only a fraction of them may be used; None for all labels of `images`.
    """

    images: ImageSet
    test: ImageSet | None
    dataset: DatasetRecipe
    views: ViewRecipe
    num_views: int | None
    targets: TargetSource
    target_dim: int | None = None
    components: Components | None = None
    cache: TeacherCache | None = None
    known: PartialLabels | None = None

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

    def identity(self) -> dict[str, str]:
        """Identifies the data of a run. A fingerprint covers images, views and targets, but not the number of views."""
        if self.cache is not None:
            return _identity(self.cache, self.num_views)
        return {"images": self.images.content_digest}

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the folders of the images, such as files that are left out."""
        return (*self.images.notes(), *(self.test.notes() if self.test is not None else ()))

    def labels_only(self) -> TrainingData:
        """The same labelled images and views without targets; images without a label are left out."""
        images = self.images if self.known is None else self.images.subset(np.flatnonzero(self.known.labelled))
        return replace(
            self, images=images, targets=NoTargets(), target_dim=None, components=None, cache=None, known=None
        )

    def feed(self, recipe: TrainRecipe, device: torch.device) -> Feed:
        """The batches of a run."""
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
        )


def open_data(recipe: TrainRecipe, device: torch.device, open_split: Opener = open_images) -> TrainingData:
    """Open and check the data of a recipe.

    Args:
        open_split: opens each split; a sweep passes a function that opens it once for all trials.

    Raises:
        NotFoundError, FormatError: no such cache, or a damaged one.
        IncompleteError: a half-built cache.
        DataError: images that are missing or cannot be read.
        MismatchError: images that are not those of the cache, or whose views differ from it.
        RecipeError: a loss that needs component features, with a cache of fused ones.
    """
    if recipe.loss.needs_targets:
        return _open_cached(recipe, device, open_split)
    return _open_labels_only(recipe, open_split)


def cache_identity(cache: TeacherCache, recipe: TrainRecipe) -> dict[str, str]:
    """`TrainingData.identity` of a recipe with targets from a cache, without opening the images."""
    return _identity(cache, _num_views(cache, recipe))


def _open_labels_only(recipe: TrainRecipe, open_split: Opener) -> TrainingData:
    assert recipe.dataset is not None, "a recipe without targets has a dataset"
    dataset = recipe.locate(recipe.dataset)
    images = open_split(dataset, None)
    test = _open_test(dataset, images, open_split)
    check_new_images(images, test)
    if recipe.label_fraction < 1.0:
        images = images.subset(labelled_rows(images.labels, recipe.label_fraction, recipe.label_seed))
    return TrainingData(
        images=images,
        test=test,
        dataset=dataset,
        views=recipe.views,
        num_views=recipe.num_views,
        targets=NoTargets(),
    )


def _open_cached(recipe: TrainRecipe, device: torch.device, open_split: Opener) -> TrainingData:
    assert recipe.cache is not None, "a recipe with targets has a cache"
    cache = TeacherCache.open(recipe.cache)
    cache.require_complete()
    registry.mark_used(cache.path)
    dataset = recipe.locate(cache.manifest.dataset)
    images = aligned(cache, open_split(dataset, None))
    cache.check_canaries(images)
    test = _open_test(dataset, images, open_split)
    check_images(test)  # the build of the cache decoded all training images
    loss, fusion = recipe.loss, recipe.fusion.resolve(cache)
    components = _components(cache, fusion, loss)
    return TrainingData(
        images=images,
        test=test,
        dataset=dataset,
        views=cache.recipe.views,
        num_views=_num_views(cache, recipe),
        targets=CachedTargets(
            cache,
            device,
            logits=loss.needs_logits,
            features=loss.needs_features and components is None,
            components=components is not None,
            fusion=fusion,
            sparse_temperature=_sparse_temperature(cache, loss),
        ),
        target_dim=cache.recipe.fusion.feature_dim,
        components=components,
        cache=cache,
        known=partial_labels(cache, fusion, recipe.label_fraction, recipe.label_seed),
    )


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
            found="fused_logits, fused_features",
            next_step="set loss.feature_source=fused, or build the cache with --store components",
        )
    return None


def _sparse_temperature(cache: TeacherCache, loss: LossRecipe) -> float | None:
    """The temperature of the cache's top-k targets; None for dense targets.

    Raises:
        RecipeError: a loss of another kind or temperature than the top-k targets allow.
    """
    spec = cache.targets.get("fused_logits")
    if spec is None or not isinstance(spec.codec, TopK) or not loss.needs_logits:
        return None
    stored = spec.codec.temperature
    if loss.kind == "kd" and loss.temperature == stored:
        return stored
    raise RecipeError(
        "top-k targets hold the largest classes and the mass of all others, at one temperature",
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


def _open_test(dataset: DatasetRecipe, images: ImageSet, open_split: Opener) -> ImageSet | None:
    if dataset.test_split is None:
        return None
    return with_classes(open_split(dataset, dataset.test_split), images.class_names)
