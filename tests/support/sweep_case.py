"""The sweep that `faults.py` kills: finished trials stay, and in the end the table equals that of a clean run."""

from __future__ import annotations

import json
import os
import select
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.fault_cases import POLL_S, Case, Found

STUDENTS, LOSSES, EPOCHS = ("resnet8", "wrn_16_1"), ("kd",), 3
# Columns that are equal in every run of the same sweep: all but folder and times.
FIGURES = ("trial", "student", "loss", "seed", "status", "error", "parameters", "flops", "top1", "top5", "nll", "ece",
           "best_epoch", "best_top1", "epochs_done")  # fmt: skip


class Sweep(Case):
    """`sweep-students` in one process. Its "blocks" are trials, its "rows" weights compared with a clean run."""

    def run(self, target: str) -> None:
        from tests.support.shortcuts import take_shortcuts
        from train.sweep.cli import app

        os.environ["TEACHER_CACHE_HOME"] = str(self.root / "home")
        with pytest.MonkeyPatch.context() as patch:
            take_shortcuts(patch)
            app(list(self.command(target)), standalone_mode=False)

    def watch(self, target: str, stop: int) -> list[tuple[int, int]]:
        seen: set[tuple[int, int]] = set()
        while not select.select([stop], [], [], POLL_S)[0]:
            seen |= set(self._finished(target))
        return sorted(seen)

    def look(self, target: str, seen: Sequence[tuple[int, int]], *, finished: bool = False) -> Found:
        finished_trials, clean = self._finished(target), self._finished(self._clean)
        problems = [f"trial {number}: no longer finished" for number, _ in seen if (number, 0) not in finished_trials]
        rows = 0
        for number, folder in finished_trials.items():
            ours, theirs = _weights(folder), _weights(clean[number])
            rows += len(ours)
            if ours != theirs:
                problems.append(f"{folder.name}: weights differ from those of the clean run")
        if finished:
            problems += self._differences(Path(target))
        return Found(committed=len(finished_trials), blocks=len(clean), rows=rows, refused=0, problems=problems)

    def keep_clean(self, target: str) -> None:
        if Path(target) != self._clean:
            shutil.copytree(target, self._clean)

    def _finished(self, target: str | Path) -> dict[tuple[int, int], Path]:
        from train.runs.result import load_result

        folders = sorted(Path(target).glob("trials/*"))
        names = [f"{student}-{loss}-s{seed}" for student in STUDENTS for loss in LOSSES for seed in (0, 1)]
        return {(names.index(folder.name), 0): folder for folder in folders if load_result(folder) is not None}

    def _differences(self, target: Path) -> list[str]:
        import polars as pl

        ours, theirs = (pl.read_parquet(root / "trials.parquet") for root in (target, self._clean))
        found = (
            []
            if ours.select(FIGURES).equals(theirs.select(FIGURES))
            else ["the table differs from that of the clean run"]
        )
        page = target / "report.html"
        names = ours["trial"].to_list()
        if not page.exists() or not all(name in page.read_text() for name in names):
            found.append("the page lacks trials")
        for name in names:
            metrics = [pl.read_parquet(root / "trials" / name / "metrics.parquet") for root in (target, self._clean)]
            one, other = (table.drop("train_s", "images_per_s") for table in metrics)
            if not one.equals(other):
                found.append(f"{name}: metrics differ from those of the clean run")
        return found


@contextmanager
def sweep(root: Path, in_child: Callable[..., Any]) -> Iterator[Case]:
    from tests.support import tiny_run

    pictures = tiny_run.write_pictures(root / "pictures")
    cache = in_child(lambda: str(tiny_run.write_cache(root / "tiny.zarr", pictures)))
    base = tiny_run.recipe(cache, Path("unused"), epochs=EPOCHS).model_dump(mode="json", exclude={"out"})
    (root / "recipe.yaml").write_text(json.dumps(base))
    file = {"name": "tiny", "recipe": str(root / "recipe.yaml"), "students": STUDENTS, "losses": LOSSES, "seeds": 2}
    (root / "sweep.yaml").write_text(json.dumps(file))
    options = ["--sweep", str(root / "sweep.yaml"), "--workers", "1", "--out"]
    yield Sweep("sweep", root, lambda target: [*options, target], str(root))


def _weights(folder: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(folder / "last.safetensors").items()}
