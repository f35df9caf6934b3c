"""The documents: their code runs, their numbers are right, and their links, options and recipes exist."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import cache_tools.cli
import pipeline.cli
import pipeline.evaluate.cli
import train.cli
import train.export.cli
import train.report.cli
import train.sweep.cli
from cache_tools import TeacherCache
from cache_tools.alignment import pixel_digest
from cache_tools.format.recipe import FusionRecipe
from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.images import open_images
from cache_tools.views.recipe import ViewRecipe
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe, load_build_recipe
from tests.support import cache_factory
from train.recipe import TrainRecipe
from train.recipe.loading import load_train_recipe
from train.sweep.recipe import SweepRecipe

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(path for folder in (".", "docs", "examples", "benchmarks") for path in (ROOT / folder).glob("*.md"))
README, TUTORIAL, FORMAT = ROOT / "README.md", ROOT / "docs/tutorial.md", ROOT / "docs/format.md"
APPS = {
    "build-cache": pipeline.cli.app,
    "train-student": train.cli.app,
    "evaluate-student": pipeline.evaluate.cli.app,
    "sweep-students": train.sweep.cli.app,
    "report-students": train.report.cli.app,
    "export-student": train.export.cli.app,
    "cache-tools": cache_tools.cli.app,
}
OTHER_COMMANDS = {"venv/bin/pip", "pip", "python3", "make", "python", "sbatch", "jupyter"}

Read = Callable[[Path, str, int], np.ndarray]


def fenced(document: Path, language: str) -> list[str]:
    """The code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "<document>", "exec"), names)
    return names


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every shell line in the documents, continuation lines joined; of torchrun its command."""
    for document in DOCUMENTS:
        for block in fenced(document, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.partition(" #")[0].split("&&"):
                    if part.split() and not part.lstrip().startswith("#"):
                        words = part.split()
                        yield document.name, words[words.index("--") + 1 :] if words[0] == "torchrun" else words


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache home with the embedded digits cache, two views of it, built by the real pipeline."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(folder))
        build_cache(load_build_recipe("digits", ["num_views=2", "preflight_samples=64", "device=cpu"]))
    return folder


@pytest.fixture
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> TeacherCache:
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    return TeacherCache.open("digits")


@pytest.fixture(scope="module")
def format_code() -> SimpleNamespace:
    """Everything that the Python blocks of format.md define; none of them imports this package."""
    code = "\n".join(fenced(FORMAT, "python"))
    imported = {
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"hashlib", "json", "numpy", "pathlib", "tensorstore", "zarr"}
    assert "import_" not in code
    assert "from " not in code.replace('"""', "")
    return SimpleNamespace(**run(code, {}))


# README and tutorial


def test_readme_lines_give_targets_and_the_teachers_pixels(cache: TeacherCache) -> None:
    three_lines, batch_lines = fenced(README, "python")
    assert len(three_lines.strip().splitlines()) == 3
    source = open_images(cache.manifest.dataset)
    images = torch.from_numpy(source.load(slice(None)))
    index = torch.tensor([1437, 0, 95, 7])
    got = run(three_lines + batch_lines, {"images": images, "index": index})

    for name, array in (("logits", "fused_logits"), ("features", "fused_features")):
        np.testing.assert_array_equal(got[name].numpy(), cache.read_array(array, 0)[index].astype(np.float32))
        assert got[name].dtype == torch.float32
    torch.testing.assert_close(got["logits"].mean(dim=1), torch.zeros(4), atol=5e-3, rtol=0)
    digests = {canary.index: canary.pixel_digest for canary in cache.manifest.canaries if canary.view == 0}
    assert [pixel_digest(got["pixels"][k]) for k in (1, 2)] == [digests[0], digests[95]]

    # View 0 is clean; view 1 against padding and cropping one image at a time.
    torch.testing.assert_close(got["pixels"], images[index], atol=0, rtol=0)
    moved = run(batch_lines.replace("view=0", "view=1"), got)["pixels"]
    drawn = cache.recipe.views.parameters(index, 1, (32, 32))
    padded = np.pad(images[index].numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)))
    for row, (top, left) in enumerate(zip(drawn["0.pad-crop.top"], drawn["0.pad-crop.left"], strict=True)):
        np.testing.assert_array_equal(moved[row].numpy(), padded[row, :, top : top + 32, left : left + 32])
    assert not torch.equal(moved, images[index])


