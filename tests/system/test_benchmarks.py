"""Each script of benchmarks/ runs at its smallest and prints one JSON line of plausible figures.

These tests do not check times: the scripts measure them on an idle machine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.preloaded import Preloaded, run_script
from tests.support.turns import slow

pytestmark = pytest.mark.medium

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SAMPLES = 359  # the test split of the digits
SMALLEST = ("--set", "dataset.split=test", "--rounds", "1", "--views", "2", "--threads", "1", "--device", "cpu")
MORE = {
    "sweep_cost": ("--students", "resnet8,vgg8"),
    "train_throughput": ("--student", "resnet8", "--schedule", "1", "--precision", "bfloat16"),
}
# script → variants timed, and each figure as a function of their seconds
SCRIPTS: dict[str, tuple[set[str], dict[str, Callable[[dict[str, float]], float]]]] = {
    "target_overhead": (
        {"labels", "fed", "distilled"},
        {
            "ratio": lambda s: s["distilled"] / s["labels"],
            "feed": lambda s: s["fed"] / s["labels"],
            "loss": lambda s: s["distilled"] / s["fed"],
        },
    ),
    "online_vs_cached": (
        {"online", "cached", "teachers", "student"},
        {
            "speed_up": lambda s: s["online"] / s["cached"],
            "ideal": lambda s: (s["teachers"] + s["student"]) / s["student"],
            "achieved": lambda s: s["online"] / s["cached"] / ((s["teachers"] + s["student"]) / s["student"]),
        },
    ),
    "sweep_cost": (
        {"together", "separate", "bare"},
        {
            "ratio": lambda s: s["together"] / s["bare"],
            "separate": lambda s: s["separate"] / s["bare"],
            "gain": lambda s: s["separate"] / s["together"],
        },
    ),
    "own_loops": (
        {"train_student", "plain_loop", "timm_loop"},
        {
            "plain_loop": lambda s: s["train_student"] / s["plain_loop"],
            "timm_loop": lambda s: s["train_student"] / s["timm_loop"],
        },
    ),
    "train_throughput": ({"step", "bare"}, {"throughput": lambda s: s["bare"] / s["step"]}),
    "build_overhead": ({"build", "bare"}, {"throughput": lambda s: s["bare"] / s["build"]}),
}


def start(script: str, *options: str) -> Preloaded:
    # In another working folder: the scripts must not depend on it.
    return Preloaded(run_script, BENCHMARKS / f"{script}.py", *options, cwd=Path("/"))


@pytest.mark.parametrize("script", ["target_overhead", *map(slow, sorted(SCRIPTS.keys() - {"target_overhead"}))])
def test_a_benchmark_prints_one_line_of_figures(script: str):
    process = start(script, *SMALLEST, *MORE.get(script, ()))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (line,) = out.splitlines()
    figures = json.loads(line)
    variants, ratios = SCRIPTS[script]
    assert figures["benchmark"] == script
    for of_clock, seconds in ((figures, figures["median_s"]), (figures["processor"], figures["median_processor_s"])):
        assert seconds.keys() == variants
        assert all(value > 0 for value in seconds.values())
        for name, ratio in ratios.items():
            assert of_clock[name].keys() == {"median", "q1", "q3"}
            assert all(math.isfinite(value) and value > 0 for value in of_clock[name].values())
            assert of_clock[name]["median"] == pytest.approx(ratio(seconds), rel=2e-3)  # of one round
    assert figures["n"] == (2 * SAMPLES if script == "build_overhead" else SAMPLES)
    assert (figures["rounds"], figures["views"], figures["threads"]) == (1, 2, 1)
    assert figures.get("schedule_s", 1.0) > 0
    assert figures["device"].startswith("cpu")
    assert all(figures[key] for key in ("clock", "python", "torch", "timm", "open_clip_torch", "zarr"))


@pytest.mark.slow
def test_asha_measures_the_cost_of_stopping_early(tmp_path: Path):
    """One of two learning rates is far too small. Checks the time saved and the rank of the trial that was kept."""
    process = start("asha", *SMALLEST, "--rates", "0.0001,0.1", "--keep-one-in", "2", "--epochs", "3")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    assert line["epochs"]["median"] == pytest.approx((2 + 3) / 6, abs=1e-4)
    assert line["time"]["median"] > 0
    assert line["rank_of_kept"][0] in (1, 2)
    assert (line["kept_best"] == 1) == (line["rank_of_kept"] == [1]) == (line["behind"]["mean"] == 0)


@pytest.mark.slow
def test_large_caches_are_measured_by_row() -> None:
    process = start("scale", "--rows", "600,2000", "--classes", "8", "--window", "2", "--rounds", "1", "--threads", "1")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    assert (line["rows"], line["classes"], line["window"], line["block_rows"]) == ([600, 2000], 8, 2, 128)
    for table in (line["seconds"], line["processor_seconds"], line["memory_mb"]):
        assert table.keys() == {"open", "start", "whole", "stats"}
        assert all(by_size.keys() == {"600", "2000"} for by_size in table.values())
    for name, seconds in line["seconds"].items():
        ratio = seconds["2000"]["median"] / 2000 / (seconds["600"]["median"] / 600)
        assert line["per_row"][name] == {"2000/600": pytest.approx(ratio, rel=0.05)}


@pytest.mark.slow
def test_decoding_is_compared_with_the_bare_decoder() -> None:
    process = start("decode", "--pictures", "150", "--size", "64", "--views", "2", "--workers", "1", "--rounds", "1")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    for of_clock, s in ((line, line["median_s"]), (line["processor"], line["median_processor_s"])):
        assert s.keys() == {"service", "first", "bare", "threads", "once", "passes", "decode", "crop"}
        assert all(value > 0 for value in s.values())
        possible = 2 * (s["decode"] + s["crop"]) / (s["decode"] + 2 * s["crop"])
        expected = {
            "throughput": s["bare"] / s["service"],
            "first_epoch": s["bare"] / s["first"],
            "in_threads": s["bare"] / s["threads"],
            "gain": s["passes"] / s["once"],
            "possible": possible,
            "achieved": s["passes"] / s["once"] / possible,
        }
        for name, value in expected.items():
            assert of_clock[name]["median"] == pytest.approx(value, rel=2e-3)  # of one round
    assert (line["n"], line["workers"], line["views"], line["rounds"]) == (150, 1, 2, 1)
    assert line["decoder"]["pillow"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image's photos")
@pytest.mark.parametrize("canvases", [False, True])
def test_packed_pixels_are_compared_with_the_bare_student(canvases: bool) -> None:
    options = ("--pictures", "40", "--size", "32", "--batch-size", "16", "--student", "resnet8", "--rounds", "1")
    process = start("packed_pixels", *options, *(["--canvases"] if canvases else []), "--device", "cpu")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    for of_clock, s in ((line, line["median_s"]), (line["processor"], line["median_processor_s"])):
        assert s.keys() == {"bare", "packed", "decoded"}
        expected = {
            "throughput": s["bare"] / s["packed"],
            "decoded": s["bare"] / s["decoded"],
            "gain": s["decoded"] / s["packed"],
        }
        for name, value in expected.items():
            assert of_clock[name]["median"] == pytest.approx(value, rel=2e-3)  # of one round
    assert (line["n"], line["size"], line["batch_size"], line["rounds"]) == (40, 32, 16, 1)


@pytest.mark.slow
def test_opening_many_images_reads_only_what_changed() -> None:
    process = start("image_index", "--files", "1500", "--rows", "3000")
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    openings = {
        f"{name} {which}": figures
        for name in ("folder", "list", "pack", "shards")
        for which, figures in line[name].items()
        if which != "pack_s"
    }
    assert all(figures["s"] > 0 and figures["memory_mb"] >= 0 for figures in openings.values())
    read = {name: figures["read"] for name, figures in openings.items()}
    assert read == dict.fromkeys(openings, 0) | {  # of hard links one is read
        "folder first": 150, "list first": 150, "folder touched": 1, "folder added": 1,
    }  # fmt: skip
    images = {name: figures["images"] for name, figures in openings.items()}
    assert images == dict.fromkeys(openings, 1500) | {
        "folder added": 1501, "shards first": 3000, "shards second": 3000,
    }  # fmt: skip


@pytest.mark.slow
def test_an_error_is_one_line_and_exit_code_2():
    process = start("build_overhead", "--set", "num_vews=3")
    out, errors = process.communicate(timeout=300)
    assert (process.returncode, out) == (2, "")
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


STAND_IN = {
    "__init__.py": "",
    "engine/__init__.py": "",
    "distillers/__init__.py": "",
    "engine/trainer.py": """
