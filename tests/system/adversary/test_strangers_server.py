"""Received caches, runs, sweeps and checkpoints that name a stranger's server everywhere: no command contacts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from cache_tools.home.origin import OriginRecord, write_origin
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.system import named
from tests.support import cache_factory, tiny_build, tiny_run
from tests.support.in_process import invoke
from tests.support.s3_server import has_loopback
from tests.support.stranger import Stranger, strangers_server
from tests.support.turns import slow
from train.checkpoints import LAST
from train.run import train_student

pytest.importorskip("obstore", reason="needs obstore (the remote extra)")
pytestmark = [pytest.mark.medium, pytest.mark.skipif(not has_loopback(), reason="needs the loopback interface")]

HUB_NET, HUB_CLIP = "timm:hf-hub:stranger/net", "hf-hub:stranger/clip"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with a cache home and a record of what the user has named: nothing."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("received")
        patch.setenv("TEACHER_CACHE_HOME", str(folder / "home"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setattr(named, "_in_process", set())
        patch.chdir(folder)
        tiny_build.prepare(folder, train=30)
        yield folder


@pytest.fixture(scope="module")
def stranger(root: Path) -> Iterator[Stranger]:
    """The server, which is also where every request for an S3 bucket goes. The user has credentials."""
    with strangers_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("MLFLOW_TRACKING_TOKEN", "secret token")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        yield server


@pytest.fixture(autouse=True)
def nothing_logged(stranger: Stranger) -> Iterator[None]:
    stranger.log.clear()
    yield
    assert not stranger.log, stranger.log


def received_cache(path: Path, root: Path, url: str, *, blocks: int | None = None, **dataset: Any) -> Path:
    """A cache whose manifest names the stranger wherever it can; with `blocks`, a mirror that lacks the others."""
    images: Any = open_images(tiny_run.dataset(root / "pictures"), "train")
    networks = {"teacher": {"name": HUB_NET, "weights": "pretrained"}, "clip": {"name": HUB_CLIP}}
    recipe = tiny_build.recipe(root, **networks).model_dump(mode="json")
    recipe |= {"out": url, "dataset": recipe["dataset"] | {"download": True}}
    built = cache_factory.tiny_manifest(images, store="components").model_copy(
        update={
            "dataset": tiny_run.dataset(root / "pictures").model_copy(update=dataset),
            "build_recipe": recipe,
            "provenance": {"command": f"build-cache --out {url}", "source": url, "origin": url, "url": url},
        }
    )
    writer = cache_factory.create(path, built, images)
    missing = writer.missing_blocks()
    cache_factory.write(writer, cache_factory.tiny_targets(built), missing[:blocks])
    for complete in (True, False):  # the last is what stays
        record = OriginRecord(url=url, fingerprint=built.fingerprint, views=built.num_views, complete=complete)
        write_origin(path, record)
    return path


@pytest.fixture(scope="module", params=["http", slow("s3")])
def url(request: pytest.FixtureRequest, stranger: Stranger) -> str:
    return "s3://stranger/caches/evil.zarr" if request.param == "s3" else f"{stranger.url}/caches/evil.zarr"


@pytest.fixture(scope="module")
def mirror(root: Path, stranger: Stranger, url: str) -> Path:
    """In the cache home, as if a received folder were unpacked there: half of the blocks are missing."""
    path = root / "home" / f"mirror-{len(url)}.zarr"
    return received_cache(path, root, url, blocks=3)


@pytest.fixture(scope="module")
def whole(root: Path, stranger: Stranger, url: str) -> Path:
    return received_cache(root / f"whole-{len(url)}.zarr", root, url)


@pytest.fixture(scope="module")
def run(root: Path, whole: Path, url: str) -> Path:
    """An unfinished run of the whole cache, which was received with the cache's place as a URL."""
    path = root / f"run-{len(url)}"
    train_student(tiny_run.recipe(whole, path, epochs=1, loggers=(), fusion={"teacher_weight": 0.4}))
    stored = json.loads((path / "cache.json").read_text())
    (path / "cache.json").write_text(json.dumps(stored | {"path": "/nowhere/evil.zarr", "url": url}))
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"cache": url, "out": url}))
    trackers = {
        "mlflow": {"run": {"tracking_uri": url.partition("/caches")[0], "run_id": "0" * 32}, "epochs": 0},
        "wandb": {"run": {"id": "stranger", "server": url}, "epochs": 0},
    }
    (path / "trackers.json").write_text(json.dumps(trackers))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["ls"], ["info"], ["verify"], ["verify", "--images"], ["verify", "--replay", "2"], ["stats"], ["fidelity"],
        ["tune-fusion"], ["path"], ["repair"], ["rm"], ["copy", "{new}"], ["push", "{new}"], ["recode", "{new}"],
        ["fuse", "{new}"], ["fuse", "{new}", "--prompts", "openai"], ["repair", "--yes"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["mirror", slow("whole")])
