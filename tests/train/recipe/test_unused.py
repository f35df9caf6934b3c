"""Settings that have no effect are refused, by `train-student` and by sweeps, where somebody has made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cache_tools.errors import RecipeError
from train.recipe import all_fields, default_fields
from train.recipe.loading import load_train_recipe
from train.recipe.loss import named_loss
from train.recipe.unused import unused_settings
from train.sweep.options import read_sweep
from train.sweep.recipe import make_trials

CE, CRD = named_loss("ce"), named_loss("crd")


@pytest.mark.parametrize(
    ("settings", "loss", "needs"),
    [
        (["loss.temperature=4"], CE, "a logit term"),
        (["optimiser.weight_decay=0", "optimiser.weight_decay_exclusions=true"], None, "weight_decay above 0"),
        (["loss.temperature=4"], CRD, "a logit term"),
        (["loss.distill_weight=2"], CE, "loss.kind other than ce"),
        (["loss.dkd_beta=2"], None, "loss.kind=dkd or standardised_dkd"),
        (["loss.dkd_alpha=2"], named_loss("standardised_kd"), "loss.kind=dkd"),
        (["loss.warmup_epochs=2"], CE, "a logit term"),
        (["loss.temperature=4", "loss.distill_weight=0", "loss.feature=mse"], None, "loss.distill_weight above 0"),
        (["loss.feature_weight=2"], None, "loss.feature other than none"),
        (["loss.feature_source=fused"], None, "loss.feature other than none"),
        (["loss.crd_dim=64"], None, "loss.feature=crd"),
        (["loss={kind: kd, feature: mse, crd_negatives: 64}"], None, "loss.feature=crd"),
        (["loss.rkd_angle_weight=1", "loss.feature=pkt"], None, "loss.feature=rkd"),
        (["schedule.milestones=[2, 4]"], None, "schedule.name=multistep"),
        (["schedule.gamma=0.5"], None, "schedule.name=multistep"),
        (["schedule.name=constant", "schedule.min_learning_rate=0.001"], None, "schedule.name=cosine"),
        (["label_seed=3"], None, "a label_fraction below 1"),
        (["fusion.teacher_weight=0.5"], CE, "a loss with targets"),
        (["fusion.teacher_weight=0.5"], CRD, "a loss with a logit term"),
        (["fusion.feature_weight=0.5"], None, "a loss with a feature term"),
        (["compare_with_labels=true"], CE, "this run is one on labels alone"),
    ],
)
def test_a_setting_without_effect_is_refused(settings: list[str], loss: dict[str, Any] | None, needs: str) -> None:
    with pytest.raises(RecipeError, match=f"this setting has no effect .*{needs}.*Leave"):
        load_train_recipe("digits", settings, {"loss": loss})


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        (["loss.temperature=3", "label_seed=0"], CE),  # the defaults
        (["loss.dkd_beta=2"], named_loss("dkd")),
        (["optimiser.weight_decay=0.1", "optimiser.weight_decay_exclusions=true"], None),
        (["loss.kind=standardised_dkd", "loss.dkd_alpha=2"], None),
        (["loss.crd_dim=64", "fusion.feature_weight=0.5"], CRD),
        (["fusion.teacher_weight=0.5", "label_fraction=0.5", "label_seed=3"], CRD),  # for the labels that are missing
        (["schedule.name=multistep", "schedule.milestones=[2, 4]", "schedule.gamma=0.5"], None),
        (["schedule.min_learning_rate=0.001", "fusion.clip_scale=match"], None),
        (["compare_with_labels=false"], CE),
    ],
)
def test_settings_with_an_effect_are_accepted(settings: list[str], loss: dict[str, Any] | None) -> None:
    load_train_recipe("digits", settings, {"loss": loss})


def test_only_what_is_set_in_the_command_counts(tmp_path: Path) -> None:
    """The settings of a recipe file may be for another loss than the one of the command."""
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ncache: c\ndataset: {name: digits}\nfusion: {teacher_weight: 0.5}\ncompare_with_labels: true\n"
    )
    assert load_train_recipe(str(tmp_path / "mine.yaml"), [], {"loss": CE}).fusion.teacher_weight == 0.5
    assert load_train_recipe("digits", [], {"loss": CE}).compare_with_labels


def test_every_key_is_one_of_the_recipe() -> None:
    known = default_fields()
    for loss in (CE, named_loss("kd"), CRD, named_loss("richkd")):
        recipe = load_train_recipe("digits", [], {"loss": loss})
        for key in unused_settings(all_fields(recipe)):
            part, _, name = key.rpartition(".")
            assert name in (known[part] if part else known), key


def trials(tmp_path: Path, items: list[str], grid: list[str], **keys: Any) -> list[str]:
    sweep = read_sweep(None, "digits", {}, items, keys, grid)
    return [trial.name for trial in make_trials(sweep, tmp_path)]


def test_a_sweep_over_losses_may_set_what_some_of_them_use(tmp_path: Path) -> None:
    names = trials(tmp_path, ["loss.temperature=2"], [], losses=["kd", "crd"])
    assert names == ["kd-s0", "crd-s0"]


def test_a_loss_that_does_not_use_a_varied_setting_is_trained_once(tmp_path: Path) -> None:
    names = trials(tmp_path, [], ["loss.dkd_beta=2,6"], losses=["kd", "dkd"])
    assert names == ["kd-dkd_beta=2-s0", "dkd-dkd_beta=2-s0", "dkd-dkd_beta=6-s0"]


@pytest.mark.parametrize(
    ("items", "grid"),
    [(["loss.crd_dim=64"], []), ([], ["loss.crd_dim=64,32"]), ([], ["label_seed=1,2"]), (["schedule.gamma=0.3"], [])],
)
def test_a_setting_that_no_trial_uses_is_refused(tmp_path: Path, items: list[str], grid: list[str]) -> None:
    with pytest.raises(RecipeError, match="no effect on any trial of the sweep"):
        trials(tmp_path, items, grid, losses=["kd", "dkd"])
