"""Polars tables of one view: a row per source and sample, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
import torch

CALIBRATION_BINS = 15
QUADRANTS = ("confident_right", "unsure_right", "unsure_wrong", "confident_wrong")


def sample_table(
    rows: slice,
    labels: torch.Tensor,
    figures: Mapping[str, Mapping[str, torch.Tensor]],
    divergence: torch.Tensor | None,
) -> pl.DataFrame:
    """One row per source and sample.

    Args:
        rows: which samples.
        figures: source → `sample_figures`.
        divergence: of teacher and CLIP, the same for every source of a sample; None without the two.
    """
    shared = {
        "sample": np.arange(rows.start, rows.stop, dtype=np.int32),
        "label": labels.cpu().numpy().astype(np.int32),
    }
    if divergence is not None:
        shared["teacher_clip_divergence"] = divergence.cpu().numpy()
    tables = []
    for source, by_name in figures.items():
        columns = {name: values.cpu().numpy() for name, values in by_name.items()}
        classes = {name: columns[name].astype(np.int32) for name in ("top1", "rival")}
        table = pl.DataFrame({**shared, **columns, **classes})
        tables.append(table.select(pl.lit(source).alias("source"), pl.all()))
    return pl.concat(tables)


def bin_sums(frame: pl.DataFrame) -> pl.DataFrame:
    """Per source and bin of the confidence ([k/15, (k+1)/15), the last one closed): `n` and sums over the bin."""
    number = (pl.col("confidence") * CALIBRATION_BINS).floor().clip(0, CALIBRATION_BINS - 1).cast(pl.Int32)
    return frame.group_by("source", number.alias("bin")).agg(
        pl.len().alias("n"), pl.col("confidence").sum(), pl.col("right").sum().cast(pl.Float64)
    )


def calibration_error(bins: pl.DataFrame, *by: str) -> pl.DataFrame:
    """Expected calibration error of `bin_sums`: Σ_b n_b/n · |accuracy_b − confidence_b|, per group."""
    gap = (pl.col("right") - pl.col("confidence")).abs().sum() / pl.col("n").sum()
    return bins.group_by(*by).agg(gap.alias("ece"))


def summary(frame: pl.DataFrame, confident: float) -> pl.DataFrame:
    """One row per source: `n`, `top1`, `top5` (null with five classes or fewer), means, and the quadrants' shares."""
    sure, right = pl.col("confidence") >= confident, pl.col("right")
    quadrants = (sure & right, ~sure & right, ~sure & ~right, sure & ~right)
    top5 = pl.col("in_top5").mean() if "in_top5" in frame.columns else pl.lit(None, pl.Float64)
    return frame.group_by("source").agg(
        pl.len().cast(pl.Int64).alias("n"),
        right.mean().alias("top1"),
        top5.alias("top5"),
        pl.col("nll", "brier", "confidence", "entropy").mean(),
        *[share.mean().alias(name) for name, share in zip(QUADRANTS, quadrants, strict=True)],
    )


def disagreement(frame: pl.DataFrame) -> pl.DataFrame:
    """One row of one view; the rows of every source are in the order of the samples."""
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


def merge_against(kept: pl.DataFrame, fusion: pl.DataFrame) -> pl.DataFrame:
    """Sum, maximum (and whose it is) and count of what the fusion says against the label, sample by sample."""
    new = fusion.select(
        "sample",
        "label",
        "rival",
        pl.col("against").alias("against_sum"),
        pl.col("against").alias("against_max"),
        (~pl.col("right")).cast(pl.Int32).alias("views_against"),
    )
    if kept.is_empty():
        return new
    larger = new["against_max"] > kept["against_max"]
    return kept.with_columns(
        pl.when(larger).then(new["rival"]).otherwise(pl.col("rival")).alias("rival"),
        pl.when(larger).then(new["against_max"]).otherwise(pl.col("against_max")).alias("against_max"),
        (pl.col("against_sum") + new["against_sum"]).alias("against_sum"),
        (pl.col("views_against") + new["views_against"]).alias("views_against"),
    )
