"""Searches: suggestions follow outcomes, no settings are trained twice, and a killed search resumes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cache_tools.config import validate
from cache_tools.errors import RecipeError
from tests.support import tiny_run
from train.report.trials import setting_columns
from train.sweep import cli
from train.sweep.recipe import SweepRecipe
from train.sweep.run import SweepResult, run_sweep, train_in_process
from train.sweep.search_recipe import Range, Search, edges, parse_range
from train.sweep.suggest import Outcome, Suggestions

pytestmark = pytest.mark.medium

optuna = pytest.importorskip("optuna")

FIGURES = ("trial", "status", "top1", "nll", "ece", "best_epoch", "epochs_done")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    return tiny_run.write_cache(folder / "tiny.zarr", tiny_run.write_pictures(folder / "pictures"))


def sweep(cache: Path, search: dict[str, Any], **changes: Any) -> SweepRecipe:
    base = tiny_run.recipe(cache, Path("unused"), epochs=2, loggers=()).model_dump(mode="json")
    data = {"name": "tiny", "base": {**base, **changes.pop("base", {})}, "search": search, **changes}
    return validate(SweepRecipe, data, where="test")


def table(result: SweepResult) -> pl.DataFrame:
    return result.trials.select(*FIGURES, *setting_columns(result.trials))


class Counted:
    """The engine of this process. It records the trials of each round."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, streams: Any, halving: Any) -> None:
        self.batches.append([trial.name for stream in streams for trial in stream])
        train_in_process(streams, halving)


# Suggestions


def suggested(search: Search, value_of: Callable[[dict[str, Any]], float]) -> list[dict[str, Any]]:
    """All suggestions of a search in which the outcome of a trial is `value_of` its settings."""
    suggestions, found = Suggestions(search, search.space), []
    while len(suggestions) < search.trials:
        first = len(suggestions)
        found += [suggestions.ask() for _ in range(search.together)]
        for number in range(first, len(found)):
            suggestions.tell(number, Outcome("finished", value_of(found[number]), 3))
    return found


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_suggestions_approach_the_optimum(sampler: str) -> None:
    """Two searches with different optima: first suggestions are equal, later ones are near the own optimum."""
    space = {"lr": "0.001..1.0", "student": ["resnet8", "resnet20"]}
    search = Search.model_validate({"sampler": sampler, "trials": 20, "space": space, "metric": "test_nll"})
    low = suggested(search, lambda tried: abs(math.log(tried["lr"] / 0.003)) + (tried["student"] == "resnet8"))
    high = suggested(search, lambda tried: abs(math.log(tried["lr"] / 0.3)) + (tried["student"] == "resnet20"))
    assert low[:10] == high[:10]
    after = [sorted(tried["lr"] for tried in each[12:]) for each in (low, high)]
    assert after[0][4] < 0.03 < after[1][4]
    students = [[tried["student"] for tried in each[12:]] for each in (low, high)]
    assert students[0].count("resnet20") > students[1].count("resnet20")


