import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cache_tools.cli import app
from cache_tools.home import registry
from cache_tools.home.sizes import INDEX
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.next_commands import commands_in

pytestmark = pytest.mark.medium

IMAGES = tiny_images()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete cache, a half-built one, and a damaged one."""
    home = tmp_path_factory.mktemp("home")
    manifest = tiny_manifest(IMAGES, name="digits")
    build(home / f"digits-{manifest.fingerprint[:12]}.zarr", manifest, IMAGES)
    half = tiny_manifest(IMAGES, name="half", store="components")
    write(
        create(home / f"half-{half.fingerprint[:12]}.zarr", half, IMAGES),
        tiny_targets(half),
        [(0, block) for block in range(5)],
    )
    broken = tiny_manifest(IMAGES, name="broken", codec="float32")
    build(home / "broken-0123456789ab.zarr", broken, IMAGES)
    (home / "broken-0123456789ab.zarr" / "zarr.json").write_text(
        '{"attributes": {"teacher_cache": {"format_version": 1}}'
    )
    return home


def run(home: Path, *arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"TEACHER_CACHE_HOME": str(home), "COLUMNS": None})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.stderr
    return result


def test_ls_lists_complete_half_built_and_damaged_caches(home: Path) -> None:
    header, broken, digits, half, problem = run(home, "ls").stdout.splitlines()
    assert header.split() == ["name", "fingerprint", "dataset", "teacher", "CLIP", "views", "size", "modified", "used"]
    assert broken.split()[:2] == ["broken", "damaged"]
    fingerprint = tiny_manifest(IMAGES).fingerprint[:12]
    assert digits.split()[:6] == ["digits", fingerprint, "digits/train", "tiny_teacher", "tiny_clip", "3/3"]
    assert half.split()[0] == "half"
    assert half.split()[5] == "1/3"
    assert problem.startswith("broken is damaged: damaged or foreign zarr.json")


def test_ls_json_has_every_field(home: Path) -> None:
    records = json.loads(run(home, "ls", "--json").stdout)
    assert [record["name"] for record in records] == ["broken", "digits", "half"]
    assert [record["complete"] for record in records] == [False, True, False]
    assert "zarr.json" in records[0]["problem"]
    assert records[1]["path"] == str(registry.resolve(Path(records[1]["path"])))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--complete"], ["digits"]),
        (["--incomplete"], ["broken", "half"]),
        (["--name", "DIG"], ["digits"]),
        (["--dataset", "digits/", "--teacher", "tiny_t*r", "--incomplete"], ["half"]),
        (["--larger-than", "1B", "--unused-for", "0s"], ["broken", "digits", "half"]),
        (["--larger-than", "1GB"], []),
        (["--unused-for", "1d"], []),
    ],
)
def test_ls_filters(home: Path, options: list[str], names: list[str]) -> None:
    assert [record["name"] for record in json.loads(run(home, "ls", "--json", *options).stdout)] == names
    table = run(home, "ls", *options).stdout
    assert [name for name in ("broken", "digits", "half") if f"{name} " in table] == names
    assert names or table == f"No cache in {home} matches.\n"


def test_ls_of_a_bad_filter_is_one_clear_error(home: Path) -> None:
    assert "expected a size such as 100GB" in run(home, "ls", "--larger-than", "big", code=2).stderr
    assert "expected a time such as 30d" in run(home, "ls", "--unused-for", "1 year", code=2).stderr


def test_ls_of_another_folder_and_of_one_cache(home: Path, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    shutil.copytree(home, tmp_path / "share", dirs_exist_ok=True)
    assert len(json.loads(run(tmp_path / "none", "ls", str(tmp_path / "share"), "--json").stdout)) == 3
    one = next((tmp_path / "share").glob("half-*"))
    assert [record["path"] for record in json.loads(run(home, "ls", str(one), "--json").stdout)] == [str(one)]


def test_ls_of_an_empty_home_names_build_cache(tmp_path: Path) -> None:
    assert "build-cache" in run(tmp_path / "none", "ls").stdout
    assert json.loads(run(tmp_path / "none", "ls", "--json").stdout) == []


def test_info_shows_recipe_geometry_progress_and_accuracies(home: Path) -> None:
    text = run(home, "info", "digits").stdout
    for words in (
        tiny_manifest(IMAGES).fingerprint,
        "digits/train, 75 samples, 5 classes, 32×32",
        "3 of 3 done, complete",
        "base seed 7, pad-crop → flip, view 0 clean",
        "tiny_teacher",
        "2 templates, the first: a photo of a {}.",
        "teacher weight 0.7, feature weight 0.7, CLIP scale 100 (model)",
        "fused, float16, teachers ran in float32",
        "5 per view, 16 rows each",
        "3×75×5 float16",
        "teacher_top1 75.00%, clip_top1 50.00%, n 64",
    ):
        assert words in text
    half = run(home, "info", "half").stdout
    assert "1 of 3 done, half-built: run the same build-cache command to continue" in half
    assert "teacher_head_weight" in half


def test_info_and_ls_name_every_network(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, store="components", teacher_weights=(0.3, 0.7), clip_weights=(0.5, 0.5))
    create(tmp_path / "several-0123456789ab.zarr", manifest, IMAGES)
    text = run(tmp_path, "info", manifest.fingerprint[:12]).stdout
    for words in (
        "teacher:               tiny_teacher, share 0.3, weights abababababab",
        "teacher 2:             tiny_teacher, share 0.7, weights abababababab, 15 features",
        "CLIP 2:                tiny_clip, share 0.5",
        "prompts 2:             3 templates",
        "CLIP scale 100, 50 (model), prompt ensemble embedding",
        "teacher_logits_2",
    ):
        assert words in text
    assert "tiny_teacher + tiny_teacher" in run(tmp_path, "ls").stdout


def test_info_json_holds_the_whole_manifest(home: Path) -> None:
    details = json.loads(run(home, "info", "half", "--json").stdout)
    manifest = tiny_manifest(IMAGES, name="half", store="components")
    assert details["manifest"] == json.loads(manifest.model_dump_json())
    assert details["complete_views"] == [0]
    arrays = {array["name"]: array for array in details["arrays"]}
    assert arrays["teacher_features"]["shape"] == [3, 75, 12]
    assert arrays["teacher_features"]["dense_bytes"] == 3 * 75 * 12 * 2
    folder = Path(details["record"]["path"])
    for name, array in arrays.items():
        assert array["stored_bytes"] == sum(file.stat().st_size for file in (folder / name).iterdir())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nothing", "no such cache (nothing)"),
        ("digts", "Did you mean digits"),
        ("./nowhere", "no cache here (nowhere)"),
        ("nosuch://bucket/c", "not a URL of an object store"),
        ("broken", "zarr.json"),
    ],
)
def test_bad_references_are_one_line_and_exit_code_2(home: Path, reference: str, message: str) -> None:
    result = run(home, "info", reference, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_home_that_is_a_file_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run(tmp_path / "file", "ls")
    run(tmp_path / "file", "info", "digits", code=2)


@pytest.mark.parametrize("arguments", [["ls"], ["info", "digits"]])
def test_ls_and_info_import_no_slow_package(home: Path, arguments: list[str]) -> None:
    environment = os.environ | {"TEACHER_CACHE_HOME": str(home)}
    command = [sys.executable, "-X", "importtime", "-m", "cache_tools.cli", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "cache_tools" in imported
    assert not imported & {"torch", "sklearn", "torchvision", "open_clip", "timm", "matplotlib", "polars", "zarr"}
    assert arguments != ["ls"] or "numpy" not in imported


MODULES = """
import sys
from cache_tools.cli import main
sys.argv[1:] = ["ls", "--json"]
try:
    main()
