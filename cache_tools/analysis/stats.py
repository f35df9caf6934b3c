"""Statistics of a cache's predictions: accuracy, calibration, consistency, disagreement, stability.

No model runs. Views are read one at a time; docs/analysis.md explains each figure.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from cache_tools.analysis import tables
from cache_tools.analysis.figures import NonTargetConsistency, OtherClasses, Stability, js_divergence, row_chunks
from cache_tools.analysis.mixed import MixedSums
from cache_tools.analysis.pieces import view_pieces
from cache_tools.analysis.tables import SampleColumns
from cache_tools.config import Frozen
from cache_tools.console import Progress, resolve_device, storage_error
from cache_tools.errors import IncompleteError, RecipeError
from cache_tools.files import SafeFolder
from cache_tools.format.manifest import Fusion
from cache_tools.format.recipe import CacheRecipe
from cache_tools.images.recipe import require_one_label
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from cache_tools.targets import Index, ViewTargets

_FILES = (
    "summary", "reliability", "classes", "confusions", "disagreement", "stability", "mixed", "samples", "suspicious"
)  # fmt: skip
WriteView = Callable[[int, pl.DataFrame], None]  # (view, its table)


class About(Frozen):
    """The cache and the settings of the statistics.

    Attributes:
        sources: `teacher`, `clip`, `fusion`, the last of them what students learn from (`sources_of`).
        views: the analysed views, of the cache's `num_views`.
        confident: a prediction is confident if its probability is at least this.
        temperature: divides all logits before the softmax.
        teacher_weight: of the fusion; None without a teacher or without a CLIP.
        clip_scales: multiply the cosines of each CLIP, also for CLIP's own figures; empty without a CLIP.
        prompt_ensemble: what is averaged over the prompt templates.
    """

    path: str
    name: str
    fingerprint: str
    dataset: str
    class_names: tuple[str, ...]
    num_samples: int
    views: tuple[int, ...]
    num_views: int
    sources: tuple[str, ...]
    store: str
    confident: float
    temperature: float
    teacher_weight: float | None
    clip_scales: tuple[float, ...]
    prompt_ensemble: str

    @property
    def main(self) -> str:
        """The source that students learn from."""
        return self.sources[-1]


@dataclass(frozen=True)
class TeacherStats:
    """Tables of statistics. Shares and accuracies are in [0, 1]; NLL, entropies and divergences are in nats.

    Attributes:
        summary: one row per source and view, and per source over all views (`view` null): `n`, `top1`, `top5`, `nll`,
            `brier`, `ece`, `confidence`, `entropy`, `consistency`, and the quadrants `confident_right`,
            `unsure_right`, `unsure_wrong`, `confident_wrong`.
        reliability: one row per source, view (null: all) and confidence bin.
        classes: one row per class: accuracies and consistencies by source, gains of the fusion.
        confusions: one row per ordered pair (label, wrong prediction), most frequent first.
        disagreement: of teacher and CLIP; one row per view, and over all (`view` null); empty for a cache without both
            of them separately.
        stability: one row per source; empty for a single view.
        mixed: how far linearly mixed labels are from the targets of mixed pictures (`mixed.mixed_figures`): one row per
            source and view, and over all (`view` null); empty without views that mix.
        samples: one row per sample, over the views: how strongly the targets contradict the label and, with two views
            or more, `SOURCE_same_top1` and `SOURCE_divergence`.
    """

    about: About
    summary: pl.DataFrame
    reliability: pl.DataFrame
    classes: pl.DataFrame
    confusions: pl.DataFrame
    disagreement: pl.DataFrame
    stability: pl.DataFrame
    mixed: pl.DataFrame
    samples: pl.DataFrame

    def suspicious(self, count: int) -> pl.DataFrame:
        """The `count` samples, wrong in at least one view, whose label the targets contradict most on average."""
        wrong = self.samples.filter(pl.col("views_wrong") > 0)
        columns = ("sample", "label", "class", "rival", "rival_class", "against", "views_against", "views_wrong")
        return wrong.sort(["against", "sample"], descending=[True, False]).head(count).select(columns)

    def classes_by_gain(self) -> pl.DataFrame:
        """The classes, those first that the fusion helps most: by its gain over the teacher, or else by accuracy."""
        has_gains = len(self.about.sources) > 1
        by = "gain_over_teacher" if has_gains else f"{self.about.main}_accuracy"
        return self.classes.sort(by, descending=True, nulls_last=True)

    def gains(self, count: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The `count` classes that the fusion helps most, and those that it hurts most, the most extreme ones first.

        By its gain over the teacher, as `classes_by_gain`; classes without gain or loss are in neither. For caches with
        teacher and CLIP.
        """
        gain, rows = pl.col("gain_over_teacher"), self.classes_by_gain()
        return rows.filter(gain > 0).head(count), rows.filter(gain < 0).reverse().head(count)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables, by the names of their files."""
        names = ("summary", "reliability", "classes", "confusions", "disagreement", "stability", "mixed", "samples")
        return {name: getattr(self, name) for name in names}

    def to_dict(self, rows: int = 20) -> dict[str, Any]:
        """Plain JSON, with the `rows` most frequent confusions and the `rows` most suspicious samples."""
        tables = {
            "summary": self.summary,
            "reliability": self.reliability,
            "classes": self.classes,
            "disagreement": self.disagreement,
            "stability": self.stability,
            "mixed": self.mixed,
            "confusions": self.confusions.head(rows),
            "suspicious": self.suspicious(rows),
        }
        return {"about": self.about.model_dump(mode="json")} | {name: t.to_dicts() for name, t in tables.items()}


def analyse(
    cache: TeacherCache,
    views: Iterable[int] | None = None,
    *,
    confident: float = 0.8,
    temperature: float = 1.0,
    choice: FusionChoice | None = None,
    device: str = "cpu",
    write_view: WriteView | None = None,
) -> TeacherStats:
    """Read the views of a cache one after the other and compute the statistics of the targets.

    Reads a few blocks at a time. Needs memory for the table of one view (about 100 bytes per sample and source), and
    for one [N, C] float32 array per source if there are several views.

    Args:
        views: None for all complete views.
        confident: threshold of a confident prediction, between 0 and 1.
        temperature: above 0; divides all logits.
        choice: another fusion than that of the component cache.
        write_view: called with each view and its table, one row per source and sample, before the next view is read.

    Raises:
        RecipeError: the threshold or the temperature is out of range, or images may have several labels.
        IncompleteError: no view, or not every requested view, is complete.
        NotFoundError: there is no such view, or `choice` is given for a fused cache.
        FormatError, DeviceError: as `TeacherCache.load_view`.
    """
    require_one_label(cache.recipe.dataset.multi_label, "analyse", cache.path)  # `label_stats` is for the others
    check_confident(confident)
    check_temperature(temperature)
    chosen = view_numbers(cache, views)
    fusion = (choice or FusionChoice()).resolve(cache)
    stream = ViewStream(cache, fusion, temperature, resolve_device(device, needs_float64=True), several=len(chosen) > 1)
    sums = tables.Sums(cache.class_names, stream.sources, confident)
    with Progress("stats", len(chosen) * cache.num_samples, "samples") as progress:
        for view in chosen:
            frame, consistency = stream.read(view, progress)
            if write_view is not None:
                write_view(view, frame)
            sums.add(view, frame, consistency)
    samples = sums.samples(stream.rivals())
    for source, (same, divergence) in stream.stability().items():
        samples = samples.with_columns(
            pl.Series(f"{source}_same_top1", same), pl.Series(f"{source}_divergence", divergence)
        )
    return TeacherStats(
        about=about_of(cache, chosen, stream.sources, confident, temperature, fusion),
        summary=sums.summary(),
        reliability=sums.reliability(),
        classes=sums.classes(),
        confusions=sums.confusions(),
        disagreement=sums.disagreement(),
        stability=tables.stability_table(samples, stream.sources if len(chosen) > 1 else ()),
        mixed=stream.mixed.table(stream.sources),
        samples=samples,
    )


class Tables(Protocol):
    """Statistics that can be written: `TeacherStats` or `label_stats.LabelStats`."""

    def tables(self) -> dict[str, pl.DataFrame]: ...

    def to_dict(self) -> dict[str, Any]: ...


class StatsFolder:
    """The output folder: `stats.json`, a parquet file per table, and `views/` with the table of each view.

    Args:
        path: created if missing. The first view that is written removes the views of an earlier run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_cleared = False
        self._folder = SafeFolder(path)
        make_folder(path, "views")
        for name in ("", "views"):
            self._folder.remove_partials(name)  # of killed commands

    def write_view(self, view: int, frame: pl.DataFrame) -> None:
        """Write the table of a view, one row per source and sample, with figures in float32."""
        self._clear_views()  # not earlier: until here a bad option may end the run
        small = frame.with_columns(pl.lit(view, pl.Int32).alias("view"), pl.col(pl.Float64).cast(pl.Float32))
        put_file(self._folder, f"views/view-{view:04}.parquet", _parquet(small.select("view", pl.exclude("view"))))

    def write(self, stats: Tables) -> None:
        """Write every table and `stats.json`."""
        self._clear_views()
        written = {name: table for name, table in stats.tables().items() if not table.is_empty()}
        for name in _FILES:
            if name in written:
                put_file(self._folder, f"{name}.parquet", _parquet(written[name]))
            else:
                self._folder.remove(f"{name}.parquet")
        put_file(self._folder, "stats.json", json.dumps(stats.to_dict(), indent=2, ensure_ascii=False).encode())

    def _clear_views(self) -> None:
        """Remove the tables of views that an earlier run wrote, once."""
        if not self._is_cleared:
            for stale in self._folder.names("views"):
                if re.fullmatch(r"view-[0-9]{4,}\.parquet", stale):
                    self._folder.remove(f"views/{stale}")
            self._is_cleared = True


