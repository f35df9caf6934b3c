"""A run in its folder: what it has done so far, the learner that goes on, and what a finished one leaves."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from train import checkpoints, folder
from train.checkpoints import StudentCard
from train.cost import check_images
from train.curves import plot_curves
from train.data import TrainingData
from train.evaluate import Evaluation, evaluate
from train.logs import read_metrics
from train.loop import Learner
from train.objective import Objective
from train.predictions import store_predictions
from train.recipe import TrainRecipe
from train.result import RunResult
from train.students import create_student

History = list[dict[str, Any]]


class Run:
    """A run in its folder, from the last finished epoch on.

    Attributes:
        history: a row of figures for each finished epoch.
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
        self.learner = _learner(data, recipe, device, steps_per_epoch)
        self.card = _card(data, recipe, digest)
        self.history: History = []
        self.best_epoch: int | None = None
        if (state := checkpoints.load_state(path / folder.STATE, ("learner", "history", "best_epoch"))) is not None:
            self.learner.load_state_dict(state["learner"])
            self.history, self.best_epoch = state["history"], state["best_epoch"]

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.recipe.epochs

    def finish_epoch(self, means: dict[str, float], train_s: float, samples: int) -> dict[str, Any]:
        """Evaluate where that is due and keep what there is to go on from; gives the epoch's row of figures."""
        epoch = len(self.history)
        row = {"epoch": epoch, "updates": self.learner.updates, "learning_rate": self.learner.learning_rate}
        row |= {**means, "train_s": train_s, "images_per_s": samples / train_s, **self._evaluate(epoch)}
        self._keep(row)
        return row

    def result(self) -> RunResult:
        """Write everything that a finished run has."""
        card = self.card.model_copy(update={"epoch": len(self.history)})
        checkpoints.save_student(self.path / checkpoints.LAST, self.learner.student, card)
        if self.learner.average is not None:
            checkpoints.save_student(self.path / checkpoints.EMA, self.learner.average.module, card)
        store_predictions(self.path, self.learner.student, self.data.test, self.data.preprocessing, self.device)
        cache = self.data.cache
        result = RunResult(
            name=self.recipe.name,
            student=self.recipe.student,
            parameters=sum(parameter.numel() for parameter in self.learner.student.parameters()),
            loss=self.recipe.loss_name,
            epochs=self.recipe.epochs,
            seed=self.recipe.seed,
            folder=self.path,
            recipe_digest=self.card.recipe_digest,
            fingerprint=None if cache is None else cache.manifest.fingerprint,
            train_samples=len(self.data.images),
            test_split=None if self.data.test is None else self.data.test.split,
            last=_evaluation(self.history[-1], "test"),
            best=None if self.best_epoch is None else _evaluation(self.history[self.best_epoch], "test"),
            best_epoch=self.best_epoch,
            ema=_evaluation(self.history[-1], "ema"),
            teachers=None if cache is None else cache.manifest.preflight,
            train_s=sum(row["train_s"] for row in self.history),
            environment=_environment(self.device),
            command=command_line(),
        )
        draw(result)
        result.save()
        return result

    def _evaluate(self, epoch: int) -> dict[str, Any]:
        """Test figures of an epoch, None where it is not evaluated: every row has the same columns."""
        due = (epoch + 1) % self.recipe.evaluate_every == 0 or epoch + 1 == self.recipe.epochs
        models = {"test": self.learner.student}
        if self.learner.average is not None:
            models["ema"] = self.learner.average.module
        figures: dict[str, Any] = {}
        for prefix, model in models.items():
            measured: dict[str, Any] = dict.fromkeys(Evaluation.model_fields)
            if due and self.data.test is not None:
                measured = evaluate(model, self.data.test, self.data.preprocessing, self.device).model_dump()
            figures |= {f"{prefix}_{name}": value for name, value in measured.items()}
        return figures

    def _keep(self, row: dict[str, Any]) -> None:
        """Add a finished epoch. The state is the commit: what a crash before it leaves is written again on resuming."""
        self.history.append(row)
        top1 = row["test_top1"]
        if top1 is not None and (self.best_epoch is None or top1 > self.history[self.best_epoch]["test_top1"]):
            self.best_epoch = row["epoch"]
            card = self.card.model_copy(update={"epoch": row["epoch"] + 1})
            checkpoints.save_student(self.path / checkpoints.BEST, self.learner.student, card)
        state = {"learner": self.learner.state_dict(), "history": self.history, "best_epoch": self.best_epoch}
        checkpoints.save_state(self.path / folder.STATE, state)


def draw(result: RunResult) -> None:
    """The curves of a run, with what its teachers and its twin on labels alone reach."""
    teachers = result.teachers or {}
    names = {"teacher_top1": "teacher", "clip_top1": "CLIP", "fusion_top1": "fusion"}
    references = {label: teachers[key] for key, label in names.items() if key in teachers}
    if result.labels_only is not None and result.labels_only.last is not None:
        references["labels only"] = result.labels_only.last.top1
    title = f"{result.student} on {result.name}, loss {result.loss}, seed {result.seed}"
    if (history := read_metrics(result.folder)) is not None:
        plot_curves(history, result.folder / folder.CURVES, title, references)


def command_line() -> str:
    """What was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _learner(data: TrainingData, recipe: TrainRecipe, device: torch.device, steps_per_epoch: int) -> Learner:
    torch.manual_seed(recipe.seed)  # weights are drawn on the CPU, so they are the same on every device
    num_classes = len(data.images.class_names)
    student: Any = create_student(recipe.student, num_classes)
    check_images(student.eval(), data.views.output_size(data.images.image_size))
    objective = Objective(
        recipe.loss,
        student.num_features,
        data.target_dim,
        num_classes,
        len(data.images),
        data.labels,
        components=data.components,
        seed=recipe.seed,
    )
    return Learner(recipe, student, objective, data.preprocessing, steps_per_epoch, device)


def _card(data: TrainingData, recipe: TrainRecipe, digest: str) -> StudentCard:
    return StudentCard(
        architecture=recipe.student,
        num_classes=len(data.images.class_names),
        class_names=data.images.class_names,
        image_size=data.views.output_size(data.images.image_size),
        mean=data.preprocessing.mean,
        std=data.preprocessing.std,
        dataset=data.images.name,
        recipe_digest=digest,
    )


def _evaluation(row: dict[str, Any], prefix: str) -> Evaluation | None:
    figures = {name: row.get(f"{prefix}_{name}") for name in Evaluation.model_fields}
    return None if figures["n"] is None else Evaluation.model_validate(figures)


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "timm", "numpy", "zarr")},
        "platform": platform.platform(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
