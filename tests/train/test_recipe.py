"""Training recipes: the built-in ones, their validation, and the values that identify a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache_tools.config import builtin_names, dump_yaml
from cache_tools.errors import RecipeError
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.views.recipe import ViewRecipe
from pipeline.recipe import load_build_recipe
from train.recipe import (
    LOSSES,
    LossRecipe,
    TrainRecipe,
    builtin_recipes,
    load_train_recipe,
    named_loss,
    recipe_digest,
    run_folder,
)
from train.sweep.options import read_sweep

PAIRS = (
    "cifar100-resnet32x4-resnet8x4",
    "cifar100-resnet32x4-shufflev2",
    "cifar100-vgg13-mobilenetv2",
    "cifar100-vgg13-vgg8",
    "cifar100-wrn40-2-wrn16-2",
    "cifar100-wrn40-2-wrn40-1",
)
NAMES = ("cifar100", *PAIRS, "digits", "fashion-mnist")


def test_built_in_recipes() -> None:
    assert tuple(builtin_names(builtin_recipes())) == NAMES
    paper = load_train_recipe("cifar100")
    assert (paper.student, paper.epochs, paper.batch_size) == ("resnet8x4", 240, 64)
    assert (paper.optimiser.learning_rate, paper.optimiser.weight_decay) == (0.05, 5e-4)
    assert paper.schedule.milestones == (150, 180, 210)
    assert (paper.loss.distill_weight, paper.loss.temperature, paper.loss.feature_weight) == (3.0, 3.0, 0.8)
    assert load_train_recipe("digits").compare_with_labels


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_labels_alone_has_the_views_of_the_cache(name: str) -> None:
    cache = load_train_recipe(name).cache
    assert cache is not None
    build = load_build_recipe(cache)
    assert cache == build.name
    train = load_train_recipe(name, [], {"loss": {"kind": "ce"}})
    assert train.dataset == build.dataset
    assert train.views == build.views


@pytest.mark.parametrize("name", NAMES)
def test_a_shown_recipe_reads_back_as_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_train_recipe(name, ["epochs=7", "loss.temperature=2.5"])
    (tmp_path / "shown.yaml").write_text(dump_yaml(recipe))
    assert load_train_recipe(str(tmp_path / "shown.yaml")) == recipe
    assert (recipe.epochs, recipe.loss.temperature) == (7, 2.5)


def test_losses_by_name() -> None:
    """Weights of CE, logit term and feature term, and the temperature, are those of the papers' code."""
    terms = {}
    for name in LOSSES:
        loss = LossRecipe(**named_loss(name))
        logit = (loss.kind, loss.distill_weight, loss.temperature) if loss.needs_logits else None
        terms[name] = loss.ce_weight, logit, (loss.feature, loss.feature_weight) if loss.needs_features else None
    assert terms == {
        "ce": (1.0, None, None),
        "kd": (1.0, ("kd", 3.0, 3.0), None),
        "dkd": (1.0, ("dkd", 1.0, 4.0), None),
        "standardised_kd": (0.1, ("standardised_kd", 9.0, 2.0), None),
        "crd": (1.0, None, ("crd", 0.8)),
        "richkd-l": (1.0, ("kd", 3.0, 3.0), None),
        "richkd-f": (1.0, None, ("crd", 0.8)),
        "richkd": (1.0, ("kd", 3.0, 3.0), ("crd", 0.8)),
        "bce": (1.0, ("bce", 1.0, 1.0), None),
        "bce-labels": (1.0, None, None),
    }
    with pytest.raises(RecipeError, match="no such loss"):
        named_loss("kdd")


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ({"kind": "ce"}, "ce"),
        ({"kind": "kd"}, "kd"),
        ({"kind": "kd", "feature": "crd"}, "kd+crd"),
        ({"kind": "ce", "feature": "mse"}, "ce+mse"),
        ({"kind": "kd", "distill_weight": 0.0}, "ce"),
        ({"kind": "bce", "feature": "pkt"}, "bce+pkt"),
        ({"kind": "bce", "distill_weight": 0.0}, "bce-labels"),
    ],
)
def test_the_name_of_a_loss(loss: dict[str, Any], name: str) -> None:
    assert make(loss=loss).loss_name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epoch": 3}, "unknown recipe key 'epoch'.*'epochs'"),
        ({"optimiser": {"learning_rat": 1}}, "optimiser.learning_rat.*learning_rate"),
        ({"cache": None}, "learns from a cache, and none is named"),
        ({"loss": {"kind": "ce"}, "dataset": None, "cache": None}, "needs a dataset of its own"),
        ({"optimiser": {"name": "adamw", "nesterov": True}}, "nesterov"),
        ({"schedule": {"name": "multistep"}}, "needs milestones"),
        ({"schedule": {"name": "multistep", "milestones": [3, 2]}}, "must rise"),
        ({"schedule": {"warmup_epochs": 11}}, "warm-up is longer than the run"),
        ({"epochs": 0}, "'epochs'"),
        ({"seed": -1}, "'seed'"),
        ({"ema_decay": 1.0}, "'ema_decay'"),
        ({"optimiser": {"accumulate": 0}}, "'optimiser.accumulate'"),
        ({"optimiser": {"clip_grad_norm": 0}}, "'optimiser.clip_grad_norm'"),
        ({"loss": {"label_smoothing": 1.0}}, "'loss.label_smoothing'"),
        ({"precision": "float8"}, "'precision'"),
    ],
)
def test_an_impossible_recipe_is_an_error_of_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    import yaml

    data = {"name": "mine", "cache": "c", "dataset": {"name": "digits"}, "epochs": 10} | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=words) as caught:
        load_train_recipe(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_values_hold_everything_that_determines_the_result() -> None:
    recipe = make()
    for same in ({"device": "cpu"}, {"out": "x"}, {"name": "other"}, {"data_dir": "d"}, {"cache": "elsewhere"},
                 {"dataset": {"name": "cifar10"}}, {"compare_with_labels": True}):  # fmt: skip
        assert make(**same).values() == recipe.values(), same
    for different in ({"seed": 1}, {"epochs": 9}, {"student": "vgg8"}, {"precision": "bfloat16"},
                      {"loss": {"kind": "dkd"}}, {"evaluate_every": 2}, {"batch_size": 63},
                      {"num_views": 3}, {"label_fraction": 0.1}, {"fusion": {"teacher_weight": 0.5}}):  # fmt: skip
        assert make(**different).values() != recipe.values(), different


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("resnet8X4", "resnet8x4"),
        ("mobilenetv2", "MobileNetV2"),
        ("shufflenetv1", "ShuffleV1"),
        ("Torchvision:ResNet18", "torchvision:resnet18"),
        ("TIMM:resnet10t", "timm:resnet10t"),
        ("timm:Mine", "timm:Mine"),
        ("Nobody's", "Nobody's"),
    ],
)
def test_a_student_has_one_canonical_name(written: str, name: str) -> None:
    assert make(student=written).values() == make(student=name).values()
    assert make(student=name).student == name


