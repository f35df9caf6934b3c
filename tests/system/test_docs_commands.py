"""Every command in the documents is run, in the order of each document, or `NOT_RUN` says why not.

`make test` runs those that cost little. `make test-slow` runs others that can run on one machine without a network,
made cheap: with words at their end (one epoch, one view), and with the digits in place of a larger data set.
`test_docs.py` checks the names and options of all.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cache_tools.home.registry import HOME_VARIABLE, cache_path
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from tests.support import cache_factory, tiny_run
from tests.support.in_process import MODULES, invoke
from tests.support.shortcuts import share_tokenizer, take_shortcuts
from tests.system.test_docs import ROOT, command_lines

pytestmark = pytest.mark.medium


class Run(NamedTuple):
    """How a command is run.

    Attributes:
        place: the folder, with a cache home of its own.
        added: words at its end.
        replaced: text in the command, and what is there instead.
        is_short: whether `make test` runs it.
    """

    place: str
    added: str = ""
    replaced: tuple[tuple[str, str], ...] = ()
    is_short: bool = False


def short(place: str) -> Run:
    return Run(place, is_short=True)


PART = "--set dataset.split=train[:96] --set dataset.test_split=test[:32]"
BUILD = "--views 1 --set preflight_samples=32"
TRAIN = "--epochs 1 --set loggers=[]"
DIGITS = (("fashion-mnist", "digits"), ("train[50000:]", "train[1300:]"))
A_RUN = "runs/digits-resnet20-kd-0c1f7a52"

# A command → how it is run. A command is described by the first pattern that matches, here or in NOT_RUN.
RUN = {
    r"cache-tools show digits --sample .*": Run("components"),
    r"cache-tools fuse digits --prompts .*": Run("components"),
    r"cache-tools show digits .*--out disagree\.png|cache-tools tune-fusion digits --plot .*": Run("components"),
    r"cache-tools show digits .*--disagree.*": short("components"),
    r"cache-tools (tune-fusion|fuse) digits.*": short("components"),
    r"cache-tools (verify digits --replay|stats digits) .*": Run("fused"),
    r"cache-tools (ls|info|path|show|fidelity|verify|recode)( --.*| digits.*)?": short("fused"),
    r"cache-tools (export-hf|repair|prune|rm)( --.*| digits.*)?": short("fused"),
    r"cache-tools pack-images photos/ photos\.pack": short("fused"),
    r"cache-tools import logits-npz logits\.npz .*": short("fused"),
    r"build-cache --plan": Run("fused"),
    r"export-student runs/digits-resnet8-kd-e40b004d": Run("fused"),
    r"report-students runs/digits-resnet8-kd-e40b004d .*": Run("fused"),
    # The digits, as the first pages build and train them.
    r"build-cache": Run("default", f"{BUILD} {PART}"),
    r"build-cache --(clip|teacher) none .*": Run("default", f"{BUILD} {PART}"),
    r"train-student|train-student --cache digits-teacher": Run("default", TRAIN),
    r"train-student digits --pictures": Run("default", TRAIN),
    r"build-cache --store components|build-cache digits --set store=components --views 4": Run(
        "default-components", f"{BUILD} {PART}"
    ),
    r"report-students RUN RUN": Run("fused", replaced=(("RUN", A_RUN),)),
    r"export-student (RUN|runs/digits-resnet8-kd-e40b004d) .*": Run("fused", replaced=(("RUN", A_RUN),)),
    r"build-cache fashion-mnist .*dataset\.split.*": Run("test-split", BUILD, DIGITS),
    r"cache-tools (stats|tune-fusion) fashion-mnist-test": Run("test-split", "", DIGITS),
    r"build-cache fashion-mnist .*": Run("default", f"{BUILD} {PART}", DIGITS),
}
NOT_YET = "could run here on stand-ins, and no test does so yet"
HUB = "needs weights or images from the network"
GPU = "needs a GPU"
CLUSTER = "needs a cluster"
SERVICE = "needs a service: a store of Google, a browser"
PROGRAM = "installs or starts other programs"
MINUTES = "takes minutes"
# Why a command is not run here → what these commands are. A reason with a path names the test that runs them instead.
NOT_RUN = {
    PROGRAM: (r"make (demo|test)", r"python3 -m venv venv", r"pip install .*", r"jupyter lab .*"),
    GPU: (
        r"sweep-students .*--per-gpu auto",
        r"(build-cache|train-student|cache-tools verify|python benchmarks/\S+) .*--device cuda.*",
    ),
    HUB: (
        r"(build-cache|train-student|sweep-students) (cifar100|imagenet)(-1k)?(\.yaml)?( --(?!.*--per-gpu).*)?",
        r".*timm:(convnext_atto\.d2_in1k|resnet\d+\.a1_in1k).*",
        r"build-cache photos/ .*--clip ViT-B-32 .*",
        r"python -c 'import datasets; .*",
    ),
    CLUSTER: (r"sbatch .*", r".*--engine ray.*"),
    "tests/system/test_torchrun.py": (r"train-student photos\.yaml --sync-batchnorm",),
    "tests/cache_tools/exchange/test_import.py": (r"cache-tools import (tinyvit|ml-dr) .*",),
    SERVICE: (r"cache-tools copy s3://\S+ gs://\S+", r"report-students runs/sweep-digits .*--open"),
    MINUTES: (
        r"python (benchmarks|examples)/(?!loops/).*",
        r"evaluate-student \S+ --robustness.*",
    ),
    "tests/system/test_reproduce.py": (r"(build-cache|train-student) cifar100-.*",),
    "tests/teacher_cache/test_loops.py": (r"python examples/loops/.*",),
    "tests/pipeline/build/test_rolling.py": (r".*--keep-views 4 .*",),
    "tests/train/test_stage_budget.py": (r".*--stage-budget .*",),
    "tests/train/report/test_pictures.py": (r"report-students runs/sweep-digits --pictures digits",),
    "tests/cache_tools/images/test_pack.py": (r"(build-cache|train-student) photos\.pack/ .*",),
    NOT_YET: (
        r"train-student fashion-mnist .* --out runs/small",
        r"sweep-students fashion-mnist .*",
        r"train-student fashion-mnist( --.*)?",
        r"cache-tools fuse fashion-mnist .*",
        r"export-student runs/small .*",
        r"train-student (photos|flowers)/ --loss ce --student resnet20 .*",
        r"build-cache (photos|flowers)/ --teacher \S+",
        r"train-student (photos|flowers)/ --student .*",
        r"sweep-students photos/ .*",
        r"train-student --cache (photos|large) .*",
        r"report-students runs/photos .*",
        r"cache-tools (verify photos|push photos s3://\S+)",
        r"build-cache my\.yaml --clip none",
        r"build-cache my\.yaml .* --teacher timm:resnet50 .*",
        r"train-student photos\.yaml( --student (nets|resnet20|timm:resnet18)\S* .*)?",
        r"build-cache photos\.yaml (--out /shared/photos\.zarr|--teacher nets:.*)",
        r"evaluate-student runs/small",
        r"train-student squares\.yaml.*",
        r"build-cache squares\.yaml",
        r"cache-tools (push digits|ls|info|verify|stats|pull) ?s3://.*|cache-tools push digits .*",
        r"train-student --cache s3://bucket/caches/digits-.*",
        r"build-cache (my|photos)\.yaml .*s3://bucket/\S+|train-student my\.yaml .*",
    ),
}


def test_every_command_is_run_or_says_why_not() -> None:
    described = {line: described_by(line) for line in commands()}
    assert not [line for line, pattern in described.items() if pattern is None], "describe them in RUN or NOT_RUN"
    patterns = {*RUN, *(pattern for patterns in NOT_RUN.values() for pattern in patterns)}
    assert set(described.values()) == patterns, "a pattern that describes nothing"
    missing = [reason for reason in NOT_RUN if reason.startswith("tests/") and not (ROOT / reason).is_file()]
    assert not missing, "a test that is not there"


def test_cheap_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line, run in runs().items() if run.is_short]
    write_random_caches(tmp_path, monkeypatch)
    # What removes caches comes last.
    for line in sorted(lines, key=lambda line: " rm " in f"{line} "):
        run_in(tmp_path, line, monkeypatch)


SLOW_PLACES = ("components", "fused", "default", "default-components", "test-split")


@pytest.mark.slow
@pytest.mark.parametrize("place", SLOW_PLACES)
def test_other_commands_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {run.place for run in runs().values() if not run.is_short} == {*SLOW_PLACES}
    take_shortcuts(monkeypatch)
    share_tokenizer(monkeypatch)
    if place in {"components", "fused"}:
        prepare_digits(tmp_path, monkeypatch)
    lines = [line for line, run in runs().items() if run.place == place and not run.is_short]
    for line in lines:
        run_in(tmp_path, line, monkeypatch)


def commands() -> list[str]:
    """The commands of the documents, once each, in their order."""
    return list(dict.fromkeys(" ".join(words).removeprefix("venv/bin/") for _, words in command_lines()))


def described_by(line: str) -> str | None:
    """The pattern of a command; those that say why it is not run come first where they are longer."""
    not_run = [pattern for reason, patterns in NOT_RUN.items() if reason != NOT_YET for pattern in patterns]
    patterns = [*not_run, *RUN, *NOT_RUN[NOT_YET]]
    return next((pattern for pattern in patterns if re.fullmatch(pattern, line)), None)


def runs() -> dict[str, Run]:
    """The commands that are run, and how."""
    described = {line: described_by(line) for line in commands()}
    return {line: RUN[pattern] for line, pattern in described.items() if pattern in RUN}


def run_in(root: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as its pattern says."""
    run = runs()[line]
    go_to(root / run.place, monkeypatch)
    for old, new in run.replaced:
        line = line.replace(old, new)
    command(f"{line} {run.added}")


