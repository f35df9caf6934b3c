"""Polars tables: one row per source and sample of a view, and their statistics over the views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

CALIBRATION_BINS = 15
QUADRANTS = ("confident_right", "unsure_right", "unsure_wrong", "confident_wrong")


class SampleColumns:
    """The figures of the samples of a view, filled in piece by piece.

    The arrays are made by the first piece and kept: many small ones between large temporary ones would leave holes in
    the memory of the process.

    Args:
        count: samples of the view.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._columns: dict[str, dict[str, npt.NDArray[Any]]] = {}
        self._divergence: npt.NDArray[np.float64] | None = None

    def add(
        self, rows: slice, figures: Mapping[str, Mapping[str, torch.Tensor]], divergence: torch.Tensor | None
    ) -> None:
        """Add some samples.

        Args:
            rows: the samples.
            figures: source → `sample_figures`.
            divergence: of teacher and CLIP; None if the cache does not have both separately.
        """
        for source, by_name in figures.items():
            columns = self._columns.setdefault(source, {})
            for name, values in by_name.items():
                if name not in columns:
                    kind = np.int32 if name in ("top1", "rival") else values.cpu().numpy().dtype
                    columns[name] = np.empty(self._count, kind)
                columns[name][rows] = values.cpu().numpy()
        if divergence is not None:
            if self._divergence is None:
                self._divergence = np.empty(self._count)
            self._divergence[rows] = divergence.cpu().numpy()

    def table(self, labels: npt.NDArray[np.int32]) -> pl.DataFrame:
        """One row per source and sample, the samples of each source in their order, with their labels [N].

        The divergence of teacher and CLIP is repeated for every source.
        """
        shared: dict[str, npt.NDArray[Any]] = {"sample": np.arange(self._count, dtype=np.int32), "label": labels}
        if self._divergence is not None:
            shared["teacher_clip_divergence"] = self._divergence
        tables = [
            pl.DataFrame({**shared, **columns}).select(pl.lit(source).alias("source"), pl.all())
            for source, columns in self._columns.items()
        ]
        return pl.concat(tables)


def bin_sums(frame: pl.DataFrame) -> pl.DataFrame:
    """`n` and sums per source and bin of the confidence: [k/15, (k+1)/15), the last one closed.

    Here and below `maintain_order` fixes the order of the sums, so that figures repeat to the last bit.
    """
    number = (pl.col("confidence") * CALIBRATION_BINS).floor().clip(0, CALIBRATION_BINS - 1).cast(pl.Int32)
    return frame.group_by("source", number.alias("bin"), maintain_order=True).agg(
        pl.len().alias("n"), pl.col("confidence").sum(), pl.col("right").sum().cast(pl.Float64)
    )


def calibration_error(bins: pl.DataFrame, *by: str) -> pl.DataFrame:
    """The expected calibration error Σ_b n_b/n · |accuracy_b − confidence_b| of `bin_sums`, per group."""
    gap = (pl.col("right") - pl.col("confidence")).abs().sum() / pl.col("n").sum()
    return bins.group_by(*by, maintain_order=True).agg(gap.alias("ece"))


def summary(frame: pl.DataFrame, confident: float) -> pl.DataFrame:
    """One row per source: `n`, `top1`, `top5` (null for five classes or fewer), means, and shares of the quadrants."""
    sure, right = pl.col("confidence") >= confident, pl.col("right")
    quadrants = (sure & right, ~sure & right, ~sure & ~right, sure & ~right)
    top5 = pl.col("in_top5").mean() if "in_top5" in frame.columns else pl.lit(None, pl.Float64)
    return frame.group_by("source", maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("n"),
        right.mean().alias("top1"),
        top5.alias("top5"),
        pl.col("nll", "brier", "confidence", "entropy").mean(),
        *[share.mean().alias(name) for name, share in zip(QUADRANTS, quadrants, strict=True)],
    )


def disagreement(frame: pl.DataFrame) -> pl.DataFrame:
    """One row for one view; within each source, `frame` is in the order of the samples."""
    by_source = {name: frame.filter(pl.col("source") == name) for name in ("teacher", "clip", "fusion")}
    table = pl.DataFrame(
        {name: part["top1"] for name, part in by_source.items()}
        | {f"{name}_right": part["right"] for name, part in by_source.items()}
        | {"divergence": by_source["teacher"]["teacher_clip_divergence"]}
    )
    differ = pl.col("teacher") != pl.col("clip")
    neither = ~pl.col("teacher_right") & ~pl.col("clip_right")
    fusion_sides = [(pl.col("fusion") == pl.col(name)).filter(differ).mean() for name in ("teacher", "clip")]
    return table.select(
        differ.mean().alias("differ"),
        pl.col("teacher_right").filter(differ).mean().alias("differ_teacher_right"),
        pl.col("clip_right").filter(differ).mean().alias("differ_clip_right"),
        neither.filter(differ).mean().alias("differ_neither_right"),
        fusion_sides[0].alias("differ_fusion_with_teacher"),
        fusion_sides[1].alias("differ_fusion_with_clip"),
        pl.col("divergence").mean(),
        *[
            expression.mean().alias(f"fusion_{verb}_{name}")
            for name, right in (("teacher", pl.col("teacher_right")), ("clip", pl.col("clip_right")))
            for verb, expression in (
                ("corrects", pl.col("fusion_right") & ~right),
                ("spoils", ~pl.col("fusion_right") & right),
            )
        ],
    )


