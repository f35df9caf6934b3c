"""Cached targets in any training loop: map-style datasets of torch with views, labels and what the teachers said.

    from teacher_cache import CachedDataset

    train = CachedDataset("digits", features=True)
    for batch in train.loader(batch_size=64):  # each pass is the next epoch, with the next view
        loss = losses.kd(model(batch["pixel_values"]), batch["teacher_logits"], temperature=4.0)

Every batch is made as a whole: there is no Python code per sample where a loader asks for batches (`__getitems__`).
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from teacher_cache.packages import claim

claim(
    "train"
)  # a pickled dataset is loaded here, in a worker that may run beside a train.py or cache_tools.py of its user

from cache_tools.alignment import aligned, open_cached, rows_in_cache  # noqa: E402
from cache_tools.errors import RecipeError  # noqa: E402
from cache_tools.format.manifest import Fusion  # noqa: E402
from cache_tools.format.recipe import Preprocessing  # noqa: E402
from cache_tools.images import open_images  # noqa: E402
from cache_tools.images.classes import with_classes  # noqa: E402
from cache_tools.images.image_set import ImageSet  # noqa: E402
from cache_tools.preprocess import prepare, resize_and_crop  # noqa: E402
from cache_tools.reader import TeacherCache  # noqa: E402
from cache_tools.system.memory import free_memory  # noqa: E402
from cache_tools.targets import ViewTargets  # noqa: E402
from teacher_cache.batches import EpochBatches, whole_number  # noqa: E402
from teacher_cache.transforms import Transform, refuse_geometry  # noqa: E402
from train.evaluate.canvas import evaluation_preprocessing  # noqa: E402
from train.recipe.mixed import check_mixed_part  # noqa: E402

Batch = dict[str, torch.Tensor]

# Argument → its types, and what people are told.
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "cache": ((TeacherCache, str, Path), "an open TeacherCache, or a path, URL, name or fingerprint"),
    "images": ((ImageSet,), "what open_images returns, or None to open the images of the cache"),
    "data_dir": ((str, Path), "a path, or None"),
    "transform": ((), "a function of uint8 tensors [B, 3, H, W], or None"),
    "fusion": ((Fusion,), "a Fusion, or None for that of the cache"),
}
MEMORY_SHARE = 0.3
"""Of the free memory, for the pixels of a whole view."""
_PIECE = 4096  # samples of a view made at once


class ImageDataset(Dataset[Batch]):
    """Images with their labels, for the loops and loaders of torch.

    An item is a dict of tensors, `batch` gives the same for many samples at once:

    - `pixel_values`: float32 [3, H, W], or what `transform` makes of it.
    - `labels`: int64 []; for images with any number of labels float32 [C] of 0 and 1.
    - `index`: int64 [], the number of the sample.
    """

    def __init__(self, images: ImageSet, preprocessing: Preprocessing, transform: Transform | None) -> None:
        self.images, self.preprocessing, self.transform = images, preprocessing, transform
        labels = torch.from_numpy(np.ascontiguousarray(images.labels))
        self._labels = labels.float() if images.multi_label else labels.long()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> Batch:
        row = operator.index(sample)
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} of {len(self)}")
        return {name: rows[0] for name, rows in self.batch([row % len(self)]).items()}

    def __getitems__(self, samples: Sequence[int]) -> Rows:
        """What the fetcher of `DataLoader` calls with the numbers of a whole batch."""
        return Rows(self.batch(samples))

    def batch(self, samples: Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor) -> Batch:
        """The items of samples, in this order, stacked: `pixel_values` [B, 3, H, W], `labels` [B], `index` [B].

        Raises:
            DataError: an image cannot be decoded, or it changed since it was opened.
        """
        rows = np.asarray(samples)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"samples are chosen by their numbers, not by {rows.dtype}")
        rows = rows.astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"samples {rows.min()} to {rows.max()} of {len(self)}")
        return self._batch(rows)

    @staticmethod
    def collate_fn(rows: Sequence[Batch]) -> Batch:
        """For a `DataLoader`: takes a batch of `__getitems__` as it is, and stacks single items like torch does."""
        if isinstance(rows, Rows):
            return rows.batch
        stacked: Batch = default_collate(list(rows))
        return stacked

    @abstractmethod
    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch: ...

    def _input(self, pixels_NCHW_u8: torch.Tensor) -> torch.Tensor:
        """What the student is given."""
        if self.transform is None:
            return prepare(pixels_NCHW_u8, self.preprocessing)
        return self.transform(resize_and_crop(pixels_NCHW_u8, self.preprocessing))


class TestDataset(ImageDataset):
    """A test split, prepared as `train-student` prepares it: at the size of the views, normalised. It has no views."""

    __test__ = False  # its name is not that of a test of pytest

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        pixels = torch.from_numpy(np.ascontiguousarray(self.images.load(rows)))
        index = torch.from_numpy(rows)
        return {"pixel_values": self._input(pixels), "labels": self._labels[index], "index": index}


class CachedDataset(ImageDataset):
    """The views of a cache with their targets: the pixels that the teachers saw, and what they said about them.

    Epoch e shows view e modulo the number of views. In addition to the keys of `ImageDataset` an item has

    - `teacher_logits`: float32 [C], fused; rows are mean-centred unless images may have several labels.
    - `teacher_features`: float32 [D], fused; with `features=True`.
    - `partner_labels`, `label_share`: of views that mix images (MixUp, CutMix): the label of the other image, and the
      share of the own label, float32 []. The loss on labels is share · CE(labels) + (1 − share) · CE(partner_labels).

    A dataset can be pickled; a worker opens the cache again and reads the targets of the view for itself. `set_epoch`
    reaches workers that are already running. Where all pixels are in memory and nothing else needs it, the pixels of
    the whole view are made once an epoch, and a batch is an index into them.

    Args:
        cache: an open cache, or its path, URL, name or fingerprint.
        images: those that the cache was built from, or some of them, in any order; None to open the split of the cache.
        data_dir: where the files of that split are, if not where they were.
        views: numbers of the views to cycle through; None for all.
        epoch: the first one.
        features: also give fused features.
        transform: makes the network's input of a batch of views, uint8 [B, 3, H, W] → [B, …, H, W]; None scales to
            [0, 1] and normalises as `train-student` does. It may change colours, but not move pixels: what the
            teachers said is about this crop. It must be picklable where workers are spawned.
        fusion: how to fuse a component cache, by default as it was built (see `TeacherCache.load_view`).

    Raises:
        NotFoundError, FormatError, IncompleteError: no such cache or view, a damaged one, or one not completely built.
        DataError: images that are missing or cannot be read.
        MismatchError: other images than those of the cache, or pixels that are not those that the teachers saw.
        RecipeError: a transform that moves, cuts or resizes pixels, or that does not take uint8 tensors.
    """

    def __init__(
        self,
        cache: TeacherCache | str | Path,
        images: ImageSet | None = None,
        *,
        data_dir: str | Path | None = None,
        views: Sequence[int] | None = None,
        epoch: int = 0,
        features: bool = False,
        transform: Transform | None = None,
        fusion: Fusion | None = None,
    ) -> None:
        _check_types(cache=cache, images=images, data_dir=data_dir, transform=transform, fusion=fusion)
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache.open(cache)
        self.features, self._fusion = features, fusion
        self.views = tuple(range(self.cache.num_views)) if views is None else _view_numbers(views)
        self.cache.recipe.views.require_pixels(self.cache.path)
        if features and not self.cache.recipe.has_features:
            raise RecipeError(
                "imported targets are logits alone", where=self.cache.path, expected="CachedDataset(features=False)"
            )
        if not self.views:
            raise RecipeError(
                "no view is chosen", where="CachedDataset(views=…)", expected="at least one", found="none"
            )
        for view in dict.fromkeys(self.views):
            self.cache.require_view(view, fusion)
        self.cache.check_arrays()
        self._source = self._recipe_at(data_dir)
        opened = open_cached(self.cache, self._source) if images is None else images
        self._samples: npt.NDArray[np.int64] | None = None
        if len(opened) == self.cache.num_samples:
            opened = aligned(self.cache, opened)
            self.cache.check_canaries(opened)
        else:
            self._samples = rows_in_cache(self.cache, opened)
            mixed = [view for view in self.views if self.cache.recipe.views.mixes(view)]
            check_mixed_part(self.cache.recipe.views, max(mixed, default=-1) + 1, self.cache.path, opened.split)
        self._pixels_of = self.cache.recipe.views.seen_by("student")
        mean, std = self._source.normalisation
        super().__init__(opened, Preprocessing(mean=mean, std=std), transform)
        if transform is not None:
            refuse_geometry(transform, self.image_size)
        self._epoch = torch.tensor(0).share_memory_()  # workers that are running see `set_epoch`
        self.set_epoch(epoch)
        self._held: dict[str, tuple[int, Any]] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the views, as the student sees them."""
        return self._pixels_of.output_size(self.images.image_size)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @property
    def view(self) -> int:
        """The view that the current epoch shows."""
        return self.views[self.epoch % len(self.views)]

    def set_epoch(self, epoch: int) -> None:
        """Show the view of another epoch from now on, as `DistributedSampler.set_epoch` does for the order."""
        number = whole_number(epoch, "CachedDataset(epoch=…)")
        if not 0 <= number < 1 << 62:
            raise RecipeError("no such epoch", where="CachedDataset(epoch=…)", expected="0 or more", found=number)
        self._epoch.fill_(number)
        self._is_announced = True

    def start_epoch(self) -> int:
        """Called when a pass begins: go to the next epoch, unless one was set since the last pass began."""
        if not self._is_announced:
            self.set_epoch(self.epoch + 1)
        self._is_announced = False
        return self.epoch

    def loader(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> DataLoader[Batch]:
        """A `DataLoader` with the batches of `train-student`: the same samples in the same order for the same seed.

        Each pass over it is an epoch. The first one is the current epoch and every other the next, unless `set_epoch`
        was called in between (on the dataset, or on `loader.batch_sampler`, as Lightning and Accelerate do).

        Args:
            batch_size: over all ranks together.
            rank, world_size: each rank gets its part of every batch; a last batch with fewer samples than ranks is
                left out.
            **options: of `DataLoader`, such as `num_workers` (for images that are decoded), `pin_memory`,
                `persistent_workers`.

        Raises:
            RecipeError: a batch size or rank that cannot be.
        """
        batches = EpochBatches(self, batch_size, seed=seed, rank=rank, world_size=world_size)
        return DataLoader(self, batch_sampler=batches, collate_fn=self.collate_fn, **options)

    def test(self, split: str | None = None, *, transform: Transform | None = None) -> TestDataset:
        """A test split of the same source, prepared for a student that is trained on these views.

        Args:
            split: None for the first test split of the recipe.
            transform: as for training; None normalises.

        Raises:
            DataError: no such split, or classes that training does not know.
        """
        chosen = split or next(iter(self._source.test_splits), None)
        if chosen is None:
            raise RecipeError(
                "the recipe of the cache names no test split", where=self.cache.path, next_step="name one"
            )
        images = with_classes(open_images(self._source, chosen), self.class_names)
        normalisation = self._source.normalisation
        preprocessing = evaluation_preprocessing(self.image_size, images.image_size, normalisation)
        return TestDataset(images, preprocessing, transform)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": {}}  # a worker reads what it needs

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        view, index = self.view, torch.from_numpy(rows)
        numbers = rows if self._samples is None else self._samples[rows]
        samples = torch.from_numpy(numbers)
        targets: ViewTargets = self._kept("targets", view, self._load_targets)
        batch = {
            "pixel_values": self._input(self._pixels(view, rows, numbers)),
            "labels": self._labels[index],
            "index": samples,
            "teacher_logits": targets.logits(samples),
        }
        if self.features:
            batch["teacher_features"] = targets.features(samples)
        mixing = self._pixels_of.mixing(numbers, view, self.images.image_size)
        if mixing is not None:
            batch["partner_labels"] = self._labels[torch.from_numpy(mixing.partner)]
            batch["label_share"] = torch.from_numpy(mixing.share).float()
        return batch

    def _pixels(self, view: int, rows: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """The pixels of a view, uint8 [B, 3, H, W]."""
        if self._keeps_pixels:
            whole: torch.Tensor = self._kept("pixels", view, self._whole_view)
            return whole[torch.from_numpy(rows)]
        return self._pixels_of.finish(self._pixels_of.load(self.images, rows, numbers, view), numbers, view)

    @property
    def _keeps_pixels(self) -> bool:
        """Whether the pixels of a whole view are made at once; not in workers, which would each hold them."""
        if "pixels" in self._held:
            return True
        if not self.images.resident or get_worker_info() is not None:
            return False
        height, width = self.image_size
        return 3 * len(self) * height * width <= MEMORY_SHARE * free_memory(torch.device("cpu"))

    def _whole_view(self, view: int) -> torch.Tensor:
        pixels = torch.empty((len(self), 3, *self.image_size), dtype=torch.uint8)
        for start in range(0, len(self), _PIECE):
            rows = np.arange(start, min(start + _PIECE, len(self)))
            numbers = rows if self._samples is None else self._samples[rows]
            loaded = self._pixels_of.load(self.images, rows, numbers, view)
            pixels[start : start + len(rows)] = self._pixels_of.finish(loaded, numbers, view)
        return pixels

    def _load_targets(self, view: int) -> ViewTargets:
        return self.cache.load_view(view, features=self.features, fusion=self._fusion)

    def _kept(self, name: str, view: int, make: Callable[[int], Any]) -> Any:
        """What was made for this view; that of another view is given up first."""
        kept = self._held.get(name)
        if kept is None or kept[0] != view:
            self._held.pop(name, None)
            self._held[name] = kept = (view, make(view))
        return kept[1]

    def _recipe_at(self, data_dir: str | Path | None) -> Any:
        stored = self.cache.manifest.dataset
        return stored if data_dir is None else stored.model_copy(update={"data_dir": Path(data_dir)})


class Rows(Sequence[Batch]):
    """A batch that is also a sequence of items, for collate functions that want these."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["index"])

    @overload
    def __getitem__(self, row: int) -> Batch: ...
    @overload
    def __getitem__(self, row: slice) -> Self: ...
    def __getitem__(self, row: int | slice) -> Batch | Self:
        if isinstance(row, slice):
            return type(self)({name: rows[row] for name, rows in self.batch.items()})
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return {name: rows[row] for name, rows in self.batch.items()}


def _view_numbers(views: object) -> tuple[int, ...]:
    where = "CachedDataset(views=…)"
    if isinstance(views, str) or not isinstance(views, Iterable):
        raise RecipeError(
            "views are chosen by their numbers",
            where=where,
            expected="a list of numbers, such as [0, 1, 2], or None for all views",
            found=repr(views),
        )
    return tuple(whole_number(view, where) for view in views)


def _check_types(**arguments: object) -> None:
    """Raise RecipeError for an argument of another type, before the work starts."""
    for name, value in arguments.items():
        kinds, expected = _TYPES[name]
        is_right = callable(value) if name == "transform" else isinstance(value, kinds)
        if (value is not None and not is_right) or (value is None and name == "cache"):
            found = f"{type(value).__name__}: {value!r}"
            raise RecipeError(
                "an argument of another type", where=f"CachedDataset({name}=…)", expected=expected, found=found
            )
