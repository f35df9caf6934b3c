"""The commands that `system/adversary/kills.py` kills at every step, and how their results are compared."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import MODULES

PARTIAL = ".partial"
# Times, and what is made of them; everything else must be equal.
_TIMES = {"created", "date", "train_s", "images_per_s", "latency", "latency_1_ms", "latency_128_ms"}
# Locks, files that hold times of files, and what `others` write.
_SKIPPED = re.compile(
    r"(^|/)(\.lock|\.sizes\.json|workers\.log)$|\.used$|^home/indexes/\w+\.parquet$|^page\.html|^other/"
)
_LEFTOVER = re.compile(r"\.partial(/|$)|\.claims(/|$)")


@dataclass(frozen=True)
class Command:
    """A command line, and the exit codes that it may have.

    Args:
        codes: 1 is for damage that `verify` finds; 2 is for one clear error.
    """

    program: str
    arguments: tuple[str, ...]
    codes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class KillCase:
    """A command to kill.

    Args:
        prepare: fills the current folder with what the command needs.
        command: runs in that folder, whose sub-folder `home` is the cache home.
        others: commands that must not fail on what a killed command leaves.
        again: the command that goes on after a kill; by default the same.
        ignored: pattern of files that need not be equal in the end.
        needs_store: whether it needs the S3 server that the environment names.
    """

    name: str
    prepare: Callable[[], None]
    command: Command
    others: tuple[Command, ...] = ()
    again: Command | None = None
    ignored: str | None = None
    needs_store: bool = False


def run(command: Command) -> dict[str, Any]:
    """Run a command in this process; its exit code, and the traceback of an error that it did not report itself."""
    with pytest.MonkeyPatch.context() as patch:
        if command.program not in ("build-cache", "cache-tools"):
            from tests.support.shortcuts import take_shortcuts  # imports what trains

            take_shortcuts(patch)
        try:
            _application(command.program)(list(command.arguments), standalone_mode=False)
        except SystemExit as leaving:
            return {"code": leaving.code or 0}
        except BaseException:
            return {"code": None, "traceback": traceback.format_exc()}
    return {"code": 0}


def _application(program: str) -> Any:
    return importlib.import_module(MODULES[program]).app


def contents(folder: Path, ignored: str | None = None) -> dict[str, str]:
    """Digests of what a killed command must leave as an undisturbed one does, by file name."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if not file.is_file() or _SKIPPED.search(name) or (ignored and re.search(ignored, name)):
            continue
        found[name] = hashlib.blake2b(repr(_content(file)).encode(), digest_size=8).hexdigest()
    return found


