"""Read a sweep from options and a sweep file: every option has an effect or is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cache_tools.config import dump_yaml
from cache_tools.errors import RecipeError
from tests.support import tiny_run
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from train.recipe.loading import load_train_recipe
from train.recipe.loss import named_loss
from train.sweep import cli
from train.sweep.options import default_folder, read_sweep
from train.sweep.recipe import SweepRecipe, make_trials


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A train recipe with a loss of its own."""
    data = {"name": "tiny", "cache": "none.zarr", "student": "resnet8", "epochs": 2, "device": "cpu"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**data, "loss": {"temperature": 2.0, "ce_weight": 0.5}}))
    return str(tmp_path / "base.yaml")


def sweep(
    recipe: str, *, file: dict[str, Any] | None = None, items: tuple[str, ...] = (), **sweep_keys: Any
) -> SweepRecipe:
    path = None
    if file is not None:
        path = Path(recipe).with_name("sweep.yaml")
        path.write_text(yaml.safe_dump({"recipe": recipe, **file}))
    return read_sweep(path, None if file else recipe, {}, items, sweep_keys)


def refused(*words: str) -> str:
    """The one line that the command prints when it refuses these words."""
    result = CliRunner().invoke(cli.app, [*words, "--show-trials"])
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output


# Losses


@pytest.mark.parametrize(
    ("items", "file"),
    [
        (("loss.temperature=7",), None),
        ((), {"set": {"loss.temperature": 7}}),
        ((), {"set": {"loss": {"temperature": 7}}}),
        (("loss.temperature=7",), {"set": {"loss.temperature": 5}}),
    ],
)
def test_set_applies_to_losses_by_name(recipe: str, items: tuple[str, ...], file: dict[str, Any] | None) -> None:
    for trial in make_trials(sweep(recipe, file=file, items=items, losses=["kd", "dkd"]), Path("unused")):
        alone = load_train_recipe(recipe, ["loss.temperature=7"], {"loss": named_loss(trial.loss)})
        assert trial.recipe.loss == alone.loss


def test_settings_of_a_trial_win_over_set(recipe: str) -> None:
    file: dict[str, Any] = {"set": {"loss.temperature": 7}, "trials": [{"lr": 0.1}, {"loss": "dkd"}]}
    file["trials"] += [{"loss": "dkd", "temperature": 5}]
    own, named, other = make_trials(sweep(recipe, file=file), Path("unused"))
    assert (own.recipe.loss.temperature, own.recipe.loss.ce_weight) == (7, 0.5), "the loss of the base"
    assert (named.recipe.loss.temperature, named.recipe.loss.ce_weight) == (7, 1.0)
    assert other.recipe.loss.temperature == 5


