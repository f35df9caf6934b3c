"""Training gives every image its own targets even if files are renamed, moved and shuffled."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cache_tools.config import dump_yaml
from cache_tools.images.folder import FolderImages
from cache_tools.images.image_set import sample_key
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.turns import some
from train.checkpoints import LAST
from train.cli import app
from train.data import open_data

SHUFFLES = 3


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which one has two copies: one in the same class, one in another class."""
    root = tiny_run.write_pictures(tmp_path_factory.mktemp("order") / "pictures", train=40, test=6)
    blue, red = root / "train" / "blue", root / "train" / "red"
    for target in (blue / "900.png", red / "050.png"):
        shutil.copy(blue / "003.png", target)
    return root


@pytest.fixture(scope="module")
def cache(pictures: Path) -> Path:
    return tiny_run.write_cache(pictures.parent / "cache", pictures, num_views=2, block_rows=16)


@pytest.fixture(scope="module")
def recipe_file(cache: Path) -> Path:
    file = cache.parent / "tiny.yaml"
    file.write_text(dump_yaml(tiny_run.recipe(cache, cache.parent / "never", epochs=2)))
    return file


@pytest.fixture(scope="module")
def weights(recipe_file: Path) -> dict[str, torch.Tensor]:
    """The weights of a student trained on the original files."""
    return learned(recipe_file, recipe_file.parent / "as-built")


def shuffled(pictures: Path, root: Path, seed: int) -> Path:
    """Copy the images under other names, some of them into sub-folders of their class."""
    rng = np.random.default_rng(seed)
    shutil.copytree(pictures / "test", root / "test")
    for folder in (pictures / "train").iterdir():
        for file in folder.iterdir():
            inner = rng.choice(["", "a", "z/b"])
            target = root / "train" / folder.name / inner / f"{rng.integers(1 << 40):012}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    return root


def train(recipe_file: Path, out: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(part) for part in (recipe_file, "--out", out, *arguments)])


def learned(recipe_file: Path, out: Path, *arguments: object) -> dict[str, torch.Tensor]:
    done = train(recipe_file, out, *arguments)
    assert done.exit_code == 0, done.stderr
    return load_file(out / LAST)


@pytest.mark.parametrize("seed", some(range(SHUFFLES), 1))
def test_every_image_is_trained_on_with_its_own_targets(cache: Path, pictures: Path, tmp_path: Path, seed: int) -> None:
    """Compare the batches of an epoch with the rows that the cache has for the content of each file."""
    root = shuffled(pictures, tmp_path / "pictures", seed)
    recipe = tiny_run.recipe(cache, tmp_path / "run", data_dir=root, epochs=2)
    data = open_data(recipe, torch.device("cpu"))
    assert isinstance(data.images, FolderImages)
    assert sorted(data.images.files) != list(data.images.files), "this shuffle changes nothing"
    opened = TeacherCache.open(cache)
    feed = data.feed(recipe, torch.device("cpu"))
    for epoch in range(2):
        logits, seen = opened.read_array("fused_logits", epoch), []
        for batch in feed.epoch(epoch):
            for row, sample in enumerate(batch.index.tolist()):
                file = data.images.files[sample]
                key, label = sample_key(file.read_bytes()), data.images.class_names.index(class_of(file, root))
                assert int(batch.labels[row]) == label
                places = np.flatnonzero(
                    (opened.sample_keys == np.frombuffer(key, np.uint8)).all(axis=1) & (opened.labels == label)
                )
                assert sample in places
                np.testing.assert_array_equal(np.asarray(batch.targets.logits)[row], logits[sample])
                view = opened.recipe.views.apply(
                    torch.from_numpy(data.images.load(np.array([sample]))), [sample], epoch
                )
                assert batch.pixels[row].equal(view[0])
                seen.append(sample)
        assert len(set(seen)) == len(seen) > 0
    feed.close()
    data.targets.close()


def class_of(file: Path, root: Path) -> str:
    return file.relative_to(root / "train").parts[0]


@pytest.mark.parametrize("seed", some(range(SHUFFLES), 1))
def test_the_student_is_identical_bit_for_bit(
    weights: dict[str, torch.Tensor], recipe_file: Path, pictures: Path, tmp_path: Path, seed: int
) -> None:
    root = shuffled(pictures, tmp_path / "pictures", seed)
    found = learned(recipe_file, tmp_path / "run", "--data-dir", root)
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)


def test_swapped_names_are_noticed(
    weights: dict[str, torch.Tensor], recipe_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """Two files swap their names, so that only their content shows it."""
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    first, second = (root / "train" / "green" / name for name in ("001.png", "004.png"))
    first.rename(root / "aside")
    second.rename(first)
    (root / "aside").rename(second)
    found = learned(recipe_file, tmp_path / "run", "--data-dir", root)
    assert all(found[name].equal(weights[name]) for name in weights)


def test_the_same_images_keep_their_labels_with_a_label_fraction(
    recipe_file: Path, pictures: Path, tmp_path: Path
) -> None:
    options = ("--label-fraction", 0.5)
    expected = learned(recipe_file, tmp_path / "as-built", *options)
    root = shuffled(pictures, tmp_path / "pictures", 9)
    found = learned(recipe_file, tmp_path / "run", "--data-dir", root, *options)
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["label", "content", "missing", "more", "class"])
def test_other_images_or_labels_stop_before_the_first_step(
    recipe_file: Path, pictures: Path, tmp_path: Path, change: str
) -> None:
    """`label` moves a copy of an image to another class: labels are part of the cache's identity."""
    root = shuffled(pictures, tmp_path / "pictures", 5)
    red, blue = root / "train" / "red", root / "train" / "blue"
    copies = duplicates(root)
    victim = next(file for file in sorted(red.rglob("*.png")) if file not in copies)
    if change == "label":
        moved = next(file for file in copies if red in file.parents)
        moved.rename(root / "train" / "green" / "moved.png")
    elif change == "content":
        shutil.copy(next(blue.rglob("*.png")), victim)
    elif change == "missing":
        victim.unlink()
    elif change == "more":
        shutil.copy(victim, red / "another.png")
    else:
        red.rename(root / "train" / "scarlet")
    done = train(recipe_file, tmp_path / "run", "--data-dir", root)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert {
        "label": "other labels of 1 samples",
        "content": "other contents of 1 images",
        "missing": "1 image is missing, first sample ",
        "more": "1 image was added",
        "class": "class names",
    }[change] in line
    assert not (tmp_path / "run").exists()


def duplicates(root: Path) -> list[Path]:
    """Files whose bytes occur more than once."""
    files = sorted((root / "train").rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    return [file for file, content in zip(files, contents, strict=True) if contents.count(content) > 1]
