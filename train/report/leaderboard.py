"""The page's leaderboard: a table with a body per setting, first a row with its mean, below it a row per seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from html import escape

from cache_tools.screen import nats
from train.report.comparison import Comparison, Setting, label_names, short_names
from train.report.records import FIGURE_ON, FINISHED, TrialRecord
from train.report.spread import Spread

Format = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A figure in the table.

    Attributes:
        header: its text; a line break is written `|`.
        text: formats a value.
        largest_first: the first press of the header sorts the largest value first.
        has_deviation: whether the standard deviation is shown beside the mean.
        interval: header of the column with the interval; empty for no such column.
        hint: tooltip of the header.
    """

    name: str
    header: str
    text: Format
    largest_first: bool = False
    has_deviation: bool = False
    interval: str = ""
    hint: str = ""


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f}"


def _headline_column(name: str, header: str) -> Column:
    return Column(
        name=name,
        header=header,
        text=_percent,
        largest_first=True,
        has_deviation=True,
        interval="95 % interval",
        hint="test split, last epoch",
    )


def _best_column(name: str, header: str) -> Column:
    hint = "of all epochs, chosen on the test split, hence optimistic"
    return Column(name=f"best_{name}", header=f"Best|{header} %", text=_percent, largest_first=True, hint=hint)


def _ema_column(name: str, header: str) -> Column:
    hint = "average of the weights"
    return Column(name=f"ema_{name}", header=f"EMA|{header} %", text=_percent, largest_first=True, hint=hint)


# The first column of a page is the figure that its settings are compared by.
HEADLINE_COLUMNS = {"top1": _headline_column("top1", "Top-1 %"), "map": _headline_column("map", "mAP %")}
COLUMNS = (
    Column(
        name="gain",
        header="Gain over|labels alone",
        text=_points,
        largest_first=True,
        has_deviation=True,
        interval="95 % interval|of the gain",
        hint="points: mean over the seeds of this student minus the same student on labels alone, same seed",
    ),
    Column(name="top5", header="Top-5 %", text=_percent, largest_first=True, has_deviation=True),
    Column(name="nll", header="NLL", text=nats, has_deviation=True, hint="negative log-likelihood in nats"),
    Column(name="bce", header="BCE", text=nats, has_deviation=True, hint="binary cross entropy per label in nats"),
    Column(name="ece", header="ECE", text=nats, has_deviation=True, hint="expected calibration error, 15 bins"),
    Column(name="parameters", header="Parameters", text=lambda value: f"{value:,.0f}"),
    Column(name="flops", header="MFLOPs", text=lambda value: f"{value / 1e6:,.1f}", hint="per image, forward"),
    Column(name="latency_1_ms", header="Latency ms,|1 image", text=lambda value: f"{value:,.2f}"),
    Column(name="latency_128_ms", header="Latency ms,|batch of 128", text=lambda value: f"{value:,.1f}"),
    Column(name="train_s", header="Training|s", text=lambda value: f"{value:,.1f}", hint="training steps only"),
    _best_column("top1", "top-1"),
    _best_column("map", "mAP"),
    Column(name="best_epoch", header="at|epoch", text=lambda value: f"{value:.0f}", largest_first=True),
    _ema_column("top1", "top-1"),
    _ema_column("map", "mAP"),
)


def leaderboard(comparison: Comparison, anchors: Mapping[TrialRecord, str]) -> str:
    """The leaderboard as HTML.

    Args:
        anchors: trial → id of its section of the page.
    """
    more = dict.fromkeys(name for one in comparison.settings for name in one.figures if name.startswith(FIGURE_ON))
    others = [*(_figure_on(name, comparison.figure_name) for name in more), *COLUMNS]
    first = HEADLINE_COLUMNS[comparison.figure]
    tested = {trial.test_split for trial in comparison.trials if trial.test_split}
    if more and len(tested) == 1:
        first = replace(first, hint=f"split {tested.pop()}, last epoch")
    known = [column for column in others if any(column.name in one.figures for one in comparison.settings)]
    table = _Table(comparison, [first, *known], anchors)
    return "\n".join(
        ['<table id="board">', f"<caption>{table.caption()}</caption>", "<thead>", table.head(), "</thead>"]
        + [line for number, setting in enumerate(comparison.settings) for line in table.body(number, setting)]
        + ["</table>"]
    )