def prepare_digits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component cache of the digits, the same fused, and runs."""
    go_to(root / "components", monkeypatch)
    command("build-cache digits --set store=components --views 2 --set preflight_samples=64")
    (cache,) = Path("home").absolute().glob("digits-*.zarr")
    go_to(root / "fused", monkeypatch)
    command(f"cache-tools fuse {cache} --teacher-weight 0.7 --name digits")
    run = "runs/digits-resnet8-kd-e40b004d"
    command(f"train-student digits --no-compare-with-labels --epochs 1 {PART} --out {run}")
    for copied in (Path(A_RUN), root / "components/runs/digits"):
        shutil.copytree(run, copied)


def write_random_caches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A component and a fused cache of random targets, without networks, and logits of pictures from elsewhere."""
    go_to(root / "components", monkeypatch)
    dataset = DatasetRecipe(name="digits", split="train[:256]", test_split="test")
    images: Any = open_images(dataset)
    manifest = cache_factory.tiny_manifest(images, name="digits", store="components", num_views=2, block_rows=128)
    manifest = manifest.model_copy(update={"dataset": dataset})
    path = cache_path(manifest.name, manifest.fingerprint)
    targets = {name: values / 8 for name, values in cache_factory.tiny_targets(manifest).items()}
    cache_factory.write(cache_factory.create(path, manifest, images), targets)
    go_to(root / "fused", monkeypatch)
    command(f"cache-tools fuse {path} --teacher-weight 0.7 --clip-scale 20 --name digits")
    pictures = tiny_run.write_pictures(Path("photos"))
    names = sorted(path.relative_to("photos/train") for path in pictures.glob("train/*/*.png"))
    logits = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    classes = np.array(tiny_run.CLASSES)
    np.savez("logits.npz", logits=logits, names=np.array([str(name) for name in names]), classes=classes)


def go_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv(HOME_VARIABLE, str(place / "home"))


def command(line: str) -> Any:
    name, *words = shlex.split(line)
    assert name in MODULES
    done = invoke(name, *words)
    assert done.exit_code == 0, f"{line}\n{done.stderr}"
    return done
