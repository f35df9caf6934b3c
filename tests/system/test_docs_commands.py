"""The commands in the documents are run in the order of each document, or `NOT_RUN` says why not.

Not run are those of several seconds, and those that need a GPU, a network, a cluster, an object store or the reader's
own data or training. `test_docs.py` checks the names and options of all.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_tools.home.registry import HOME_VARIABLE
from tests.support.in_process import MODULES, invoke
from tests.support.tiny_run import CLASSES, write_pictures
from tests.system.test_docs import command_lines

pytestmark = pytest.mark.medium

# A command → where it is run: in a folder with a fused cache `digits`, or with one of components.
RUN = {
    r"cache-tools show digits .*(--disagree|--sample).*": "components",
    r"cache-tools (tune-fusion|fuse) digits.*": "components",
    r"cache-tools (ls|info|path|stats|show|fidelity|verify|recode)( --.*| digits.*)?": "fused",
    r"cache-tools (export-hf|repair|prune|rm)( --.*| digits.*)?": "fused",
    r"cache-tools pack-images photos/ photos\.pack": "fused",
    r"cache-tools import logits-npz logits\.npz .*": "fused",
    r"build-cache --plan": "fused",
    r"export-student runs/digits-resnet8-kd-e40b004d": "fused",
    r"report-students runs/digits-resnet8-kd-e40b004d .*": "fused",
}
# A command → why it is not run here. A command is described by the first pattern that matches.
NOT_RUN = {
    r".*(s3|gs)://.*": "an object store or a cluster: tests/cache_tools/places, tests/pipeline/build",
    r".*--(device cuda|sync-batchnorm|open)\b.*": "a GPU, several processes or a browser",
    r"(make|python3|pip|jupyter) .*": "installs or starts other programs",
    r"python examples/loops/.*": "runs in tests/teacher_cache/test_loops.py",
    r"python .*": "minutes, or the network",
    r".*\bRUN\b.*": "RUN stands for the folder of a run",
    r".*cifar100.*|.*imagenet.*": "a data set of hours",
    r".*fashion-mnist.*|export-student runs/small .*": "minutes: networks must be trained before",
    r"train-student( digits --pictures)?|build-cache( --store components)?": "whole: tests/system/test_wheel.py",
    r"build-cache .*digits.*|train-student --cache digits-teacher": "another build or training of the digits",
    r"(build-cache|train-student|evaluate-student|sweep-students|report-students|cache-tools) .*"
    r"(photos|flowers|squares|large|my\.yaml|runs/small|sweep-digits).*": "the reader's own data, runs or networks",
    r"evaluate-student runs/digits-resnet8.* --robustness.*": "minutes of corrupted images",
    r"export-student .*onnx": "seconds: tests/train/export",
}
HALF_A_SECOND_OF_DIGITS = "--epochs 1 --set dataset.split=train[:64] --set dataset.test_split=test[:32] --out"


def test_commands_of_the_documents_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: dict[str, None] = {}  # once each, in their order
    for _, words in command_lines():
        commands[" ".join(words).removeprefix("venv/bin/")] = None
    described = {line: described_by(line) for line in commands}
    assert not [line for line, pattern in described.items() if pattern is None]
    assert set(described.values()) == {*RUN, *NOT_RUN}, "a pattern that describes nothing"

    places = {name: tmp_path / name for name in ("components", "fused")}
    prepare(places, monkeypatch)
    # What removes caches comes last.
    chosen = sorted((line for line in commands if described[line] in RUN), key=lambda line: " rm " in f"{line} ")
    for line in chosen:
        go_to(places[RUN[described[line] or ""]], monkeypatch)
        command(line)


def described_by(line: str) -> str | None:
    return next((pattern for pattern in (*RUN, *NOT_RUN) if re.fullmatch(pattern, line)), None)


def prepare(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of the digits, the same fused, a run, pictures, and logits of them from elsewhere."""
    for place in places.values():
        place.mkdir()
    go_to(places["components"], monkeypatch)
    command("build-cache digits --set store=components --views 2 --set preflight_samples=64")
    (cache,) = (places["components"] / "home").glob("digits-*.zarr")
    go_to(places["fused"], monkeypatch)
    command(f"cache-tools fuse {cache} --teacher-weight 0.7 --name digits")
    run = "runs/digits-resnet8-kd-e40b004d"
    command(f"train-student digits --no-compare-with-labels {HALF_A_SECOND_OF_DIGITS} {run}")
    for copied in (Path("runs/digits-resnet20-kd-0c1f7a52"), places["components"] / "runs/digits"):
        shutil.copytree(run, copied)
    names = sorted(path.relative_to("photos/train") for path in write_pictures(Path("photos")).glob("train/*/*.png"))
    logits = np.random.default_rng(0).normal(size=(len(names), 3)).astype(np.float32)
    np.savez("logits.npz", logits=logits, names=np.array([str(name) for name in names]), classes=np.array(CLASSES))


def go_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv(HOME_VARIABLE, str(place / "home"))


def command(line: str) -> Any:
    name, *words = shlex.split(line)
    assert name in MODULES
    done = invoke(name, *words)
    assert done.exit_code == 0, f"{line}\n{done.stderr}"
    return done
