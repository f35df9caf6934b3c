"""Every figure of `cache-tools stats` against a slow float64 reference that loops over samples, classes and pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.testing
import pytest
import torch

from cache_tools.analysis.figures import NonTargetConsistency, Stability, entropy, js_divergence, row_chunks
from cache_tools.analysis.pieces import view_pieces
from cache_tools.analysis.stats import StatsFolder, TeacherStats, analyse
from cache_tools.analysis.stats_text import print_stats
from cache_tools.errors import IncompleteError, NotFoundError, RecipeError, StorageError
from cache_tools.format.manifest import Fusion
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.stats_case import (
    CHOICE,
    CLASSES,
    CONFIDENT,
    SCALE,
    VIEWS,
    labelled_images,
    reference_summary,
    softmax,
    write_cache,
)

SOURCES = ("teacher", "clip", "fusion")

Logits = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("stats") / "c.zarr", labelled_images(), store="components")


@pytest.fixture(scope="module")
def fused_cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("stats") / "f.zarr", labelled_images(), store="fused")


@pytest.fixture(scope="module")
def stats(cache: TeacherCache) -> TeacherStats:
    return analyse(cache, confident=CONFIDENT, choice=CHOICE)


@pytest.fixture(scope="module")
def logits(cache: TeacherCache) -> list[Logits]:
    """View → source → float64 logits."""
    return [reference_logits(cache, view) for view in range(VIEWS)]


def reference_logits(cache: TeacherCache, view: int) -> Logits:
    everything = slice(None)
    targets = cache.load_view(view)
    teacher = targets.teacher_logits(everything).double().numpy()
    clip = SCALE * targets.cosine(everything).double().numpy()
    return {"teacher": teacher, "clip": clip, "fusion": 0.7 * teacher + 0.3 * clip}


def row_of(table: pl.DataFrame, **where: Any) -> dict[str, Any]:
    for name, value in where.items():
        table = table.filter(pl.col(name).is_null() if value is None else pl.col(name) == value)
    (row,) = table.to_dicts()
    return row


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("view", [0, 1, 2, None])
def test_accuracy_calibration_and_quadrants(
    cache: TeacherCache, stats: TeacherStats, logits: list[Logits], source: str, view: int | None
) -> None:
    views = range(VIEWS) if view is None else [view]
    rows = [row for number in views for row in logits[number][source]]
    expected = reference_summary(rows, list(cache.labels) * len(views))
    row = row_of(stats.summary, source=source, view=view)
    assert row["n"] == len(rows)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    quadrants = ("confident_right", "unsure_right", "unsure_wrong", "confident_wrong")
    assert sum(row[name] for name in quadrants) == pytest.approx(1.0)
    assert view is not None or min(row[name] for name in quadrants) > 0, "every quadrant is tried"


def test_calibration_error_equals_torchmetrics(stats: TeacherStats, cache: TeacherCache, logits: list[Logits]) -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error  # takes seconds

    for source in SOURCES:
        p = torch.from_numpy(np.concatenate([view[source] for view in logits])).softmax(dim=1)
        labels = torch.from_numpy(np.tile(cache.labels, VIEWS))
        theirs = multiclass_calibration_error(p, labels, CLASSES, n_bins=15)
        assert row_of(stats.summary, source=source, view=None)["ece"] == pytest.approx(float(theirs), abs=1e-6)


def test_reliability_has_every_bin_and_every_prediction(stats: TeacherStats, logits: list[Logits]) -> None:
    for source, view in itertools.product(SOURCES, [0, 1, 2, None]):
        where = pl.col("view").is_null() if view is None else pl.col("view") == view
        table = stats.reliability.filter((pl.col("source") == source) & where)
        assert table["bin"].to_list() == list(range(15))
        rows = np.concatenate([logits[v][source] for v in (range(VIEWS) if view is None else [view])])
        confidences = [max(softmax(row)) for row in rows]
        for row in table.to_dicts():
            members = [value for value in confidences if row["low"] <= value < row["high"]]
            assert row["n"] == len(members)
            if members:
                assert row["confidence"] == pytest.approx(sum(members) / len(members))
                assert 0 <= row["accuracy"] <= 1
            else:
                assert row["confidence"] is None


def test_temperature_divides_every_logit(cache: TeacherCache) -> None:
    got = analyse(cache, [1], confident=CONFIDENT, temperature=2.5, choice=CHOICE)
    for source, rows in reference_logits(cache, 1).items():
        expected = reference_summary(list(rows / 2.5), list(cache.labels))
        row = row_of(got.summary, source=source, view=1)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)


def reference_consistency(rows: np.ndarray, label: int) -> float | None:
    """Mean cosine similarity, one pair of samples at a time."""
    vectors = []
    for row in rows:
        p = softmax(row)
        others = [value for number, value in enumerate(p) if number != label]
        vectors.append([value / sum(others) for value in others])
    cosines = [
        sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        for a, b in itertools.combinations(vectors, 2)
    ]
    return sum(cosines) / len(cosines) if cosines else None


def test_classes_against_pairwise_loops(cache: TeacherCache, stats: TeacherStats, logits: list[Logits]) -> None:
    assert stats.classes["class"].to_list() == list(cache.class_names)
    for label in range(CLASSES):
        members = np.flatnonzero(cache.labels == label)
        row = row_of(stats.classes, label=label)
        assert row["n"] == len(members)
        accuracies: dict[str, Any] = {}
        for source in SOURCES:
            predicted = [int(np.argmax(view[source][sample])) for view in logits for sample in members]
            accuracies[source] = predicted.count(label) / len(predicted) if predicted else None
            assert row[f"{source}_accuracy"] == pytest.approx(accuracies[source])
            values: list[Any] = [reference_consistency(view[source][members], label) for view in logits]
            if None in values:
                assert row[f"{source}_consistency"] is None
            else:
                assert row[f"{source}_consistency"] == pytest.approx(np.mean(values), rel=1e-6)
        for other in ("teacher", "clip"):
            gain = None if not len(members) else accuracies["fusion"] - accuracies[other]
            assert row[f"gain_over_{other}"] == pytest.approx(gain)
    assert stats.classes["n"].to_list()[-2:] == [1, 0]
    assert stats.classes["fusion_consistency"].null_count() == 2


def test_summary_has_the_mean_consistency_of_the_classes(stats: TeacherStats) -> None:
    for source in SOURCES:
        row = row_of(stats.summary, source=source, view=None)
        assert row["consistency"] == pytest.approx(stats.classes[f"{source}_consistency"].mean())


def test_consistency_is_exact_for_a_confident_teacher() -> None:
    """With target logits of 500, 1 − p_y is 0 in float64, but the other classes still have a distribution."""
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double() * 3
    labels = torch.arange(30) % 3
    logits[torch.arange(30), labels] = 500.0
    meter = NonTargetConsistency(6)
    for rows in row_chunks(30, 6, numbers=66):
        meter.add(logits[rows], labels[rows])
    calm = logits.clone()
    calm[torch.arange(30), labels] = 0.0  # the target's own logit must not matter
    for label, value in enumerate(meter.compute()[:3].tolist()):
        assert value == pytest.approx(reference_consistency(calm[labels == label].numpy(), label), rel=1e-12)


def test_two_classes_have_no_consistency() -> None:
    meter = NonTargetConsistency(2)
    meter.add(torch.randn(10, 2), torch.arange(10) % 2)
    assert meter.compute().isnan().all()


def kl(p: list[float], q: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def mean_of(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def test_disagreement_sample_by_sample(cache: TeacherCache, stats: TeacherStats, logits: list[Logits]) -> None:
    for view in (0, 1, 2, None):
        counts: dict[str, float] = defaultdict(float)
        for number in range(VIEWS) if view is None else [view]:
            for sample, label in enumerate(cache.labels):
                p = {source: softmax(logits[number][source][sample]) for source in SOURCES}
                predicted = {source: int(np.argmax(p[source])) for source in SOURCES}
                middle = mean_of([p["teacher"], p["clip"]])
                counts["rows"] += 1
                counts["divergence"] += (kl(p["teacher"], middle) + kl(p["clip"], middle)) / 2
                for other in ("teacher", "clip"):
                    counts[f"fusion_corrects_{other}"] += predicted["fusion"] == label != predicted[other]
                    counts[f"fusion_spoils_{other}"] += predicted[other] == label != predicted["fusion"]
                if predicted["teacher"] != predicted["clip"]:
                    counts["differ"] += 1
                    counts["differ_teacher_right"] += predicted["teacher"] == label
                    counts["differ_clip_right"] += predicted["clip"] == label
                    counts["differ_neither_right"] += label not in {predicted["teacher"], predicted["clip"]}
                    counts["differ_fusion_with_teacher"] += predicted["fusion"] == predicted["teacher"]
                    counts["differ_fusion_with_clip"] += predicted["fusion"] == predicted["clip"]
        row = row_of(stats.disagreement, view=view)
        assert counts["differ_clip_right"] > 0 < counts["differ_neither_right"]
        assert set(row) == set(counts) - {"rows"} | {"view"}
        for name in set(row) - {"view"}:
            among = counts["differ"] if name.startswith("differ_") else counts["rows"]
            assert row[name] == pytest.approx(counts[name] / among, rel=1e-6, abs=1e-9), name


def test_stability_sample_by_sample(cache: TeacherCache, stats: TeacherStats, logits: list[Logits]) -> None:
    for source in SOURCES:
        same, divergences = [], []
        for sample in range(cache.num_samples):
            views = [softmax(view[source][sample]) for view in logits]
            same.append(len({int(np.argmax(p)) for p in views}) == 1)
            divergences.append(sum(kl(p, mean_of(views)) for p in views) / VIEWS)
        assert 0 < sum(same) < len(same)
        assert stats.samples[f"{source}_same_top1"].to_list() == same
        np.testing.assert_allclose(stats.samples[f"{source}_divergence"], divergences, rtol=1e-5, atol=1e-6)
        row = row_of(stats.stability, source=source)
        assert row["same_top1"] == pytest.approx(np.mean(same))
        assert row["divergence"] == pytest.approx(np.mean(divergences), rel=1e-5)


def test_divergence_of_two_views_equals_js_divergence_and_is_0_for_equal_views() -> None:
    p, q = torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(1)).double().mul(4).softmax(dim=2)
    for second, expected in ((q, js_divergence(p, q)), (p, torch.zeros(40))):
        meter = Stability(40, 9)
        for view in (p, second):
            meter.add(slice(0, 40), view, view.argmax(1), entropy(view))
            meter.next_view()
        same, divergence = meter.compute(slice(0, 40))
        torch.testing.assert_close(divergence, expected.double(), atol=1e-6, rtol=1e-5)
        assert same.tolist() == (p.argmax(1) == second.argmax(1)).tolist()


def test_confused_pairs_and_suspicious_labels(cache: TeacherCache, stats: TeacherStats, logits: list[Logits]) -> None:
    pairs: dict[str, Counter[tuple[int, int]]] = {source: Counter() for source in SOURCES}
    views: dict[int, list[list[float]]] = {}
    for view, (sample, label) in itertools.product(logits, enumerate(cache.labels)):
        for source in SOURCES:
            pairs[source][int(label), int(np.argmax(view[source][sample]))] += 1
        views.setdefault(sample, []).append(softmax(view["fusion"][sample]))
    found = {(row["label"], row["said"]): row for row in stats.confusions.to_dicts()}
    wrong = {pair for counts in pairs.values() for pair in counts if pair[0] != pair[1]}
    assert set(found) == wrong
    for (label, said), row in found.items():
        total = VIEWS * int((cache.labels == label).sum())
        for source in SOURCES:
            assert row[f"{source}_n"] == pairs[source][label, said]
            assert row[f"{source}_share"] == pytest.approx(pairs[source][label, said] / total)
        assert (row["class"], row["said_class"]) == (f"class_{label}", f"class_{said}")
    assert stats.confusions["fusion_n"].is_sorted(descending=True)

    expected = {sample: doubt(rows, int(cache.labels[sample])) for sample, rows in views.items()}
    doubted = [sample for sample, (_, _, _, missed) in expected.items() if missed]
    worst = sorted(doubted, key=lambda sample: -expected[sample][1])[:5]
    table = stats.suspicious(5)
    assert table["sample"].to_list() == worst
    for row in table.to_dicts():
        rival, against, agree, missed = expected[row["sample"]]
        assert (row["rival"], row["rival_class"], row["against"]) == (rival, f"class_{rival}", pytest.approx(against))
        assert (row["views_against"], row["views_wrong"]) == (agree, missed)
        assert row["label"] == cache.labels[row["sample"]]


def doubt(views: list[list[float]], label: int) -> tuple[int, float, int, int]:
    """In plain loops: the other class with the highest mean probability, that mean, and the views that have this class
    as top-1 and that have another top-1 than the label."""
    means = [sum(row[number] for row in views) / len(views) for number in range(len(views[0]))]
    rival = max((number for number in range(len(means)) if number != label), key=lambda number: means[number])
    best = [max(range(len(row)), key=lambda number: row[number]) for row in views]
    return rival, means[rival], sum(one == rival for one in best), sum(one != label for one in best)


DOG, CAT, FLOWER = 0, 1, 2
DOUBTS = {  # views of a dog as probabilities of dog, cat, flower → the rival, views that agree, views that are wrong
    # Cat has the largest probability of a single view, but flower is the top-1 of three views and higher on average.
    "one view of a cat": (((0.03, 0.943, 0.027), *((0.2, 0.018, 0.782),) * 3), FLOWER, 3, 4),
    "all views agree": (((0.1, 0.8, 0.1),) * 4, CAT, 4, 4),
    "right in two views": (((0.1, 0.7, 0.2), (0.2, 0.6, 0.2), (0.6, 0.2, 0.2), (0.9, 0.05, 0.05)), CAT, 2, 2),
    "a rival that is never the top-1": (((0.5, 0.3, 0.2), (0.15, 0.4, 0.45), (0.5, 0.4, 0.1)), CAT, 0, 1),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_a_suspicious_sample_has_one_rival_for_all_views(tmp_path: Path, case: str) -> None:
    rows, rival, agree, wrong = DOUBTS[case]
    images = dataclasses.replace(tiny_images(12, 3), labels=np.full(12, DOG))
    manifest = tiny_manifest(images, num_views=len(rows), store="fused", codec="float32")
    targets = tiny_targets(manifest)
    targets["fused_logits"][:] = np.log((0.9, 0.05, 0.05))
    targets["fused_logits"][:, 7] = np.log(rows)
    write(create(tmp_path / "c.zarr", manifest, images), targets)
    got = analyse(TeacherCache(tmp_path / "c.zarr"))
    (row,) = got.suspicious(5).to_dicts()
    mean = sum(p[rival] for p in rows) / len(rows)
    assert (row["sample"], row["rival"], row["views_against"], row["views_wrong"]) == (7, rival, agree, wrong)
    assert row["against"] == pytest.approx(mean, abs=1e-6)
    console = [line.split() for line in text_of(got).splitlines() if line.startswith("7 ")]
    assert console == [["7", "class_0", f"class_{rival}", f"{mean:.3f}", str(agree), "of", str(len(rows))]]


def text_of(stats: TeacherStats) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_stats(stats)
    return out.getvalue()


def test_the_size_of_the_row_chunks_does_not_matter(
    cache: TeacherCache, stats: TeacherStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_tools.analysis.stats.row_chunks", lambda n, c: row_chunks(n, c, numbers=50))
    again = analyse(cache, confident=CONFIDENT, choice=CHOICE)
    for name in ("summary", "reliability", "classes", "confusions", "disagreement", "stability", "samples"):
        polars.testing.assert_frame_equal(getattr(again, name), getattr(stats, name))


def test_the_number_of_blocks_read_at_a_time_does_not_matter(
    cache: TeacherCache, stats: TeacherStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_tools.analysis.pieces.PIECE_NUMBERS", 16 * CLASSES)
    assert len(list(view_pieces(cache, 0, torch.device("cpu"), Fusion.stored(cache.manifest)))) == 4
    again = analyse(cache, confident=CONFIDENT, choice=CHOICE)
    for name in ("summary", "reliability", "classes", "confusions", "disagreement", "stability", "samples"):
        polars.testing.assert_frame_equal(getattr(again, name), getattr(stats, name))


def test_a_fused_cache_has_the_fusion_only(fused_cache: TeacherCache) -> None:
    got = analyse(fused_cache, confident=CONFIDENT)
    assert got.about.sources == ("fusion",)
    assert got.about.store == "fused"
    assert got.disagreement.is_empty()
    rows = [row for view in range(VIEWS) for row in fused_cache.read_array("fused_logits", view).astype(np.float64)]
    expected = reference_summary(rows, list(fused_cache.labels) * VIEWS)
    row = row_of(got.summary, source="fusion", view=None)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert "gain_over_teacher" not in got.classes.columns
    with pytest.raises(NotFoundError, match="cannot be fused differently"):
        analyse(fused_cache, choice=CHOICE)


def test_another_fusion_changes_only_the_fusion(cache: TeacherCache) -> None:
    got = analyse(cache, [0], confident=CONFIDENT, choice=FusionChoice(teacher_weight=1.0, clip_scale=SCALE))
    teacher, fusion = (row_of(got.summary, source=source, view=0) for source in ("teacher", "fusion"))
    assert (fusion.pop("source"), teacher.pop("source")) == ("fusion", "teacher")
    assert fusion == pytest.approx(teacher, rel=1e-5)
    plain = analyse(cache, [0], confident=CONFIDENT)
    assert plain.about.clip_scales == (100.0,)
    assert row_of(plain.summary, source="teacher", view=0).items() >= teacher.items()
    assert row_of(plain.summary, source="fusion", view=0)["nll"] != pytest.approx(fusion["nll"], rel=0.01)


def test_a_single_view_has_no_stability_and_five_classes_no_top5(tmp_path: Path) -> None:
    build(tmp_path / "c.zarr", tiny_manifest(tiny_images()), tiny_images())
    got = analyse(TeacherCache(tmp_path / "c.zarr"), [1])
    assert got.stability.is_empty()
    assert "fusion_divergence" not in got.samples.columns
    assert got.summary["top5"].to_list() == [None, None]
    assert got.about.views == (1,)


def test_only_complete_views_are_read(tmp_path: Path) -> None:
    images = tiny_images()
    manifest = tiny_manifest(images)
    writer = create(tmp_path / "half.zarr", manifest, images)
    with pytest.raises(IncompleteError, match="no view of this cache"):
        analyse(TeacherCache(tmp_path / "half.zarr"))
    write(writer, tiny_targets(manifest), [(1, block) for block in range(manifest.num_blocks)])
    assert analyse(TeacherCache(tmp_path / "half.zarr")).about.views == (1,)
    with pytest.raises(IncompleteError, match="view 0 is not completely built"):
        analyse(TeacherCache(tmp_path / "half.zarr"), [0])


@pytest.mark.parametrize(
    "settings", [{"confident": 0.0}, {"confident": 1.5}, {"temperature": 0.0}, {"temperature": math.nan}]
)
def test_settings_out_of_range_are_refused(cache: TeacherCache, settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="bad --"):
        analyse(cache, **settings)


def test_folder_holds_every_table_and_replaces_an_earlier_run(cache: TeacherCache, tmp_path: Path) -> None:
    for views in (None, [2]):
        folder = StatsFolder(tmp_path / "out")
        got = analyse(cache, views, confident=CONFIDENT, choice=CHOICE, write_view=folder.write_view)
        folder.write(got)
        chosen = list(got.about.views)
        table = pl.read_parquet(tmp_path / "out" / "views" / "*.parquet")
        assert sorted(table["view"].unique()) == chosen
        assert len(table) == len(chosen) * len(SOURCES) * cache.num_samples
        nll = table.filter(pl.col("source") == "clip")["nll"].cast(pl.Float64).mean()
        assert nll == pytest.approx(row_of(got.summary, source="clip", view=None)["nll"], rel=1e-6)
        polars.testing.assert_frame_equal(pl.read_parquet(tmp_path / "out" / "classes.parquet"), got.classes)
        assert (tmp_path / "out" / "stability.parquet").exists() == (len(chosen) > 1)
        assert json.loads((tmp_path / "out" / "stats.json").read_text()) == got.to_dict()


def test_a_mistake_in_the_options_does_not_change_the_folder(cache: TeacherCache, tmp_path: Path) -> None:
    folder = StatsFolder(tmp_path / "out")
    folder.write(analyse(cache, [0, 1], write_view=folder.write_view))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    with pytest.raises(RecipeError, match="bad --confident"):
        analyse(cache, confident=2.0, write_view=StatsFolder(tmp_path / "out").write_view)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_a_folder_in_the_way_of_a_table_is_named(cache: TeacherCache, tmp_path: Path) -> None:
    folder = StatsFolder(tmp_path)
    (tmp_path / "summary.parquet").symlink_to("/dev/full")
    found = analyse(cache, [0], write_view=folder.write_view)
    folder.write(found)  # replaces the link, does not write to its target
    assert (tmp_path / "summary.parquet").is_file()
    (tmp_path / "classes.parquet").unlink()
    (tmp_path / "classes.parquet").mkdir()
    with pytest.raises(StorageError, match=r"Is a directory .*classes\.parquet"):
        folder.write(found)


def test_a_full_disk_keeps_the_old_files(cache: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = StatsFolder(tmp_path)
    found = analyse(cache, [0], write_view=folder.write_view)
    folder.write(found)
    before = (tmp_path / "summary.parquet").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left on device .*summary\.parquet.*Free some space"):
        folder.write(found)
    assert (tmp_path / "summary.parquet").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_several_networks_are_analysed_as_their_mix(tmp_path: Path) -> None:
    images = tiny_images(60, CLASSES)
    shares: dict[str, Any] = {"teacher_weights": (0.3, 0.7), "clip_weights": (0.4, 0.6)}
    build(tmp_path / "c.zarr", tiny_manifest(images, num_views=1, store="components", **shares), images)
    cache, everything = TeacherCache(tmp_path / "c.zarr"), slice(None)
    targets, got = cache.load_view(0), analyse(TeacherCache(tmp_path / "c.zarr"), confident=CONFIDENT)
    assert got.about.clip_scales == (100.0, 50.0)
    teachers = [targets.teacher_logits(everything, number).double().numpy() for number in range(2)]
    cosines = [targets.cosine(everything, number).double().numpy() for number in range(2)]
    teacher = 0.3 * teachers[0] + 0.7 * teachers[1]
    clip = 0.4 * 100 * cosines[0] + 0.6 * 50 * cosines[1]
    for source, rows in {"teacher": teacher, "clip": clip, "fusion": 0.7 * teacher + 0.3 * clip}.items():
        expected = reference_summary(list(rows), list(cache.labels))
        row = row_of(got.summary, source=source, view=0)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6), source