def split_leftovers(found: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Contents without partial files and claims, and the names of these."""
    left = [name for name in found if _LEFTOVER.search(name)]
    return {name: value for name, value in found.items() if name not in left}, left


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"not in the undisturbed run: {name}" for name in found if name not in expected]
    problems += [f"differs: {name}" for name in expected if name in found and found[name] != expected[name]]
    return problems


def _content(file: Path) -> Any:
    """Content as plain data, without times."""
    data = file.read_bytes()
    if _LEFTOVER.search(str(file)):
        return data
    if file.suffix == ".json":
        value = _without_times(json.loads(data))
        if file.name == "zarr.json" and "teacher_cache" in value.get("attributes", {}):
            del value["attributes"]["teacher_cache"]["digest"]  # of the manifest with its times
        return value
    if file.suffix == ".parquet":
        import polars as pl

        return [_without_times(row) for row in pl.read_parquet(io.BytesIO(data)).to_dicts()]
    if file.name == "state.pt" or file.name == "checkpoint.pt":
        import torch

        return _without_times(torch.load(io.BytesIO(data), weights_only=True))
    if file.suffix == ".html":
        return re.sub(r"[\d.,]+( (ms|s|µs|min|h)\b)?", "0", data.decode())  # the figures are those of the tables
    return data


def _without_times(value: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: _without_times(each) for key, each in value.items() if key not in _TIMES}
    if isinstance(value, list | tuple):
        return [_without_times(each) for each in value]
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return value


# The cases


def _tiny_recipe(*, views: int = 2, **changes: Any) -> None:
    """Write `tiny.yaml`, a build of 20 pictures in blocks of 16 without CLIP, and everything that it needs."""
    from cache_tools.config import dump_yaml
    from tests.support import tiny_build

    root = Path.cwd()
    tiny_build.prepare(root, train=20)
    recipe = tiny_build.recipe(root, num_views=views, block_rows=16, **{"out": None, "clip": None, **changes})
    (root / "tiny.yaml").write_text(dump_yaml(recipe))


def _done(*command: str) -> None:
    outcome = run(Command(command[0], command[1:]))
    assert outcome == {"code": 0}, (command, outcome)


def _built(**changes: Any) -> Callable[[], None]:
    def prepare() -> None:
        _tiny_recipe(**changes)
        _done("build-cache", "tiny.yaml", "--views", "1")

    return prepare


def _half_built() -> None:
    _tiny_recipe()
    _done("build-cache", "tiny.yaml")
    for commit in sorted(Path("home").glob("tiny-*.zarr/commits/c.*"))[1:]:
        commit.unlink()


def _random_cache(**recipe: Any) -> Callable[[], None]:
    """Write `source.zarr`, a cache of random targets."""

    def prepare() -> None:
        from tests.support.cache_factory import build, tiny_images, tiny_manifest

        images = tiny_images(20)
        options = {"num_views": 2, "block_rows": 16, "canaries": False, **recipe}
        build(Path("source.zarr").absolute(), tiny_manifest(images, **options), images)

    return prepare


def _half_copied() -> None:
    _random_cache()()
    _done("cache-tools", "push", "source.zarr", "copy.zarr")
    for commit in sorted(Path("copy.zarr/commits").glob("c.*"))[1:]:
        commit.unlink()


def _damaged() -> None:
    _random_cache()()
    root = Path("source.zarr")
    for number, chunk in enumerate(sorted(root.glob("fused_logits/c.*"))[:2]):
        data = bytearray(chunk.read_bytes())
        data[number] ^= 1
        chunk.write_bytes(data)
    for name in ("labels", "fused_features"):
        (root / name / "zarr.json").write_text("{}")


def _caches_in_home() -> None:
    """Two caches that nobody has used for a day."""
    _random_cache()()
    for name in ("one", "two"):
        shutil.copytree("source.zarr", f"home/{name}.zarr")
        for suffix, text in (("used", ""), ("origin", json.dumps(_ORIGIN))):
            Path(f"home/.{name}.zarr.{suffix}").write_text(text)
    then = time.time() - 86_400
    for file in Path("home").rglob("*"):
        os.utime(file, (then, then))


_ORIGIN = {"url": "s3://bucket/source.zarr", "fingerprint": "0" * 64, "views": 2, "complete": False}


def _pictures_and_cache(views: int = 2, **cache: Any) -> None:
    from tests.support import tiny_run

    pictures = tiny_run.write_pictures(Path.cwd() / "pictures", train=20, test=9)
    tiny_run.write_cache(Path.cwd() / "tiny.zarr", pictures, num_views=views, block_rows=16, **cache)


def _logits_to_import() -> None:
    import numpy as np

    from tests.support import tiny_run

    tiny_run.write_pictures(Path.cwd() / "pictures", train=20, test=3)
    logits = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    np.savez("logits.npz", logits=logits)


def _pictures_to_pack() -> None:
    from tests.support import tiny_run

    tiny_run.write_pictures(Path.cwd() / "pictures", train=3, test=1)


def _train_recipe(epochs: int = 2, **changes: Any) -> None:
    from cache_tools.config import dump_yaml
    from tests.support import tiny_run

    recipe = tiny_run.recipe(Path.cwd() / "tiny.zarr", Path.cwd() / "run", epochs=epochs, loggers=(), **changes)
    Path("train.yaml").write_text(dump_yaml(recipe))


def _to_train(**changes: Any) -> Callable[[], None]:
    def prepare() -> None:
        _pictures_and_cache()
        _train_recipe(**changes)

    return prepare


def _to_stage() -> None:
    """A recipe for the copy of a cache in an object store, with room on the disk for two of its three views."""
    from cache_tools.config import dump_yaml
    from cache_tools.errors import RecipeError
    from cache_tools.places import LocalPlace, open_place
    from cache_tools.places.transfer import copy_cache
    from cache_tools.reader import TeacherCache
    from tests.support import tiny_run
    from tests.support.s3_server import new_bucket

    _pictures_and_cache(views=3)
    new_bucket(_BUCKET)
    copy_cache(LocalPlace(Path.cwd() / "tiny.zarr"), open_place(_STAGED))
    shutil.rmtree("tiny.zarr")
    try:
        TeacherCache.open(_STAGED, stage_budget=1)
    except RecipeError as error:
        budget = int(str(error).rpartition("--stage-budget ")[2].partition("B or more")[0])
    recipe = tiny_run.recipe(_STAGED, Path.cwd() / "run", epochs=3, evaluate_every=3, loggers=(), stage_budget=budget)
    Path("train.yaml").write_text(dump_yaml(recipe))


def _trained(**changes: Any) -> Callable[[], None]:
    def prepare() -> None:
        _to_train(**changes)()
        _done("train-student", "train.yaml")

    return prepare


def _trained_otherwise() -> None:
    """A finished run of other settings is in the folder."""
    _to_train(epochs=1, compare_with_labels=True)()
    _done("train-student", "train.yaml")
    _done("evaluate-student", "run")
    _done("export-student", "run", "--format", "safetensors")
    _train_recipe(epochs=1, seed=5)


def _to_sweep(**sweep: Any) -> Callable[[], None]:
    def prepare() -> None:
        from tests.support import tiny_run

        _pictures_and_cache()
        recipe = tiny_run.recipe(Path.cwd() / "tiny.zarr", Path("unused"), epochs=2, loggers=())
        Path("recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude={"out"})))
        file = {"name": "tiny", "recipe": str(Path.cwd() / "recipe.yaml"), "losses": ["kd", "ce"], **sweep}
        Path("sweep.yaml").write_text(json.dumps(file))

    return prepare


def _after(prepare: Callable[[], None], *command: str) -> Callable[[], None]:
    def prepare_and_run() -> None:
        prepare()
        _done(*command)

    return prepare_and_run


def _command(line: str, codes: tuple[int, ...] = (0,)) -> Command:
    program, *arguments = line.split()
    return Command(program, tuple(arguments), codes)


def _pushed(name: str, prepare: Callable[[], None], line: str) -> KillCase:
    """A case that makes `copy.zarr`."""
    return KillCase(name, prepare, _command(line), (_command("cache-tools verify copy.zarr", (0, 2)),))


def _run(name: str, prepare: Callable[[], None], line: str, **options: Any) -> KillCase:
    """A case that trains in the folder `run`, or writes into it."""
    return KillCase(
        name, prepare, _command(line), (_command("report-students run --out page.html", (0, 2)),), **options
    )


def _sweep(name: str, prepare: Callable[[], None], options: str = "") -> KillCase:
    report = _command("report-students sweep --out page.html", (0, 2))
    return KillCase(name, prepare, _command(f"{_SWEEP} {options}"), (report,))


_BUCKET = "kills"
_STAGED = f"s3://{_BUCKET}/caches/tiny.zarr"
_CLIP = {"name": "local-dir:package:digits-clip", "class_names": ("zero", "one", "two")}
_HALVING = {"losses": ["kd"], "seeds": 4, "asha": {"keep_one_in": 2, "first_epochs": 1}}
_SEARCH = {"losses": [], "search": {"trials": 2, "space": {"lr": [0.01, 0.1]}}}
_SWEEP = "sweep-students --sweep sweep.yaml --workers 1 --out sweep"
_LS, _VERIFY = _command("cache-tools ls"), _command("cache-tools verify tiny")
_ON_LABELS = "--student resnet8 --epochs 1 --loss ce --device cpu --set dataset.image_size=16 --set loggers=[]"
_ON_DISK = "--device-memory 0 --host-memory 0 --pixel-disk 1MB"
_EXPORT = "export-student run --format safetensors"

CASES = [
    KillCase("pack", _pictures_to_pack, _command("cache-tools pack-images pictures pack --max-side 12"), (_LS,)),
    KillCase("build", _tiny_recipe, _command("build-cache tiny.yaml"), (_LS,)),
    _pushed("build-out", _tiny_recipe, "build-cache tiny.yaml --out copy.zarr"),
    KillCase(
        "build-components",
        lambda: _tiny_recipe(views=1, store="components", codec="compact", clip=_CLIP),
        _command("build-cache tiny.yaml"),
        (_LS,),
    ),
    KillCase(
        "build-product",
        lambda: _tiny_recipe(views=2, codec={"logits": {"codec": "product", "parts": 1, "width": 2}}),
        _command("build-cache tiny.yaml"),
        (_LS,),
    ),
    KillCase("grow", _built(), _command("build-cache tiny.yaml"), (_LS, _VERIFY)),
    KillCase("resume", _half_built, _command("build-cache tiny.yaml"), (_LS, _VERIFY)),
    KillCase("correct", _built(), _command("build-cache tiny.yaml --views 1 --set dataset.test_split=train"), (_LS,)),
    _pushed("push", _random_cache(), "cache-tools push source.zarr copy.zarr"),
    _pushed("push-rest", _half_copied, "cache-tools push source.zarr copy.zarr"),
    KillCase("pull", _random_cache(), _command("cache-tools pull source.zarr"), (_LS,)),
    _pushed("recode", _random_cache(), "cache-tools recode source.zarr --codec compact --out copy.zarr"),
    _pushed(
        "fuse",
        _random_cache(store="components"),
        "cache-tools fuse source.zarr --teacher-weight 0.4 --prompts 1 --out copy.zarr",
    ),
    KillCase(
        "export-hf",
        _random_cache(),
        _command("cache-tools export-hf source.zarr hf"),
        again=_command("cache-tools export-hf source.zarr hf --overwrite"),
    ),
    _pushed(
        "import",
        _logits_to_import,
        "cache-tools import logits-npz logits.npz --dataset pictures --set dataset.image_size=16 --block-rows 16 "
        "--out copy.zarr",
    ),
    KillCase(
        "repair",
        _damaged,
        _command("cache-tools repair source.zarr --yes"),
        (_command("cache-tools verify source.zarr", (0, 1)),),
    ),
    KillCase(  # the second time there may be nothing to remove, which is an error
        "rm",
        _caches_in_home,
        _command("cache-tools rm home/one.zarr --yes"),
        (_LS, _command("cache-tools rm home/one.zarr --yes", (0, 2))),
        again=_command("cache-tools prune --incomplete --yes"),
    ),
    KillCase(
        "prune",
        _caches_in_home,
        _command("cache-tools prune --keep-size 0GB --yes"),
        (_LS,),
        again=_command("cache-tools prune --keep-size 0GB --incomplete --yes"),
    ),
    KillCase("ls", _caches_in_home, _LS, (_LS,)),
    _run("train", _to_train(compare_with_labels=True, ema_decay=0.9, epochs=1), "train-student train.yaml"),
    _run("train-inside", _to_train(epochs=2), "train-student train.yaml --checkpoint-every-minutes 1e-9"),
    _run("train-pixels", _to_train(epochs=1), f"train-student train.yaml {_ON_DISK}"),
    _run("train-folder", _pictures_and_cache, f"train-student pictures {_ON_LABELS} --out run"),
    KillCase(
        "train-staged",
        _to_stage,
        _command(f"train-student train.yaml --cache {_STAGED}"),
        (_LS, _command("cache-tools prune --incomplete"), _command("report-students run --out page.html", (0, 2))),
        needs_store=True,
    ),
    _run("overwrite", _trained_otherwise, "train-student train.yaml --overwrite"),
    _sweep("sweep", _to_sweep()),
    _sweep("sweep-halving", _to_sweep(**_HALVING)),
    _sweep("sweep-more", _after(_to_sweep(), *_SWEEP.split(), "--losses", "kd"), "--losses kd,ce"),
    _sweep("sweep-overwrite", _after(_to_sweep(losses=["kd"]), *_SWEEP.split()), "--overwrite --set seed=4"),
    _sweep("search", _to_sweep(**_SEARCH)),
    _run("evaluate", _trained(epochs=1), "evaluate-student run"),
    _run("evaluate-again", _after(_trained(epochs=1), "evaluate-student", "run"), "evaluate-student run --split train"),
    _run("export", _trained(epochs=1), f"{_EXPORT},torchscript", ignored=r"torchscript\.pt$|config\.json$"),
    _run("export-again", _after(_trained(epochs=1), *f"{_EXPORT},torchscript".split()), _EXPORT),
    KillCase(
        "report", _trained(epochs=1), _command("report-students run"), (_command("evaluate-student run --out other"),)
    ),
    KillCase("stats", _random_cache(store="components"), _command("cache-tools stats source.zarr --out stats")),
    KillCase(
        "show",
        partial(_pictures_and_cache, store="components"),
        _command("cache-tools show tiny.zarr --count 2 --view 0 --out sheets/show.html"),
    ),
    KillCase(
        "tune",
        _random_cache(store="components"),
        _command("cache-tools tune-fusion source.zarr --plot plot.png --weights 0.4,0.6 --scales 1,100"),
    ),
]