def test_settings_of_the_ce_term_apply_to_labels_alone(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of --set and of the grid; those of a loss that a name replaces do not, as in the other trials."""
    cache = tiny_run.write_cache(tmp_path / "tiny.zarr", tiny_run.write_pictures(tmp_path / "pictures"))
    data = yaml.safe_load(Path(recipe).read_text())
    data |= {"cache": str(cache), "loss": {"label_smoothing": 0.4, "class_weights": "balanced"}}
    Path(recipe).write_text(yaml.safe_dump(data))
    grid = {"label_smoothing": (0.0, 0.2), "accumulate": (2,), "clip_grad_norm": (0.5, 1.0)}
    trials = make_trials(sweep(recipe, losses=["ce", "kd"], grid=grid), Path("unused"))
    found = {
        (trial.loss, trial.recipe.loss.label_smoothing, trial.recipe.optimiser.clip_grad_norm): trial.recipe
        for trial in trials
    }
    assert set(found) == {(loss, *pair) for loss in ("ce", "kd") for pair in itertools.product((0.0, 0.2), (0.5, 1.0))}
    assert {recipe.optimiser.accumulate for recipe in found.values()} == {2}
    assert {recipe.loss.class_weights for recipe in found.values()} == {"none"}
    assert found["kd", 0.2, 1.0].loss.temperature == 3.0
    weighted = make_trials(sweep(recipe, losses=["ce", "kd"], items=("loss.class_weights=1,2,3",)), Path("unused"))
    assert [trial.recipe.loss.class_weights for trial in weighted] == [(1.0, 2.0, 3.0)] * 2


@pytest.mark.parametrize("item", ["loss.kind=dkd", "loss={kind: dkd}"])
def test_losses_by_name_and_a_kind_for_all_are_refused(recipe: str, item: str) -> None:
    with pytest.raises(RecipeError, match=r"loss.kind"):
        sweep(recipe, items=(item,), losses=["kd", "dkd"])
    assert sweep(recipe, items=(item,)).base["loss"]["kind"] == "dkd"


# Options and the file


def test_options_win_over_the_file(recipe: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": "nosuch", "set": {"epochs": 6, "seed": 4}, "students": ["vgg8"]}))
    read = read_sweep(file, recipe, {"epochs": 3, "cache": None}, (), {"students": ["resnet8"], "seeds": None})
    assert (read.base["epochs"], read.base["seed"], read.students) == (3, 4, ("resnet8",))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"set": None}, "'set'"),
        ({"set": ["epochs=1"]}, "'set'"),
        ({"recipe": 3}, "'recipe'"),
        ({"recipe": {"name": "x"}}, "'recipe'"),
        ({"search": 5}, "'search'"),
        ({"search": [1]}, "'search'"),
        ({"search": {"space": None}}, "'search.space'"),
        ({"seeds": []}, "without seeds"),
        ({"base": {"epochs": 3}}, "'base'"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--search", "3", "--grid", "lr=0.01..0.5")])
def test_a_file_with_a_wrong_type_is_refused_in_one_line(
    recipe: str, tmp_path: Path, file: dict[str, Any], message: str, options: tuple[str, ...]
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"recipe": recipe, **file}))
    assert message in refused("--sweep", str(path), *options)


def test_an_impossible_date_is_refused_in_one_line(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("name: 2024-13-45")
    assert "cannot be read" in refused("--sweep", str(tmp_path / "sweep.yaml"))
    assert "cannot be read" in refused(recipe, "--grid", "name=2024-13-45")


# Options without effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grid", "seed=3"), "--seeds"),
        (("--grid", "seed=1,2"), "--seeds"),
        (("--grid", "lr=0.1", "--grid", "lr=0.2"), "--grid lr"),
        (("--grid", "lr=0.1", "--grid", "optimiser.learning_rate=0.2"), "given twice"),
        (("--students", "resnet8", "--grid", "student=resnet20"), "grid.student"),
        (("--losses", "kd", "--grid", "loss=dkd"), "grid.loss"),
        (("--search", "3", "--grid", "lr=0.1..0.2", "--grid", "lr=0.1..0.5"), "--grid lr"),
        (("--students", ","), "--students"),
        (("--losses", ""), "--losses"),
        (("--ray-gpus", "2"), "--engine ray"),
        (("--ray-address", "auto"), "--engine ray"),
    ],
)
def test_options_that_would_be_ignored_are_refused(recipe: str, options: tuple[str, ...], message: str) -> None:
    assert message in refused(recipe, *options)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"grid": {"seed": [3]}}, "--seeds"),
        ({"grid": {"lr": [0.1], "optimiser.learning_rate": [0.2]}}, "given twice"),
        ({"students": ["resnet8"], "grid": {"student": ["resnet20"]}}, "grid.student"),
        ({"trials": [{"lr": 0.1, "optimiser.learning_rate": 0.2}]}, "trials.0"),
        ({"search": {"space": {"lr": "0.1..0.2", "optimiser.learning_rate": "0.1..0.5"}}}, "search.space"),
    ],
)
def test_a_setting_given_twice_in_a_file_is_refused(recipe: str, file: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sweep(recipe, file=file)


@pytest.mark.parametrize("given", [(), ("--overwrite",)])
def test_overwrite_is_passed_on(recipe: str, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]) -> None:
    passed: dict[str, Any] = {}

    def run_sweep(sweep: SweepRecipe, folder: Path, **options: Any) -> None:
        passed.update(options)
        raise RecipeError("far enough", where=folder)

    monkeypatch.setattr("train.sweep.run.run_sweep", run_sweep)
    result = CliRunner().invoke(cli.app, [recipe, "--workers", "1", *given])
    assert "far enough" in result.output
    assert passed["overwrite"] is bool(given)


# Names


def test_a_sweep_of_a_cache_is_named_after_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    build(tmp_path / "home" / "photos-000000000000.zarr", tiny_manifest(tiny_images(), name="photos"), tiny_images())
    named = read_sweep(None, None, {"cache": "photos"}, (), {})
    assert (named.name, default_folder(named)) == ("photos", Path("runs/sweep-photos"))
    assert read_sweep(None, "digits", {"cache": "photos"}, (), {}).name == "digits"
    assert read_sweep(None, None, {"cache": "photos"}, (), {"name": "mine"}).name == "mine"
    assert read_sweep(None, None, {"cache": "elsewhere"}, (), {}).name == "digits"


def test_a_sweep_that_an_earlier_version_named_after_the_recipe_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    earlier, other = Path("runs/sweep-digits"), Path("runs/sweep-photos")
    earlier.mkdir(parents=True)
    sweeps = {cache: SweepRecipe(name="photos", base={"cache": cache}) for cache in ("photos", "flowers")}
    (earlier / "sweep.yaml").write_text(dump_yaml(SweepRecipe(name="digits", base={"cache": "photos"})))
    assert [default_folder(sweep) for sweep in sweeps.values()] == [earlier, other]
    other.mkdir()
    assert default_folder(sweeps["photos"]) == other