def _figure_on(name: str, figure: str) -> Column:
    """The column of a further test split."""
    split = name.removeprefix(FIGURE_ON)
    header = f"{escape(split)}|{figure} %"
    hint = f"split {split}, last epoch"
    return Column(name=name, header=header, text=_percent, largest_first=True, has_deviation=True, hint=hint)


class _Table:
    def __init__(self, comparison: Comparison, columns: list[Column], anchors: Mapping[TrialRecord, str]) -> None:
        self.comparison, self.columns, self.anchors = comparison, columns, anchors
        self.has_seeds = any(len(setting.trials) > 1 for setting in comparison.settings)
        self.has_intervals = any(spread.n > 1 for one in comparison.settings for spread in one.figures.values())
        self.has_statuses = any(trial.status != FINISHED for trial in comparison.trials)
        self.names = short_names(comparison.varied)
        self.first_columns = [column for column in columns if column.interval]
        self.other_columns = [column for column in columns if not column.interval]

    def caption(self) -> str:
        text = "Test figures after the last epoch."
        if self.has_intervals:
            text += (
                " Several seeds: mean ± standard deviation, and the 95 % confidence interval of the mean (Student's t)."
            )
        if any(column.name == "gain" for column in self.columns):
            figure = self.comparison.figure_name
            text += f" Gain: {figure} minus that of the same student on labels alone, paired by seed, in points."
        return text

    def head(self) -> str:
        cells = [_header("student", "Student", "ascending"), _header("loss", "Loss", "ascending", "varied")]
        cells += [_header(f"setting-{key}", escape(name), "ascending", "varied") for key, name in self.names.items()]
        for column in self.first_columns:
            cells.append(self._head(column))
            if self.has_intervals:
                key = "interval" if column.name in HEADLINE_COLUMNS else f"{column.name}-interval"
                cells.append(_header(key, column.interval, "ascending", "number", "sorts by the width of the interval"))
        cells.append(_header("seed", "Seeds" if self.has_seeds else "Seed", "ascending", "number"))
        if self.has_statuses:
            cells.append(_header("status", "Status", "ascending"))
        cells += [self._head(column) for column in self.other_columns]
        return f"<tr>{''.join(cells)}</tr>"

    def _head(self, column: Column) -> str:
        first = "descending" if column.largest_first else "ascending"
        kind = "number wide" if self.has_intervals and column.has_deviation else "number"
        return _header(column.name, column.header, first, kind, column.hint)

    def body(self, number: int, setting: Setting) -> Iterator[str]:
        """A row of the setting and, if it has several trials, a row per trial."""
        several = len(setting.trials) > 1
        seeds = [f"setting-{number}-seed-{place}" for place in range(len(setting.trials))] if several else []
        yield f'<tbody data-setting="{number}" data-student="{_e(setting.student)}" data-loss="{_e(setting.loss)}">'
        kind = "setting" if setting.finished else "setting unfinished"
        yield f'<tr class="{kind}">{"".join(self._setting(setting, seeds))}</tr>'
        for trial, name in zip(setting.trials if several else (), seeds, strict=True):
            yield f'<tr class="seed" id="{name}" hidden>{"".join(self._seed(trial))}</tr>'
        yield "</tbody>"

    def _setting(self, setting: Setting, seeds: list[str]) -> Iterator[str]:
        first = setting.trials[0]
        name = _e(setting.student)
        link = name if seeds else f'<a href="#{self.anchors[first]}">{name}</a>'
        names = label_names(self.comparison.varied)
        parts = [setting.loss, *(f"{names[key]} {text}" for key, text in setting.varied.items())]
        rest = " · ".join(f"<span>{_e(part)}</span>" for part in parts)
        place = f'<span class="key"></span>{link}<span class="rest">{rest}</span>'
        yield f'<th scope="row" data-value="{name}">{place}</th>'
        yield _varied_cell(setting.loss)
        yield from (_varied_cell(setting.varied[key]) for key in self.comparison.varied)
        count = len(setting.seeds)
        button = f'<button type="button" class="unfold" aria-expanded="false" aria-controls="{" ".join(seeds)}">'
        text = (
            f'{button}{count}<span class="aside"> seeds of {_e(setting.label)}</span></button>' if seeds else first.seed
        )
        middle = [f'<td class="number" data-value="{count if seeds else first.seed}">{text}</td>']
        yield from self._figures(setting.figures, [*middle, _status(setting)] if self.has_statuses else middle)

    def _seed(self, trial: TrialRecord) -> Iterator[str]:
        yield f'<th scope="row"><a href="#{self.anchors[trial]}">{_e(trial.student)}, seed {trial.seed}</a></th>'
        yield '<td class="varied"></td>' * (1 + len(self.comparison.varied))
        middle = [f'<td class="number">{trial.seed}</td>']
        status = f"<td>{_badge(trial.status)}{_reason(trial.error)}</td>"
        figures = {name: Spread(n=1, mean=value) for name, value in trial.figures.items()}
        yield from self._figures(figures, [*middle, status] if self.has_statuses else middle)

    def _figures(self, figures: Mapping[str, Spread], middle: list[str]) -> Iterator[str]:
        """Cells of all figures; `middle` are the cells after the first figures and their intervals."""
        headline = figures.get(self.comparison.figure)
        count = 0 if headline is None else headline.n
        for column in self.first_columns:
            yield self._figure(column, figures.get(column.name))
            if self.has_intervals:
                yield _interval(column, figures.get(column.name), count)
        yield from middle
        yield from (self._figure(column, figures.get(column.name)) for column in self.other_columns)

    def _figure(self, column: Column, spread: Spread | None) -> str:
        wide = " wide" if self.has_intervals and column.has_deviation else ""
        if spread is None:
            return f'<td class="number{wide}">–{"<span class=deviation></span>" if wide else ""}</td>'
        deviation = ""
        if wide:
            text = "" if spread.std is None else f"±&#8239;{column.text(spread.std).lstrip('+')}"
            deviation = f'<span class="deviation">{text}</span>'
        return f'<td class="number{wide}" data-value="{spread.mean!r}">{column.text(spread.mean)}{deviation}</td>'


