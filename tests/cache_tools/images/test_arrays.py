"""Array sources: order, keys, labels, class names, and what happens when files are missing or damaged."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torchvision import datasets

from cache_tools.errors import DataError, RecipeError
from cache_tools.images import arrays, open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.images.recipe import DatasetRecipe

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def check_interface(images: ImageSet, size: int) -> None:
    """What every image set promises."""
    count = len(images)
    assert images.labels.shape == (count,)
    assert images.labels.dtype == np.int64
    assert images.keys.shape == (count, 16)
    assert images.keys.dtype == np.uint8
    assert images.image_size == (size, size)
    assert images.labels.min() >= 0
    assert images.labels.max() < len(images.class_names)
    everything = images.load(slice(None))
    assert everything.shape == (count, 3, size, size)
    assert everything.dtype == np.uint8
    order = np.array([count - 1, 0, count - 1, -1])
    np.testing.assert_array_equal(images.load(order), everything[order])
    assert images.load(np.array([], np.int64)).shape == (0, 3, size, size)
    with pytest.raises(IndexError):
        images.load(np.array([count]))
    identity = images.identity()
    assert (identity.num_samples, identity.class_names) == (count, images.class_names)
    assert identity.content_digest == images.content_digest


def test_importing_the_module_loads_no_heavy_library() -> None:
    heavy = {"torch", "sklearn", "torchvision", "PIL", "open_clip", "timm"}
    code = f"import sys, cache_tools.images; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_recipe_is_validated_and_round_trips() -> None:
    with pytest.raises(ValidationError, match="image_size is for folders"):
        DatasetRecipe(name="digits", image_size=64)
    with pytest.raises(ValidationError, match="needs data_dir"):
        DatasetRecipe(name="folder")
    recipe = DatasetRecipe(name="folder", data_dir=Path("photos"), image_size=96)
    assert recipe.absolute().data_dir == Path.cwd() / "photos"
    assert DatasetRecipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"no such split \(val\)"):
        open_images(DatasetRecipe(name="digits", split="val"))


# --- digits ---


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("[:100]", slice(100)),
        ("[100:]", slice(100, None)),
        ("[-7:]", slice(-7, None)),
        ("[25%:75%]", slice(359, 1078)),  # of 1438
        ("[::5]", slice(None, None, 5)),
        ("[10:20:3]", slice(10, 20, 3)),
    ],
)
def test_a_part_of_a_split_is_opened_like_a_split(part: str, rows: slice) -> None:
    whole, images = open_images(DatasetRecipe(name="digits")), open_images(DatasetRecipe(name="digits"), f"train{part}")
    assert images.split == f"train{part}"
    assert np.array_equal(images.labels, whole.labels[rows])
    assert np.array_equal(images.keys, whole.keys[rows])
    assert np.array_equal(images.load(slice(None)), whole.load(rows))
    assert images.content_digest != whole.content_digest
    check_interface(images, 32)


@pytest.mark.parametrize(
    ("split", "words"),
    [("train[5000:]", "empty.*1438 samples"), ("train[1:2", "no such split"), ("train[a:b]", "no such split")],
)
def test_an_empty_or_malformed_part_is_refused(split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_images(DatasetRecipe(name="digits", split=split))


def test_digits_have_a_stable_order_split_and_key() -> None:
    train, test = (open_images(DatasetRecipe(name="digits"), split) for split in ("train", "test"))
    check_interface(train, 32)
    check_interface(test, 32)
    assert train.resident
    assert train.class_names == DIGIT_NAMES
    assert (len(train), len(test)) == (1438, 359)
    assert train.labels[:8].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # 4 and 9 are the first two test samples
    assert test.labels[:2].tolist() == [4, 9]
    keys = [key.tobytes() for images in (train, test) for key in images.keys]
    assert len(set(keys)) == 1797
    # These pin the dataset that existing caches were built with; they must never change.
    assert train.content_digest == "21d79b54cb1374279ad895efd22a4c65"
    assert test.content_digest == "97161007d038a1c234d8d0860f6d4be1"


def test_digits_are_enlarged_by_exact_bilinear_interpolation() -> None:
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images[np.arange(1797) % 5 == 4])[:, None]
    expected = F.interpolate(scans, (32, 32), mode="bilinear", align_corners=False).numpy() * 255 / 16
    pixels = open_images(DatasetRecipe(name="digits"), "test").load(slice(None))
    assert np.abs(pixels - expected).max() <= 0.5 + 1e-9  # expected broadcasts over the three equal channels
    assert pixels.max() == 255


def test_digits_keys_are_hashes_of_the_scans() -> None:
    from sklearn.datasets import load_digits

    scan = load_digits().images[9].astype(np.uint8).tobytes()
    images = open_images(DatasetRecipe(name="digits"), "test")
    assert images.keys[1].tobytes() == hashlib.blake2b(scan, digest_size=16).digest()


def test_the_content_digest_depends_on_everything() -> None:
    images = open_images(DatasetRecipe(name="digits"), "test")
    fields = {name: getattr(images, name) for name in ("name", "split", "image_size", "pixels")}

    def digest(labels: np.ndarray, keys: np.ndarray, class_names: tuple[str, ...]) -> str:
        changed = arrays.ArrayImages(labels=labels, keys=keys, class_names=class_names, **fields)
        return changed.content_digest

    swapped = np.arange(len(images))
    swapped[[3, 4]] = [4, 3]
    relabelled = images.labels.copy()
    relabelled[0] = 1
    variants = {
        digest(images.labels, images.keys, images.class_names),
        digest(images.labels[swapped], images.keys[swapped], images.class_names),
        digest(relabelled, images.keys, images.class_names),
        digest(images.labels, images.keys, images.class_names[::-1]),
        digest(images.labels[:-1], images.keys[:-1], images.class_names),
    }
    assert images.content_digest in variants
    assert len(variants) == 5


def test_digits_normalisation_is_that_of_the_train_canvas() -> None:
    pixels = open_images(DatasetRecipe(name="digits")).load(slice(None)) / 255
    mean, std = DatasetRecipe(name="digits").normalisation
    np.testing.assert_allclose(pixels.mean((0, 2, 3)), mean, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 2, 3)), std, atol=1e-4)


# --- Fashion-MNIST ---


def write_idx(path: Path, array: np.ndarray) -> bytes:
    """The IDX format; gzipped when the name says so. Returns the plain bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return data


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[DatasetRecipe, np.ndarray, np.ndarray]:
    """A tiny Fashion-MNIST as torchvision leaves it: train plain, test gzipped."""
    monkeypatch.setattr(arrays, "SYSTEM_FASHION_DIR", tmp_path / "none")
    scans = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12) % 10
    raw = tmp_path / "FashionMNIST" / "raw"
    for prefix, suffix in (("train", ""), ("t10k", ".gz")):
        write_idx(raw / f"{prefix}-images-idx3-ubyte{suffix}", scans)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return DatasetRecipe(name="fashion-mnist", data_dir=tmp_path), scans, labels


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist_from_idx_files(fashion: Any, split: str) -> None:
    recipe, scans, labels = fashion
    images = open_images(recipe, split)
    check_interface(images, 32)
    np.testing.assert_array_equal(images.labels, labels)
    pixels = images.load(slice(None))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, channel, 2:30, 2:30], scans)
    assert pixels.sum() == 3 * scans.astype(int).sum()  # the border is zero
    assert images.keys[4].tobytes() == hashlib.blake2b(scans[4].tobytes(), digest_size=16).digest()
    assert images.class_names[0] == "t-shirt/top"
    assert images.class_names[9] == "ankle boot"