def test_accuracy_is_maximised_and_loss_minimised() -> None:
    space = {"lr": "0.001..1.0"}
    found = {}
    for metric in ("test_top1", "test_nll"):
        search = Search.model_validate({"trials": 20, "space": space, "metric": metric})
        tried = suggested(search, lambda settings: math.log(settings["lr"]))
        found[metric] = sum(math.log(settings["lr"]) for settings in tried[12:]) / 8
    assert found["test_top1"] > found["test_nll"] + 2


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
def test_suggestions_repeat_and_lie_in_the_space(sampler: str) -> None:
    space = {
        "lr": {"low": 0.01, "high": 0.5},
        "loss.temperature": {"low": 1.0, "high": 8.0},
        "optimiser.momentum": {"low": 0.5, "high": 0.95, "step": 0.15},
        "batch_size": {"low": 8, "high": 32, "step": 8},
        "epochs": {"low": 1, "high": 40},
        "student": ["resnet8", "wrn_16_1"],
        "loss": ["kd"],
        "schedule.milestones": [[1, 2], []],
    }
    search = Search.model_validate({"sampler": sampler, "trials": 12, "space": space, "seed": 3})
    found = suggested(search, lambda tried: tried["lr"])
    assert found == suggested(search, lambda tried: tried["lr"])
    assert found != suggested(search.model_copy(update={"seed": 4}), lambda tried: tried["lr"])
    for tried in found:
        assert list(tried) == list(space)
        assert 0.01 <= tried["lr"] <= 0.5
        assert 1.0 <= tried["loss.temperature"] <= 8.0
        assert tried["optimiser.momentum"] in (0.5, 0.65, 0.8, 0.95)
        assert tried["batch_size"] in (8, 16, 24, 32)
        assert tried["epochs"] in range(1, 41)
        assert tried["loss"] == "kd"
        assert tried["schedule.milestones"] in ([1, 2], [])
        assert max(len(str(tried[key])) for key in ("lr", "loss.temperature")) <= 7
    assert {tried["student"] for tried in found} == {"resnet8", "wrn_16_1"}


def test_optuna_records_the_values_that_were_trained() -> None:
    search = Search.model_validate({"trials": 4, "space": {"lr": "0.01..0.5", "epochs": "1..3"}})
    suggestions = Suggestions(search, search.space)
    used = [suggestions.ask() for _ in range(4)]
    outcomes = [Outcome("finished", 0.5, 3), Outcome("stopped", 0.25, 1), Outcome("failed", None, 0)]
    for number, outcome in enumerate([*outcomes, Outcome("finished", None, 3)]):
        suggestions.tell(number, outcome)
    known = suggestions.study.trials
    assert [trial.params for trial in known] == used
    assert [trial.state.name for trial in known] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    assert [trial.value for trial in known] == [0.5, 0.25, None, None]
    assert known[1].last_step == 1


# Ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.01..0.5", (0.01, 0.5, True, None, False)),
        ("1.0..8", (1.0, 8, False, None, False)),
        ("1..8", (1, 8, False, None, True)),
        ("1..10", (1, 10, True, None, True)),
        ("0..10", (0, 10, False, None, True)),
        ("0.01..0.5:linear", (0.01, 0.5, False, None, False)),
        ("2..4:log", (2, 4, True, None, True)),
        ("16..160:16", (16, 160, False, 16, True)),
        ("1e-5..1e-3", (1e-5, 1e-3, True, None, False)),
        ("-1.0..1", (-1.0, 1, False, None, False)),
    ],
)
def test_parse_range(text: str, expected: tuple[Any, ...]) -> None:
    found = Range.model_validate(parse_range(text))
    assert (found.low, found.high, found.on_log_scale, found.step, found.whole) == expected


@given(low=st.floats(1e-6, 1e3), width=st.floats(1e-4, 1e4), part=st.floats(0, 1), log=st.booleans())
def test_rounding_stays_in_the_range_and_within_a_thousandth_of_it(
    low: float, width: float, part: float, log: bool
) -> None:
    limits = Range(low=low, high=low * (1 + width), log=log)
    value = limits.low + part * (limits.high - limits.low)
    near = limits.rounded(value)
    assert limits.low <= near <= limits.high
    spread = value * math.log(limits.high / limits.low) if log else limits.high - limits.low
    assert abs(near - value) <= spread / 1000
    assert limits.rounded(near) == pytest.approx(near, abs=spread / 1000)


def test_edges_contain_every_choice_and_both_ends() -> None:
    space: dict[str, Any] = {"lr": Range(low=0.1, high=0.5), "student": ("a", "b", "c")}
    assert list(edges(space)) == [
        {"lr": 0.1, "student": "a"},
        {"lr": 0.5, "student": "a"},
        {"lr": 0.1, "student": "b"},
        {"lr": 0.1, "student": "c"},
    ]


# Searches with training


SPACE = {"lr": "0.001..0.5", "temperature": "1.0..8.0", "student": ["resnet8", "resnet14"]}


