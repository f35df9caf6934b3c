"""Every command on caches with a teacher alone, several teachers, or CLIP alone, as users type it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import cache_tools.cli
import pipeline.cli
import pipeline.evaluate.cli
import train.cli
from cache_tools.images import open_images
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.networks.ensemble import load_ensemble
from pipeline.online import LiveTeachers
from pipeline.plan import make_plan
from tests.support import one_group, tiny_run
from tests.support.one_group import KINDS, Caches
from tests.support.turns import some
from train.checkpoints import load_student
from train.data import open_data
from train.export.student import ExportOptions, export_student
from train.report.comparison import compare
from train.report.records import read_run
from train.run import train_on, train_student
from train.runs.result import load_result, summary
from train.sweep.recipe import SweepRecipe
from train.sweep.run import run_sweep

pytestmark = pytest.mark.medium

CPU = torch.device("cpu")
EVERYTHING = slice(None)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    return Caches(one_group.prepare(tmp_path_factory.mktemp("commands"), train=48))


def tools(*arguments: object) -> Result:
    done = CliRunner().invoke(cache_tools.cli.app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def name_of(kind: str) -> str:
    return "teacher" if kind.startswith("teacher") else "clip"


# cache-tools


@pytest.mark.parametrize(
    ("kind", "store"),
    some([("teacher", "fused"), ("clips", "components"), ("teachers", "components"), ("clip", "fused")], 2),
)
def test_stats_are_about_the_only_group(caches: Caches, kind: str, store: str) -> None:
    cache = caches.open(kind, store)
    text = tools("stats", cache.path).stdout
    data = json.loads(tools("stats", cache.path, "--json").stdout)
    source = name_of(kind)
    logits = np.concatenate([cache.load_view(view).logits(EVERYTHING).double().numpy() for view in range(3)])
    labels = np.tile(cache.labels, 3)
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    every = [row for row in data["summary"] if row["view"] is None]
    assert [row["source"] for row in every] == [source]
    assert every[0]["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert every[0]["nll"] == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-5)
    assert (data["about"]["sources"], data["about"]["teacher_weight"]) == ([source], None)
    assert data["disagreement"] == []
    assert not [key for row in data["classes"] for key in row if key.startswith(("gain", "fusion"))]
    assert "NaN" not in json.dumps(data)
    assert f"targets: {'the teacher alone, no CLIP' if source == 'teacher' else 'CLIP alone, no teacher'}" in text
    assert ("teacher" if source == "clip" else "CLIP") not in text.split("softmax at")[1]
    assert "fusion" not in text
    assert "nan" not in text.lower().split()


def test_pictures_of_one_group(caches: Caches, tmp_path: Path) -> None:
    tools("stats", caches.path("clips", "components"), "--out", tmp_path / "out")
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"quadrants.png", "reliability.png", "consistency.png", "stability.png"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("teacher", "there is nothing to tune: the cache has one teacher and no CLIP"),
        ("clip", "there is nothing to tune: the cache has one CLIP and no teacher"),
    ],
)
@pytest.mark.parametrize("store", ["fused", "components"])
def test_one_network_leaves_nothing_to_tune(caches: Caches, kind: str, store: str, words: str) -> None:
    done = CliRunner().invoke(cache_tools.cli.app, ["tune-fusion", str(caches.path(kind, store))])
    assert done.exit_code == 2
    assert words in done.stderr
    assert "Traceback" not in done.output


def test_info_and_ls_show_the_networks_that_there_are(
    caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path))
    for kind in ("teachers", "clip"):
        shutil.copytree(caches.path(kind), tmp_path / f"{kind}-{'ab' * 6}.zarr")
    teachers, clip = tools("info", "teachers-fused").stdout, tools("info", "clip-fused").stdout
    assert "fusion:                2 teachers, no CLIP\n" in teachers
    assert "CLIP:" not in teachers
    assert "teacher:" not in clip
    assert "fusion:                CLIP alone, CLIP scale 14.1044 (model), prompt ensemble embedding\n" in clip
    rows = {row["name"]: row for row in json.loads(tools("ls", "--json").stdout)}
    assert (rows["teachers-fused"]["teacher"], rows["teachers-fused"]["clip"]) == ("resnet8 + wrn_16_2", "")
    assert (rows["clip-fused"]["teacher"], rows["clip-fused"]["clip"]) == ("", "local-dir:digits-clip")
    assert "resnet8 + wrn_16_2" in tools("ls").stdout
    assert json.loads(tools("info", "clip-fused", "--json").stdout)["manifest"]["recipe"]["teachers"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_components_gives_the_cache_that_a_build_stores(caches: Caches, tmp_path: Path, kind: str) -> None:
    printed = tools("fuse", caches.path(kind, "components"), "--out", tmp_path / "fused", "--device", "cpu").stdout
    made, built = TeacherCache.open(tmp_path / "fused"), caches.open(kind)
    assert made.recipe.fusion == built.recipe.fusion
    assert made.manifest.clip_scales == built.manifest.clip_scales
    for view in range(3):
        one, other = made.load_view(view), built.load_view(view)
        torch.testing.assert_close(one.logits(EVERYTHING), other.logits(EVERYTHING), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.features(EVERYTHING), other.features(EVERYTHING), rtol=1e-5, atol=1e-6)
    words = {"teacher": "the teacher alone", "teachers": "2 teachers, no CLIP"}
    assert words.get(kind, "CLIP alone, CLIP scale 14.1044") in printed
    assert ("prompt templates" in printed) == kind.startswith("clip")


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("teacher", ["--teacher-weight", "0.5"], "no CLIP, so the teacher has all the weight"),
        ("teacher", ["--clip-scale", "match"], "no CLIP, so this setting has no effect"),
        ("teacher", ["--prompts", "openai"], "the cache has no CLIP, so there are no prompts to change"),
        ("teachers", ["--prompt-ensemble", "logits"], "fusion.prompt_ensemble"),
        ("clip", ["--clip-scale", "match"], "no teacher whose spread the scale could match"),
        ("clip", ["--teacher-weights", "1"], "no teacher, so this setting has no effect"),
    ],
    ids=str,
)
def test_fuse_refuses_settings_of_a_missing_group(
    caches: Caches, tmp_path: Path, kind: str, arguments: list[str], words: str
) -> None:
    command = ["fuse", str(caches.path(kind, "components")), *arguments, "--out", str(tmp_path / "no")]
    done = CliRunner().invoke(cache_tools.cli.app, command)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("kind", "store"), some([("clip", "components"), ("teachers", "components"), ("teacher", "fused")], 1)
)
def test_recode_fidelity_and_replay(caches: Caches, tmp_path: Path, kind: str, store: str) -> None:
    tools("recode", caches.path(kind, store), "--codec", "float16", "--out", tmp_path / "half")
    made, exact = TeacherCache.open(tmp_path / "half").load_view(2), caches.open(kind, store).load_view(2)
    torch.testing.assert_close(made.logits(EVERYTHING), exact.logits(EVERYTHING), rtol=5e-3, atol=5e-3)
    found = json.loads(tools("fidelity", caches.path(kind, store), "--rows", 40, "--json").stdout)
    assert found
    printed = tools("verify", tmp_path / "half", "--replay", 12, "--device", "cpu").stdout
    assert "replay: 12 rows computed again" in printed
    assert "100.0% of the numbers the same" in printed


def test_copies_and_grown_views(caches: Caches, tmp_path: Path) -> None:
    home = {"TEACHER_CACHE_HOME": str(tmp_path / "home")}
    part = build_cache(one_group.recipe(caches.root, "clip", num_views=2, out=tmp_path / "part.zarr")).path
    target = tmp_path / "shared.zarr"
    for views in (2, 3):
        build_cache(one_group.recipe(caches.root, "clip", num_views=views, out=part))
        for command in (["push", str(part), str(target)], ["pull", str(target), "--out", str(tmp_path / "back.zarr")]):
            done = CliRunner().invoke(cache_tools.cli.app, command, env=home)
            assert done.exit_code == 0, done.output
        copy = TeacherCache.open(tmp_path / "back.zarr")
        assert copy.complete_views == tuple(range(views))
    ours, theirs = copy.load_view(2), caches.open("clip").load_view(2)
    assert torch.equal(ours.logits(EVERYTHING), theirs.logits(EVERYTHING))


# Training and evaluation


@pytest.mark.parametrize(
    ("kind", "loss"),
    some(
        [
            ("clip", {"kind": "kd", "feature": "crd", "crd_dim": 8}),
            ("teacher", {"kind": "kd", "feature": "cosine"}),
            ("teachers", {"kind": "dkd", "feature": "crd", "crd_dim": 8}),
        ],
        1,
    ),
    ids=["clip", "teacher", "teachers"],
)
def test_cached_training_equals_training_with_the_live_group(
    caches: Caches, tmp_path: Path, kind: str, loss: dict[str, Any]
) -> None:
    store = "components" if loss["feature"] == "crd" else "fused"
    plan, runs = one_group.recipe(caches.root, kind), []
    for name in ("cached", "live"):
        run = tiny_run.recipe(caches.path(kind, store), tmp_path / name, epochs=1, loss=loss)
        data = open_data(run, CPU)
        if name == "live":
            ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, data.images, plan.dataset, CPU, "float32")
            data = replace(data, targets=LiveTeachers(ensemble), cache=None)
        train_on(data, run, CPU)
        runs.append(load_file(tmp_path / name / "last.safetensors"))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name], rtol=1e-4, atol=1e-5)


PREFLIGHTS = {
    "teacher": {"teacher_top1": 0.9, "clip_top1": None, "fusion_top1": None, "n": 9, "split": "test"},
    "clip": {"teacher_top1": None, "clip_top1": 0.4, "fusion_top1": None, "n": 9, "split": "test"},
}


@pytest.mark.parametrize("kind", PREFLIGHTS)
def test_a_run_and_its_page_show_the_only_group(
    caches: Caches, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cache_tools.format.manifest import Manifest

    monkeypatch.setattr(Manifest, "preflight", property(lambda _: PREFLIGHTS[kind]))
    train_student(tiny_run.recipe(caches.path(kind), tmp_path / "run", epochs=1))
    result = load_result(tmp_path / "run")
    assert result is not None
    assert result.teachers == PREFLIGHTS[kind]
    label, other = ("teacher", "CLIP") if kind == "teacher" else ("CLIP", "teacher")
    text = summary(result)
    assert [label, f"{PREFLIGHTS[kind][f'{kind}_top1']:.2%}"] in [line.split() for line in text.splitlines()]
    assert f"{label[0].upper()}{label[1:]}: 9 clean images of the test split" in text
    assert other not in text.split("\n\n")[0]
    assert "fused" not in text
    references = compare(read_run(tmp_path / "run")).references
    assert [(reference.label, reference.figure) for reference in references] == [
        (label, result.teachers[f"{kind}_top1"])
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert '"label":"fusion"' not in page.replace(" ", "")


@pytest.mark.parametrize("kind", some(KINDS, 2))
def test_a_student_is_compared_with_the_only_group(caches: Caches, tmp_path: Path, kind: str) -> None:
    train_student(tiny_run.recipe(caches.path(kind), tmp_path / "run", epochs=1))
    command = [str(tmp_path / "run"), "--teachers", "--device", "cpu"]
    done = CliRunner().invoke(pipeline.evaluate.cli.app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["teachers"]
    label = "teacher" if kind.startswith("teacher") else "CLIP"
    assert [row["source"] for row in rows] == [label]
    plan = one_group.recipe(caches.root, kind)
    images = open_images(plan.dataset, "test")
    ensemble = load_ensemble(plan.teacher, plan.clip, plan.fusion, images, plan.dataset, CPU, "float32")
    pixels = torch.from_numpy(images.load(EVERYTHING))
    own, _ = ensemble.fuse(*ensemble.outputs(pixels))
    model, card = load_student(tmp_path / "run" / "last.safetensors")
    mean, std = (torch.tensor(values)[:, None, None] for values in (card.mean, card.std))
    with torch.no_grad():
        student = model.eval()((pixels / 255 - mean) / std)
    assert rows[0]["top1"] == pytest.approx(float((own.argmax(1).numpy() == images.labels).mean()))
    assert rows[0]["agreement"] == pytest.approx(float((own.argmax(1) == student.argmax(1)).double().mean()))
    log_p, log_q = own.double().log_softmax(1), student.double().log_softmax(1)
    assert rows[0]["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
    printed = CliRunner().invoke(pipeline.evaluate.cli.app, command).stdout
    table = printed.split("Agreement with the teachers")[1].split("\n\n")[0]
    first_words = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert [word for word in first_words if word in {"teacher", "CLIP", "fusion"}] == [label]


def test_a_sweep_an_export_and_few_labels(caches: Caches, tmp_path: Path) -> None:
    base = tiny_run.recipe(caches.path("clips", "components"), Path("unused"), epochs=1).model_dump(mode="json")
    recipe = SweepRecipe.model_validate(
        {"name": "s", "base": base, "students": ("resnet8",), "losses": ("kd", "richkd")}
    )
    assert run_sweep(recipe, tmp_path / "sweep").trials["status"].to_list() == ["finished", "finished"]
    few = tiny_run.recipe(caches.path("teachers"), tmp_path / "few", epochs=1, label_fraction=0.5)
    assert train_student(few).last is not None
    assert export_student(tmp_path / "few", ExportOptions(formats=("safetensors",), out=tmp_path / "exported"))


def test_train_student_refuses_a_weight_without_a_second_group(caches: Caches, tmp_path: Path) -> None:
    arguments = ["--cache", str(caches.path("teacher", "components")), "--out", str(tmp_path / "run")]
    for more, words in (
        (["--teacher-weight", "0.5"], "the cache has no CLIP, so the teacher has all the weight"),
        (["--clip-scale", "10"], "the cache has no CLIP, so this setting has no effect (fusion.clip_scale)"),
    ):
        done = CliRunner().invoke(train.cli.app, [*arguments, *more])
        assert done.exit_code == 2
        assert words in done.stderr


# build-cache --plan


@pytest.mark.parametrize(
    ("kind", "words"),
    some([("teachers", "through 2 teachers, so"), ("teacher", "through teacher, so"), ("clip", "through CLIP, so")], 1),
)
def test_a_plan_names_the_networks(caches: Caches, kind: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.MAX_BATCHES", 1)
    plan = make_plan(one_group.recipe(caches.root, kind), "resnet8", 1)
    assert words in str(plan)
    width = 4 * (3 + 16)
    assert plan.bytes >= 3 * 48 * width
    assert pipeline.cli.app is not None