def test_fashion_mnist_equals_torchvision(fashion: Any) -> None:
    recipe, _, _ = fashion
    for path in (recipe.data_dir / "FashionMNIST" / "raw").glob("*.gz"):  # torchvision wants all four unpacked
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    reference = datasets.FashionMNIST(recipe.data_dir, train=True)
    images = open_images(recipe)
    np.testing.assert_array_equal(images.load(slice(None))[:, 0, 2:30, 2:30], reference.data.numpy())
    np.testing.assert_array_equal(images.labels, reference.targets.numpy())
    assert images.class_names == tuple(name.lower() for name in reference.classes)


@pytest.mark.parametrize("damage", ["truncate", "not gzip", "wrong magic", "other count", "label 10", "header only"])
def test_damaged_idx_files_are_named(fashion: Any, damage: str) -> None:
    recipe, _, labels = fashion
    raw = recipe.data_dir / "FashionMNIST" / "raw"
    images_file, labels_file = raw / "t10k-images-idx3-ubyte.gz", raw / "t10k-labels-idx1-ubyte.gz"
    if damage == "truncate":
        images_file.write_bytes(images_file.read_bytes()[:-100])
    elif damage == "not gzip":
        images_file.write_bytes(b"<html>404</html>")
    elif damage == "wrong magic":
        write_idx(images_file, labels)
    elif damage == "other count":
        write_idx(labels_file, labels[:-1])
    elif damage == "label 10":
        write_idx(labels_file, labels + 1)
    else:
        images_file.write_bytes(gzip.compress(b"\0\0\x08"))
    with pytest.raises(DataError, match=str(raw)):
        open_images(recipe, "test")


