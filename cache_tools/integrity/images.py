"""Check that images are still those that a cache's teachers saw: the first checks of training, as a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_tools.alignment import aligned, check_canaries, open_cached
from cache_tools.config import Frozen
from cache_tools.errors import MismatchError
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import as_received

if TYPE_CHECKING:
    from cache_tools.reader import TeacherCache


class ImagesCheck(Frozen):
    """Contents, labels and classes compared with the dataset digest, and pixels of a few views with the canaries.

    Attributes:
        same_order: the samples are in the order of the cache; if not, they were matched by their contents.
        canaries: number of views whose pixels were compared.
        problem: the first difference.
    """

    dataset: str
    samples: int
    same_order: bool
    canaries: int
    problem: str | None = None

    @property
    def sound(self) -> bool:
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """All fields, and whether the images are sound."""
        return self.model_dump(mode="json") | {"sound": self.sound}

    def __str__(self) -> str:
        if self.problem is not None:
            return f"images: {self.problem}"
        order = "in the order of the cache" if self.same_order else "in another order, matched by their contents"
        return (
            f"images: {self.dataset}, {self.samples:,} samples {order}; {self.canaries} pairs of sample and view have "
            "the pixels that the teachers saw"
        )


def check_images(cache: TeacherCache, data_dir: Path | None = None) -> tuple[ImagesCheck, ImageSet | None]:
    """Open the images of a cache and compare them with what its manifest says.

    Args:
        data_dir: where they are, if they were moved since the build.

    Returns:
        the report, and the images in the order of the cache; None if they are not those of the cache.

    Raises:
        DataError: no images there, or some that cannot be decoded.
    """
    dataset = as_received(cache.manifest.dataset, cache.path, data_dir=data_dir)
    found = open_cached(cache, dataset.located(data_dir))
    identity = cache.recipe.dataset
    report = ImagesCheck(
        dataset=f"{identity.name}/{identity.split}",
        samples=len(found),
        same_order=found.content_digest == identity.content_digest,
        canaries=len(cache.manifest.canaries),
    )
    try:
        images = aligned(cache, found)
        check_canaries(cache, images)
    except MismatchError as error:
        return report.model_copy(update={"problem": str(error)}), None
    return report, images
