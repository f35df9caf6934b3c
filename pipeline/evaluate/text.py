"""Print an evaluation as tables on the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from cache_tools.console import print_line
from cache_tools.screen import TextTable, nats
from pipeline.evaluate.agreement import Agreement, LabelAgreement
from pipeline.evaluate.report import EvaluationReport, RobustnessReport
from train.evaluate.corruptions import SEVERITIES
from train.evaluate.multilabel import Figures, MultiLabelEvaluation
from train.runs.stored import data_name

_WORST_CLASSES = 10


def print_report(report: EvaluationReport) -> None:
    """Print all tables and notes of a report."""
    for table in _tables(report):
        print(f"{table.text()}\n")
    for note in _notes(report):
        print_line(note)


def _tables(report: EvaluationReport) -> Iterable[TextTable]:
    yield _figures(report)
    yield _labels(report) if report.labels else _classes(report)
    if report.confused:
        yield _confused(report)
    if report.robustness is not None:
        yield _robustness(report.robustness)
    if report.teachers is not None:
        yield _teachers(report)


def _figures(report: EvaluationReport) -> TextTable:
    several = isinstance(report.figures[0].evaluation, MultiLabelEvaluation)
    kinds = ["mAP", "BCE"] if several else ["top-1", "top-5", "NLL", "ECE", "Brier"]
    titles = ["checkpoint", "images", *kinds]
    images = f"{data_name(report.run, report.dataset)} {report.split}"
    table = TextTable(titles, title=f"{report.student} ({report.loss}) on {images}")
    for row in report.figures:
        details = " ←" if row.checkpoint == report.checkpoint and len(report.figures) > 1 else ""
        table.add_row(f"{row.checkpoint} (epoch {row.epoch}){details}", *_cells(row.evaluation))
    if (base := report.baseline_figures) is not None:
        table.add_row(f"baseline, {base.checkpoint} (epoch {base.epoch})", *_cells(base.evaluation))
    for split, rows in report.more_splits.items():
        for row in rows:
            table.add_row(f"{row.checkpoint} (epoch {row.epoch}), {split}", *_cells(row.evaluation))
    if report.shifted is not None:
        table.add_row(f"shifted images, {report.checkpoint}", *_cells(report.shifted))
    return table


def _cells(figures: Figures) -> tuple[str, ...]:
    if isinstance(figures, MultiLabelEvaluation):
        return f"{figures.n:,}", f"{figures.map:.2%}", nats(figures.bce)
    return (
        f"{figures.n:,}",
        f"{figures.top1:.2%}",
        _percent(figures.top5, 2),
        nats(figures.nll),
        f"{figures.ece:.4f}",
        "–" if figures.brier is None else f"{figures.brier:.4f}",
    )


def _classes(report: EvaluationReport) -> TextTable:
    known = [row for row in report.classes if row.accuracy is not None]
    worst = sorted(known, key=lambda row: row.accuracy or 0.0)[:_WORST_CLASSES]
    all_shown = len(worst) == len(report.classes)
    title = "Classes" if all_shown else f"The {len(worst)} worst of {len(report.classes)} classes"
    table = TextTable(["class", "images", "accuracy", "precision"], title=title)
    for row in worst:
        table.add_row(row.name, f"{row.n:,}", _percent(row.accuracy, 1), _percent(row.precision, 1))
    return table


def _labels(report: EvaluationReport) -> TextTable:
    known = [row for row in report.labels if row.average_precision is not None]
    worst = sorted(known, key=lambda row: row.average_precision or 0.0)[:_WORST_CLASSES]
    all_shown = len(worst) == len(report.labels)
    title = "Labels" if all_shown else f"The {len(worst)} worst of {len(report.labels)} labels"
    table = TextTable(["label", "images", "AP", "precision", "recall"], title=title)
    for row in worst:
        shares = (_percent(value, 1) for value in (row.average_precision, row.precision, row.recall))
        table.add_row(row.name, f"{row.n:,}", *shares)
    return table


def _confused(report: EvaluationReport) -> TextTable:
    table = TextTable(["class", "predicted as", "images", "of the class"], names=2, title="Most confused classes")
    for pair in report.confused:
        table.add_row(pair.label, pair.predicted, f"{pair.count:,}", f"{pair.share:.1%}")
    return table


def _robustness(report: RobustnessReport) -> TextTable:
    summary, against = report.summary, report.baseline is not None
    titles = ["corruption", *map(str, SEVERITIES), "mean", *(("baseline", "CE", "relative CE") if against else ())]
    table = TextTable(titles, title="Error in % under corruptions, by severity")
    for row in summary.corruptions:
        cells = [_times_100(error) for error in (*row.by_severity, row.error)]
        if against:
            cells += [_times_100(row.baseline_error), _ratio(row.ce), _ratio(row.relative_ce)]
        table.add_row(row.corruption.replace("_", " "), *cells)
    last = ["mean", *[""] * len(SEVERITIES), _times_100(summary.mean_error)]
    if against:
        last += [_times_100(summary.baseline_mean_error), _ratio(summary.mce), _ratio(summary.relative_mce)]
    table.add_row(*last)
    return table


def _teachers(report: EvaluationReport) -> TextTable:
    if report.labels:
        return _teachers_of_labels(report)
    titles = ["", "top-1", "same prediction", "KL to student", "wrong", "student follows", "student is right"]
    table = TextTable(titles, title="Agreement with the teachers on clean test images")
    for row in report.teachers or ():
        assert isinstance(row, Agreement), "a report without labels has figures of classes"
        shares = (_percent(row.follows_when_wrong, 1), _percent(row.right_when_wrong, 1))
        table.add_row(row.source, f"{row.top1:.2%}", f"{row.agreement:.2%}", f"{row.kl:.4f}", f"{row.wrong:,}", *shares)
    return table


def _teachers_of_labels(report: EvaluationReport) -> TextTable:
    titles = ["", "mAP", "same decision", "KL to student", "wrong", "student is right"]
    table = TextTable(titles, title="Agreement with the teachers on clean test images")
    for row in report.teachers or ():
        assert isinstance(row, LabelAgreement), "a report with labels has figures of labels"
        wrong = (f"{row.wrong:.2%}", _percent(row.right_when_wrong, 1))
        table.add_row(row.source, f"{row.map:.2%}", f"{row.agreement:.2%}", f"{row.kl:.4f}", *wrong)
    return table


def _notes(report: EvaluationReport) -> Iterable[str]:
    yield from (f"Note: {note}." for note in report.notes)
    if len(report.figures) > 1:
        yield f"← everything below the first table is about this checkpoint: {report.checkpoint}."
    robust = report.robustness
    if robust is not None:
        clean = f"clean error on the same {robust.samples:,} images {robust.summary.clean_error:.2%}"
        yield f"Corruptions: {robust.source}; {clean}."
        if robust.baseline is None:
            yield "No run on labels alone to compare with: mean errors are not normalised, and there is no mCE."
        else:
            figures = f"mCE {_ratio(robust.summary.mce)}, relative mCE {_ratio(robust.summary.relative_mce)}"
            yield f"{figures}: means of CE and relative CE; 1 equals the baseline, {robust.baseline}."
            missing = len(robust.summary.corruptions) - (robust.summary.relative_corruptions or 0)
            if missing:
                yield f"Relative mCE leaves out {missing} of 15 corruptions: they do not raise the baseline's error."
    if report.labels:
        yield "AP: average precision; precision and recall count labels of a probability of 0.5 or more."
    if report.teachers is not None and report.labels:
        yield "A decision is whether an image has a label. KL is in nats per decision, at temperature 1."
    elif report.teachers is not None:
        yield "follows, is right: shares of the images that the teacher gets wrong. KL is in nats, at temperature 1."
    best = next((row for row in report.figures if row.checkpoint == "best"), None)
    if best is not None:
        yield "The best epoch was chosen on the test split, as in papers: its figures are optimistic."
    yield f"Everything is in {report.folder}"
    yield f"next: {shlex.join(['export-student', str(report.run)])}"


def _percent(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _times_100(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