def test_a_search_continues_a_smaller_one_and_trains_nothing_twice(cache: Path, tmp_path: Path) -> None:
    """A search of 3 and then 6 trials equals one of 6; the third time nothing is trained."""
    engines = [Counted() for _ in range(5)]
    search = {"trials": 6, "together": 2, "space": SPACE, "metric": "test_nll"}
    whole = run_sweep(sweep(cache, search), tmp_path / "whole", engine=engines[0])
    assert whole.trials["status"].to_list() == ["finished"] * 6
    assert [len(batch) for batch in engines[0].batches] == [2, 2, 2]
    grown_folder = tmp_path / "grown"
    run_sweep(sweep(cache, {**search, "trials": 3}), grown_folder, engine=engines[1])
    grown = run_sweep(sweep(cache, search), grown_folder, engine=engines[2])
    assert [len(batch) for batch in engines[1].batches] == [2, 1]
    assert [len(batch) for batch in engines[2].batches] == [1, 2]
    assert table(grown).equals(table(whole))
    again = run_sweep(sweep(cache, search), grown_folder, engine=engines[3])
    assert engines[3].batches == []
    assert table(again).equals(table(whole))
    assert again.best == grown.best
    assert whole.best is not None
    assert whole.best.value == pytest.approx(whole.trials["nll"].min())
    row = whole.trials.filter(pl.col("trial") == whole.best.trial)
    assert row["nll"][0] == whole.trials["nll"].min()
    page = (grown_folder / "report.html").read_text()
    assert all(str(rate) in page for rate in whole.trials["optimiser.learning_rate"])


def test_failed_stopped_and_repeated_suggestions(cache: Path, tmp_path: Path) -> None:
    """Four settings, one of which diverges, with halving: each is trained once in six rounds."""
    counted = Counted()
    rates = [0.05, 0.06, 1e-6, 1e30]
    search = {"trials": 12, "together": 2, "sampler": "random", "space": {"lr": rates}}
    recipe = sweep(cache, search, asha={"metric": "loss", "keep_one_in": 2}, base={"epochs": 2})
    result = run_sweep(recipe, tmp_path, engine=counted)
    names = [name for batch in counted.batches for name in batch]
    assert sorted(names) == sorted(f"lr={rate}-s0" for rate in rates)
    by_rate = dict(zip(result.trials["optimiser.learning_rate"], result.trials["status"], strict=True))
    assert by_rate[1e30] == "failed"
    assert "stopped" in by_rate.values()
    assert result.best is not None
    assert by_rate[float(result.best.trial.split("=")[1].removesuffix("-s0"))] == "finished"
    again = run_sweep(recipe, tmp_path, engine=counted)
    assert table(again).equals(table(result))
    assert sum(map(len, counted.batches)) == len(rates)