def _header(name: str, text: str, first: str, kind: str = "", hint: str = "") -> str:
    """A header that sorts; `first` is the direction of the first press."""
    title = f' title="{_e(hint)}"' if hint else ""
    return (
        f'<th scope="col" class="{kind}" data-key="{_e(name)}" data-first="{first}">'
        f'<button type="button"{title}>{text.replace("|", " <br>")}</button></th>'
    )


def _varied_cell(text: str) -> str:
    """A value that differs between settings. On a phone these values are below the student instead."""
    return f'<td class="varied" data-value="{_e(text)}">{_e(text)}</td>'


def _interval(column: Column, spread: Spread | None, seeds: int) -> str:
    """The interval, with the number of values where that is not the number of seeds of the setting."""
    if spread is None or spread.low is None or spread.high is None:
        return '<td class="number">–</td>'
    width, between = spread.high - spread.low, "to" if column.name == "gain" else "–"
    count = "" if spread.n == seeds else f" ({spread.n} pairs)"
    text = f"{column.text(spread.low)} {between} {column.text(spread.high)}{count}"
    return f'<td class="number" data-value="{width!r}">{text}</td>'


def _status(setting: Setting) -> str:
    finished = sum(trial.status == FINISHED for trial in setting.trials)
    others = list(dict.fromkeys(trial.status for trial in setting.trials if trial.status != FINISHED))
    text = _badge(FINISHED) if not others else ", ".join(map(_badge, others))
    count = f" {finished} of {len(setting.trials)} finished" if len(setting.trials) > 1 and others else ""
    reason = _reason(setting.trials[0].error) if len(setting.trials) == 1 else ""
    return f'<td data-value="{_e(", ".join(others) or FINISHED)}">{text}{count}{reason}</td>'


def _badge(status: str) -> str:
    return f'<span class="status status-{_e(status)}">{_e(status)}</span>'


def _reason(error: str) -> str:
    return f' <span class="why">{_e(error)}</span>' if error else ""


def _e(text: str) -> str:
    return escape(text, quote=True)
