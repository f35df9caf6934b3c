"""examples/train_clip.py and the shipped CLIP: open_clip loads its folders, and the same seed gives the same bytes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from pipeline.networks.prompts import render_prompts, template_set

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_clip.py"
SHIPPED = ROOT / "pipeline" / "assets" / "digits-clip"


@pytest.fixture(autouse=True)
def _leave_torch_as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_clip", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_clip"] = module  # pydantic resolves annotations there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_same_seed_same_bytes_and_open_clip_loads_them(script: ModuleType, tmp_path: Path) -> None:
    options = {"samples": 96, "epochs": 2, "batch_size": 32, "device": "cpu"}
    script.main("digits", tmp_path / "a", seed=3, **options)
    script.main("digits", tmp_path / "c", seed=4, **options)
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, str(SCRIPT), "digits", "--seed=3", f"--out={tmp_path / 'b'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "zero-shot top-1 on 359 test images" in done.stdout
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'a'}")
    image = Image.fromarray(open_images(DatasetRecipe(name="digits")).load(slice(0, 1))[0].transpose(1, 2, 0))
    model.eval()
    assert model.encode_image(preprocess(image)[None]).shape == (1, 64)
    report = json.loads((tmp_path / "a" / "training.json").read_text())
    assert (report["num_samples"], report["epochs"], report["seed"]) == (96, 2, 3)


def test_a_folder_of_images(script: ModuleType, tmp_path: Path) -> None:
    for label, colour in enumerate(("red", "blue")):
        folder = tmp_path / "photos" / colour
        folder.mkdir(parents=True)
        for number in range(6):
            noise = np.random.default_rng(10 * label + number).integers(0, 30, (40, 50, 3), dtype=np.uint8)
            pixels = noise + np.array([200, 0, 0] if colour == "red" else [0, 0, 200], np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    out = tmp_path / "clip"
    script.main(str(tmp_path / "photos"), out, image_size=64, epochs=1, batch_size=4, device="cpu")
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"] == 64
    open_clip.create_model_from_pretrained(f"local-dir:{out}")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("nothing-here", {}, "bad value for 'name'"),
        ("digits", {"templates": "nowhere.txt"}, "no such prompt templates"),
        ("digits", {"device": "cuda:99"}, "no such CUDA device"),
        ("digits", {"image_size": 64}, "image_size is for folders"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    script: ModuleType,
    dataset: str,
    options: dict[str, object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exited:
        script.command(script.main)(dataset, tmp_path / "clip", **options)
    assert exited.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_the_shipped_model_is_small_and_accurate(script: ModuleType) -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 7_000_000
    report = json.loads((SHIPPED / "training.json").read_text())
    images = open_images(DatasetRecipe(name="digits"), "test")
    top1 = script.zero_shot_top1(SHIPPED, images, template_set("richkd"), torch.device("cpu"))
    assert top1 >= 0.95
    assert abs(top1 - report["test_top1"]) < 0.01


def test_the_shipped_weights_were_trained_on_the_captions_only() -> None:
    """Exactly the tokens of captions have embeddings other than zero."""
    embedding = load_file(SHIPPED / "open_clip_model.safetensors")["token_embedding.weight"]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{SHIPPED}")
    names = open_images(DatasetRecipe(name="digits"), "test").class_names
    captions = tokenizer(render_prompts(template_set("richkd"), names))
    used = torch.zeros(len(embedding), dtype=torch.bool)
    used[captions.unique()] = True
    assert torch.equal(embedding.abs().amax(1) > 0, used)
    assert (captions.argmax(1) < captions.shape[1] - 1).all()  # nothing was cut off


def test_loss_is_cross_entropy_with_targets_shared_by_a_class(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    image, text = (torch.nn.functional.normalize(rows, dim=1) for rows in (image, text))
    labels, scale = torch.tensor([0, 1, 0, 2, 1, 0]), torch.tensor(7.0, dtype=torch.float64)
    expected = 0.0
    logits = (scale * image @ text.T).numpy()
    for rows in (logits, logits.T):
        log_p = rows - np.log(np.exp(rows).sum(1, keepdims=True))
        for i in range(6):
            same = [j for j in range(6) if labels[j] == labels[i]]
            expected -= sum(log_p[i, j] for j in same) / len(same) / 12
    loss = script.unicl_loss(image, text, labels, scale)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    distinct = torch.arange(6)
    clip = open_clip.ClipLoss()(image, text, scale)
    assert float(script.unicl_loss(image, text, distinct, scale)) == pytest.approx(float(clip), rel=1e-6)


def test_each_distinct_caption_is_encoded_once(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**script.model_config((32, 32), 16, 4)).eval()
    captions = open_clip.SimpleTokenizer(context_length=script.CONTEXT_LENGTH)(["one", "a two", "three"])
    chosen = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        rows = script.encode_captions(model, captions, chosen)
        torch.testing.assert_close(rows, model.encode_text(captions[chosen], normalize=True))