def test_on_labels_alone_the_values_hold_dataset_and_views_but_not_data_dir() -> None:
    recipe = make(loss={"kind": "ce"})
    assert recipe.values() != make(loss={"kind": "kd"}).values()
    assert make(loss={"kind": "ce"}, cache="other").values() == recipe.values()
    assert make(loss={"kind": "ce"}, dataset={"name": "digits", "data_dir": "x"}).values() == recipe.values()
    assert make(loss={"kind": "ce"}, dataset={"name": "cifar10"}).values() != recipe.values()
    assert make(loss={"kind": "ce"}, num_views=2).values() != recipe.values()
    assert make(loss={"kind": "ce"}, views={"base_seed": 2}).values() != recipe.values()


def test_on_labels_changes_only_the_loss() -> None:
    recipe = make(compare_with_labels=True)
    on_labels = recipe.on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    before, after = recipe.model_dump(), on_labels.model_dump()
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"cache", "dataset", "views", "loss", "num_views", "compare_with_labels"}
    assert not on_labels.loss.needs_targets


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "d19dde278b7f12d6a863bf74b552fd7b3cfda6776843e14bd49ce3f35e83fb25"),
        ({"loss": {"kind": "ce"}}, "06b1060efbc91dba50e504ca728ad49f17ac7038712f5f1076b2ea61d61b1188"),
        (
            {"optimiser": {"name": "adamw", "learning_rate": 0.001}},
            "c5179835658efbf661d222c3248c33038f6a85f7ac1a140d500b07cb85e39241",
        ),
    ],
)
def test_digests_of_earlier_versions_stay(changes: dict[str, Any], digest: str) -> None:
    """Runs of version 0.1 resume and are found again."""
    assert recipe_digest({"recipe": make(**changes).values()}) == digest


ADDED: dict[str, dict[str, Any]] = {
    "optimiser": {"accumulate": 4, "clip_grad_norm": 1.0},
    "loss": {"label_smoothing": 0.1, "class_weights": (1.0, 2.0)},
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, values in ADDED.items() for key in values])
def test_an_added_setting_is_another_run(part: str, key: str) -> None:
    recipe = make(**{part: {key: ADDED[part][key]}})
    assert recipe.values() != make().values()
    assert f"{key}: " in dump_yaml(make()), "a shown recipe has all settings"


