"""One run from recipe to result: open, check, train epoch by epoch, keep enough to go on from, report."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
import torch

from cache_tools.config import dump_yaml
from cache_tools.console import Progress, resolve_device
from cache_tools.durable import put_durably
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from train import checkpoints, folder
from train.checkpoints import StudentCard
from train.curves import plot_curves
from train.data import TrainingData, open_data
from train.evaluate import Evaluation, evaluate
from train.logs import RunLog
from train.loop import Learner, repeatable
from train.objective import Objective
from train.recipe import TrainRecipe, recipe_digest, run_folder
from train.result import RunResult, load_result
from train.students import create_student

History = list[dict[str, Any]]


def train_student(recipe: TrainRecipe, *, overwrite: bool = False) -> RunResult:
    """Train a student, or go on with an interrupted run of the same recipe, or give the result of a finished one.

    With `compare_with_labels` the same student is then trained on labels alone, in `labels-only` inside the run folder.

    Args:
        overwrite: start over, whatever is in the run folder.

    Raises:
        CacheError: the subclass says what is wrong: recipe, device, cache, images, or storage.
    """
    device = _device(recipe)
    data = open_data(recipe, device)
    try:
        result = train_on(data, recipe, device, overwrite=overwrite)
    finally:
        data.targets.close()
    if recipe.compare_with_labels and recipe.loss.needs_targets and (result.labels_only is None or overwrite):
        assert data.num_views is not None, "targets come in views"
        twin = recipe.on_labels(data.dataset, data.views, data.num_views)
        twin = twin.model_copy(update={"out": result.folder / folder.LABELS_ONLY})
        baseline = train_on(data.labels_only(), twin, device, overwrite=overwrite)
        result = result.model_copy(update={"labels_only": baseline, "command": _command()})
        _draw(result)
        result.save()
    return result


def train_on(data: TrainingData, recipe: TrainRecipe, device: torch.device, *, overwrite: bool = False) -> RunResult:
    """`train_student` on data that are open already (from a cache, from live teachers), without the comparison."""
    identity = {"recipe": recipe.values(), "data": data.identity()}
    digest = recipe_digest(identity)
    path = run_folder(recipe, digest)
    with folder.claimed(path, identity, overwrite=overwrite), repeatable(device, recipe.deterministic):
        if (finished := load_result(path)) is not None:
            return finished
        put_durably(path / folder.RECIPE, dump_yaml(recipe).encode())
        if data.cache is not None:
            put_durably(path / folder.CACHE, json.dumps(_where(data.cache), indent=2, ensure_ascii=False).encode())
        return _Run(data, recipe, device, path, digest).result()


class _Run:
    """A run in its folder, from the last finished epoch on."""

    def __init__(self, data: TrainingData, recipe: TrainRecipe, device: torch.device, path: Path, digest: str) -> None:
        self.data, self.recipe, self.device, self.path = data, recipe, device, path
        self.feed = data.feed(recipe, device)
        self.learner = _learner(data, recipe, device, self.feed.steps_per_epoch)
        self.card = _card(data, recipe, digest)
        self.history: History = []
        self.best_epoch: int | None = None
        if (state := checkpoints.load_state(path / folder.STATE)) is not None:
            self.learner.load_state_dict(state["learner"])
            self.history, self.best_epoch = state["history"], state["best_epoch"]

    def result(self) -> RunResult:
        """Train what is left, then write everything that a finished run has."""
        try:
            self._train()
        finally:
            self.feed.close()
        card = self.card.model_copy(update={"epoch": len(self.history)})
        checkpoints.save_student(self.path / checkpoints.LAST, self.learner.student, card)
        if self.learner.average is not None:
            checkpoints.save_student(self.path / checkpoints.EMA, self.learner.average.module, card)
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
            teachers=None if cache is None else cache.manifest.provenance.get("preflight"),
            train_s=sum(row["train_s"] for row in self.history),
            environment=_environment(self.device),
            command=_command(),
        )
        _draw(result)
        result.save()
        return result

    def _train(self) -> None:
        recipe, samples = self.recipe, self.feed.samples_per_epoch
        title = f"train {recipe.student} ({recipe.loss_name})"
        done = len(self.history)
        with (
            RunLog(self.path, done) as log,
            Progress(title, recipe.epochs * samples, "images", done=done * samples) as progress,
        ):
            for epoch in range(done, recipe.epochs):
                start = time.perf_counter()
                means = self.learner.train_epoch(self.feed, epoch, progress.advance)
                train_s = time.perf_counter() - start
                row = {"epoch": epoch, "updates": self.learner.updates, "learning_rate": self.learner.learning_rate}
                row |= {**means, "train_s": train_s, "images_per_s": samples / train_s, **self._evaluate(epoch)}
                self._keep(row)
                log.write(self.history)
                progress.advance(0, _note(row, recipe.epochs))

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


def _where(cache: TeacherCache) -> dict[str, Any]:
    """Where a run's targets came from; `url` is that of a remote cache, whose mirror `path` then is."""
    url = None if cache.origin is None else cache.origin.url
    return {"path": str(cache.path.absolute()), "url": url, "manifest": cache.manifest.model_dump(mode="json")}


def _learner(data: TrainingData, recipe: TrainRecipe, device: torch.device, steps_per_epoch: int) -> Learner:
    torch.manual_seed(recipe.seed)  # weights are drawn on the CPU, so they are the same on every device
    num_classes = len(data.images.class_names)
    student: Any = create_student(recipe.student, num_classes)
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


def _device(recipe: TrainRecipe) -> torch.device:
    device = resolve_device(recipe.device)
    if recipe.precision == "float16" and device.type != "cuda":
        raise RecipeError(
            "float16 training needs CUDA",
            where=f"--device {recipe.device}",
            next_step="use --precision bfloat16 or float32 on the CPU",
        )
    return device


def _evaluation(row: dict[str, Any], prefix: str) -> Evaluation | None:
    figures = {name: row.get(f"{prefix}_{name}") for name in Evaluation.model_fields}
    return None if figures["n"] is None else Evaluation.model_validate(figures)


def _draw(result: RunResult) -> None:
    teachers = result.teachers or {}
    names = {"teacher_top1": "teacher", "clip_top1": "CLIP", "fusion_top1": "fusion"}
    references = {label: teachers[key] for key, label in names.items() if key in teachers}
    if result.labels_only is not None and result.labels_only.last is not None:
        references["labels only"] = result.labels_only.last.top1
    title = f"{result.student} on {result.name}, loss {result.loss}, seed {result.seed}"
    history = pl.read_parquet(result.folder / folder.METRICS)
    plot_curves(history, result.folder / folder.CURVES, title, references)


def _note(row: dict[str, Any], epochs: int) -> str:
    top1 = "" if row["test_top1"] is None else f", test top-1 {row['test_top1']:.2%}"
    return f"epoch {row['epoch'] + 1}/{epochs}: loss {row['loss']:.4f}{top1}"


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


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
