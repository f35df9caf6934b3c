"""Run a recipe: open its data, claim the run folder, train to the last epoch, store the result."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from cache_tools.config import dump_yaml
from cache_tools.console import Progress, describe_device, resolve_device, warn
from cache_tools.errors import RecipeError, StorageError, WeightsError
from cache_tools.files import put_durably
from cache_tools.images.classes import missing_notes
from cache_tools.images.image_set import ImageSet
from cache_tools.memory import drop_tracebacks
from cache_tools.reader import TeacherCache
from train import checkpoints
from train.checkpoints import StudentCard
from train.cost import check_images, count_parameters
from train.data import TrainingData, open_data, with_cached_images
from train.epoch_clock import EpochClock
from train.evaluate.metrics import Evaluation, evaluate
from train.evaluate.multilabel import HEADLINES, Figures, MultiLabelEvaluation, evaluate_multilabel, headline_of
from train.feed import Feed
from train.initial import check_outputs, first_student
from train.loop import EpochState, Learner, explain_out_of_memory, repeatable, train_epoch
from train.losses.class_weights import class_weights
from train.objective import Objective
from train.recipe import TrainRecipe, recipe_digest
from train.report.html import write_report
from train.runs import folder, trackers
from train.runs.curves import plot_curves
from train.runs.metrics import RunLog, read_metrics
from train.runs.predictions import store_predictions
from train.runs.result import RunResult, SplitResult, figures_of_teachers, load_result
from train.runs.stored import data_name

Value = TypeVar("Value")
StopRule = Callable[[int, Sequence[Path]], set[Path]]
"""(number of finished epochs, folders of the runs that are to continue) → folders of those that stop instead."""


def train_student(recipe: TrainRecipe, *, overwrite: bool = False) -> RunResult:
    """Train a student, resume an interrupted run of the same recipe, or return the result of a finished one.

    With `compare_with_labels` the same student is then trained on labels alone, in `labels-only` inside the run folder.

    Args:
        overwrite: start from scratch, whatever is in the run folder.

    Raises:
        CacheError: a problem with recipe, device, cache, images, storage, divergence or memory.
    """
    device = run_device(recipe)
    recipe = with_cached_images(recipe)
    trackers.choose_trackers(recipe)  # fail on a missing package before the data are opened
    data = open_data(recipe, device)
    try:
        result = train_on(data, recipe, device, overwrite=overwrite)
    finally:
        data.targets.close()
    if recipe.compare_with_labels and recipe.loss.needs_targets and (result.labels_only is None or overwrite):
        assert data.num_views is not None, "a run with targets has a number of views"
        on_labels = recipe.on_labels(data.dataset, data.views, data.num_views)
        on_labels = on_labels.model_copy(update={"out": result.folder / folder.LABELS_ONLY})
        baseline = train_on(data.labels_only(), on_labels, device, overwrite=overwrite)
        result = result.model_copy(update={"labels_only": baseline, "command": command_line()})
        draw_curves(result)
        result.save()
    write_report([result.folder], result.folder / folder.REPORT)
    return result


def train_on(data: TrainingData, recipe: TrainRecipe, device: torch.device, *, overwrite: bool = False) -> RunResult:
    """`train_student` on data that are already open (from a cache or from live teachers), without the comparison."""
    with claimed_run(data, recipe, overwrite=overwrite) as (path, digest), repeatable(device, recipe.deterministic):
        if (finished := load_result(path)) is not None:
            return finished
        feed = data.feed(recipe, device)
        with closing(feed), explain_out_of_memory(recipe, device):
            run = Run(data, recipe, device, path, digest, feed.steps_per_epoch)
            [outcome] = train_group([run], feed, f"train {recipe.student} ({recipe.loss_name})")
            if isinstance(outcome, Exception):
                raise outcome
        assert outcome is not None, "a run without a stop rule trains to its last epoch"
        return outcome


def train_group(
    runs: Sequence[Run], feed: Feed, title: str, *, stop: StopRule | None = None
) -> list[RunResult | Exception | None]:
    """Train the remaining epochs of every run; runs that are ahead wait for the others.

    Args:
        runs: of one batch stream (see `loop.train_epoch`) and with the same number of epochs.
        title: of the progress bar.
        stop: called before every epoch.

    Returns:
        For each run its result, None if `stop` named it, or the error that ended it; an error ends its own run only.

    Raises:
        StorageError, OSError: the files of a run cannot be written.
    """
    alone = len(runs) == 1
    samples, epochs = feed.samples_per_epoch, runs[0].recipe.epochs
    first = min(len(run.history) for run in runs)
    outcomes: dict[Run, RunResult | Exception | None] = {}
    with ExitStack() as stack:
        logs = {run: stack.enter_context(RunLog(run.path, run.recipe, run.history)) for run in runs}
        done = first * samples + min(run.samples_begun(feed) for run in runs if len(run.history) == first)
        progress = stack.enter_context(Progress(title, epochs * samples, "images", done=done))
        clock = EpochClock(run.recipe.checkpoint_every_minutes for run in runs)
        for epoch in range(first, epochs):
            training = [run for run in runs if len(run.history) == epoch and run not in outcomes]
            if stop is not None and training:
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
                progress.advance,
                begun=[run.begun for run in training],
                save=partial(_save_if_due, training, clock) if clock.stores_checkpoints else None,
            )
            times = clock.train_s()
            for run, mean, train_s in zip(training, means, times, strict=True):
                if isinstance(mean, Exception):
                    outcomes[run] = mean
                    continue
                row = _value_or_error(run, partial(run.finish_epoch, mean, train_s, samples), alone)
                if isinstance(row, Exception):
                    outcomes[run] = row
                    continue
                logs[run].write(run.history)
                progress.advance(0, _note(row, epochs))
        for run, log in logs.items():
            if run not in outcomes:
                result = _value_or_error(run, run.finish, alone)
                outcomes[run] = result if isinstance(result, Exception) else log.finish(result)
    return [outcomes[run] for run in runs]


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
            put_durably(path / folder.RECIPE, dump_yaml(recipe.stored()).encode())
            if data.cache is not None:
                source = json.dumps(_describe_cache(data.cache), indent=2, ensure_ascii=False)
                put_durably(path / folder.CACHE, source.encode())
        yield path, digest


def run_device(recipe: TrainRecipe) -> torch.device:
    """The device of a run.

    Raises:
        DeviceError: no such device.
        RecipeError: a device that cannot train in this precision.
    """
    device = resolve_device(recipe.device)
    if recipe.precision == "float16" and device.type != "cuda":
        raise RecipeError(
            "float16 training needs CUDA",
            where=f"--device {recipe.device}",
            next_step="use --precision bfloat16 or float32 on the CPU",
        )
    return device


class Run:
    """A run in its folder, continued after its last finished epoch or from a checkpoint inside the next one.

    Attributes:
        history: a row of figures for each finished epoch.
        begun: the checkpoint inside the next epoch; None to start it from its first batch.
        best_epoch: the one with the highest test top-1 (mAP with several labels) so far, counted from 0; None before
            the first evaluation.
    """

    def __init__(
        self,
        data: TrainingData,
        recipe: TrainRecipe,
        device: torch.device,
        path: Path,
        digest: str,
        steps_per_epoch: int,
    ) -> None:
        self.data, self.recipe, self.device, self.path = data, recipe, device, path
        self.learner = _create_learner(data, recipe, device, steps_per_epoch)
        self.card = _create_card(data, recipe, digest)
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        if (state := checkpoints.load_state(path / folder.STATE, ("learner", "history", "best_epoch"))) is not None:
            self.learner.load_state_dict(state["learner"])
            self.history, self.best_epoch = state["history"], state["best_epoch"]
        self.begun = self._load_checkpoint()
        if self.begun is not None:
            self.learner.load_state_dict(self.begun.pop("learner"))

    def save_checkpoint(self, state: EpochState, train_s: float) -> None:
        """Store a state inside the current epoch.

        Args:
            train_s: time of training in this epoch so far.
        """
        inside = {**state, "epoch": len(self.history), "train_s": train_s}
        checkpoints.save_state(self.path / folder.CHECKPOINT, inside)

    def samples_begun(self, feed: Feed) -> int:
        """Number of samples of the current epoch that the run has been trained on."""
        return 0 if self.begun is None else feed.bounds[self.begun["batches"] - 1][1]

    def _load_checkpoint(self) -> EpochState | None:
        """The checkpoint inside the next epoch, if there is one."""
        try:
            state = checkpoints.load_state(
                self.path / folder.CHECKPOINT, ("learner", "batches", "means", "random", "epoch", "train_s")
            )
        except WeightsError as error:
            warn(f"{error.what} ({error.where}): the epoch starts again")
            return None
        # One of an earlier epoch was left by a process that was killed just after the epoch's commit.
        return state if state is not None and state["epoch"] == len(self.history) else None

    def finish_epoch(self, means: dict[str, float], train_s: float, samples: int) -> dict[str, Any]:
        """Evaluate if this epoch is due and store the state to resume from.

        Returns:
            The epoch's row of figures.
        """
        epoch = len(self.history)
        row = {"epoch": epoch, "updates": self.learner.updates, "learning_rate": self.learner.learning_rate}
        row |= {**means, "train_s": train_s, "images_per_s": samples / train_s, **self._evaluate(epoch)}
        self._commit_epoch(row)
        return row

    def finish(self) -> RunResult:
        """Write the files of a finished run."""
        card = self.card.model_copy(update={"epoch": len(self.history)})
        checkpoints.save_student(self.path / checkpoints.LAST, self.learner.student, card)
        if self.learner.average is not None:
            checkpoints.save_student(self.path / checkpoints.EMA, self.learner.average.module, card)
        if not self.data.images.multi_label:  # a row holds one label and one prediction
            student, test = self.learner.student, self.data.test
            store_predictions(self.path, student, test, self.data.test_preprocessing, self.device)
        cache, kind = self.data.cache, _evaluation_class(self.data)
        result = RunResult(
            name=self.recipe.name,
            student=self.recipe.student,
            parameters=count_parameters(self.learner.student),
            loss=self.recipe.loss_name,
            epochs=self.recipe.epochs,
            seed=self.recipe.seed,
            folder=self.path,
            recipe_digest=self.card.recipe_digest,
            fingerprint=None if cache is None else cache.manifest.fingerprint,
            train_samples=len(self.data.images),
            test_split=None if self.data.test is None else self.data.test.split,
            last=_evaluation(self.history[-1], "test", kind),
            best=None if self.best_epoch is None else _evaluation(self.history[self.best_epoch], "test", kind),
            best_epoch=self.best_epoch,
            ema=_evaluation(self.history[-1], "ema", kind),
            average_precision=self._average_precision(),
            more_tests={
                test.split: self._more_figures(number) for number, test in enumerate(self.data.tests) if number > 0
            },
            test_preprocessing=self.data.test_preprocessing if self.data.tests else None,
            teachers=None if cache is None else self.recipe.fusion.kept_accuracies(cache),
            notes=missing_notes(*self.data.tests),
            train_s=sum(row["train_s"] for row in self.history),
            environment=_environment(self.device),
            command=command_line(),
            data_notes=self.data.notes(),
        )
        draw_curves(result)
        result.save()
        return result

    def _average_precision(self) -> dict[str, float]:
        if self.data.test is None or not self.data.images.multi_label:
            return {}
        return _measure(self.learner.student, self.data.test, self.data, self.device)[1]

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        """Test figures of an epoch; None where it is not evaluated, so that every row has the same columns."""
        due = (epoch + 1) % self.recipe.evaluate_every == 0 or epoch + 1 == self.recipe.epochs
        kind = _evaluation_class(self.data)
        models = {"test": self.learner.student}
        if self.learner.average is not None:
            models["ema"] = self.learner.average.module
        figures: dict[str, Any] = {}
        for prefix, model in models.items():
            for number, test in enumerate(self.data.tests or (None,)):
                measured: dict[str, Any] = dict.fromkeys(kind.model_fields)
                if due and test is not None:
                    measured = _measure(model, test, self.data, self.device)[0].model_dump()
                figures |= {f"{_columns(prefix, number)}_{name}": value for name, value in measured.items()}
        return figures

    def _more_figures(self, number: int) -> SplitResult:
        """The figures on a test split after the first one."""
        test, ema, last = _columns("test", number), _columns("ema", number), self.history[-1]
        kind = _evaluation_class(self.data)
        best = None if self.best_epoch is None else _evaluation(self.history[self.best_epoch], test, kind)
        return SplitResult(last=_evaluation(last, test, kind), best=best, ema=_evaluation(last, ema, kind))

    def _commit_epoch(self, row: dict[str, Any]) -> None:
        """Add a finished epoch. Its commit is the state file: a run that crashed before it repeats the epoch."""
        self.history.append(row)
        column = f"test_{headline_of(self.data.images.multi_label)}"
        figure = row[column]
        if figure is not None and (self.best_epoch is None or figure > self.history[self.best_epoch][column]):
            self.best_epoch = row["epoch"]
            card = self.card.model_copy(update={"epoch": row["epoch"] + 1})
            checkpoints.save_student(self.path / checkpoints.BEST, self.learner.student, card)
        state = {"learner": self.learner.state_dict(), "history": self.history, "best_epoch": self.best_epoch}
        checkpoints.save_state(self.path / folder.STATE, state)
        (self.path / folder.CHECKPOINT).unlink(missing_ok=True)
        self.begun = None


def draw_curves(result: RunResult) -> None:
    """Write the curves of a run, with the accuracies of its teachers and of the same student on labels alone."""
    references = figures_of_teachers(result.teachers)
    if result.labels_only is not None and result.labels_only.last is not None:
        references["labels only"] = result.labels_only.last.headline
    title = f"{result.student} on {data_name(result.folder, result.name)}, loss {result.loss}, seed {result.seed}"
    if (history := read_metrics(result.folder)) is not None:
        plot_curves(history, result.folder / folder.CURVES, title, references)


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _create_learner(data: TrainingData, recipe: TrainRecipe, device: torch.device, steps_per_epoch: int) -> Learner:
    torch.manual_seed(recipe.seed)  # weights are drawn on the CPU, so they are the same on every device
    num_classes = len(data.images.class_names)
    student, notes = first_student(recipe, num_classes)
    check_images(student.eval(), data.view_size)
    check_outputs(student, recipe, num_classes, data.view_size)
    for note in notes:
        print(f"note: {recipe.student} {note}", file=sys.stderr, flush=True)
    objective = Objective(
        recipe.loss,
        student.num_features,
        data.target_dim,
        num_classes,
        len(data.images),
        data.labels,
        components=data.components,
        class_weights=class_weights(recipe.loss, data.images.class_names, data.real_labels),
        seed=recipe.seed,
    )
    return Learner(recipe, student, objective, data.preprocessing, steps_per_epoch, device)


def _create_card(data: TrainingData, recipe: TrainRecipe, digest: str) -> StudentCard:
    return StudentCard(
        architecture=recipe.student,
        num_classes=len(data.images.class_names),
        class_names=data.images.class_names,
        image_size=data.view_size,
        crop=data.test_preprocessing.crop,
        mean=data.preprocessing.mean,
        std=data.preprocessing.std,
        dataset=data.images.name,
        recipe_digest=digest,
    )


def _save_if_due(training: Sequence[Run], clock: EpochClock, states: Callable[[], list[EpochState | None]]) -> None:
    """Store the states of runs inside an epoch, if it is time."""
    if clock.is_due():
        for run, state, train_s in zip(training, states(), clock.train_s(), strict=True):
            if state is not None:
                run.save_checkpoint(state, train_s)
        clock.restart()


def _describe_cache(cache: TeacherCache) -> dict[str, Any]:
    """The location of the cache of a run: `path` and, for a remote cache, `url`; `path` is then its local mirror."""
    url = None if cache.origin is None else cache.origin.url
    return {"path": str(cache.path.absolute()), "url": url, "manifest": cache.manifest.model_dump(mode="json")}


def _columns(prefix: str, number: int) -> str:
    """How the names of the metrics on a test split begin: `test`, then `test_2`, …; `ema` for averaged weights."""
    return prefix if number == 0 else f"{prefix}_{number + 1}"


def _evaluation_class(data: TrainingData) -> type[Figures]:
    return MultiLabelEvaluation if data.images.multi_label else Evaluation


def _measure(
    model: nn.Module, test: ImageSet, data: TrainingData, device: torch.device
) -> tuple[Figures, dict[str, float]]:
    """The figures of a test split and, for several labels, the average precision of each class."""
    if data.images.multi_label:
        return evaluate_multilabel(model, test, data.test_preprocessing, device)
    return evaluate(model, test, data.test_preprocessing, device), {}


def _evaluation(row: dict[str, Any], prefix: str, kind: type[Figures]) -> Figures | None:
    figures = {name: row.get(f"{prefix}_{name}") for name in kind.model_fields}
    return None if figures["n"] is None else kind.model_validate(figures)


def _environment(device: torch.device) -> dict[str, str]:
    return {
        "device": describe_device(device),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "numpy", "zarr")},
        "platform": platform.platform(),
    }


def _value_or_error(run: Run, work: Callable[[], Value], alone: bool) -> Value | Exception:
    """Call `work` for a run.

    Returns:
        Its value, or an error that concerns this run only, such as divergence or too little memory.
    """
    try:
        with explain_out_of_memory(run.recipe, run.device):
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