class Sums:
    """Accumulates the statistics of the views of a cache in small tables.

    Args:
        class_names: of the cache.
        sources: in the order of the tables, the one that students learn from last.
        confident: threshold of a confident prediction.
    """

    def __init__(self, class_names: Sequence[str], sources: Sequence[str], confident: float) -> None:
        self._class_names, self._sources, self._confident = tuple(class_names), tuple(sources), confident
        self._main = self._sources[-1]
        self._summaries: list[pl.DataFrame] = []
        self._bins: list[pl.DataFrame] = []
        self._consistency: list[pl.DataFrame] = []
        self._disagreement: list[pl.DataFrame] = []
        self._confusion = pl.DataFrame()
        self._rivals = pl.DataFrame()
        self._predicted: list[pl.Series] = []

    def add(self, view: int, frame: pl.DataFrame, consistency: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Add the table of a view (`SampleColumns.table`), and source → consistency of the classes [C] (or NaN)."""
        number = pl.lit(view, pl.Int32).alias("view")
        bins = bin_sums(frame)
        sums = summary(frame, self._confident)
        self._summaries.append(sums.join(calibration_error(bins, "source"), on="source").with_columns(number))
        self._bins.append(bins.with_columns(number))
        self._consistency += [
            pl.DataFrame({"label": np.arange(len(values), dtype=np.int32), "consistency": values}).with_columns(
                pl.col("consistency").fill_nan(None), pl.lit(source).alias("source"), number
            )
            for source, values in consistency.items()
        ]
        if len(self._sources) > 1:
            self._disagreement.append(disagreement(frame).with_columns(number))
        counts = frame.group_by("source", "label", "top1").agg(pl.len().cast(pl.Int64).alias("n"))
        merged = pl.concat([self._confusion, counts], how="diagonal")
        self._confusion = merged.group_by("source", "label", "top1").agg(pl.col("n").sum())
        targets = frame.filter(pl.col("source") == self._main)
        self._rivals = targets.select("sample", "label", "rival", "against")
        self._predicted.append(targets["top1"])

    def summary(self) -> pl.DataFrame:
        """Per source and view, then over all views (view null): means of means, as all views have the same samples."""
        mean_class = (
            pl.concat(self._consistency)
            .group_by("source", "view", maintain_order=True)
            .agg(pl.col("consistency").mean())
        )
        views = pl.concat(self._summaries).join(mean_class, on=["source", "view"])
        figures = pl.exclude("source", "view", "n", "ece")
        every = views.group_by("source", maintain_order=True).agg(
            pl.lit(None, pl.Int32).alias("view"), pl.col("n").sum(), figures.mean()
        )
        every = every.join(calibration_error(self._bins_over_views(), "source"), on="source")
        table = pl.concat([views, every.select(views.columns)])
        return self._sorted(table.select("source", "view", "n", pl.exclude("source", "view", "n")), "view")

    def reliability(self) -> pl.DataFrame:
        """`n`, mean `confidence` and `accuracy` (null in empty bins) per source, view (null: all) and bin."""
        views = pl.concat(self._bins)
        every = self._bins_over_views().with_columns(pl.lit(None, pl.Int32).alias("view"))
        sums = pl.concat([views, every.select(views.columns)])
        bins = pl.DataFrame({"bin": np.arange(CALIBRATION_BINS, dtype=np.int32)})
        grid = sums.select("source", "view").unique().join(bins, how="cross")
        table = grid.join(sums, on=["source", "view", "bin"], how="left", nulls_equal=True).select(
            "source",
            "view",
            "bin",
            (pl.col("bin") / CALIBRATION_BINS).alias("low"),
            ((pl.col("bin") + 1) / CALIBRATION_BINS).alias("high"),
            pl.col("n").fill_null(0),
            pl.col("confidence") / pl.col("n"),
            (pl.col("right") / pl.col("n")).alias("accuracy"),
        )
        return self._sorted(table, "view", "bin")

    def classes(self) -> pl.DataFrame:
        """One row per class: `n` samples, `SOURCE_accuracy`, `SOURCE_consistency`, gains of the fusion."""
        right = pl.col("n").filter(pl.col("label") == pl.col("top1")).sum() / pl.col("n").sum()
        accuracy = self._confusion.group_by("source", "label").agg(right.alias("accuracy"))
        consistency = (
            pl.concat(self._consistency)
            .group_by("source", "label", maintain_order=True)
            .agg(pl.col("consistency").mean())
        )
        table = self._label_counts()
        for values, name in ((accuracy, "accuracy"), (consistency, "consistency")):
            table = self._add_columns(table, values, name, on=["label"])
        mine = pl.col(f"{self._main}_accuracy")
        gains = [(mine - pl.col(f"{name}_accuracy")).alias(f"gain_over_{name}") for name in self._sources[:-1]]
        return table.with_columns(gains).sort("label")

    def confusions(self) -> pl.DataFrame:
        """Pairs (label, wrong prediction) with their share of the label's rows; the targets' most frequent first."""
        totals = self._confusion.filter(pl.col("source") == self._main).group_by("label").agg(total=pl.col("n").sum())
        wrong = self._confusion.filter(pl.col("label") != pl.col("top1"))
        table = wrong.select("label", "top1").unique()
        table = self._add_columns(table, wrong, "n", on=["label", "top1"]).join(totals, on="label")
        counts = [pl.col(f"{source}_n").fill_null(0) for source in self._sources]
        table = table.with_columns(counts)
        shares = [(pl.col(f"{source}_n") / pl.col("total")).alias(f"{source}_share") for source in self._sources]
        order = [f"{source}_n" for source in reversed(self._sources)]
        return (
            table.with_columns(*shares, self._class_name("label", "class"), self._class_name("top1", "said_class"))
            .sort([*order, "label", "top1"], descending=[True] * len(order) + [False, False])
            .select(
                "label", "class", pl.col("top1").alias("said"), "said_class", pl.selectors.ends_with("_share", "_n")
            )
        )

    def disagreement(self) -> pl.DataFrame:
        """Per view, then over all views (view null); empty without teacher and CLIP."""
        if not self._disagreement:
            return pl.DataFrame()
        views = pl.concat(self._disagreement).sort("view")
        # Shares among the rows where the two differ are weighted by the number of such rows.
        among = [name for name in views.columns if name.startswith("differ_")]
        weighted = [(pl.col(name) * pl.col("differ")).sum() / pl.col("differ").sum() for name in among]
        plain = pl.exclude("view", *among).mean()
        every = views.select(pl.lit(None, pl.Int32).alias("view"), plain, *weighted)
        every = every.with_columns(pl.col(among).fill_nan(None))
        return pl.concat([views.select("view", pl.exclude("view")), every.select("view", *views.drop("view").columns)])

    def samples(self, mean_rivals: Mapping[str, npt.NDArray[Any]] | None) -> pl.DataFrame:
        """One row per sample: how strongly the targets contradict its label.

        `rival` is the class other than the label with the highest probability, averaged over the views, and `against`
        is that mean. `views_against` counts the views whose top-1 is the rival, `views_wrong` those whose top-1 is not
        the label.

        Args:
            mean_rivals: `rival` and `against` of each sample; None for a single view, which has them in its table.
        """
        table = (
            self._rivals
            if mean_rivals is None
            else self._rivals.with_columns(
                pl.Series(name, values, dtype=self._rivals.schema[name]) for name, values in mean_rivals.items()
            )
        )
        agrees = [predicted == table["rival"] for predicted in self._predicted]
        wrong = [predicted != table["label"] for predicted in self._predicted]
        return table.select(
            "sample",
            "label",
            self._class_name("label", "class"),
            "against",
            "rival",
            self._class_name("rival", "rival_class"),
            pl.sum_horizontal(*agrees).cast(pl.Int32).alias("views_against"),
            pl.sum_horizontal(*wrong).cast(pl.Int32).alias("views_wrong"),
        )

    def _bins_over_views(self) -> pl.DataFrame:
        """The bins over all views; their calibration error is not the mean of the errors of the views."""
        return (
            pl.concat(self._bins)
            .group_by("source", "bin", maintain_order=True)
            .agg(pl.col("n", "confidence", "right").sum())
        )

    def _label_counts(self) -> pl.DataFrame:
        names = pl.DataFrame({"label": np.arange(len(self._class_names), dtype=np.int32), "class": self._class_names})
        counts = self._rivals.group_by("label").agg(pl.len().alias("n"))
        return names.join(counts, on="label", how="left").with_columns(pl.col("n").fill_null(0))

    def _add_columns(self, table: pl.DataFrame, values: pl.DataFrame, name: str, on: list[str]) -> pl.DataFrame:
        """Add a column `SOURCE_name` per source."""
        for source in self._sources:
            column = values.filter(pl.col("source") == source).select(*on, pl.col(name).alias(f"{source}_{name}"))
            table = table.join(column, on=on, how="left")
        return table

    def _class_name(self, number: str, name: str) -> pl.Expr:
        return pl.col(number).replace_strict(dict(enumerate(self._class_names)), return_dtype=pl.String).alias(name)

    def _sorted(self, table: pl.DataFrame, *by: str) -> pl.DataFrame:
        order = pl.col("source").cast(pl.Enum(self._sources))
        return table.sort(order, *by, nulls_last=True)


def stability_table(samples: pl.DataFrame, sources: Sequence[str]) -> pl.DataFrame:
    """One row per source: the means of `SOURCE_same_top1` and `SOURCE_divergence`."""
    rows = [
        samples.select(
            pl.lit(source).alias("source"),
            pl.col(f"{source}_same_top1").mean().alias("same_top1"),
            pl.col(f"{source}_divergence").mean().alias("divergence"),
        )
        for source in sources
    ]
    return pl.concat(rows) if rows else pl.DataFrame()
