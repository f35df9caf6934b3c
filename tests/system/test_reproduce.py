"""docs/reproduce.md: its commands run, on stand-ins of the same shape, and its numbers are right."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import pipeline.cli
import train.cli
from cache_tools.config import builtin_names
from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.reader import TeacherCache
from pipeline import recipe as build_recipes
from pipeline.recipe import BuildRecipe, load_build_recipe
from tests.support import cifar_files, mdistiller_files, tiny_clip
from train.checkpoints import load_state
from train.recipe import TrainRecipe
from train.recipe import loading as train_recipes
from train.recipe.loading import load_train_recipe
from train.recipe.loss import named_loss
from train.students import create_student

# All commands are a dozen small trainings and five builds.
pytestmark = pytest.mark.timeout(1800)

TEXT = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
APPS = {"build-cache": pipeline.cli.app, "train-student": train.cli.app}
# Changes for the stand-ins: a CLIP in a folder, two views, and no check that the random teachers beat chance.
BUILD = ["--clip", "local-dir:tiny-clip", "--set", "num_views=2", "--set", "preflight_samples=0", "--device", "cpu"]
TRAIN = ["--epochs", "1", "--set", "evaluate_every=1", "--device", "cpu", "--json"]
LAYOUT = "download_ckpts/cifar_teachers/{}_vanilla/ckpt_epoch_240.pth"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def pairs() -> list[str]:
    return [name for name in builtin_names(train_recipes.builtin_recipes()) if name.startswith("cifar100-")]


def caches() -> list[str]:
    return [name for name in builtin_names(build_recipes.builtin_recipes()) if name.startswith("cifar100-")]


def table(heading: str) -> list[list[str]]:
    """Rows of the table that begins with this heading."""
    block = re.search(rf"^\| {re.escape(heading)} \|.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    assert block, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block[0].splitlines()[2:]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory, with stand-ins for everything that the page says to download."""
    root = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv(HOME_VARIABLE, str(root / "home"))
        cifar_files.write_cifar100(root / "data", patch)
        mdistiller_files.write_tree(root / "download_ckpts", "resnet32x4", "vgg13", "wrn_40_2")
        tiny_clip.make_folder(root / "tiny-clip")
        yield root


def run(lines: list[list[str]]) -> list[tuple[list[str], dict[str, Any]]]:
    """What commands of the page print as JSON."""
    results = []
    for program, *arguments in lines:
        extra = [*BUILD, "--json"] if program == "build-cache" else TRAIN
        printed = CliRunner().invoke(APPS[program], [*arguments, *extra])
        assert printed.exit_code == 0, f"{program} {shlex.join(arguments)}: {printed.stderr[-2000:]}"
        results.append(([program, *arguments], json.loads(printed.stdout)))
    return results


@pytest.fixture(scope="module")
def done(place: Path) -> list[tuple[list[str], dict[str, Any]]]:
    """What every command of the page printed, in the order of the page."""
    return run(commands())