finally:
    print(*(name for name in sys.modules if name.startswith("cache_tools.")), file=sys.stderr)
"""


def test_ls_of_caches_that_it_knows_builds_no_models_of_manifests(home: Path, tmp_path: Path) -> None:
    """A second `ls` prints the same without pydantic models, and still notices damage."""
    for name in ("digits", "half"):
        shutil.copytree(next(home.glob(f"{name}-*")), tmp_path / f"{name}.zarr")

    def listed() -> tuple[list[dict[str, Any]], set[str]]:
        for path in [*tmp_path.rglob("*/"), tmp_path]:
            os.utime(path, (1e9, 1e9))  # nothing has changed a moment ago
        environment = os.environ | {"TEACHER_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", MODULES]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return json.loads(done.stdout), set(done.stderr.split())

    first, imported = listed()
    assert "cache_tools.format.manifest" in imported
    assert [row["views_done"] for row in first] == [3, 1]
    again, imported = listed()
    assert again == first
    assert not [name for name in imported if name.startswith(("cache_tools.format.", "cache_tools.config."))]
    file = tmp_path / "half.zarr/zarr.json"
    file.write_text(file.read_text().replace('"name"', '"nome"', 1))
    damaged, _ = listed()
    assert damaged[0] == first[0]
    assert "digest does not match" in damaged[1]["problem"]


OPENED = """
import os, sys
opened = []

def record(event, words):
    if event == "open" and isinstance(words[0], str) and not words[2] & os.O_DIRECTORY:
        opened.append(words[0])

sys.addaudithook(record)
from cache_tools.cli import main
sys.argv[1:] = ["ls", "--json"]
try:
    main()
finally:
    print(*opened, sep="\\n", file=sys.stderr)
