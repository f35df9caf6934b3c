"""Asynchronous successive halving: which trials stop at which rung, also after a sweep was killed."""

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

pytestmark = pytest.mark.medium

RATES = (1e-5, 0.02, 0.05, 0.1)
RULES = Asha(metric="loss", keep_one_in=2, first_epochs=1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = tiny_run.write_pictures(tmp_path_factory.mktemp("pictures"))
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "tiny.zarr", pictures)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """The same trials without halving."""
    return run_sweep(sweep(cache, asha=None), tmp_path_factory.mktemp("whole"))


def sweep(cache: Path, asha: Asha | None = RULES, **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=4).model_dump(mode="json")
    data = {"name": "tiny", "base": base, "students": ("resnet8",), "grid": {"lr": RATES}, "asha": asha}
    return SweepRecipe.model_validate(data | changes)


def losses(result: SweepResult, epoch: int) -> dict[str, float]:
    """Training loss by trial, after this number of epochs."""
    return {
        row["trial"]: pl.read_parquet(Path(row["folder"]) / "metrics.parquet")["loss"][epoch - 1]
        for row in result.trials.iter_rows(named=True)
    }


def test_rungs_are_powers_below_the_last_epoch() -> None:
    assert RULES.rungs(4) == [1, 2]
    assert Asha().rungs(30) == [1, 3, 9, 27]
    assert not RULES.larger_is_better
    assert Asha().larger_is_better


def test_the_better_half_continues_at_each_rung(cache: Path, whole: SweepResult, tmp_path: Path) -> None:
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
    decision = json.loads((tmp_path / "trials" / max(first, key=lambda name: first[name]) / STOPPED).read_bytes())
    assert (decision["epochs"], decision["of"]) == (1, 4)


def test_a_later_trial_is_compared_with_all_earlier_ones(cache: Path, whole: SweepResult, tmp_path: Path) -> None:
    """Trials one after the other: the first passes every rung, and only a better trial passes after it."""

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


@pytest.mark.slow
def test_processes_stop_trials_too(cache: Path, tmp_path: Path) -> None:
    result = run_sweep(sweep(cache), tmp_path, engine=ProcessEngine(2, tmp_path))
    statuses = result.trials["status"].to_list()
    assert set(statuses) == {"finished", "stopped"}


def test_a_sweep_killed_between_a_rung_and_its_decision_decides_the_same(cache: Path, tmp_path: Path) -> None:
    undisturbed = run_sweep(sweep(cache), tmp_path / "undisturbed").trials.select(
        "trial", "status", "epochs_done", "top1"
    )

    class Killed(Exception):
        pass

    def cut(streams: Any, halving: Halving | None) -> None:
        """Stop at the first rung with one of two decisions written, as after a crash."""
        assert halving is not None
        stop_all = halving.stop

        def stop(rung: int, standing: Any) -> set[Path]:
            worse = sorted(stop_all(rung, standing))
            if worse:
                (worse[0] / STOPPED).unlink()
                (worse[0] / "metrics.parquet").unlink()  # and without the row of the last epoch
                raise Killed
            return set()

        object.__setattr__(halving, "stop", stop)
        train_in_process(streams, halving)

    with pytest.raises(Killed):
        run_sweep(sweep(cache), tmp_path / "cut", engine=cut)
    again = run_sweep(sweep(cache), tmp_path / "cut").trials.select("trial", "status", "epochs_done", "top1")
    assert again.equals(undisturbed)


def test_stopped_trials_continue_without_halving_or_with_other_rules(
    cache: Path, whole: SweepResult, tmp_path: Path
) -> None:
    run_sweep(sweep(cache), tmp_path)
    milder = run_sweep(sweep(cache, RULES.model_copy(update={"first_epochs": 2})), tmp_path)
    assert sorted(milder.trials["epochs_done"].to_list()) == [2, 2, 4, 4]
    without = run_sweep(sweep(cache, None), tmp_path)
    figures = ["trial", "status", "top1", "nll", "epochs_done"]
    assert without.trials.select(figures).equals(whole.trials.select(figures))


@pytest.mark.parametrize(
    ("asha", "base", "message"),
    [
        (Asha(metric="nosuch"), {}, "no such metric"),
        (Asha(), {"evaluate_every": 2}, "no test_top1 by epoch 1"),
        (Asha(metric="test_top5"), {}, "no test_top5 by epoch 1"),  # the test split has three classes
    ],
)
def test_bad_rules_are_refused(cache: Path, tmp_path: Path, asha: Asha, base: Any, message: str) -> None:
    recipe = sweep(cache, asha)
    with pytest.raises(RecipeError, match=message):
        run_sweep(recipe.model_copy(update={"base": {**recipe.base, **base}}), tmp_path)


def test_the_first_rung_comes_after_the_warm_up(cache: Path) -> None:
    recipe = sweep(cache, None)
    base = {**recipe.base, "schedule": {"name": "cosine", "warmup_epochs": 2}}
    for rules, expected in (({}, 3), ({"metric": "loss"}, 3), ({"first_epochs": 1}, 1)):
        asha = SweepRecipe.model_validate({**recipe.model_dump(), "base": base, "asha": rules}).asha
        assert asha is not None
        assert asha.first_epochs == expected