class ViewStream:
    """Reads views one after the other and accumulates their stability.

    Attributes:
        sources: as in `About`.
        mixed: the figures of views that mix two images.
    """

    def __init__(
        self, cache: TeacherCache, fusion: Fusion, temperature: float, device: torch.device, *, several: bool
    ) -> None:
        self._cache, self._fusion, self._temperature, self._device = cache, fusion, temperature, device
        self.sources = sources_of(cache.recipe)
        self._labels = torch.from_numpy(cache.labels).to(device)
        compared = self.sources if several else ()
        self.mixed = MixedSums(cache.recipe.views, cache.recipe.dataset.image_size, self._labels)
        self._stability = {name: Stability(cache.num_samples, cache.num_classes, device) for name in compared}

    def read(self, view: int, progress: Progress) -> tuple[pl.DataFrame, Mapping[str, npt.NDArray[np.float64]]]:
        """Read a view; return its table (`SampleColumns.table`) and the consistency [C] of each source."""
        cache = self._cache
        consistency = {name: NonTargetConsistency(cache.num_classes, self._device) for name in self.sources}
        columns = SampleColumns(cache.num_samples)
        for first, targets in view_pieces(cache, view, self._device, self._fusion):
            for inside in row_chunks(len(targets), cache.num_classes):
                rows = slice(first + inside.start, first + inside.stop)
                self._add(view, targets, rows, inside, consistency, columns)
                progress.advance(rows.stop - rows.start, f"view {view}")
        for stability in self._stability.values():
            stability.next_view()
        table = columns.table(cache.labels.astype(np.int32))
        return table, {name: value.compute().numpy() for name, value in consistency.items()}

    def stability(self) -> dict[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
        """Source → (same top-1 in all views, divergence) per sample [N]; empty for a single view."""
        by_source = {}
        for name, stability in self._stability.items():
            parts = [stability.compute(rows) for rows in self._chunks()]
            same, divergence = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
            by_source[name] = (same, divergence)
        return by_source

    def rivals(self) -> dict[str, npt.NDArray[Any]] | None:
        """`rival` and `against` [N]: the most probable class but the label, on average over the views; None for one."""
        if (stability := self._stability.get(self.sources[-1])) is None:
            return None
        parts = [stability.rivals(rows, self._labels[rows]) for rows in self._chunks()]
        rival, against = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return {"rival": rival, "against": against}

    def _add(
        self,
        view: int,
        targets: ViewTargets,
        rows: slice,
        inside: slice,
        consistency: Mapping[str, NonTargetConsistency],
        columns: SampleColumns,
    ) -> None:
        """Add the figures of samples `rows`, which are the rows `inside` of the targets."""
        labels, figures, by_source, others = self._labels[rows], {}, {}, {}
        for name in self.sources:
            logits = source_logits(targets, name, self.sources[-1], inside).double() / self._temperature
            by_source[name] = logits
            others[name] = OtherClasses(logits, labels)
            figures[name] = others[name].figures()
        divergence = None
        if len(self.sources) > 1:
            p, q = (others[name].probabilities() for name in ("teacher", "clip"))
            divergence = js_divergence(p, q, (figures["teacher"]["entropy"], figures["clip"]["entropy"]))
        for name, stability in self._stability.items():
            top1, entropy = figures[name]["top1"], figures[name]["entropy"]
            stability.add(rows, others[name].probabilities(), top1, entropy)
        self.mixed.add(view, rows, by_source)
        for name, meter in consistency.items():
            meter.add_rows(others[name])
        columns.add(rows, figures, divergence)

    def _chunks(self) -> list[slice]:
        return list(row_chunks(self._cache.num_samples, self._cache.num_classes))


def source_logits(targets: ViewTargets, source: str, main: str, rows: Index) -> torch.Tensor:
    """Logits [B, C] of one of `sources_of`, `main` the last of them; several networks are mixed, CLIP's are scaled."""
    if source == main:
        return targets.logits(rows)
    return targets.teacher_logits(rows) if source == "teacher" else targets.clip_logits(rows)


def view_numbers(cache: TeacherCache, views: Iterable[int] | None) -> tuple[int, ...]:
    """Return `views`, or every complete view if None.

    Raises:
        IncompleteError: no view is complete.
    """
    chosen = cache.complete_views if views is None else tuple(views)
    if not chosen:
        raise IncompleteError(
            "no view of this cache is completely built",
            where=cache.path,
            next_step=f"run the same {cache.manifest.recipe.made_by} command again: it resumes",
        )
    return chosen


def label_views(
    cache: TeacherCache, views: Iterable[int] | None, why: str = "a fusion is chosen by the labels"
) -> tuple[int, ...]:
    """`view_numbers`, for figures that need the labels of single images.

    Raises:
        RecipeError: a view mixes two images.
    """
    chosen, recipe = view_numbers(cache, views), cache.recipe.views
    if mixed := [view for view in chosen if recipe.mixes(view)]:
        raise RecipeError(
            f"{why}, and these views mix two images (views.mix)",
            where=cache.path,
            found=f"view {mixed[0]}" + (f" and {len(mixed) - 1} more" if len(mixed) > 1 else ""),
            next_step="take the clean view: --view 0"
            if recipe.clean_first
            else "use a cache whose views are not mixed",
        )
    return chosen


def check_confident(confident: float) -> None:
    """Raise RecipeError unless this is a probability that tells confident from unsure predictions."""
    if not 0.0 < confident < 1.0:
        raise RecipeError("bad --confident", expected="a probability between 0 and 1", found=confident)


def check_temperature(temperature: float) -> None:
    """Raise RecipeError unless logits divided by the temperature are finite in float32."""
    if not 1e-6 <= temperature <= 1e6:
        expected = "a number above 0, from 1e-6 to 1e6"
        raise RecipeError("bad --temperature", expected=expected, found=f"{temperature:g}")


def sources_of(recipe: CacheRecipe) -> tuple[str, ...]:
    """The sources whose predictions a cache has, the one that students learn from last.

    `teacher`, `clip`, `fusion` for components; `fusion` for a fused cache. A cache with teachers alone or with CLIPs
    alone has `teacher` or `clip` only, however it is stored: its targets are theirs.
    """
    if recipe.only_group is not None:
        return (recipe.only_group,)
    return ("teacher", "clip", "fusion") if recipe.store == "components" else ("fusion",)


def make_folder(path: Path, inside: str = "") -> None:
    """Create a folder and its parents, and one inside.

    Raises:
        StorageError: a file is in the way, or the disk is full or read-only.
        UnsafeFileError: a link is in the way.
    """
    try:
        SafeFolder(path).make_folder(inside)
    except OSError as error:
        raise storage_error(error) from error


def put_file(folder: SafeFolder, name: str, data: Any) -> None:
    """Replace a file, or a link itself; if that fails, the old file stays.

    Raises:
        StorageError: a folder is in the way, or the disk is full or read-only.
    """
    try:
        if folder.exists(name) and not (folder.is_file(name) or folder.is_folder(name)):
            folder.remove(name)
        folder.put(name, data)
    except OSError as error:
        error.filename = str(folder.path / name)  # instead of the temporary file
        raise storage_error(error) from error


def about_of(
    cache: TeacherCache,
    views: tuple[int, ...],
    sources: tuple[str, ...],
    confident: float,
    temperature: float,
    fusion: Fusion,
) -> About:
    """What statistics are about."""
    dataset = cache.recipe.dataset
    return About(
        path=str(cache.path),
        name=cache.manifest.name,
        fingerprint=cache.manifest.fingerprint,
        dataset=f"{dataset.name}/{dataset.split}",
        class_names=cache.class_names,
        num_samples=cache.num_samples,
        views=views,
        num_views=cache.num_views,
        sources=sources,
        store=cache.recipe.store,
        confident=confident,
        temperature=temperature,
        teacher_weight=None if cache.recipe.only_group else fusion.teacher_weight,
        clip_scales=fusion.clip_scales,
        prompt_ensemble=fusion.prompt_ensemble,
    )


def _parquet(table: pl.DataFrame) -> memoryview:
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getbuffer()