def test_tutorial_training_step_moves_the_student(cache: TeacherCache) -> None:
    (code,) = fenced(TUTORIAL, "python")
    torch.manual_seed(0)
    got = run(code, {})
    assert got["loss"].isfinite()
    again = got["student"](got["pixels"].float() / 255)
    assert got["losses"].kd(again, got["targets"].logits(got["index"]), temperature=4.0) < got["loss"]


# format.md


@pytest.mark.parametrize("reader", ["read_view", "read_view_tensorstore"])
def test_readers_of_the_format_give_what_ours_gives(
    cache: TeacherCache, format_code: SimpleNamespace, reader: str
) -> None:
    read: Read = getattr(format_code, reader)
    for name in ("fused_logits", "fused_features"):
        for view in range(cache.num_views):
            np.testing.assert_array_equal(read(cache.path, name, view), cache.read_array(name, view))
    for view in (-1, cache.num_views):
        with pytest.raises(ValueError, match="no such view"):
            read(cache.path, "fused_logits", view)


@pytest.mark.parametrize("reader", ["read_view", "read_view_tensorstore"])
def test_readers_of_the_format_refuse_what_is_not_committed(
    cache: TeacherCache, format_code: SimpleNamespace, reader: str, tmp_path: Path
) -> None:
    shutil.copytree(cache.path, tmp_path / "copy")
    (tmp_path / "copy/commits/c.1.0.0").unlink()
    with pytest.raises(ValueError, match="not completely built"):
        getattr(format_code, reader)(tmp_path / "copy", "fused_logits", 1)


