"""`cache-tools fidelity` and `recode` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cache_tools.cli import app
from cache_tools.codecs import FeatureSteps, Float32, RowStep
from cache_tools.codecs.presets import resolve_codecs
from cache_tools.home.registry import HOME_VARIABLE, list_caches
from cache_tools.home.sizes import INDEX, size_and_time
from cache_tools.integrity.local import verify
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.next_commands import commands_in

IMAGES = tiny_images()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fused cache `digits` and a component cache `parts`, both float32, in a home of their own."""
    folder = tmp_path / "home"
    monkeypatch.setenv(HOME_VARIABLE, str(folder))
    for name, store in (("digits", "fused"), ("parts", "components")):
        manifest = tiny_manifest(IMAGES, name=name, store=store, codec="float32")
        build(folder / f"{name}-{manifest.fingerprint[:12]}.zarr", manifest, IMAGES)
    return folder


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit | None)
    return result


def contents(home: Path) -> dict[Path, bytes]:
    """Every file except the index of sizes, which listing a home writes once its folders are a few seconds old."""
    return {file: file.read_bytes() for file in home.rglob("*") if file.is_file() and file.name != INDEX}


def names(home: Path) -> set[str]:
    return {record.name for record in list_caches(home)}


def test_fidelity_prints_a_line_for_each_codec_and_changes_nothing(home: Path) -> None:
    before = contents(home)
    text = run("fidelity", "digits", "--codec", "compact", "--codec", "row-step+float16").stdout
    assert [line.split()[0] for line in text.splitlines() if line.endswith("any zarr")] == [
        "compact",
        "row-step+float16",
        "(as",
    ]
    assert "g T=1" in text
    assert "g T=4" in text
    assert contents(home) == before


@pytest.mark.parametrize(
    ("codecs", "expected"),
    [
        (["float32", "float16"], ["cache-tools", "recode", "wide", "--codec", "float16"]),
        (["float32"], ["train-student", "--cache", "wide"]),  # its own
    ],
)
def test_fidelity_names_the_smallest_good_codec(home: Path, codecs: list[str], expected: list[str]) -> None:
    run("recode", "digits", "--codec", "float32", "--name", "wide")
    options = [word for codec in codecs for word in ("--codec", codec)]
    text = run("fidelity", "wide", *options).stdout
    found = json.loads(run("fidelity", "wide", *options, "--json").stdout)["codecs"]
    good = [
        cost
        for cost in found
        if cost["bytes"] is not None and max(*cost["g"].values(), cost["feature_error"] or 0) <= 0.02
    ]
    smallest = min(good, key=lambda cost: cost["bytes"])["spec"]
    assert smallest == (expected[-1] if "--codec" in expected else "(as it is)")
    assert commands_in(text) == [expected]


def test_fidelity_as_json_at_the_temperatures_of_a_run(home: Path) -> None:
    options = ["--temperature", "2", "--temperature", "0.5", "--rows", "40", "--view", "2", "--json"]
    found = json.loads(run("fidelity", "parts", "--codec", "row-step", *options).stdout)
    assert (found["view"], found["rows"], found["temperatures"]) == (2, 40, [2.0, 0.5])
    (cost,) = (cost for cost in found["codecs"] if cost["spec"] == "row-step")
    assert set(cost["kl"]) == {"2", "0.5"}
    assert set(cost["g"]) == {"100@2", "200@2", "100@0.5", "200@0.5"}
    assert set(cost["targets"]) == {"teacher_features", "clip_features"}
    assert cost["bytes"] == pytest.approx(sum(target["bytes"] for target in cost["targets"].values()))


def test_fidelity_without_specs_shows_what_suits_the_cache(home: Path) -> None:
    specs = {cost["spec"] for cost in json.loads(run("fidelity", "digits", "--json").stdout)["codecs"]}
    assert {"(as it is)", "float16", "compact", "row-step", "fixed-step+"} <= specs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fidelity", "digits", "--codec", "float8"], "no such codec (float8)"),
        (["fidelity", "parts", "--codec", "companded"], "made from its features"),
        (["fidelity", "digits", "--temperature", "0"], "a number above 0"),
        (["fidelity", "digits", "--temperature", "nan"], "a finite number"),
        (["fidelity", "digits", "--view", "3"], "no such view"),
        (["fidelity", "nothing"], "no such cache (nothing)"),
        (["recode", "digits"], "no codec is given"),
        (["recode", "digits", "--codec", "compact", "--name", "a/b"], "bad cache name"),
        (["recode", "digits", "--logits", "feature-steps"], "feature-steps are for features"),
        (["recode", "nothing", "--codec", "compact"], "no such cache (nothing)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(home: Path, arguments: list[str], message: str) -> None:
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert names(home) == {"digits", "parts"}


def test_recode_makes_a_new_cache_and_continues_it(home: Path) -> None:
    text = run("recode", "digits", "--codec", "compact").stdout
    cache = TeacherCache.open("digits-compact")
    assert text.startswith(f"15 blocks converted: {cache.path}\n")
    assert cache.recipe.codecs == resolve_codecs("compact", 5)
    assert cache.recipe.derived_from == TeacherCache.open("digits").manifest.fingerprint
    assert verify(cache.path).sound
    (cache.path / "commits/c.2.1.0").unlink()
    assert run("recode", "digits", "--codec", "compact").stdout.startswith("1 block converted, 14 already there: ")
    assert run("recode", "digits", "--codec", "compact").stdout.startswith("0 blocks converted, 15 already there: ")
    assert names(home) == {"digits", "parts", "digits-compact"}


def test_recode_one_target_to_a_given_folder(home: Path, tmp_path: Path) -> None:
    options = ["--features", "feature-steps:resolution=8", "--out", str(tmp_path / "c"), "--name", "mine", "--json"]
    found = json.loads(run("recode", "digits", *options, "--block-rows", "32").stdout)
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.recipe.codecs.logits == Float32()
    assert cache.recipe.codecs.features == FeatureSteps(resolution=8.0)
    assert (cache.manifest.name, cache.manifest.block_rows) == ("mine", 32)
    assert found["blocks"] == 9
    assert found["fingerprint"] == cache.manifest.fingerprint
    assert found["bytes"] == size_and_time(cache.path)[0] < found["source_bytes"]


def test_codecs_given_one_by_one_make_the_name(home: Path) -> None:
    run("recode", "digits", "--logits", "row-step", "--features", "feature-steps")
    codecs = TeacherCache.open("digits-row-step-feature-steps").recipe.codecs
    assert (codecs.logits, codecs.features) == (RowStep(), FeatureSteps())


def test_a_finer_codec_gives_a_warning_on_stderr(home: Path) -> None:
    assert run("recode", "digits", "--codec", "compact").stderr == ""
    result = run("recode", "digits-compact", "--codec", "float32", "--json")
    assert result.stderr.startswith("warning: fused_logits from companded to float32 and fused_features")
    assert "stays lost" in json.loads(result.stdout)["caution"]


def test_recoding_a_half_built_cache_prints_what_is_missing(home: Path, tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES)
    write(create(tmp_path / "a", manifest, IMAGES), tiny_targets(manifest), [(0, block) for block in range(5)])
    text = run("recode", str(tmp_path / "a"), "--codec", "compact").stdout
    assert "10 blocks not in" in text
    assert "recode or fuse" in run("info", "tiny-compact").stdout
    result = run("recode", "tiny-compact", "--codec", "float16+", "--out", str(tmp_path / "b"))
    assert "10 blocks not in" in result.stdout