"""


def test_ls_reads_one_file_of_each_cache(home: Path) -> None:
    """Only its manifest, so that a home of hundreds of caches is listed quickly."""
    (home / INDEX).unlink(missing_ok=True)
    environment = os.environ | {"TEACHER_CACHE_HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", OPENED], env=environment, check=True, capture_output=True, text=True)
    caches = [row["path"] for row in json.loads(done.stdout)]
    assert len(caches) >= 3
    lines = done.stderr.splitlines()
    assert not [line for line in lines if line.startswith(tuple(caches))]  # files are opened by name, in their folder
    assert lines.count("zarr.json") == len(caches)
    assert {line for line in lines if "/" not in line and not line.startswith(".")} <= {"zarr.json", ""}


def test_stats_of_a_component_cache_names_all_three(home: Path) -> None:
    text = run(home, "stats", "half", "--confident", "0.6").stdout
    for words in (
        "digits/train, cache",
        "75 samples × view 0, 5 classes",
        "confident: probability ≥ 0.6",
        "teacher     CLIP   fusion",
        "confident (≥ 0.6) and wrong",
        "different top-1",
        "1 of the cache's 3 views were analysed.",
    ):
        assert words in text


def test_stats_of_a_fused_cache_are_of_the_fusion_only(home: Path) -> None:
    text = run(home, "stats", "digits", "--view", "1").stdout
    assert "This cache has the fusion only (store: fused)" in text
    assert "CLIP top-1" not in text


def test_stats_json_and_folder_agree(home: Path, tmp_path: Path) -> None:
    printed = json.loads(run(home, "stats", "digits", "--json", "--out", str(tmp_path / "a" / "b")).stdout)
    assert printed == json.loads((tmp_path / "a" / "b" / "stats.json").read_text())
    assert printed["about"]["views"] == [0, 1, 2]
    assert {row["view"] for row in printed["summary"]} == {0, 1, 2, None}
    names = {path.name for path in (tmp_path / "a" / "b").iterdir()}
    assert {"samples.parquet", "classes.parquet", "summary.parquet", "quadrants.png", "stability.png"} <= names


def test_stats_can_fuse_again(home: Path) -> None:
    found = json.loads(run(home, "stats", "half", "--json", "--teacher-weight", "1", "--clip-scale", "match").stdout)
    assert found["about"]["teacher_weight"] == 1.0
    teacher, fusion = (
        next(row for row in found["summary"] if row["source"] == source) for source in ("teacher", "fusion")
    )
    assert fusion["nll"] == pytest.approx(teacher["nll"], rel=1e-5)


def test_tune_fusion_prints_options_for_the_other_commands(home: Path, tmp_path: Path) -> None:
    from pipeline.recipe import load_build_recipe

    arguments = (
        "tune-fusion",
        "half",
        "--weights",
        "0,0.5,1",
        "--scales",
        "model,7",
        "--plot",
        str(tmp_path / "p.png"),
    )
    text = run(home, *arguments).stdout
    line = next(line for line in text.splitlines() if line.strip().startswith("--set"))
    fusion = load_build_recipe("digits", [word for word in line.split() if "=" in word]).fusion
    found = json.loads(run(home, *arguments, "--json").stdout)
    assert fusion.teacher_weight == found["chosen_weight"]
    chosen = found["chosen_scale"]
    assert fusion.clip_scale == (chosen["name"] or chosen["value"])
    place = found["path"]
    options = shlex.split(found["train_options"])
    assert commands_in(text) == [
        ["train-student", "--cache", place, *options],
        ["cache-tools", "fuse", place, *options],
    ]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune-fusion", "digits"], "found fused targets only"),
        (["stats", "digits", "--clip-scale", "1"], "cannot be fused differently"),
        (["stats", "half", "--clip-scale", "big"], "expected model, match or a number above 0; found big"),
        (["stats", "half", "--teacher-weight", "2"], "teacher_weight"),
        (["stats", "half", "--view", "first"], "expected the number of a view, or all; found first"),
        (["stats", "half", "--view", "1"], "view 1 is not completely built"),
        (["stats", "half", "--view", "3"], "no such view"),
        (["stats", "half", "--confident", "80"], "bad --confident"),
        (["stats", "half", "--device", "tpu"], "no such device"),
        (["tune-fusion", "half", "--weights", "0:2:1"], "teacher weights from 0 to 1"),
        (["tune-fusion", "half", "--scales", "modle"], "cannot read --scales"),
        (["tune-fusion", "half", "--holdout", "1"], "bad --holdout"),
        (["tune-fusion", "half", "--plot", "/dev/null/surface.png"], "cannot write or read"),
    ],
)
def test_bad_analysis_options_are_one_line_and_exit_code_2(home: Path, arguments: list[str], message: str) -> None:
    result = run(home, *arguments, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