class AverageMeter: ...
class BaseTrainer:
    def __init__(self, name, distiller, loader, validation, cfg):
        self.distiller = distiller
        assert (cfg.SOLVER.TYPE, cfg.SOLVER.LR_DECAY_STAGES, cfg.LOG.WANDB) == ("SGD", [], False)
    def train_iter(self, data, epoch, meters):
        image, target, index = data
        assert image.cuda(non_blocking=True) is image
        self.distiller(image=image.float(), target=target)
""",
    "distillers/KD.py": """
from torch import nn
class KD(nn.Module):
    def __init__(self, student, teacher, cfg):
        super().__init__()
        self.student, self.teacher, self.temperature = student, teacher, cfg.KD.TEMPERATURE
    def forward(self, image, target):
        (student, _), (teacher, _) = self.student(image), self.teacher(image)
        assert student.shape == teacher.shape == (len(target), 10)
""",
}


@pytest.mark.slow
def test_loops_of_others_run_from_their_clones_and_those_that_are_absent_have_no_figures(tmp_path: Path) -> None:
    for name, code in STAND_IN.items():
        file = tmp_path / "mdistiller" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    small = ("--set", "dataset.split=test", "--rounds", "1", "--threads", "1", "--device", "cpu")
    process = start("peers", *small, "--student", "resnet8", "--teacher", "resnet8", "--mdistiller", str(tmp_path))
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    line = json.loads(out)
    seconds = line["median_s"]
    assert seconds.keys() == {"bare", "ours", "mdistiller"}
    assert line["mdistiller_over_bare"]["median"] == pytest.approx(seconds["mdistiller"] / seconds["bare"], rel=2e-3)
    assert line["mdistiller_over_ours"]["median"] == pytest.approx(seconds["mdistiller"] / seconds["ours"], rel=2e-3)
    assert line["torchdistill_over_bare"] is line["torchdistill_over_ours"] is None
    assert line["images"] == SAMPLES


def test_a_folder_without_the_code_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "torchdistill").mkdir()
    (tmp_path / "torchdistill" / "__init__.py").write_text("")
    empty, damaged = (start("peers", f"--{name}", str(tmp_path)) for name in ("mdistiller", "torchdistill"))
    out, errors = empty.communicate(timeout=300)
    assert (empty.returncode, out) == (2, "")
    assert "not a clone of this project" in errors
    out, errors = damaged.communicate(timeout=300)
    assert (damaged.returncode, out) == (2, "")
    assert "No module named 'torchdistill.core'" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_make_gpu_needs_cuda_and_says_so_in_one_line() -> None:
    done = subprocess.run(
        ["make", "gpu", "STAMP=", f"BIN={Path(sys.executable).parent}"],
        cwd=BENCHMARKS.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "make gpu: no CUDA device"
    assert "Traceback" not in done.stderr
    assert "pytest" not in done.stdout, "it ends before the first test"