def test_on_labels_keeps_the_settings_of_the_ce_term() -> None:
    recipe = make(loss={"kind": "dkd", "ce_weight": 0.5, "label_smoothing": 0.2, "class_weights": "balanced"})
    on_labels = recipe.on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    assert on_labels.loss == LossRecipe(kind="ce", label_smoothing=0.2, class_weights="balanced")
    several = make(loss={"kind": "bce", "ce_weight": 0.5}).on_labels(DatasetRecipe(name="digits"), ViewRecipe(), 4)
    assert several.loss_name == "bce-labels"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2.5, 0]", (1.0, 2.5, 0.0)),
        ("1\n2.5\n0\n", (1.0, 2.5, 0.0)),
        ("1 2.5 0", (1.0, 2.5, 0.0)),
        ("cat: 1\n7: 2.5\n'no': 0", {"cat": 1.0, "7": 2.5, "no": 0.0}),
        ('{"cat": 1, "dog": 2}', {"cat": 1.0, "dog": 2.0}),
    ],
)
def test_class_weights_from_a_file_become_part_of_the_recipe(tmp_path: Path, text: str, expected: Any) -> None:
    file = tmp_path / "weights.txt"
    file.write_text(text)
    recipe = load_train_recipe("digits", [f"loss.class_weights={file}"])
    assert recipe.loss.class_weights == expected
    assert TrainRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert load_train_recipe("digits", options={"loss.class_weights": str(file)}) == recipe


@pytest.mark.parametrize(
    ("given", "expected"),
    [("balanced", "balanced"), ("none", "none"), (None, "none"), ("1,2,0.5", (1.0, 2.0, 0.5)), ([1, 0], (1.0, 0.0))],
)
def test_class_weights_as_options(given: Any, expected: Any) -> None:
    assert LossRecipe(class_weights=given).class_weights == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nosuch.txt", "cannot read class weights.*nosuch.txt.*no such file"),
        ([1, -1], "bad class weights.*0 or more.*-1"),
        ([1, float("nan")], "bad class weights"),
        ({"cat": float("inf")}, "bad class weights"),
        ({"cat": "heavy"}, "bad class weights.*heavy"),
        ([], "bad class weights"),
        (3, "bad class weights"),
    ],
)
def test_impossible_class_weights_are_refused(given: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make(loss={"class_weights": given})


@pytest.mark.parametrize("key", ["label_smoothing", "class_weights"])
def test_settings_of_the_ce_term_are_refused_without_one(key: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ncache: c\nloss: {ce_weight: 0}")
    value = {"label_smoothing": "0.1", "class_weights": "balanced"}[key]
    with pytest.raises(RecipeError, match=f"'loss'.*ce_weight above 0 for {key}"):
        load_train_recipe(str(tmp_path / "mine.yaml"), [f"loss.{key}={value}"])


def test_every_recipe_has_a_folder_with_a_telling_name() -> None:
    recipe = make(student="timm:mobilenetv3_small_050.lamb_in1k")
    folder = run_folder(recipe, recipe_digest({"recipe": recipe.values()}))
    assert folder.parent.name == "runs"
    assert folder.name.startswith("mine-timm_mobilenetv3_small_050.lamb_in1k-kd-")
    assert folder != run_folder(recipe, recipe_digest({"recipe": make(seed=1).values()}))
    assert str(run_folder(make(out="here"), "0" * 64)) == "here"


def test_recipes_and_the_command_line_load_without_torch() -> None:
    code = (
        "import sys, train.cli, train.recipe; train.recipe.load_train_recipe('digits');"
        "print([m for m in ('torch', 'timm', 'zarr', 'matplotlib', 'polars', 'sklearn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def make(**changes: Any) -> TrainRecipe:
    data: dict[str, Any] = {"name": "mine", "cache": "c", "dataset": {"name": "digits"}, "epochs": 10}
    return TrainRecipe.model_validate(data | changes)


@pytest.mark.parametrize(
    ("short", "full", "value"),
    [
        ("lr=0.3", ("optimiser", "learning_rate"), 0.3),
        ("temperature=7", ("loss", "temperature"), 7.0),
        (" weight_decay = 1e-3", ("optimiser", "weight_decay"), 1e-3),
        ("label_smoothing=0.1", ("loss", "label_smoothing"), 0.1),
    ],
)
def test_set_takes_the_short_names_of_the_grid(short: str, full: tuple[str, str], value: float) -> None:
    for recipe in ("digits", "cifar100"):
        loaded = load_train_recipe(recipe, [short])
        assert getattr(getattr(loaded, full[0]), full[1]) == value
    sweep = read_sweep(None, "digits", {}, [short], {})
    assert sweep.base[full[0]][full[1]] == value
