"""Which samples of a cache to look at: spread evenly, named, of one class, or those at the end of a ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from cache_tools.analysis.stats import TeacherStats, sources_of
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.reader import TeacherCache

COUNT = 12
MAX_PICTURES = 200  # samples times views of one sheet

Order = Literal["even", "samples", "class", "disagree", "confused", "suspicious"]
# The column of a view's table (`SampleColumns.table`) whose mean over the views ranks the samples, the highest first.
_COLUMNS: Mapping[str, str] = {"disagree": "teacher_clip_divergence", "confused": "entropy"}


@dataclass(frozen=True)
class Choice:
    """Which samples to show.

    Attributes:
        order: `even`: spread evenly over the classes. `samples`: the given ones. `class`: spread evenly over one class.
            `disagree`: where teacher and CLIP differ most, by the JS divergence of their distributions. `confused`:
            where the targets are least certain, by the entropy of the fusion. Both are means over the views.
            `suspicious`: as `TeacherStats.suspicious`.
        samples: of the order `samples`.
        class_name: of the order `class`.
        count: at most so many; the order `samples` shows all of its own.
    """

    order: Order = "even"
    samples: tuple[int, ...] = ()
    class_name: str | None = None
    count: int = COUNT

    @property
    def needs_stats(self) -> bool:
        """Whether all targets are read, for a ranking and for the gains of the classes."""
        return self.order not in ("samples", "class")

    @property
    def is_ranking(self) -> bool:
        return self.order in ("disagree", "confused", "suspicious")

    def check(self, cache: TeacherCache, num_views: int) -> None:
        """Check a choice before the work starts.

        Raises:
            NotFoundError: no such sample or class, or no teacher and CLIP that could disagree.
            RecipeError: more than MAX_PICTURES pictures.
        """
        for sample in self.samples:
            if not 0 <= sample < cache.num_samples:
                expected = f"0 to {cache.num_samples - 1}"
                raise NotFoundError("no such sample", where=cache.path, expected=expected, found=sample)
        if self.order == "class":
            _class_number(cache, self.class_name or "")
        if self.order == "disagree" and len(sources_of(cache.recipe)) == 1:
            raise _cannot_disagree(cache)
        count = min(len(self.samples) if self.order == "samples" else self.count, cache.num_samples)
        if count * num_views > MAX_PICTURES:
            raise RecipeError(
                "too many pictures for one sheet",
                where=f"{count} samples in {num_views} views",
                expected=f"at most {MAX_PICTURES}",
                found=count * num_views,
                next_step="show fewer samples or views (--count, --view)",
            )

    def pick(self, cache: TeacherCache, stats: TeacherStats | None, ranking: Ranking) -> npt.NDArray[np.int64]:
        """The samples, int64 [S], in the order in which they are shown.

        Args:
            stats, ranking: filled, if the choice needs them.
        """
        if self.order == "samples":
            return np.array(list(dict.fromkeys(self.samples)), np.int64)
        if self.order == "class":
            members = np.flatnonzero(cache.labels == _class_number(cache, self.class_name or ""))
            return members[even_places(self.count, len(members))]
        if self.order == "even":
            return even_samples(cache.labels, cache.num_classes, self.count)
        if self.order == "suspicious":
            assert stats is not None
            return stats.suspicious(self.count)["sample"].to_numpy().astype(np.int64)
        return ranking.highest(self.count)


class Ranking:
    """The mean over the views of the figure that samples are ranked by, added up view by view.

    Args:
        main: the source that students learn from.
    """

    def __init__(self, order: Order, main: str, num_samples: int) -> None:
        self._column, self._main, self._views = _COLUMNS.get(order), main, 0
        self._sum = np.zeros(num_samples)

    def add(self, view: int, frame: pl.DataFrame) -> None:
        """Add the table of a view: `analyse` calls this."""
        if self._column is not None:
            self._sum += frame.filter(pl.col("source") == self._main)[self._column].to_numpy()
            self._views += 1

    def highest(self, count: int) -> npt.NDArray[np.int64]:
        """The samples with the highest means, of equal ones those with the lowest numbers."""
        return np.argsort(-self._sum, kind="stable")[:count].astype(np.int64)

    def mean(self, sample: int) -> float | None:
        """None for an order that is no ranking."""
        return float(self._sum[sample] / self._views) if self._views else None


def even_places(count: int, of: int) -> npt.NDArray[np.int64]:
    """`count` different numbers below `of`, ascending and evenly spaced; all of them if there are no more."""
    taken = min(count, of)
    return np.arange(taken, dtype=np.int64) * of // max(taken, 1)


def even_samples(labels: npt.NDArray[np.int64], num_classes: int, count: int) -> npt.NDArray[np.int64]:
    """Samples spread evenly over the classes, by label and then by number.

    Where there are fewer of them than classes, evenly spaced classes have one each. Else the classes have the same
    number of samples, or one more, as long as they have enough; inside a class they are evenly spaced.
    """
    held = np.bincount(labels, minlength=num_classes)
    wanted, left = np.zeros_like(held), min(count, len(labels))
    while left:
        open_classes = np.flatnonzero(wanted < held)
        taken = open_classes[even_places(left, len(open_classes))]
        wanted[taken] += 1
        left -= len(taken)
    chosen = [
        np.flatnonzero(labels == label)[even_places(int(wanted[label]), int(held[label]))]
        for label in np.flatnonzero(wanted)
    ]
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def _class_number(cache: TeacherCache, name: str) -> int:
    if name not in cache.class_names:
        near = [each for each in cache.class_names if name.casefold() in each.casefold()] or cache.class_names
        expected = ", ".join(map(repr, near[:6])) + (", …" if len(near) > 6 else "")
        raise NotFoundError("no such class", where=cache.path, expected=f"one of {expected}", found=repr(name))
    number = cache.class_names.index(name)
    if not (cache.labels == number).any():
        raise NotFoundError("no sample has this class", where=cache.path, found=repr(name))
    return number


def _cannot_disagree(cache: TeacherCache) -> NotFoundError:
    group: Any = cache.recipe.only_group
    return NotFoundError(
        "this cache does not have teacher and CLIP separately, so they cannot disagree",
        where=cache.path,
        found="store: fused" if group is None else f"{'CLIP' if group == 'clip' else 'the teacher'} alone",
        next_step="build one with --set store=components" if group is None else "choose other samples: --confused",
    )