def test_commands_on_a_cache(
    request: pytest.FixtureRequest, url: str, tmp_path: Path, words: list[str], kind: str
) -> None:
    cache = request.getfixturevalue(kind)
    command, *options = words
    new = {"recode": ["--codec", "float16", "--out"], "fuse": ["--out"]}.get(command, [])
    options = [part for word in options for part in ([*new, str(tmp_path / "n.zarr")] if word == "{new}" else [word])]
    result = invoke("cache-tools", command, *([] if command == "ls" else [cache]), *options)
    assert result.exit_code in {0, 1, 2}


def test_training_from_a_mirror_names_the_store_and_does_not_ask_it(mirror: Path, tmp_path: Path, url: str) -> None:
    result = invoke("train-student", "--cache", mirror, "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 2
    assert "you have not named the store" in result.stderr or "not completely built" in result.stderr


def test_growing_a_mirror(mirror: Path, root: Path, tmp_path: Path) -> None:
    """A build into the folder of a received mirror."""
    shutil.copytree(mirror, tmp_path / "cache.zarr")
    shutil.copy(mirror.with_name(f".{mirror.name}.origin"), tmp_path / ".cache.zarr.origin")
    recipe = tiny_build.recipe(root, out=tmp_path / "cache.zarr")
    (tmp_path / "build.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert invoke("build-cache", tmp_path / "build.yaml").exit_code == 2


def test_a_dataset_that_a_manifest_would_download(root: Path, stranger: Stranger, tmp_path: Path) -> None:
    source: dict[str, Any] = {"name": "cifar10", "data_dir": tmp_path / "none", "download": True, "image_size": None}
    cache = received_cache(tmp_path / "cifar.zarr", root, f"{stranger.url}/x.zarr", **source)
    commands: list[list[Any]] = [
        ["train-student", "--cache", cache, "--out", tmp_path / "run", "--device", "cpu"],
        ["train-student", "--cache", cache, "--loss", "ce", "--out", tmp_path / "run", "--device", "cpu"],
        ["cache-tools", "verify", cache, "--images"],
    ]
    for words in commands:
        result = invoke(*words)
        assert result.exit_code == 2
        assert "--download" in result.stderr or "data_dir" in result.stderr, result.stderr


@pytest.mark.parametrize("options", [(), ("--teachers",), ("--split", "train")], ids=" ".join)
def test_evaluation_of_a_run(run: Path, options: tuple[str, ...]) -> None:
    result = invoke("evaluate-student", run, "--device", "cpu", *options)
    assert result.exit_code == (2 if options == ("--teachers",) else 0), result.stderr


def test_teachers_of_a_run_whose_cache_is_remote(run: Path) -> None:
    assert "in a store that you have not named" in invoke("evaluate-student", run, "--teachers").stderr


def test_other_uses_of_a_run(run: Path, root: Path, tmp_path: Path) -> None:
    invoke("report-students", run, "--out", tmp_path / "page.html")
    invoke("export-student", run, "--format", "safetensors", "--out", tmp_path / "export")
    recipe = tiny_build.recipe(root, teacher={"name": str(run)}, out=tmp_path / "cache.zarr")
    (tmp_path / "build.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    assert invoke("build-cache", tmp_path / "build.yaml").exit_code == 0


def test_resuming_a_run_with_trackers(run: Path, whole: Path, tmp_path: Path, stranger: Stranger) -> None:
    """The same recipe with more trackers: MLflow's configured database gets a new run, and the stranger no token."""
    pytest.importorskip("mlflow")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    recipe = tiny_run.recipe(whole, tmp_path / "run", epochs=1, loggers=("mlflow",), fusion={"teacher_weight": 0.4})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    result = invoke("train-student", tmp_path / "recipe.yaml")
    assert result.exit_code == 0, result.stderr
    assert "warning: mlflow starts a new run on sqlite:///" in result.stderr
    stored = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]["run"]
    assert stored["tracking_uri"].startswith("sqlite:///")
    assert stored["run_id"] != "0" * 32


def test_a_sweep_in_a_received_folder(run: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "sweep" / "trials" / "resnet8-kd-s0")
    recipe = tiny_run.recipe(whole, tmp_path, epochs=1, loggers=()).model_dump(mode="json", exclude={"out"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["--students", "resnet8", "--losses", "kd", "--workers", 1, "--out", tmp_path / "sweep"]
    assert invoke("sweep-students", tmp_path / "recipe.yaml", *words).exit_code in {0, 2}


@pytest.fixture
def card_of_a_hub(run: Path, tmp_path: Path) -> Path:
    """A run whose checkpoint says that its architecture is on the hub."""
    shutil.copytree(run, tmp_path / "run")
    with safe_open(tmp_path / "run" / LAST, "pt") as file:
        card = file.metadata() | {"architecture": HUB_NET}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(weights, tmp_path / "run" / LAST, card)
    return tmp_path / "run"


def test_an_architecture_on_a_hub(card_of_a_hub: Path, root: Path, tmp_path: Path) -> None:
    recipe = tiny_build.recipe(root, teacher={"name": str(card_of_a_hub / LAST)}, out=tmp_path / "cache.zarr")
    (tmp_path / "build.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    commands: list[list[Any]] = [
        ["evaluate-student", card_of_a_hub, "--device", "cpu"],
        ["export-student", card_of_a_hub, "--format", "safetensors"],
        ["build-cache", tmp_path / "build.yaml"],
    ]
    for words in commands:
        result = invoke(*words)
        assert result.exit_code == 2
        assert f"TEACHER_CACHE_NETWORKS='{HUB_NET}'" in result.stderr, result.stderr


def test_what_the_user_names_is_contacted(stranger: Stranger) -> None:
    """The server and the log work: without this, the other tests could not fail."""
    invoke("cache-tools", "info", f"{stranger.url}/caches/named.zarr")
    assert any("/caches/named.zarr" in line for line in stranger.log)
    stranger.log.clear()
    assert named.is_named("stores", f"{stranger.url}/caches/named.zarr")


def test_a_system_folder_as_the_place_of_images(root: Path, stranger: Stranger, tmp_path: Path) -> None:
    cache = received_cache(tmp_path / "x.zarr", root, f"{stranger.url}/x.zarr", data_dir=Path("/proc/self"))
    result = invoke("train-student", "--cache", cache, "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 2
    assert "a place where images are not looked for" in result.stderr
    moved = ["--data-dir", root / "pictures", "--epochs", 1, "--set", "compare_with_labels=false"]
    assert (
        invoke("train-student", "--cache", cache, "--out", tmp_path / "run", "--device", "cpu", *moved).exit_code == 0
    )


def test_datasets_are_not_changed_otherwise() -> None:
    from cache_tools.images.recipe import as_received

    dataset = DatasetRecipe(name="folder", data_dir=Path("/dev/shm/images"), image_size=16)
    assert as_received(dataset, "a cache") == dataset
