"""Random command lines of every command, from their own definitions: a documented exit code and a clear line.

TEACHER_CACHE_LONG_TESTS=1 runs 2500 of them, TEACHER_CACHE_FUZZ=1 other ones each time.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.in_process import MODULES
from tests.support.odd_commands import app_of, names_below, run
from tests.support.turns import some, turns

pytestmark = [pytest.mark.turns, pytest.mark.medium]
SEED = random.randrange(1 << 30) if "TEACHER_CACHE_FUZZ" in os.environ else 0

# What would start a browser, a cluster or a download, or print without end.
LEFT_OUT = {"--open", "--engine", "--ray-address", "--ray-gpus", "--ray-workers", "--help", "--version", "--download"}
NUMBERS = [
    "0", "1", "-1", "2", "7", "0.5", "1.5", "1e400", "-1e400", "nan", "inf", "-inf", "9" * 30, "9" * 5000, "1e-320",
    "1e30", "0x10", "1_000", " 3", "three", "", "true", "٣",
]  # fmt: skip
PATHS = [
    "", ".", "sub/..", "x", "a/b/c", "/proc/x", "/proc/self/mem", "/dev/null", "/dev/zero", "/dev/full", "file", "pipe",
    "empty", "loop", "file/below", "cache.zarr", "~nobody/x", "~", "x" * 300, "a\nb", "é", "\udcff", "no.yaml",
    "recipe.yaml", "file.png",
]  # fmt: skip
WORDS = [
    "", "x", "none", "all", "model", "match", "auto", "cpu", "cuda:99", "tpu", "resnet8", "timm:no_such", "timm:",
    "torchvision:x", "a.b:c", ":", "kd", "ce", "richkd", "0:1:0.5", "1:0:0", "0:1:0", ",", ",,,", "1,2", "float16",
    "top-k:k=0", "fixed-step:step=1/0", "fixed-step:step=0", "companded+", "+", "float32,onnx", "dynamic", "best",
    "30d", "1GB", "-1GB", "9" * 400 + "d", "9" * 400 + "GB", "s3://", "ftp://x/y", "s3:///x", "file://", "*", "[",
    "tensorboard", "tensorboard,x", "test", "train[::0]", "\udcff\udcfe", "a\x1b[31mb", "x" * 3000,
]  # fmt: skip
SETTINGS = [
    "", "=", "a", "a=", "=1", "a=1", "epochs=0", "epochs=[", "epochs=&a [*a]", "loss=1", "loss.kind=ce", "a.b.c=1",
    "views.ops.0.op=x", "views.ops=7", "lr=0.1,0.2", "lr=0.1..0.2", "lr=1..0", "lr=a..b", "seed=1,2", "student=",
    "student=resnet8,x", "seed=1..9:2", "dataset.split=train[", "out=/proc/x", "x=\udcff",
]  # fmt: skip
STRANGE = ("--no-such-option", "-", "--", "-x", "extra", "\udcff")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a cache, a recipe and things that are neither; nothing outside it changes."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(work / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    images = tiny_images(12, 3)
    manifest = tiny_manifest(images, num_views=2, block_rows=5, store="components")
    build(work / "sound.zarr", manifest, images)
    (work / "file").write_bytes(b"\x00\xff not text")
    (work / "file.png").write_bytes(b"no image")
    (work / "recipe.yaml").write_text(
        "name: x\nloss: {kind: ce}\nepochs: 1\ndataset: {name: folder, data_dir: no/such/folder}\n"
    )
    os.mkfifo(work / "pipe")
    (work / "empty").mkdir()
    (work / "loop").symlink_to("loop")
    monkeypatch.setenv("HOME", str(work / "user"))  # commands record there what the user has named
    places = (Path("/etc"), tmp_path)
    outside = names_below(*places, leave_out=work)
    yield work
    assert names_below(*places, leave_out=work) - outside == set()


def commands() -> list[tuple[str, tuple[str, ...], Any]]:
    """(command, subcommand, its parameters) of every command."""
    found: list[tuple[str, tuple[str, ...], Any]] = []
    for command in MODULES:
        parsed: Any = typer.main.get_command(app_of(command))
        below = getattr(parsed, "commands", None)
        inner = [((), parsed)] if below is None else [((name,), one) for name, one in below.items()]
        found += [(command, words, one.params) for words, one in inner]
    return found


def random_line(rng: random.Random, command: str, parameters: Any) -> list[str]:
    """Arguments of a command: none, one or more of each kind, in any order."""
    words: list[str] = []
    options = [one for one in parameters if one.param_type_name == "option" and one.opts[0] not in LEFT_OUT]
    for option in rng.choices(options, k=rng.choice((0, 1, 1, 2, 3, 5)) if options else 0):
        flag = rng.choice([*option.opts, *option.secondary_opts])
        if option.is_flag:
            words.append(flag)
        elif rng.random() < 0.03:
            words.append(flag)  # without its value
        else:
            value = value_for(rng, option)
            words += [f"{flag}={value}"] if rng.random() < 0.5 else [flag, value]
    arguments = [one for one in parameters if one.param_type_name == "argument"]
    for _ in arguments:
        words.insert(0, rng.choice(("sound.zarr", "sound.zarr", rng.choice(PATHS), rng.choice(WORDS))))
    if command in {"build-cache", "train-student", "sweep-students"}:  # with its own recipe it would begin to work
        words = [word for word in words if word not in {"digits", "sound.zarr"}]
        words.insert(0, "recipe.yaml")
    if rng.random() < 0.05:
        words.insert(rng.randrange(len(words) + 1), rng.choice(STRANGE))
    return words


def value_for(rng: random.Random, option: Any) -> str:
    if option.opts[0] in {"--set", "--grid"}:
        return rng.choice(SETTINGS)
    kind = str(getattr(option, "type", None) or option.type_descriptor.annotation).lower()
    if rng.random() < 0.2:
        return rng.choice([*NUMBERS, *PATHS, *WORDS])
    if "int" in kind or "float" in kind:
        return rng.choice(NUMBERS)
    return rng.choice(PATHS if "path" in kind or "func" in kind else WORDS)


def test_random_command_lines(folder: Path) -> None:
    count, codes, wrong, known = turns(30, 2500), Counter[str](), [], commands()
    assert len(known) == 6 + 19
    for number in range(count):
        rng = random.Random(f"{SEED}-{number}")
        command, subcommand, parameters = known[number % len(known)]
        if not (folder / "cache.zarr" / "zarr.json").exists():
            shutil.rmtree(folder / "cache.zarr", ignore_errors=True)
            shutil.copytree(folder / "sound.zarr", folder / "cache.zarr")
        words = [*subcommand, *random_line(rng, command, parameters)]
        words = ["cache.zarr" if word == "sound.zarr" else word for word in words]
        ended = run(command, words)
        codes[f"{command} {ended.code}"] += 1
        if ended.problem is not None:
            wrong.append(f"{SEED}-{number} {command} {words!r}: {ended.problem}\n{ended.output[-300:]}")
    print(f"{count} command lines: {dict(sorted(codes.items()))}")
    assert not wrong, "\n\n".join(wrong[:15])
    assert sum(number for name, number in codes.items() if name.endswith(" 0")) > count // 50, "some lines are valid"


SURROUNDINGS = {
    "stdout closed": "{} >&-",
    "stderr closed": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-",
    "nobody reads": "{} | head -0",
    "a full disk": "{} > /dev/full",
    "no home": "env -u HOME {}",
    "an empty home": "env HOME= {}",
    "no folder": "mkdir gone && cd gone && rmdir ../gone && {}",
    "no folder for temporary files": "TMPDIR=/no/such/folder {}",
    "one column": "COLUMNS=1 {}",
    "a column that is none": "COLUMNS=x {}",
    "plain letters": "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {}",
    "no terminal": "TERM=dumb {} < /dev/null",
    "a limit of files": "ulimit -n 40 && {}",
}
LINES = ("cache-tools ls", "cache-tools --help", "cache-tools info cache.zarr", "train-student --show-recipe",
         "train-student recipe.yaml", "build-cache no.yaml")  # fmt: skip


@pytest.mark.parametrize("surroundings", some(SURROUNDINGS.values(), 6), ids=SURROUNDINGS)
def test_commands_end_in_any_surroundings(surroundings: str, folder: Path) -> None:
    shutil.copytree(folder / "sound.zarr", folder / "cache.zarr")
    root, scripts = Path(__file__).parents[3], folder / "bin"
    scripts.mkdir()
    for command, module in MODULES.items():
        (scripts / command).write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        (scripts / command).chmod(0o755)
    variables = os.environ | {"PYTHONPATH": str(root), "PATH": f"{scripts}:{os.environ['PATH']}"}
    for line in LINES[: turns(1, len(LINES))]:
        shell = ["bash", "-c", f"set -o pipefail; {surroundings.format(line)}"]
        done = subprocess.run(
            shell, cwd=folder, env=variables, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        assert "Exception ignored" not in done.stderr, f"{line}\n{done.stderr}"
        assert done.returncode in {0, 2, 141}, f"{line}: {done.returncode}\n{done.stderr}"
        shutil.rmtree(folder / "gone", ignore_errors=True)
