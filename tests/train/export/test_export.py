"""Exported students compute the logits of the student, without our packages too; other files are not kept."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.preprocess import affine
from tests.support import tiny_run
from tests.support.turns import some
from train.checkpoints import load_student, read_card
from train.evaluate.metrics import predict
from train.export import formats
from train.export.cli import app
from train.export.config import ExportReport
from train.export.formats import FORMATS
from train.export.student import ExportOptions, export_student
from train.run import train_student

ROOT = Path(__file__).parents[3]
ALL = tuple(FORMATS)
FILES = {entry.file for entry in FORMATS.values()} | {"config.json"}
# One student of each family of the zoo, and a transformer of timm.
FAMILIES = (
    "resnet8x4", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2",
    "timm:test_vit",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_pictures(tmp_path_factory.mktemp("export") / "pictures", train=24, test=21)


@pytest.fixture(scope="module")
def trained(pictures: Path) -> Path:
    return train(pictures, "resnet8", ema_decay=0.5)


@pytest.fixture(scope="module")
def efficientnet(pictures: Path) -> Path:
    """A run of timm's smallest network, for reading only: `exported` puts its files beside it."""
    return train(pictures, "timm:test_efficientnet", epochs=1)


@pytest.fixture(scope="module")
def exported(efficientnet: Path) -> ExportReport:
    """The report of an export in every format, which takes seconds."""
    pytest.importorskip("onnxruntime")
    return export_student(efficientnet, ExportOptions(formats=ALL))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train(pictures: Path, student: str, **changes: Any) -> Path:
    """A tiny run on labels."""
    out = pictures.parent / student.replace(":", "-")
    settings = {"loss": {"kind": "ce"}, "dataset": tiny_run.dataset(pictures), "epochs": 2, "loggers": ()}
    recipe = tiny_run.recipe("", out, student=student, **(settings | changes))
    return train_student(recipe.model_copy(update={"cache": None})).folder


def expected_logits(run: Path, pictures: Path, which: str = "last") -> torch.Tensor:
    model, card = load_student(run / f"{which}.safetensors")
    images = open_images(tiny_run.dataset(pictures), "test")
    return predict(model, images, Preprocessing(mean=card.mean, std=card.std), torch.device("cpu"))


def pixels(pictures: Path) -> np.ndarray:
    return np.ascontiguousarray(open_images(tiny_run.dataset(pictures), "test").load(slice(None)))


ONLY_TORCH = """
import sys
import numpy as np, torch
sys.modules.update({"train": None, "cache_tools": None, "pipeline": None, "timm": None})
folder, images = sys.argv[1], torch.from_numpy(np.load(sys.argv[2]))
notes = {"card.json": ""}
script = torch.jit.load(folder + "/model.torchscript.pt", _extra_files=notes)
program = torch.export.load(folder + "/model.pt2").module()
for name, model in (("script", script), ("program", program)):
    rows = [model(images[:1]), model(images[1:4]), model(images[4:])]
    np.save(f"{folder}/{name}.npy", torch.cat(rows).detach().numpy())
print(notes["card.json"].decode() if isinstance(notes["card.json"], bytes) else notes["card.json"])
"""

ONLY_ONNXRUNTIME = """
import sys
import numpy as np, onnxruntime
sys.modules.update({"train": None, "cache_tools": None, "torch": None})
folder, images = sys.argv[1], np.load(sys.argv[2])
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
[read] = session.get_inputs()
assert (read.name, read.type, read.shape) == ("images", "tensor(uint8)", ["batch", 3, 16, 16]), read
assert session.get_modelmeta().custom_metadata_map["architecture"] == sys.argv[3]
rows = [session.run(["logits"], {"images": part})[0] for part in (images[:1], images[1:4], images[4:])]
np.save(folder + "/onnx.npy", np.concatenate(rows))
"""


@pytest.mark.medium
def test_timm_s_network_in_every_format(efficientnet: Path, exported: ExportReport) -> None:
    check_every_format(efficientnet, exported)


@pytest.mark.slow
@pytest.mark.parametrize("student", FAMILIES)
def test_every_family_in_every_format(pictures: Path, student: str) -> None:
    pytest.importorskip("onnxruntime")
    dataset = tiny_run.dataset(pictures)
    if student == "timm:test_vit":  # takes this size only
        dataset = dataset.model_copy(update={"image_size": 160})
    run = train(pictures, student, epochs=1, dataset=dataset)
    check_every_format(run, export_student(run, ExportOptions(formats=ALL)))


def check_every_format(run: Path, report: ExportReport) -> None:
    assert [entry.format for entry in report.files] == list(ALL)
    assert report.samples == 21
    for entry in report.files:
        assert entry.max_difference <= 1e-5 * max(1.0, entry.allowed_difference / report.tolerance)
        assert entry.top1_agreement == 1.0
        assert (run / "export" / entry.file).stat().st_size == entry.file_bytes
    assert {path.name for path in (run / "export").iterdir()} == FILES