def test_missing_fashion_mnist_names_the_folders_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SYSTEM_FASHION_DIR", tmp_path / "system")
    recipe = DatasetRecipe(name="fashion-mnist", data_dir=tmp_path / "data")
    with pytest.raises(DataError) as caught:
        open_images(recipe)
    for word in (str(tmp_path / "data"), str(tmp_path / "system"), "--data-dir", "download"):
        assert word in str(caught.value)


def test_a_failed_download_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "SYSTEM_FASHION_DIR", tmp_path / "system")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://localhost:9/"])  # nobody answers there
    recipe = DatasetRecipe(name="fashion-mnist", data_dir=tmp_path / "data", download=True)
    with pytest.raises(DataError, match="cannot download FashionMNIST"):
        open_images(recipe)


@pytest.mark.skipif(not arrays.SYSTEM_FASHION_DIR.is_dir(), reason="no Fashion-MNIST on this system")
def test_the_whole_fashion_mnist() -> None:
    train, test = (open_images(DatasetRecipe(name="fashion-mnist"), split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.content_digest == "33315aaeb8557244730bb9bc011c4290"
    mean, std = DatasetRecipe(name="fashion-mnist").normalisation
    pixels = train.load(slice(None))[:, 0]
    assert abs(pixels.mean() / 255 - mean[0]) < 5e-5
    assert abs(pixels.std() / 255 - std[0]) < 5e-5


# --- CIFAR ---

CIFAR_CLASSES = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A tiny CIFAR in the published pickle layout; the table of MD5 sums is patched to match it."""
    cls = CIFAR_CLASSES[request.param]
    classes = 10 if request.param == "cifar10" else 100
    generator = np.random.default_rng(1)
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    written: dict[str, list[tuple[np.ndarray, list[int]]]] = {"train_list": [], "test_list": []}
    for table, batches in written.items():
        sums = []
        for file_name, _ in getattr(cls, table):
            data = generator.integers(0, 256, (6, 3072), dtype=np.uint8)
            labels = generator.integers(0, classes, 6).tolist()
            batches.append((data, labels))
            content = {"data": data, "batch_label": "b", "filenames": [f"{i}.png" for i in range(6)]}
            content |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": [0] * 6}
            sums.append([file_name, write_pickle(folder / file_name, content)])
        monkeypatch.setattr(cls, table, sums)
    names = [f"class_{i}" for i in range(classes)]
    md5 = write_pickle(folder / cls.meta["filename"], {cls.meta["key"]: names})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5})
    return DatasetRecipe(name=request.param, data_dir=tmp_path), written


def write_pickle(path: Path, content: dict[str, Any]) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar_in_the_published_layout(cifar: Any) -> None:
    recipe, written = cifar
    for split, table in (("train", "train_list"), ("test", "test_list")):
        images = open_images(recipe, split)
        check_interface(images, 32)
        data = np.concatenate([batch for batch, _ in written[table]])
        np.testing.assert_array_equal(images.load(slice(None)), data.reshape(-1, 3, 32, 32))
        assert images.labels.tolist() == [label for _, labels in written[table] for label in labels]
        assert images.keys[2].tobytes() == hashlib.blake2b(data[2].tobytes(), digest_size=16).digest()
        assert images.class_names[3] == "class_3"
    inside = recipe.model_copy(update={"data_dir": recipe.data_dir / CIFAR_CLASSES[recipe.name].base_folder})
    assert open_images(inside).content_digest == open_images(recipe).content_digest


def test_damaged_and_missing_cifar_are_reported(cifar: Any, tmp_path: Path) -> None:
    recipe, _ = cifar
    cls = CIFAR_CLASSES[recipe.name]
    batch = tmp_path / cls.base_folder / cls.test_list[0][0]
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        open_images(recipe)
    with pytest.raises(DataError, match=r"not found.*--data-dir"):
        open_images(recipe.model_copy(update={"data_dir": tmp_path / "elsewhere"}))


def test_the_identity_of_a_dataset_is_not_opened() -> None:
    """It is what a cache's recipe has, and has no place."""
    identity: Any = open_images(DatasetRecipe(name="digits")).identity()
    with pytest.raises(RecipeError, match=r"does not say where its images are.*cache\.manifest\.dataset"):
        open_images(identity)