def test_digests_notice_a_chunk_from_elsewhere_and_a_changed_manifest(
    cache: TeacherCache, format_code: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(cache.path, tmp_path / "copy")
    chunks = tmp_path / "copy/fused_logits"
    shutil.copy(chunks / "c.0.0.0", chunks / "c.1.0.0")
    with pytest.raises(ValueError, match="block 0 is damaged"):
        format_code.read_view(tmp_path / "copy", "fused_logits", 1)
    group = tmp_path / "copy/zarr.json"
    group.write_text(group.read_text().replace('"teacher_weight": 0.7', '"teacher_weight": 0.8'))
    with pytest.raises(ValueError, match="damaged manifest"):
        format_code.read_view(tmp_path / "copy", "fused_logits", 0)


def test_array_digests_notice_another_label(cache: TeacherCache, format_code: SimpleNamespace, tmp_path: Path) -> None:
    assert cache.manifest.array_digests
    format_code.check_arrays(cache.path)
    cache_factory.overwrite(Path(shutil.copytree(cache.path, tmp_path / "copy")), "labels")
    with pytest.raises(ValueError, match="labels is damaged"):
        format_code.check_arrays(tmp_path / "copy")


def test_manifest_of_the_format_has_the_real_fields_and_digests(
    cache: TeacherCache, format_code: SimpleNamespace
) -> None:
    example = json.loads(fenced(FORMAT, "json")[0])
    real = json.loads((cache.path / "zarr.json").read_text())["attributes"]["teacher_cache"]

    def keys(value: Any, path: str = "") -> set[str]:
        if path in {".build_recipe", ".provenance"}:
            return {path}
        if isinstance(value, list):
            return keys(value[0], f"{path}[]") if value and isinstance(value[0], dict) else {path}
        if not isinstance(value, dict):
            return {path}
        return {name for key, inner in value.items() for name in keys(inner, f"{path}.{key}")}

    assert keys(example) == keys(real)
    assert set(example["build_recipe"]) < set(real["build_recipe"])
    assert set(example["provenance"]) < set(real["provenance"])
    assert format_code.fingerprint(real) == real["fingerprint"] == cache.recipe.fingerprint
    assert format_code.manifest_digest(real) == real["digest"]
    text = FORMAT.read_text()
    for key in {*real, *real["recipe"]}:
        assert f"`{key}`" in text or f"`recipe.{key}`" in text, f"format.md does not explain {key}"


def test_arrays_are_those_of_the_format(cache: TeacherCache) -> None:
    text = FORMAT.read_text()
    for file in sorted(cache.path.glob("*/zarr.json")):
        array, name = json.loads(file.read_text()), file.parent.name
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` "))
        assert ", ".join(array["dimension_names"]) in row
        codecs = [codec["name"] for codec in array["codecs"]]
        assert codecs == (["bytes", "crc32c"] if name == "commits" else ["bytes", "zstd", "crc32c"])
        assert array["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
        fill = array["fill_value"]
        assert fill == "NaN" if "float" in array["data_type"] else f"| {str(fill).replace('-', '−')} |" in row


def test_fusing_as_the_format_says_gives_our_targets(format_code: SimpleNamespace, tmp_path: Path) -> None:
    """Both kinds of heads, several networks, one group alone, every prompt ensemble; a single teacher and CLIP."""
    images = cache_factory.tiny_images()
    choices: tuple[dict[str, Any], ...] = (
        {},
        {"teacher_weights": (0.3, 0.7), "clip_weights": (0.2, 0.3, 0.5)},
        {"teacher_weights": (0.3, 0.7), "clip_weights": ()},
        {"teacher_weights": (), "clip_weights": (1.0,)},
    )
    for ensemble in ("embedding", "logits", "probabilities"):
        for number, shares in enumerate(choices):
            manifest = cache_factory.tiny_manifest(
                images, store="components", fusion=FusionRecipe(prompt_ensemble=ensemble), **shares
            )
            path = tmp_path / f"{ensemble}-{number}"
            cache_factory.build(path, manifest, images)
            targets = TeacherCache.open(path).load_view(1)
            logits, features = format_code.fuse(path, 1)
            np.testing.assert_allclose(targets.logits(slice(None)), logits, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(targets.features(slice(None)), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("codec", ["compact", "dense", "fixed-step", "row-step", "product"])
def test_decoding_as_the_format_says_gives_our_targets(
    format_code: SimpleNamespace, tmp_path: Path, codec: str
) -> None:
    from cache_tools.codecs.presets import TargetCodecs

    both = {"logits": codec} if codec == "product" else {"logits": codec, "features": codec}
    choice: Any = codec if codec in {"compact", "dense"} else TargetCodecs.model_validate(both)
    for classes in (5, 40):
        images, path = cache_factory.tiny_images(num_classes=classes), tmp_path / str(classes)
        cache_factory.build(path, cache_factory.tiny_manifest(images, codec=choice, linear_head=False), images)
        cache = TeacherCache.open(path)
        for target in cache.targets:
            ours = cache.read_array(target, 1)
            np.testing.assert_allclose(format_code.decode(path, target, 1), ours, rtol=1e-5, atol=1e-5)


def test_arrays_of_several_networks_are_those_of_the_format(format_code: SimpleNamespace, tmp_path: Path) -> None:
    images, shares = cache_factory.tiny_images(), (0.3, 0.7)
    manifest = cache_factory.tiny_manifest(images, store="components", teacher_weights=shares, clip_weights=shares)
    stored = cache_factory.build(tmp_path / "c", manifest, images)
    assert {"teacher_features_2", "clip_features_2", "teacher_logits_2"} < set(stored)
    for name, values in stored.items():
        for reader in (format_code.read_view, format_code.read_view_tensorstore):
            np.testing.assert_array_equal(reader(tmp_path / "c", name, 2), values[2])
    text = FORMAT.read_text()
    for file in sorted((tmp_path / "c").glob("*/zarr.json")):
        name = file.parent.name
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name.removesuffix('_2')}` "))
        for dimension in json.loads(file.read_text())["dimension_names"]:
            assert dimension.removesuffix("_2") in row
            assert name.endswith("_2") or not dimension.endswith("_2")


def test_small_digests_of_the_format() -> None:
    from cache_tools.format.commits import block_digest, content_digest

    text = FORMAT.read_text()
    assert f"it is {block_digest(np.array([[1, 2], [-3, 0.5]], np.float16))}." in text
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    assert f"it is `{content_digest(keys, np.array([1, 0]), ['cat', 'a dog'])}`." in text


def test_worked_example_of_the_format(format_code: SimpleNamespace) -> None:
    example = json.loads(fenced(FORMAT, "json")[1])
    recipe = ViewRecipe.model_validate(example["views"])
    index, view, size = 7, 3, (32, 32)
    channel, y, x = np.meshgrid(np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    image = ((7 * y + 13 * x + 61 * channel) % 256).astype(np.uint8)

    assert [f"{word:08x}" for word in format_code.philox((0, 0, 0, 0), 0)] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]
    for position, expected in enumerate(example["words"]):
        assert [f"{word:08x}" for word in format_code.words(42, index, view, position)] == expected
    drawn = {name: int(values[0]) for name, values in recipe.parameters([index], view, size).items()}
    assert drawn == example["parameters"]
    assert list(drawn) == list(example["parameters"])
    assert recipe.parameter_digest([index], view, size) == example["view_parameters"]
    for count, digest in enumerate(example["canaries"]):
        part = recipe.model_copy(update={"ops": recipe.ops[:count]})
        pixels = part.apply(torch.from_numpy(image)[None], [index], view)[0]
        assert pixel_digest(pixels) == digest
        assert pixels[:, 5, 9].tolist() == example["pixel_5_9"][count]

    plain = PlainViews(format_code)
    for sample in (*range(30), 2**40 + 1):
        several = recipe.parameters([sample], view, size)
        found = plain.parameters(example["views"], sample, view, *size)
        assert found == {name: int(values[0]) for name, values in several.items()}
    assert pixel_digest(plain.pixels(example["views"]["ops"], drawn, image)) == example["canaries"][-1]


class PlainViews:
    """The section "Views" of format.md word for word, one sample and one number at a time."""

    def __init__(self, code: SimpleNamespace) -> None:
        self.words, self.below, self.chance = code.words, code.below, code.chance
        self.table = []
        for k in range(-1280, 1281):
            root = 2 ** (6144 + k % 256)
            for _ in range(8):
                root = math.isqrt(root)
            self.table.append((root << k // 256 + 5) // (256 << 5))

    def parameters(self, views: dict[str, Any], index: int, view: int, height: int, width: int) -> dict[str, int]:
        drawn: dict[str, int] = {}
        for position, op in enumerate(views["ops"]):
            w, v = (self.words(views["base_seed"], index, view, position, draw) for draw in (0, 1))
            values: dict[str, int] = {}
            if op["op"] == "pad-crop":
                values = {name: self.below(w[k], 2 * op["padding"] + 1) for k, name in enumerate(("top", "left"))}
            elif op["op"] == "flip":
                values = {"flipped": int(self.chance(w[0], 0.5))}
            elif op["op"] == "colour-jitter":
                for k, name in enumerate(("brightness", "contrast", "saturation")):
                    strength = round(op[name] * 65536)
                    values[name] = 65536 - strength + self.below(w[k], 2 * strength + 1)
                turn = round(op["hue"] * 1024)
                values["hue"] = self.below(w[3], 2 * turn + 1) - turn
            elif op["op"] == "random-resized-crop":
                values = self.box(w, height, width, (0.08, 1.0), (3 / 4, 4 / 3))
                height = width = op["size"]
            else:
                values = self.box(w, height, width, (0.02, 1 / 3), (0.3, 1 / 0.3))
                if not self.chance(v[0], 0.5):
                    values |= {"height": 0, "width": 0}
                values |= {name: self.below(v[k], 256) for k, name in enumerate(("red", "green", "blue"), start=1)}
            drawn |= {f"{position}.{op['op']}.{name}": value for name, value in values.items()}
        return drawn

    def box(
        self, w: tuple[int, ...], h: int, wide: int, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> dict[str, int]:
        t = self.table
        low = next(k for k, entry in enumerate(t) if entry >= round(ratio[0] * 2**16))
        high = max(k for k, entry in enumerate(t) if entry <= round(ratio[1] * 2**16))
        fits = min(h * h * t[high] // 2**16, wide * wide * 2**16 // t[low])
        largest = max(1, min(round(scale[1] * h * wide), fits))
        smallest = max(1, min(round(scale[0] * h * wide), largest))
        area = smallest + self.below(w[0], largest - smallest + 1)
        first = next(k for k, entry in enumerate(t) if entry >= area * 2**16 // h**2)
        first = min(max(first, low), high)
        last = max(k for k, entry in enumerate(t) if entry <= wide**2 * 2**16 // area)
        last = min(max(last, first), high)
        r = t[first + self.below(w[1], last - first + 1)]
        width = min(max((math.isqrt(4 * area * r >> 16) + 1) >> 1, 1), wide)
        height = min(max((math.isqrt(4 * (area * 2**32 // r) >> 16) + 1) >> 1, 1), h)
        top, left = self.below(w[2], h - height + 1), self.below(w[3], wide - width + 1)
        return {"top": top, "left": left, "height": height, "width": width}

    def pixels(self, ops: list[dict[str, Any]], drawn: dict[str, int], image: np.ndarray) -> np.ndarray:
        x = image.astype(np.int64)
        for position, op in enumerate(ops):
            prefix = f"{position}.{op['op']}."
            p = {name.removeprefix(prefix): value for name, value in drawn.items() if name.startswith(prefix)}
            height, width = x.shape[1:]
            if op["op"] == "pad-crop":
                padded = np.pad(x, ((0, 0), (op["padding"],) * 2, (op["padding"],) * 2))
                x = padded[:, p["top"] : p["top"] + height, p["left"] : p["left"] + width]
            elif op["op"] == "flip":
                x = x[:, :, ::-1] if p["flipped"] else x
            elif op["op"] == "colour-jitter":
                x = self.jitter(x, p)
            elif op["op"] == "random-resized-crop":
                x = x[:, p["top"] : p["top"] + p["height"], p["left"] : p["left"] + p["width"]]
                for axis in (1, 2):
                    x = np.apply_along_axis(self.resize, axis, x, op["size"])
            else:
                x = x.copy()
                rows, columns = slice(p["top"], p["top"] + p["height"]), slice(p["left"], p["left"] + p["width"])
                x[:, rows, columns] = np.array([p["red"], p["green"], p["blue"]])[:, None, None]
        return x.astype(np.uint8)

    def jitter(self, x: np.ndarray, p: dict[str, int]) -> np.ndarray:
        def level(v: np.ndarray) -> np.ndarray:
            return ((v + 2**15) >> 16).clip(0, 255)

        def luma(x: np.ndarray) -> np.ndarray:
            return (19595 * x[0] + 38470 * x[1] + 7471 * x[2] + 2**15) >> 16

        x = level(x * p["brightness"])
        m = (luma(x).sum() + x[0].size // 2) // x[0].size
        x = level(x * p["contrast"] + m * (65536 - p["contrast"]))
        x = level(x * p["saturation"] + luma(x) * (65536 - p["saturation"]))
        angle = 2 * math.pi * (p["hue"] % 1024) / 1024
        a = round(65536 * ((1 - math.cos(angle)) / 3 - math.sin(angle) / math.sqrt(3)))
        b = round(65536 * ((1 - math.cos(angle)) / 3 + math.sin(angle) / math.sqrt(3)))
        return level((65536 - a - b) * x + a * np.roll(x, -1, axis=0) + b * np.roll(x, 1, axis=0))

    @staticmethod
    def resize(line: np.ndarray, size: int) -> np.ndarray:
        length, out = len(line), []
        for i in range(size):
            u = [max(0, 2 * max(length, size) - abs((2 * j + 1) * size - (2 * i + 1) * length)) for j in range(length)]
            weights = [value * 2**15 // sum(u) for value in u]
            weights[u.index(max(u))] += 2**15 - sum(weights)
            out.append((sum(w * int(v) for w, v in zip(weights, line, strict=True)) + 2**14) >> 15)
        return np.array(out)


# links, commands, recipes, Dockerfile


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_files_that_the_documents_name_exist() -> None:
    folders = ("cache_tools", "pipeline", "train", "tests", "docs", "examples")
    for document in DOCUMENTS:
        for name in re.findall(rf"`((?:{'|'.join(folders)})/[\w./-]+)`", document.read_text()):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_commands_and_options_that_the_documents_use_exist() -> None:
    known = {name: _options(app) for name, app in APPS.items()}
    seen = set()
    for document, words in command_lines():
        name = words[0].removeprefix("venv/bin/")
        if name not in APPS:
            assert words[0] in OTHER_COMMANDS, f"{document}: {words[0]}"
            continue
        seen.add(name)
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in known[name], f"{document}: {name} has no {word}"
    assert seen == set(APPS)
    everything = set().union(*known.values(), _options(_train_clip()))
    for file in (README, TUTORIAL, ROOT / "examples/README.md"):
        for option in re.findall(r"`[^`]*?(--[a-z][a-z-]+)", file.read_text()):
            assert option in everything, f"{file.name} names {option}"


def test_recipes_that_the_documents_run_load() -> None:
    loaders: dict[str, Callable[[str], BuildRecipe | TrainRecipe]] = {
        "build-cache": load_build_recipe,
        "train-student": load_train_recipe,
    }
    names = set()
    for _, words in command_lines():
        load = loaders.get(words[0].removeprefix("venv/bin/"))
        if load and len(words) > 1 and re.fullmatch(r"[a-z0-9-]+", words[1]) and not words[1].startswith("-"):
            names.add(load(words[1]).name)
    assert {"cifar100", "fashion-mnist"} <= names


def test_yaml_recipes_in_the_documents_are_valid(tmp_path: Path) -> None:
    blocks = [block for document in DOCUMENTS for block in fenced(document, "yaml")]
    assert blocks
    for block in blocks:
        file = tmp_path / "recipe.yaml"
        file.write_text(block)
        data = yaml.safe_load(block)
        if "apiVersion" in data:  # a job of Kubernetes
            continue
        if "students" in data:
            base = load_train_recipe(data.pop("recipe"), [f"{key}={value}" for key, value in data.pop("set").items()])
            assert list(SweepRecipe.model_validate({**data, "base": base.model_dump(mode="json")}).settings())
        else:
            assert load_build_recipe(str(file)).name == data["name"]


def test_dockerfile_takes_the_steps_of_the_readme() -> None:
    steps = "\n".join(fenced(README, "sh"))
    runs = re.findall(r"^RUN (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert "python3 -m venv venv && venv/bin/pip install ." in steps
    assert "python3 -m venv /opt/teacher-cache" in runs
    assert "/opt/teacher-cache/bin/pip install ." in runs
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert copied == ["cache_tools", "pipeline", "teacher_cache", "train"], "what the wheel is made of"


def test_python_in_the_documents_can_be_parsed() -> None:
    for document in DOCUMENTS:
        for code in fenced(document, "python"):
            compile(code, document.name, "exec")


def test_shell_scripts_can_be_parsed() -> None:
    for script in ROOT.glob("examples/*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def _options(app: Any) -> set[str]:
    """Every option in the help of a command and of its sub-commands."""
    runner = CliRunner()
    words: list[list[str]] = [[]]
    words += [[info.name] for info in app.registered_commands if info.name]
    texts = [runner.invoke(app, [*word, "--help"], env={"COLUMNS": "200"}).output for word in words]
    return set(re.findall(r"--[a-z][a-z-]+", "\n".join(texts)))


def _train_clip() -> Any:
    """The command of examples/train_clip.py."""
    import importlib.util

    import typer

    spec = importlib.util.spec_from_file_location("train_clip_example", ROOT / "examples/train_clip.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return app