@pytest.mark.medium
def test_files_run_without_our_packages(
    efficientnet: Path, exported: ExportReport, pictures: Path, tmp_path: Path
) -> None:
    """In processes that cannot import teacher-cache, from pixels, with batches of several sizes."""
    folder = shutil.copytree(exported.folder, tmp_path / "export")
    architecture = read_card(efficientnet / "last.safetensors").architecture
    np.save(tmp_path / "images.npy", pixels(pictures))
    for code in (ONLY_TORCH, ONLY_ONNXRUNTIME):
        arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "images.npy"), architecture]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if code is ONLY_TORCH:
            card = json.loads(done.stdout)
            assert json.loads(card["class_names"]) == list(tiny_run.CLASSES)
    expected = expected_logits(efficientnet, pictures).numpy()
    for name in ("script", "program", "onnx"):
        np.testing.assert_allclose(np.load(folder / f"{name}.npy"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.medium
def test_timm_loads_an_exported_timm_student(pictures: Path, efficientnet: Path, tmp_path: Path) -> None:
    import timm

    export_student(efficientnet, ExportOptions(formats=("safetensors",), out=tmp_path / "export"))
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    config = model.pretrained_cfg
    assert list(config["label_names"]) == list(tiny_run.CLASSES)
    data = timm.data.resolve_data_config({}, model=model)
    assert (list(data["input_size"]), data["crop_pct"]) == ([3, 16, 16], 1.0)
    mean, std = (torch.tensor(data[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = model((torch.from_numpy(pixels(pictures)) / 255 - mean) / std)
    torch.testing.assert_close(logits, expected_logits(efficientnet, pictures), atol=1e-5, rtol=1e-5)
    wider = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=7)
    assert wider.get_classifier().out_features == 7, "it can be fine-tuned"


@pytest.mark.medium
def test_torchvision_loads_an_exported_torchvision_student(pictures: Path) -> None:
    from torchvision.models import get_model

    run = train(pictures, "torchvision:shufflenet_v2_x0_5", epochs=1)
    export_student(run, ExportOptions(formats=("safetensors",)))
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["library"] == "torchvision"
    model = get_model(config["architecture"], num_classes=config["num_classes"]).eval()
    model.load_state_dict(load_file(run / "export" / "model.safetensors"))
    mean, std = (torch.tensor(config["pretrained_cfg"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        logits = model((torch.from_numpy(pixels(pictures)) / 255 - mean) / std)
    torch.testing.assert_close(logits, expected_logits(run, pictures), atol=1e-5, rtol=1e-5)


@pytest.mark.medium
def test_the_code_in_the_documentation(pictures: Path, efficientnet: Path, exported: ExportReport) -> None:
    names: dict[str, Any] = {"folder": str(exported.folder), "images": torch.from_numpy(pixels(pictures))}
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(code, names)
    expected = expected_logits(efficientnet, pictures)
    mean, std = (torch.tensor(names["config"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    others = torch.from_numpy(names["scores"]), names["model"]((names["images"] / 255 - mean) / std)
    for logits in (*names["logits"], *others):
        torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=1e-5)
    assert names["figures"][0] == sum(parameter.numel() for parameter in names["student"].parameters())
    assert all(figure > 0 for figure in names["figures"])


@pytest.mark.parametrize("weights", ["best", "ema"])
def test_other_weights(run: Path, pictures: Path, weights: str) -> None:
    report = export_student(run, ExportOptions(weights=weights, formats=("safetensors",)))
    assert (report.checkpoint, report.epoch) == (weights, read_card(run / f"{weights}.safetensors").epoch)
    assert (run / "export" / "model.safetensors").read_bytes() == (run / f"{weights}.safetensors").read_bytes()
    named = export_student(run / f"{weights}.safetensors", ExportOptions(formats=("safetensors",)))
    assert named.checkpoint == weights


@pytest.mark.medium
def test_a_fixed_batch_of_normalised_images(run: Path, pictures: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = ExportOptions(formats=("torch-export", "onnx"), batch_size=4, input="normalised", samples=10)
    report = export_student(run, options)
    assert (report.samples, report.batch_size) == (10, 4)
    card = read_card(run / "last.safetensors")
    mean, std = (np.asarray(values, np.float32).reshape(1, 3, 1, 1) for values in (card.mean, card.std))
    images = (pixels(pictures)[:4] / np.float32(255) - mean) / std
    session = onnxruntime.InferenceSession(run / "export" / "model.onnx", providers=["CPUExecutionProvider"])
    assert (session.get_inputs()[0].type, session.get_inputs()[0].shape) == ("tensor(float)", [4, 3, 16, 16])
    [logits] = session.run(None, {"images": images})
    np.testing.assert_allclose(logits, expected_logits(run, pictures)[:4].numpy(), atol=1e-5)


def test_an_export_replaces_an_earlier_one(run: Path) -> None:
    export_student(run, ExportOptions(formats=("safetensors", "torchscript")))
    export_student(run, ExportOptions(formats=("torchscript",), weights="best"))
    assert {path.name for path in (run / "export").iterdir()} == {"model.torchscript.pt", "config.json"}
    config = json.loads((run / "export" / "config.json").read_text())
    assert config["teacher_cache"]["export"]["checkpoint"] == "best"
    model, _ = load_student(run)
    assert config["teacher_cache"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.medium
@pytest.mark.parametrize("name", some(ALL, 2))
def test_a_corrupted_export_is_caught(monkeypatch: pytest.MonkeyPatch, run: Path, name: str) -> None:
    """Negate the weights of the classifier in the written file: the earlier export stays as it was."""
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    export_student(run, ExportOptions(formats=("safetensors",)))
    before = contents(run / "export")
    weight = load_file(run / "last.safetensors")["fc.weight"].numpy()
    real = FORMATS[name]
    found: list[int] = []

    def corrupt(source: Any, path: Path) -> None:
        real.write(source, path)
        data = path.read_bytes()
        right, wrong = weight.tobytes(), (-weight).tobytes()
        found.append(data.count(right))
        path.write_bytes(data.replace(right, wrong))

    monkeypatch.setitem(FORMATS, name, replace(real, write=corrupt))
    failed = invoke(run, "--format", f"safetensors,{name}")
    assert found == [1]
    assert failed.exit_code == 2
    assert f"({name}, 21 test images)" in failed.stderr or "cannot be loaded" in failed.stderr
    assert len([line for line in failed.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert contents(run / "export") == before


@pytest.mark.medium
@pytest.mark.parametrize("name", some(ALL, 2))
def test_a_truncated_export_is_caught(monkeypatch: pytest.MonkeyPatch, run: Path, name: str) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    real = FORMATS[name]

    def truncate(source: Any, path: Path) -> None:
        real.write(source, path)
        path.write_bytes(path.read_bytes()[:-1000])

    monkeypatch.setitem(FORMATS, name, replace(real, write=truncate))
    failed = invoke(run, "--format", name)
    assert failed.exit_code == 2
    assert "error: " in failed.stderr
    assert contents(run / "export") == {}


@pytest.mark.medium
def test_a_graph_that_normalises_with_other_numbers_is_caught(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    """0 … 1 instead of 0 … 255, the most common mistake in deployments."""
    real = affine
    monkeypatch.setattr(formats, "affine", lambda *given: tuple(value / 255 for value in real(*given)))
    failed = invoke(run, "--format", "torchscript")
    assert failed.exit_code == 2
    assert "computes other logits than the student, so nothing was kept (torchscript, 21 test images)" in failed.stderr


@pytest.mark.medium
def test_the_tolerance_option(run: Path) -> None:
    failed = invoke(run, "--format", "torchscript", "--tolerance", "1e-12")
    assert failed.exit_code == 2
    assert "at most 1e-12" in failed.stderr
    assert invoke(run, "--format", "torchscript", "--tolerance", "1e-3").exit_code == 0


def test_the_printed_table_and_json(run: Path) -> None:
    table = invoke(run, "--format", "safetensors,torchscript", "--samples", 5)
    assert table.exit_code == 0, table.stderr
    for words in (
        "model.torchscript.pt",
        "100.00%",
        "compared on 5 images of pictures test",
        "uint8 pixels [N, 3, 16, 16]",
    ):
        assert words in table.stdout
    assert "deprecated" not in table.stderr
    report = json.loads(invoke(run, "--json", "--out", run / "elsewhere", "--batch-size", 2).stdout)
    assert [entry["file"] for entry in report["files"]] == ["model.safetensors", "model.torchscript.pt", "model.pt2"]
    assert (report["batch_size"], report["folder"]) == (2, str(run / "elsewhere"))
    assert (run / "elsewhere" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "first"], "'last', 'best' or 'ema'"),
        (["--format", "caffe"], "'safetensors', 'torchscript', 'torch-export' or 'onnx'"),
        (["--batch-size", "many"], "expected dynamic, or a number"),
        (["--batch-size", "0"], "batch_size"),
        (["--input", "jpeg"], "'pixels' or 'normalised'"),
        (["--split", "validation"], "image folder not found"),
        (["--data-dir", "/nowhere"], "image folder not found"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run: Path, arguments: list[str], words: str) -> None:
    failed = invoke(run, *arguments)
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")
    assert words in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_other_errors(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path) -> None:
    assert "no run of train-student here" in invoke(tmp_path / "nothing").stderr
    (tmp_path / "file").write_text("")
    assert "a file is where the export should be" in invoke(run, "--out", tmp_path / "file").stderr
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    without = invoke(run, "--format", "onnx")
    assert without.exit_code == 2
    assert "pip install 'teacher-cache[onnx]'" in without.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, including hidden ones."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
