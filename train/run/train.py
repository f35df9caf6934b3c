"""Run a recipe: open its data, claim the run folder, train to the last epoch, store the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from cache_tools.config import dump_yaml
from cache_tools.console import OUT_OF_TIME, Progress, Stopped, StopRequest, print_line, resolve_device
from cache_tools.errors import RecipeError, StorageError
from cache_tools.home.registry import cache_path
from cache_tools.reader import TeacherCache
from cache_tools.system.joined import Joined, failing_together, joined_ranks
from cache_tools.system.memory import drop_tracebacks
from cache_tools.system.ranks import ALONE
from train.data import TrainingData, open_data, with_cached_images
from train.evaluate.multilabel import HEADLINES
from train.feed import Feed
from train.loop import EpochState, explain_failure, repeatable, train_epoch
from train.recipe import TrainRecipe, recipe_digest
from train.report.html import write_report
from train.report.pictures import PictureSource
from train.run.ranks import check_batches, check_ranks, check_same_run
from train.run.state import Run, command_line, draw_curves
from train.runs import folder, trackers
from train.runs.epoch_clock import EpochClock
from train.runs.metrics import RunLog, read_metrics
from train.runs.predictions import read_predictions
from train.runs.result import RunResult, load_result
from train.weights.run_files import write_file

Value = TypeVar("Value")
StopRule = Callable[[int, Sequence[Path]], set[Path]]
"""(number of finished epochs, folders of the runs that are to continue) → folders of those that stop instead."""


_END = 2
"""In votes of ranks: store a checkpoint and end. 1 is a checkpoint alone, 0 nothing."""


def train_student(recipe: TrainRecipe, *, overwrite: bool = False, pictures: bool = False) -> RunResult:
    """Train a student, resume an interrupted run of the same recipe, or return the result of a finished one.

    With `compare_with_labels` the same student is then trained on labels alone, in `labels-only` inside the run folder.

    Args:
        overwrite: start from scratch, whatever is in the run folder.
        pictures: show samples of the cache in the report, with what the teachers and the student say.

    Raises:
        CacheError: a problem with recipe, device, cache, images, storage, divergence or memory.
    """
    if pictures and recipe.stage_budget is not None:
        raise RecipeError(
            "pictures need whole views after the training, which would take more than the budget",
            where="--pictures, --stage-budget",
            next_step="leave out one of them, or make the page later with report-students --pictures URL",
        )
    if pictures and recipe.cache is None:
        raise RecipeError(
            "there is no cache whose samples could be shown",
            where="--pictures",
            next_step="train from a cache, or leave out --pictures",
        )
    with failing_together():
        device = run_device(recipe)
        check_ranks(recipe, device)
    with joined_ranks(device) as ranks:
        result = _train_student(recipe, device, ranks, overwrite)
        if ranks is None or ranks.rank.is_first:
            source = None
            if pictures and recipe.cache is not None:
                source = PictureSource(recipe.cache, recipe.data_dir, str(device))
            write_report([result.folder], result.folder / folder.REPORT, pictures=source)
        return result


def _train_student(recipe: TrainRecipe, device: torch.device, ranks: Joined | None, overwrite: bool) -> RunResult:
    request = StopRequest(recipe.max_minutes)
    with _first_before_others(ranks):  # it may download or index images
        recipe = with_cached_images(recipe)
        trackers.choose_trackers(recipe)  # fail on a missing package before the data are opened
        data = open_data(recipe, device)
    if data.cache is not None and (ranks is None or ranks.rank.is_first):
        print_stage(data.cache)
    try:
        if ranks is not None:
            check_same_run(recipe.values() | {"cache": data.identity()}, ranks)
        result = train_on(data, recipe, device, overwrite=overwrite, ranks=ranks, request=request)
    finally:
        data.targets.close()
    if recipe.compare_with_labels and recipe.loss.needs_targets and (result.labels_only is None or overwrite):
        assert data.num_views is not None, "a run with targets has a number of views"
        on_labels = recipe.on_labels(data.dataset, data.views, data.num_views)
        on_labels = on_labels.model_copy(update={"out": result.folder / folder.LABELS_ONLY})
        baseline = train_on(
            data.labels_only(),
            on_labels,
            device,
            overwrite=overwrite,
            ranks=ranks,
            printed=result.pixels,
            request=request,
        )
        result = result.model_copy(update={"labels_only": baseline, "command": command_line()})
        if ranks is None or ranks.rank.is_first:
            draw_curves(result)
            result.save()
    return result


def train_on(
    data: TrainingData,
    recipe: TrainRecipe,
    device: torch.device,
    *,
    overwrite: bool = False,
    ranks: Joined | None = None,
    printed: str | None = None,
    request: StopRequest | None = None,
) -> RunResult:
    """`train_student` on data that are already open (from a cache or from live teachers), without the comparison.

    Args:
        ranks: that train together. Rank 0 has the folder of the run; all return its result.
        printed: the line on where the pixels are that was printed last; it is not repeated.
        request: ends the run inside an epoch, after a checkpoint.
    """
    with (
        _claimed_by_first(data, recipe, overwrite, ranks) as (path, digest, finished),
        repeatable(device, recipe.deterministic),
    ):
        if finished is not None:
            return finished
        with _first_before_others(ranks):  # it may make a file of pixels
            feed = data.feed(recipe, device, rank=ALONE if ranks is None else ranks.rank)
        with closing(feed), explain_failure(recipe, device):
            if feed.served != printed:
                print_served(feed)
            run = Run(data, recipe, device, path, digest, feed.steps_per_epoch, pixels=feed.served, ranks=ranks)
            if ranks is not None:
                check_batches(feed.bounds, run.learner.student, ranks.rank)
            title = f"train {recipe.student} ({recipe.loss_name})"
            [outcome] = train_group([run], feed, title, ranks=ranks, request=request)
            if isinstance(outcome, Exception):
                raise outcome
        if ranks is not None:
            outcome = ranks.from_first(lambda: outcome)
        assert isinstance(outcome, RunResult), "a run without a stop rule trains to its last epoch"
        return outcome


@contextmanager
def _first_before_others(ranks: Joined | None) -> Iterator[None]:
    """Inside, the first rank of a machine is done before the others begin, and an error of one is raised on all."""
    if ranks is None:
        yield
        return
    with ranks.failing_together(), ranks.first_here_before_others():
        yield


@contextmanager
def _claimed_by_first(
    data: TrainingData, recipe: TrainRecipe, overwrite: bool, ranks: Joined | None
) -> Iterator[tuple[Path, str, RunResult | None]]:
    """`claimed_run`, of several ranks by the first; also the result of a run that is finished."""
    if ranks is not None and not ranks.rank.is_first:
        yield ranks.from_first(lambda: (Path(), "", None))
        return
    with claimed_run(data, recipe, overwrite=overwrite) as (path, digest):
        if (finished := load_result(path)) is not None:
            read_metrics(path)  # for its curves and its page: fail before anything else is trained
            read_predictions(path)
        claimed = path, digest, finished
        yield claimed if ranks is None else ranks.from_first(lambda: claimed)


def train_group(
    runs: Sequence[Run],
    feed: Feed,
    title: str,
    *,
    stop: StopRule | None = None,
    after_epoch: Callable[[], None] | None = None,
    ranks: Joined | None = None,
    request: StopRequest | None = None,
) -> list[RunResult | Exception | None]:
    """Train the remaining epochs of every run; runs that are ahead wait for the others.

    Args:
        runs: of one batch stream (see `loop.train_epoch`) and with the same number of epochs.
        title: of the progress bar.
        stop: called before every epoch.
        after_epoch: called after every epoch, with its evaluation.
        ranks: that train a single run together.
        request: a signal or a limit of time stores a checkpoint and ends the training; None to be interrupted.

    Returns:
        For each run its result, None if `stop` named it or if another rank has its folder, or the error that ended it;
        an error ends its own run only.

    Raises:
        StorageError, OSError: the files of a run cannot be written.
        Stopped: as `request` says.
    """
    alone = len(runs) == 1
    samples, epochs = feed.samples_per_epoch, runs[0].recipe.epochs
    first = min(len(run.history) for run in runs)
    outcomes: dict[Run, RunResult | Exception | None] = {}
    with ExitStack() as stack:
        logs = {run: stack.enter_context(RunLog(run.path, run.recipe, run.history)) for run in runs if run.writes}
        done = first * samples + min(run.samples_begun(feed) for run in runs if len(run.history) == first)
        progress = stack.enter_context(Progress(title, epochs * samples, "images", done=done))
        records = stack.enter_context(_Records(runs, logs))
        clock = EpochClock(run.recipe.checkpoint_every_minutes for run in runs)
        if request is not None:
            stack.enter_context(request.deferred())

        def advance(samples: int) -> None:
            progress.advance(samples)
            records.write_stored()

        for epoch in range(first, epochs):
            training = [run for run in runs if len(run.history) == epoch and run not in outcomes]
            if stop is not None and training:
                records.wait()  # it reads the metrics
                stopped = stop(epoch, [run.path for run in training])
                outcomes |= {run: None for run in training if run.path in stopped}
                training = [run for run in training if run.path not in stopped]
            if not training:
                continue
            clock.begin_epoch([0.0 if run.begun is None else run.begun["train_s"] for run in training])
            means = train_epoch(
                [run.learner for run in training],
                feed,
                epoch,
                advance,
                begun=[run.begun for run in training],
                save=partial(_save_if_due, training, clock, ranks, request)
                if clock.stores_checkpoints or request is not None
                else None,
            )
            times = clock.train_s()
            records.wait()  # for the epoch before: its state is replaced by the next one
            for run, mean, train_s in zip(training, means, times, strict=True):
                if isinstance(mean, Exception):
                    outcomes[run] = mean
                    continue
                row = _value_or_error(run, partial(run.finish_epoch, mean, train_s, samples), alone)
                if isinstance(row, Exception):
                    outcomes[run] = row
                    continue
                records.begin(run)
                progress.advance(0, _note(row, epochs))
            if after_epoch is not None:
                after_epoch()
            if epoch + 1 < epochs:
                _stop_if_asked(ranks, request)
        records.wait()
        for run, log in logs.items():
            if run not in outcomes:
                result = _value_or_error(run, run.finish, alone)
                outcomes[run] = result if isinstance(result, Exception) else log.finish(result)
    if ranks is not None:
        ranks.close_vote()
    return [outcomes.get(run) for run in runs]


class _Records:
    """Passes each finished epoch on to the metrics and trackers of its run, once its state is stored.

    When the context ends, all that was begun is stored, and the background threads of the runs have ended.
    """

    def __init__(self, runs: Sequence[Run], logs: Mapping[Run, RunLog]) -> None:
        self._runs, self._logs = runs, logs
        self._waiting: dict[Run, list[dict[str, Any]]] = {}

    def begin(self, run: Run) -> None:
        """Record the epoch that a run has just finished, as soon as its state is stored."""
        if run in self._logs:
            self._waiting[run] = [*run.history]

    def write_stored(self) -> None:
        """Record the epochs whose states are stored by now, and raise the error of one that could not be."""
        for run in [run for run in self._waiting if run.is_stored]:
            self._write(run)

    def wait(self) -> None:
        """Record all finished epochs."""
        for run in list(self._waiting):
            self._write(run)
        for run in self._logs:
            run.wait()

    def _write(self, run: Run) -> None:
        history = self._waiting.pop(run)
        run.wait()
        self._logs[run].write(history, run.in_background)

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except BaseException:
            if error is None or isinstance(error, KeyboardInterrupt):
                raise  # what was asked to stop must not seem to have been stored
        finally:
            for run in self._runs:
                run.close()


@contextmanager
def claimed_run(data: TrainingData, recipe: TrainRecipe, *, overwrite: bool = False) -> Iterator[tuple[Path, str]]:
    """Create or enter the folder of a run, and keep other processes out of it.

    Yields:
        The folder and the digest of the run.

    Raises:
        RecipeError, StorageError: see `folder.claimed`.
    """
    identity = {"recipe": recipe.values(), "data": data.identity()}
    digest = recipe_digest(identity)
    path = folder.run_folder(recipe, digest)
    with folder.claimed(path, identity, overwrite=overwrite):
        if load_result(path) is None:
            write_file(path / folder.RECIPE, dump_yaml(recipe.stored()).encode())
            if data.cache is not None:
                source = json.dumps(_describe_cache(data.cache), indent=2, ensure_ascii=False)
                write_file(path / folder.CACHE, source.encode())
        yield path, digest


def print_served(feed: Feed) -> None:
    """Print where the pixels of a run are, on standard error."""
    if feed.served is not None:
        print_line(feed.served, file=sys.stderr)


def print_stage(cache: TeacherCache) -> None:
    """Print what a stage budget does, on standard error; nothing without one."""
    if cache.stage is not None:
        print_line(str(cache.stage), file=sys.stderr)


def run_device(recipe: TrainRecipe) -> torch.device:
    """The device of a run.

    Raises:
        DeviceError: no such device.
        RecipeError: a device that cannot train in this precision, or a step that cannot be compiled or captured.
    """
    device = resolve_device(recipe.device)
    if recipe.precision == "float16" and device.type != "cuda":
        raise RecipeError(
            "float16 training needs CUDA",
            where=f"--device {recipe.device}",
            next_step="use --precision bfloat16 or float32 on the CPU",
        )
    if recipe.compile == "step" and (device.type != "cuda" or recipe.precision == "float16"):
        raise RecipeError(
            "a captured step needs CUDA, in float32 or bfloat16",
            where=f"--compile step, --device {recipe.device}, --precision {recipe.precision}",
            next_step="use --compile model or off",
        )
    return device


def _save_if_due(
    training: Sequence[Run],
    clock: EpochClock,
    ranks: Joined | None,
    request: StopRequest | None,
    states: Callable[[], list[EpochState | None]],
) -> None:
    """Store the states of runs inside an epoch, if it is time or the process is asked to end, which it then does.

    Of several ranks all do so after the same step.
    """
    stopped = None if request is None else request.pending
    wanted = _END if stopped is not None else int(clock.is_due())
    if ranks is not None:
        wanted = ranks.vote(wanted)
    if not wanted:
        return
    for run, state, train_s in zip(training, states(), clock.train_s(), strict=True):
        if state is not None:
            run.save_checkpoint(state, train_s)
    clock.restart()
    if wanted == _END:
        raise stopped or Stopped("Stopped with the other ranks", OUT_OF_TIME)


def _stop_if_asked(ranks: Joined | None, request: StopRequest | None) -> None:
    """End the process between two epochs, if it is asked to."""
    stopped = None if request is None else request.pending
    asked = [stopped] if ranks is None else ranks.collect(stopped and (stopped.reason, stopped.code))
    if any(asked):
        raise stopped or Stopped("Stopped with the other ranks", OUT_OF_TIME)


def _describe_cache(cache: TeacherCache) -> dict[str, Any]:
    """The location of the cache of a run: `path` and, for a remote cache, `url`; `path` is then its local mirror."""
    url = None if cache.origin is None else cache.origin.url
    path = cache.path
    if cache.stage is not None:  # it is removed at the end: readers find the mirror, or ask the store
        path = cache_path(cache.manifest.name, cache.manifest.fingerprint)
    return {"path": str(path.absolute()), "url": url, "manifest": cache.manifest.model_dump(mode="json")}


def _value_or_error(run: Run, work: Callable[[], Value], alone: bool) -> Value | Exception:
    """Call `work` for a run.

    Returns:
        Its value, or an error that concerns this run only, such as divergence or too little memory.
    """
    try:
        with explain_failure(run.recipe, run.device):
            return work()
    except (StorageError, OSError):
        raise
    except Exception as error:
        return error if alone else drop_tracebacks(error)  # the other runs need the memory


def _note(row: dict[str, Any], epochs: int) -> str:
    figures = [
        f", test {text} {row[f'test_{name}']:.2%}" for name, text in HEADLINES.items() if row.get(f"test_{name}")
    ]
    return f"epoch {row['epoch'] + 1}/{epochs}: loss {row['loss']:.4f}{''.join(figures)}"