@pytest.mark.medium
def test_the_first_cache_and_its_first_student(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    (build, *_), (train, *_) = ([line for line in commands() if line[0] == program] for program in APPS)
    (_, built), (_, trained) = run([build, [*train, "--out", str(tmp_path / "run")]])
    assert (built["num_views"], built["images_computed"]) == (2, 64)
    assert (trained["epochs"], trained["test_split"], trained["train_samples"]) == (1, "test", 32)
    assert (trained["loss"], trained["student"]) == ("kd+crd", load_train_recipe(train[1]).student)


@pytest.mark.slow
def test_every_command_runs(done: list[tuple[list[str], dict[str, Any]]]) -> None:
    builds = [words[1] for words, _ in done if words[0] == "build-cache"]
    assert set(builds) == set(caches())
    for words, result in done:
        if words[0] == "build-cache":
            grown = words[2:3] == ["--views"]
            assert result["num_views"] == 2
            assert result["images_computed"] == (0 if grown else 64)
            continue
        assert result["epochs"] == 1
        assert result["test_split"] == "test"
        assert {"top1", "nll"} <= result["last"].keys() & result["best"].keys(), "last and best epoch are both there"
        assert result["best_epoch"] == 0
        assert result["train_samples"] == 32


@pytest.mark.slow
def test_every_pair_has_a_command_and_learns_from_both_networks(done: list[tuple[list[str], dict[str, Any]]]) -> None:
    plain = {words[1]: result for words, result in done if words[0] == "train-student" and len(words) == 2}
    assert set(plain) == set(pairs())
    for name, result in plain.items():
        state = load_state(Path(result["folder"]) / "state.pt")
        assert state is not None
        objective = state["learner"]["objective"]
        widths = [objective[f"contrast.embed_targets.{number}.weight"].shape for number in range(2)]
        teacher = load_build_recipe(load_train_recipe(name).cache).teacher.name
        assert widths == [(128, create_student(teacher, 100).num_features), (128, 32)]
        assert (result["loss"], result["student"]) == ("kd+crd", load_train_recipe(name).student)


@pytest.mark.slow
def test_the_caches_hold_what_the_tree_has(done: list[tuple[list[str], dict[str, Any]]], place: Path) -> None:
    assert done
    for name in caches():
        cache, recipe = TeacherCache.open(name), load_build_recipe(name)
        assert cache.recipe.store == "components"
        assert cache.num_classes == 100
        assert cache.recipe.teacher.architecture == recipe.teacher.name
        assert recipe.teacher.weights == LAYOUT.format(recipe.teacher.name)
        assert cache.recipe.fusion.teacher_weight == cache.recipe.fusion.feature_weight == 0.7
        assert len(cache.recipe.clip.templates) == 12


@pytest.mark.slow
def test_variants_do_what_the_page_says(done: list[tuple[list[str], dict[str, Any]]]) -> None:
    losses = [result["loss"] for words, result in done if words[0] == "train-student" and "--loss" in words]
    assert losses == ["kd", "ce+crd", "ce", "kd", "kd", "ce+crd", "dkd", "standardised_kd"]
    loss = load("train-student", "--loss", "dkd").loss
    assert (loss.dkd_beta, loss.warmup_epochs, loss.temperature, loss.ce_weight) == (6, 20, 4, 1)
    kd = load("train-student", "--loss", "kd", "--teacher-weight", "1").loss
    assert (kd.ce_weight, kd.distill_weight, kd.temperature) == (0.1, 0.9, 4)
    standardised = load("train-student", "--loss", "standardised_kd").loss
    assert (standardised.ce_weight, standardised.distill_weight, standardised.temperature) == (0.1, 9, 3)
    assert load("train-student", "--loss", "crd").fusion.feature_weight == 1
    official = load("train-student", "--cache").fusion
    assert (official.clip_scale, official.clip_view) == (1.0, 0)


def load(program: str, *words: str) -> TrainRecipe:
    """The recipe of the page's command that has these words."""
    (command,) = [line for line in commands() if line[0] == program and set(words) <= set(line)]
    shown = CliRunner().invoke(APPS[program], [*command[1:], "--show-recipe"])
    assert shown.exit_code == 0, shown.stderr
    return TrainRecipe.model_validate(yaml.safe_load(shown.stdout))


@pytest.mark.parametrize("name", pairs())
def test_recipes_of_the_pairs_differ_in_what_the_table_says(name: str) -> None:
    recipe, first = load_train_recipe(name), load_train_recipe("cifar100-resnet32x4-resnet8x4")
    slow = recipe.student in {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
    optimiser = first.optimiser.model_copy(update={"learning_rate": 0.01 if slow else 0.05})
    changes = {"name": name, "cache": recipe.cache, "student": recipe.student, "optimiser": optimiser}
    assert recipe == first.model_copy(update=changes)
    assert (recipe.epochs, recipe.batch_size, recipe.schedule.milestones) == (240, 64, (150, 180, 210))
    assert (recipe.optimiser.momentum, recipe.optimiser.weight_decay) == (0.9, 5e-4)
    loss = recipe.loss
    assert (loss.ce_weight, loss.distill_weight, loss.temperature, loss.feature_weight) == (1, 3, 3, 0.8)
    assert (loss.crd_negatives, loss.crd_dim, loss.crd_temperature, loss.crd_momentum) == (16_384, 128, 0.07, 0.5)
    build = load_build_recipe(recipe.cache)
    assert (recipe.dataset, recipe.views) == (None, None), "those of the cache"
    on_labels = load_train_recipe(name, options={"loss": named_loss("ce")})
    assert (build.dataset, build.views) == (on_labels.dataset, on_labels.views)
    assert name == f"{build.name}-{recipe.student.lower().replace('wrn_', 'wrn').replace('_', '-')}"


def test_recipes_of_the_caches_differ_in_the_teacher() -> None:
    first = load_build_recipe("cifar100-resnet32x4")
    for name in caches():
        recipe: BuildRecipe = load_build_recipe(name)
        assert recipe == first.model_copy(update={"name": name, "teacher": recipe.teacher})
        assert name == f"cifar100-{recipe.teacher.name.replace('wrn_', 'wrn').replace('_', '-')}"
    assert (first.clip.name, first.clip.weights, first.clip.templates) == ("ViT-L-14-quickgelu", "openai", "richkd")


def test_sizes_are_right() -> None:
    clip_dim, images = 768, 50_000  # of open_clip's ViT-L-14
    import open_clip

    assert open_clip.get_model_config("ViT-L-14-quickgelu")["embed_dim"] == clip_dim
    rows = {row[0].strip("`"): row for row in table("cache")}
    assert sorted(rows) == sorted(caches())
    for name, (_, features, sixteen, all_epochs) in rows.items():
        dim: Any = create_student(load_build_recipe(name).teacher.name, 100).num_features
        view_gb = images * (dim + clip_dim) * 2 / 1e9
        assert features == f"{dim} + {clip_dim}"
        assert (sixteen, all_epochs) == (f"{16 * view_gb:.1f} GB", f"{240 * view_gb:.1f} GB")
        parameters = sum(int(p.numel()) for p in create_student(load_build_recipe(name).teacher.name, 100).parameters())
        assert f"{load_build_recipe(name).teacher.name} {parameters * 4 / 1e6:.0f} MB" in TEXT


def test_tables_have_the_pairs() -> None:
    wanted = {f"{load_build_recipe(r.cache).teacher.name} → {r.student}" for r in map(load_train_recipe, pairs())}
    tables = re.findall(r"^\| pair \|.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    assert len(tables) == 2
    for block in tables:
        assert {line.split("|")[1].strip() for line in block.splitlines()[2:]} == wanted


# A published teacher, as the command takes it


@pytest.fixture(scope="module")
def small(place: Path) -> Path:
    """A tree with two small architectures, and the archive beside it."""
    tree = mdistiller_files.write_tree(place / "small", "resnet8", "resnet20")
    mdistiller_files.write_archive(tree)
    return tree.parent


def build(*arguments: object) -> Any:
    words = ["cifar100-vgg13", *BUILD, "--set", "num_views=1", *arguments, "--json"]
    return CliRunner().invoke(pipeline.cli.app, [str(word) for word in words])


@pytest.mark.slow
def test_file_folder_and_archive_make_the_same_cache(small: Path, tmp_path: Path) -> None:
    file = small / "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth"
    prints = set()
    for number, weights in enumerate((file, file.parent, small / "cifar_teachers", small / "cifar_teachers.tar")):
        built = build("--teacher", "resnet8", "--teacher-checkpoint", weights, "--out", tmp_path / str(number))
        assert built.exit_code == 0, built.stderr
        prints.add(json.loads(built.stdout)["fingerprint"])
        cache = TeacherCache.open(tmp_path / str(number))
        assert cache.load_view(0).teacher_logits(slice(None)).shape == (32, 100)
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("teacher", "weights", "words"),
    [
        ("resnet8x4", "cifar_teachers/resnet8_vanilla/ckpt_epoch_240.pth",
         "expected 'conv1.weight' of shape [32, 3, 3, 3]; found shape [16, 3, 3, 3]"),
        ("vgg13", "cifar_teachers.tar", "no checkpoint of vgg13"),
        ("resnet8", "elsewhere/cifar_teachers.tar", "no such weights"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_one_line(
    small: Path, tmp_path: Path, teacher: str, weights: str, words: str
) -> None:
    failed = build("--teacher", teacher, "--teacher-checkpoint", small / weights, "--out", tmp_path / "c")
    assert failed.exit_code == 2
    assert words in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert failed.stdout == ""
    assert not (tmp_path / "c").exists()