@pytest.mark.slow
def test_the_command_resumes_after_sigkill(cache: Path, tmp_path: Path) -> None:
    """Killed in its second round, a search ends with the table of an undisturbed one. Then try its last command."""
    base = tiny_run.recipe(cache, Path("unused"), epochs=12, loggers=()).model_dump(mode="json", exclude={"out"})
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": str(tmp_path / "base.yaml"), "search": {"together": 2}}))
    options = ["--sweep", str(file), "--search", "4", "--grid", "lr=0.001..0.5", "--grid", "temperature=2.0,4.0"]
    options += ["--workers", "1", "--json", "--out"]

    victim = subprocess.Popen(
        [sys.executable, "-m", "train.sweep.cli", *options, str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    while victim.poll() is None and len(list((tmp_path / "killed").glob("trials/*/state.pt"))) < 3:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert len(list((tmp_path / "killed").glob("trials/*/result.json"))) < 4
    printed = []
    for out in ("killed", "undisturbed"):
        result = CliRunner().invoke(cli.app, [*options, str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        printed.append(json.loads(result.stdout))
    rows = [[{key: row[key] for key in FIGURES} for row in each["trials"]] for each in printed]
    assert rows[0] == rows[1]
    assert [row["status"] for row in rows[0]] == ["finished"] * 4
    assert printed[0]["best"]["trial"] == printed[1]["best"]["trial"]
    assert printed[0]["pixels"] == printed[1]["pixels"]
    assert [line.split(" (")[0] for line in printed[0]["pixels"]] == ["pixels: in memory"]

    command = printed[0]["best"]["command"].split()
    assert command[0] == "sweep-students"
    shown = CliRunner().invoke(cli.app, [*command[1:], "--show-trials"])
    assert shown.output.split() == [f"s{seed}" for seed in range(1, 6)]


# Refused searches


@pytest.mark.parametrize(
    ("search", "changes", "message"),
    [
        ({"space": {"lr": "0.01..0.5"}}, {"seeds": 3}, "one seed"),
        ({"space": {"seed": [1, 2]}}, {}, "one seed"),
        ({"space": {"lr": "0.01..0.5"}}, {"trials": [{"lr": 0.1}]}, "makes its own trials"),
        ({"space": {"lr": "0.01..0.5"}}, {"grid": {"lr": [0.1, 0.2]}}, "searched twice"),
        ({"space": {"lr": []}}, {}, "without values"),
        ({}, {"students": ["resnet8"]}, "nothing to search"),
        ({"space": {"lr": "0.5..0.01"}}, {}, "not a range"),
        ({"space": {"lr": "0.0..0.5:log"}}, {}, "above 0"),
        ({"space": {"lr": "0.1..much"}}, {}, "cannot be read"),
        ({"space": {"lr": 0.1}}, {}, "search.space.lr"),
        ({"space": {"lr": {"low": 0.1, "high": 0.2, "stepp": 1}}}, {}, "Did you mean 'step'"),
        ({"space": {"lr": "0.01..0.5"}, "sampler": "tpee"}, {}, "'tpe'"),
    ],
)
def test_bad_searches_are_refused(cache: Path, search: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep(cache, search, **changes)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optimiser.lr": "0.01..0.5"}, "unknown recipe key"),
        ({"optimiser.momentum": "0.5..1.5"}, "optimiser.momentum"),
        ({"student": ["resnet8", "resnet9"]}, "resnet9"),
        ({"loss": ["kd", "nosuch"]}, "no such loss"),
    ],
)
def test_bad_settings_are_refused_before_training(
    cache: Path, tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message) as raised:
        run_sweep(sweep(cache, {"space": space}), tmp_path / "out")
    assert type(raised.value).__module__ == "cache_tools.errors"
    assert not (tmp_path / "out").exists()


def test_an_unknown_metric_is_refused_with_the_known_ones(cache: Path, tmp_path: Path) -> None:
    recipe = sweep(cache, {"trials": 1, "space": {"lr": "0.01..0.5"}, "metric": "test_top2"}, base={"epochs": 1})
    with pytest.raises(RecipeError, match=r"search.metric.*test_top1"):
        run_sweep(recipe, tmp_path)


def test_without_optuna_the_command_says_what_to_install(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optuna.py").write_text("raise ImportError('No module named optuna')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.delitem(sys.modules, name)
    options = ["digits", "--cache", str(tmp_path / "none"), "--search", "3", "--grid", "lr=0.01..0.5"]
    result = CliRunner().invoke(cli.app, [*options, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "pip install 'teacher-cache[search]'" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "lr=0.01..0.5"], "Give --search N"),
        (["--grid", "name=2020-13-45"], "values that cannot be read"),
        (["--search", "3"], "nothing to search"),
        (["--search", "3", "--grid", "lr=0.01..0.5", "--seeds", "3"], "one seed"),
        (["--search", "3", "--grid", "lr=0.01..0.5", "--show-trials"], "in advance"),
    ],
)
def test_options_that_exclude_each_other(options: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["digits", *options])
    assert result.exit_code == 2
    assert message in result.output
