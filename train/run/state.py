"""A run in its folder: its learner, its finished epochs, its checkpoints and its result."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache_tools.console import describe_device, print_line, warn
from cache_tools.errors import WeightsError
from cache_tools.images.classes import missing_notes
from cache_tools.images.image_set import ImageSet
from cache_tools.system.joined import Joined
from train import checkpoints
from train.checkpoints import StudentCard
from train.cost import check_images, count_parameters
from train.data import TrainingData
from train.evaluate.metrics import Evaluation, evaluate
from train.evaluate.multilabel import Figures, MultiLabelEvaluation, evaluate_multilabel, headline_of
from train.feed import Feed
from train.initial import check_outputs, first_student
from train.loop import EpochState, Learner
from train.loop.batch_norm import synchronised
from train.losses.class_weights import class_weights
from train.objective import Objective
from train.recipe import TrainRecipe
from train.run.background import BackgroundWriter, Snapshot
from train.run.ranks import environment_of_ranks, part_of_rank, tensors_on_cpu
from train.run.resume import check_history, check_inside, check_learner, state_bytes
from train.runs import folder
from train.runs.curves import plot_curves
from train.runs.metrics import read_metrics
from train.runs.predictions import store_predictions
from train.runs.result import RunResult, SplitResult, figures_of_teachers, kept_figures
from train.runs.stored import data_name
from train.weights.run_files import remove_file


class Run:
    """A run in its folder, continued after its last finished epoch or from a checkpoint inside the next one.

    Attributes:
        history: a row of figures for each finished epoch.
        begun: the checkpoint inside the next epoch; None to start it from its first batch.
        best_epoch: the one with the highest test top-1 (mAP with several labels) so far, counted from 0; None before
            the first evaluation.
        pixels: where the pixels are, one line for users.
    """

    def __init__(
        self,
        data: TrainingData,
        recipe: TrainRecipe,
        device: torch.device,
        path: Path,
        digest: str,
        steps_per_epoch: int,
        *,
        pixels: str | None = None,
        ranks: Joined | None = None,
    ) -> None:
        self.data, self.recipe, self.device, self.path, self.pixels = data, recipe, device, path, pixels
        self._ranks, self._writer = ranks, BackgroundWriter()
        with nullcontext() if ranks is None else ranks.failing_together():
            self._open(digest, steps_per_epoch)
        if ranks is not None:
            self._join(ranks)

    def _open(self, digest: str, steps_per_epoch: int) -> None:
        """Create the learner, and load what is stored."""
        data, recipe, device, path = self.data, self.recipe, self.device, self.path
        self.learner = _create_learner(data, recipe, device, steps_per_epoch, self._ranks)
        self.card = _create_card(data, recipe, digest)
        self.history: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.teachers = None if data.cache is None else kept_figures(recipe.fusion, data.cache)
        self.begun: EpochState | None = None
        if self.writes:
            self._load_state()
            self.begun = self._load_checkpoint(steps_per_epoch)
            if self.begun is not None:
                self.learner.load_state_dict(self.begun.pop("learner"))
            if data.follower is not None:
                data.follower.begin(path, digest, len(self.history))

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of the run: alone, or the first of several ranks."""
        return self._ranks is None or self._ranks.rank.is_first

    def save_checkpoint(self, state: EpochState, train_s: float) -> None:
        """Store a state inside the current epoch.

        Args:
            train_s: time of training in this epoch so far.
        """
        if not self.writes:
            return
        self._writer.wait()
        inside = {**state, "epoch": len(self.history), "train_s": train_s}
        checkpoints.save_state(self.path / folder.CHECKPOINT, inside)

    @property
    def is_stored(self) -> bool:
        """Whether all that was to be written in the background is stored, or has failed."""
        return self._writer.is_idle

    def wait(self) -> None:
        """Wait until everything is stored, and raise what went wrong meanwhile."""
        self._writer.wait()

    def in_background(self, work: Callable[[], None]) -> None:
        """Write other files of the run after what was begun before."""
        self._writer.begin(work)

    def close(self) -> None:
        """Stop the background thread, after it has stored what it has begun."""
        self._writer.close()

    def samples_begun(self, feed: Feed) -> int:
        """Number of samples of the current epoch that the run has been trained on."""
        return 0 if self.begun is None else feed.bounds[self.begun["batches"] - 1][1]

    def _join(self, ranks: Joined) -> None:
        """Continue with the other ranks from what rank 0 has read."""
        own = (self.learner.state_dict(), self.history, self.best_epoch, self.begun)
        learner, self.history, self.best_epoch, begun = ranks.from_first(lambda: tensors_on_cpu(own))
        if not self.writes:
            self.learner.load_state_dict(learner)
        self.begun = None if begun is None else part_of_rank(begun, ranks.rank)
        self.learner.join(ranks)

    def _load_state(self) -> None:
        """Load the state after the last finished epoch, if there is one."""
        file = self.path / folder.STATE
        parts = ("learner", "history", "best_epoch")
        state = checkpoints.load_state(file, parts, max_bytes=state_bytes(self.learner))
        if state is None:
            return
        kind, multi_label = _evaluation_class(self.data), self.data.images.multi_label
        splits = range(max(len(self.data.tests), 1))
        try:
            check_learner(state["learner"], self.learner)
            check_history(
                state["history"],
                state["best_epoch"],
                epochs=self.recipe.epochs,
                headline=f"test_{headline_of(multi_label)}",
                figures=[(_columns(prefix, number), kind) for prefix in ("test", "ema") for number in splits],
            )
        except ValueError as error:
            raise checkpoints.damaged_state(file, error) from error
        self.learner.load_state_dict(state["learner"])
        self.history, self.best_epoch = state["history"], state["best_epoch"]

    def _load_checkpoint(self, batches: int) -> EpochState | None:
        """The checkpoint inside the next epoch, if there is one."""
        file = self.path / folder.CHECKPOINT
        parts = ("learner", "batches", "means", "random", "epoch", "train_s")
        try:
            state = checkpoints.load_state(file, parts, max_bytes=state_bytes(self.learner))
            if state is None or state["epoch"] != len(self.history):
                # One of an earlier epoch was left by a process that was killed just after the epoch's commit.
                return None
            check_inside(state, self.learner, batches, self.device)
        except (WeightsError, ValueError) as error:
            reason = f"{error.what} ({error.where})" if isinstance(error, WeightsError) else f"damaged {file}: {error}"
            warn(f"{reason}: the epoch starts again")
            return None
        return state

    def finish_epoch(self, means: dict[str, float], train_s: float, samples: int) -> dict[str, Any]:
        """Evaluate if this epoch is due, and begin to store the state to resume from, in the background (`wait`).

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
        self.wait()
        if self.data.follower is not None:
            self.data.follower.finish()
        remove_file(self.path / folder.CHECKPOINT)  # left by a process that was killed just after the last commit
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
            teachers=self.teachers,
            notes=missing_notes(*self.data.tests),
            train_s=sum(row["train_s"] for row in self.history),
            environment=_environment(self.device, self.recipe.compile, self._ranks, self.learner.student),
            command=command_line(),
            data_notes=self.data.notes(),
            pixels=self.pixels,
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
                    measured = _measure(model, test, self.data, self.device, self._ranks)[0].model_dump()
                figures |= {f"{_columns(prefix, number)}_{name}": value for name, value in measured.items()}
        return figures

    def _more_figures(self, number: int) -> SplitResult:
        """The figures on a test split after the first one."""
        test, ema, last = _columns("test", number), _columns("ema", number), self.history[-1]
        kind = _evaluation_class(self.data)
        best = None if self.best_epoch is None else _evaluation(self.history[self.best_epoch], test, kind)
        return SplitResult(last=_evaluation(last, test, kind), best=best, ema=_evaluation(last, ema, kind))

    def _commit_epoch(self, row: dict[str, Any]) -> None:
        """Add a finished epoch. Its commit is the state file: a run that crashed before it repeats the epoch.

        The next epoch trains while a thread writes the files.
        """
        self._writer.wait()
        self.history.append(row)
        column = f"test_{headline_of(self.data.images.multi_label)}"
        figure = row[column]
        is_best = figure is not None and (self.best_epoch is None or figure > self.history[self.best_epoch][column])
        if is_best:
            self.best_epoch = row["epoch"]
        self.begun = None
        if self.writes:
            state = {"learner": self.learner.state_dict(), "history": self.history, "best_epoch": self.best_epoch}
            card = self.card.model_copy(update={"epoch": row["epoch"] + 1}) if is_best else None
            self._writer.begin(partial(self._store_epoch, Snapshot(state, self.device), card))

    def _store_epoch(self, snapshot: Snapshot, best: StudentCard | None) -> None:
        """Write the state after an epoch and, before this commits it, the student if it is the best so far."""
        state = snapshot.get()
        if best is not None:
            checkpoints.save_weights(self.path / checkpoints.BEST, state["learner"]["student"], best)
        checkpoints.save_state(self.path / folder.STATE, state)
        remove_file(self.path / folder.CHECKPOINT)
        if self.data.follower is not None:
            self.data.follower.passed(len(state["history"]))


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


def _create_learner(
    data: TrainingData, recipe: TrainRecipe, device: torch.device, steps_per_epoch: int, ranks: Joined | None
) -> Learner:
    torch.manual_seed(recipe.seed)  # weights are drawn on the CPU, so they are the same on every device
    num_classes = len(data.images.class_names)
    with nullcontext() if ranks is None else ranks.first_here_before_others():  # it may download weights
        student, notes = first_student(recipe, num_classes)
    check_images(student.eval(), data.view_size)
    if data.test_size != data.view_size:
        check_images(student, data.test_size, "set evaluation.crop to the size that the student expects")
    check_outputs(student, recipe, num_classes, data.view_size)
    for note in notes:
        print_line(f"note: {recipe.student} {note}", file=sys.stderr)
    if ranks is not None and recipe.sync_batchnorm:
        student = synchronised(student, device)
    objective = Objective(
        recipe.loss,
        student.num_features,
        data.target_dim,
        num_classes,
        len(data.images),
        data.labels,
        has_logits=data.cache is not None or data.target_dim is not None,
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
        test_size=None if data.test_size == data.view_size else data.test_size,
        interpolation=data.test_preprocessing.interpolation,
        mean=data.preprocessing.mean,
        std=data.preprocessing.std,
        dataset=data.images.name,
        recipe_digest=digest,
    )


def _columns(prefix: str, number: int) -> str:
    """How the names of the metrics on a test split begin: `test`, then `test_2`, …; `ema` for averaged weights."""
    return prefix if number == 0 else f"{prefix}_{number + 1}"


def _evaluation_class(data: TrainingData) -> type[Figures]:
    return MultiLabelEvaluation if data.images.multi_label else Evaluation


def _measure(
    model: nn.Module, test: ImageSet, data: TrainingData, device: torch.device, ranks: Joined | None = None
) -> tuple[Figures, dict[str, float]]:
    """The figures of a test split and, for several labels, the average precision of each class."""
    if data.images.multi_label:
        return evaluate_multilabel(model, test, data.test_preprocessing, device, ranks)
    return evaluate(model, test, data.test_preprocessing, device, ranks=ranks), {}


def _evaluation(row: dict[str, Any], prefix: str, kind: type[Figures]) -> Figures | None:
    figures = {name: row.get(f"{prefix}_{name}") for name in kind.model_fields}
    return None if figures["n"] is None else kind.model_validate(figures)


def _environment(device: torch.device, compiled: str, ranks: Joined | None, student: nn.Module) -> dict[str, str]:
    return {
        **environment_of_ranks(ranks, student),
        **({"compile": compiled} if compiled not in {"auto", "off"} else {}),
        "device": describe_device(device),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "numpy", "zarr")},
        "platform": platform.platform(),
    }
