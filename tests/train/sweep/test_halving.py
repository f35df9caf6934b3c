"""Asynchronous successive halving: who stops where, that nobody else notices, and what a killed sweep judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cache_tools.errors import RecipeError
from tests.support import tiny_run
from train.runs.folder import STOPPED
from train.sweep.halving import Halving
from train.sweep.recipe import Asha, SweepRecipe
from train.sweep.run import SweepResult, run_sweep, train_in_process
from train.sweep.workers import ProcessEngine

RATES = (1e-5, 0.02, 0.05, 0.1)
RULES = Asha(metric="loss", keep_one_in=2, first_epochs=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """The same trials, all trained to the end."""
    return run_sweep(sweep(cache, asha=None), tmp_path_factory.mktemp("whole"))


def sweep(cache: Path, asha: Asha | None = RULES, **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=4).model_dump(mode="json")
    data = {"name": "tiny", "base": base, "students": ("resnet8",), "grid": {"lr": RATES}, "asha": asha}
    return SweepRecipe.model_validate(data | changes)


def losses(result: SweepResult, epoch: int) -> dict[str, float]:
    """By trial, after so many epochs of training in full."""
    return {
        row["trial"]: pl.read_parquet(Path(row["folder"]) / "metrics.parquet")["loss"][epoch - 1]
        for row in result.trials.iter_rows(named=True)
    }


def test_rungs_are_powers_below_the_last_epoch() -> None:
    assert RULES.rungs(4) == [1, 2]
    assert Asha().rungs(30) == [1, 3, 9, 27]
    assert not RULES.larger_is_better
    assert Asha().larger_is_better


def test_the_better_half_goes_on_at_each_rung(cache: Path, whole: SweepResult, tmp_path: Path) -> None:
    result = run_sweep(sweep(cache), tmp_path)
    first, second = losses(whole, 1), losses(whole, 2)
    half = sorted(first, key=lambda name: first[name])[:2]
    winner = min(half, key=lambda name: second[name])
    done = dict(result.trials.select("trial", "epochs_done").iter_rows())
    assert done == {name: 4 if name == winner else 2 if name in half else 1 for name in first}
    assert set(result.trials.filter(pl.col("status") == "finished")["trial"]) == {winner}
    for row in whole.trials.filter(pl.col("trial") == winner).iter_rows(named=True):
        one = load_file(Path(row["folder"]) / "last.safetensors")
        other = load_file(tmp_path / "trials" / winner / "last.safetensors")
        assert all(torch.equal(one[name], other[name]) for name in one)
    told = json.loads((tmp_path / "trials" / max(first, key=lambda name: first[name]) / STOPPED).read_bytes())
    assert (told["epochs"], told["of"]) == (1, 4)


def test_whoever_comes_later_is_compared_with_all_before(cache: Path, whole: SweepResult, tmp_path: Path) -> None:
    """Trial after trial: the first passes every rung, and only a better one gets by it."""

    def one_by_one(streams: Any, halving: Halving | None) -> None:
        for stream in streams:
            for trial in stream:
                train_in_process([[trial]], halving)

    result = run_sweep(sweep(cache), tmp_path, engine=one_by_one)
    done = dict(result.trials.select("trial", "epochs_done").iter_rows())
    expected: dict[str, int] = {}
    for name in done:
        expected[name] = 4
        for rung in (1, 2):
            seen = sorted(losses(whole, rung)[other] for other in expected if expected[other] >= rung)
            if losses(whole, rung)[name] not in seen[: -(-len(seen) // 2)]:
                expected[name] = rung
                break
    assert done == expected
    assert sorted(done.values())[-1] == 4


def test_processes_stop_trials_too(cache: Path, tmp_path: Path) -> None:
    result = run_sweep(sweep(cache), tmp_path, engine=ProcessEngine(2, tmp_path))
    statuses = result.trials["status"].to_list()
    assert set(statuses) == {"finished", "stopped"}


def test_a_sweep_killed_between_a_rung_and_its_verdict_judges_the_same(cache: Path, tmp_path: Path) -> None:
    through = run_sweep(sweep(cache), tmp_path / "through").trials.select("trial", "status", "epochs_done", "top1")

    class Killed(Exception):
        pass

    def cut(streams: Any, halving: Halving | None) -> None:
        """Comes to the first rung with one verdict written of two, as a crash would leave it."""
        assert halving is not None
        stop_all = halving.stop

        def stop(rung: int, standing: Any) -> set[Path]:
            worse = sorted(stop_all(rung, standing))
            if worse:
                (worse[0] / STOPPED).unlink()
                (worse[0] / "metrics.parquet").unlink()  # and killed before the row of the last epoch, at that
                raise Killed
            return set()

        object.__setattr__(halving, "stop", stop)
        train_in_process(streams, halving)

    with pytest.raises(Killed):
        run_sweep(sweep(cache), tmp_path / "cut", engine=cut)
    again = run_sweep(sweep(cache), tmp_path / "cut").trials.select("trial", "status", "epochs_done", "top1")
    assert again.equals(through)


def test_without_a_contest_or_with_other_rules_the_stopped_go_on(
    cache: Path, whole: SweepResult, tmp_path: Path
) -> None:
    run_sweep(sweep(cache), tmp_path)
    milder = run_sweep(sweep(cache, RULES.model_copy(update={"first_epochs": 2})), tmp_path)
    assert sorted(milder.trials["epochs_done"].to_list()) == [2, 2, 4, 4]
    through = run_sweep(sweep(cache, None), tmp_path)
    figures = ["trial", "status", "top1", "nll", "epochs_done"]
    assert through.trials.select(figures).equals(whole.trials.select(figures))


@pytest.mark.parametrize(
    ("asha", "base", "message"),
    [
        (Asha(metric="nosuch"), {}, "no such metric"),
        (Asha(), {"evaluate_every": 2}, "no test_top1 by epoch 1"),
        (Asha(metric="test_top5"), {}, "no test_top5 by epoch 1"),  # of three classes
    ],
)
def test_bad_contests_are_refused(cache: Path, tmp_path: Path, asha: Asha, base: Any, message: str) -> None:
    recipe = sweep(cache, asha)
    with pytest.raises(RecipeError, match=message):
        run_sweep(recipe.model_copy(update={"base": {**recipe.base, **base}}), tmp_path)


def test_the_first_rung_comes_after_the_warm_up(cache: Path) -> None:
    recipe = sweep(cache, None)
    base = {**recipe.base, "schedule": {"name": "cosine", "warmup_epochs": 2}}
    for told, expected in (({}, 3), ({"metric": "loss"}, 3), ({"first_epochs": 1}, 1)):
        asha = SweepRecipe.model_validate({**recipe.model_dump(), "base": base, "asha": told}).asha
        assert asha is not None
        assert asha.first_epochs == expected
