"""torchvision's named sets, read by torchvision's own code from the folders that it makes of them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.images.arrays import STL10_NAMES
from cache_tools.images.image_set import ImageSet, sample_key
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.images.sources import SOURCES, TORCHVISION_SETS
from cache_tools.images.torchvision_sets import SETS

Patch = pytest.MonkeyPatch
COUNT = 6


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (9, 10 + number, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, number: int, kind: str = "JPEG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(number, kind))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# Each writes COUNT images of two classes, number n of class n % 2, and returns the split.


def caltech101(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        name = ["accordion", "anchor"][number % 2]
        put(root / f"caltech101/101_ObjectCategories/{name}/image_{number // 2 + 1:04}.jpg", number)
    (root / "caltech101/101_ObjectCategories/BACKGROUND_Google").mkdir()
    return "train"


def caltech256(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        name = ["001.ak47", "002.american-flag"][number % 2]
        put(root / f"caltech256/256_ObjectCategories/{name}/{number % 2 + 1:03}_{number // 2 + 1:04}.jpg", number)
    return "train"


def country211(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        put(root / f"country211/valid/{['AD', 'AE'][number % 2]}/{number}.jpg", number)
    return "valid"


def dtd(root: Path, patch: Patch) -> str:
    lines = []
    for number in range(COUNT):
        name = f"{['banded', 'dotted'][number % 2]}/{number}.jpg"
        put(root / f"dtd/dtd/images/{name}", number)
        lines.append(f"{name}\n")
    (root / "dtd/dtd/labels").mkdir()
    (root / "dtd/dtd/labels/val1.txt").write_text("".join(lines))
    return "val"


def eurosat(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        put(root / f"eurosat/2750/{['AnnualCrop', 'Forest'][number % 2]}/{number}.jpg", number)
    return "train"


def fgvc_aircraft(root: Path, patch: Patch) -> str:
    data = root / "fgvc-aircraft-2013b/data"
    for number in range(COUNT):
        put(data / f"images/{number:07}.jpg", number)
    (data / "variants.txt").write_text("707-320\nA300 B4\n")
    lines = [f"{number:07} {['707-320', 'A300 B4'][number % 2]}\n" for number in range(COUNT)]
    (data / "images_variant_trainval.txt").write_text("".join(lines))
    return "trainval"


def flowers102(root: Path, patch: Patch) -> str:
    folder = root / "flowers-102"
    for number in range(COUNT):
        put(folder / f"jpg/image_{number + 1:05}.jpg", number)
    scipy.io.savemat(folder / "setid.mat", {"trnid": [1], "valid": [2], "tstid": np.arange(1, COUNT + 1)})
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.arange(COUNT) % 2 + 1})
    files = {"label": "imagelabels.mat", "setid": "setid.mat"}
    patch.setattr(datasets.Flowers102, "_file_dict", {key: (name, md5(folder / name)) for key, name in files.items()})
    return "test"


def food101(root: Path, patch: Patch) -> str:
    listed: dict[str, list[str]] = {"apple_pie": [], "baklava": []}
    for number in range(COUNT):
        name = ["apple_pie", "baklava"][number % 2]
        put(root / f"food-101/images/{name}/{number}.jpg", number)
        listed[name].append(f"{name}/{number}")
    (root / "food-101/meta").mkdir()
    (root / "food-101/meta/test.json").write_text(json.dumps(listed))
    return "test"


def gtsrb(root: Path, patch: Patch) -> str:
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"]
    for number in range(COUNT):
        put(root / f"gtsrb/GTSRB/Final_Test/Images/{number:05}.ppm", number, "PPM")
        lines.append(f"{number:05}.ppm;9;9;0;0;9;9;{number % 2}\n")
    (root / "gtsrb/GT-final_test.csv").write_text("".join(lines))
    return "test"


def imagenette(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        put(root / f"imagenette2-160/val/{['n01440764', 'n02102040'][number % 2]}/{number}.JPEG", number)
    return "test"


def oxford_iiit_pet(root: Path, patch: Patch) -> str:
    lines = []
    for number in range(COUNT):
        name = f"{['Abyssinian', 'american_bulldog'][number % 2]}_{number}"
        put(root / f"oxford-iiit-pet/images/{name}.jpg", number)
        lines.append(f"{name} {number % 2 + 1} {number % 2 + 1} 1\n")
    (root / "oxford-iiit-pet/annotations").mkdir()
    (root / "oxford-iiit-pet/annotations/trainval.txt").write_text("".join(lines))
    return "train"


def rendered_sst2(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        put(root / f"rendered-sst2/valid/{['negative', 'positive'][number % 2]}/{number}.png", number, "PNG")
    return "val"


def stanford_cars(root: Path, patch: Patch) -> str:
    folder = root / "stanford_cars"
    rows = []
    for number in range(COUNT):
        put(folder / f"cars_train/{number:05}.jpg", number)
        rows.append((number % 2 + 1, f"{number:05}.jpg"))
    (folder / "devkit").mkdir()
    table = np.array(rows, dtype=[("class", object), ("fname", object)])
    scipy.io.savemat(folder / "devkit/cars_train_annos.mat", {"annotations": table})
    names = np.array(["AM General Hummer", "Acura RL"], dtype=object)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    return "train"


def sun397(root: Path, patch: Patch) -> str:
    for number in range(COUNT):
        put(root / f"SUN397/a/{['abbey', 'airport'][number % 2]}/sun_{number}.jpg", number)
    (root / "SUN397/ClassName.txt").write_text("/a/abbey\n/a/airport\n")
    return "train"


WRITERS: dict[str, Callable[[Path, Patch], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(caltech101, caltech256, country211, dtd, eurosat, fgvc_aircraft, flowers102, food101, gtsrb, imagenette),
        *(oxford_iiit_pet, rendered_sst2, stanford_cars, sun397),
    )
}
NAMES = {
    "caltech101": ("accordion", "anchor"), "caltech256": ("ak47", "american-flag"), "country211": ("AD", "AE"),
    "dtd": ("banded", "dotted"), "eurosat": ("AnnualCrop", "Forest"), "fgvc-aircraft": ("707-320", "A300 B4"),
    "flowers102": ("pink primrose", "hard-leaved pocket orchid"), "food101": ("apple_pie", "baklava"),
    "gtsrb": ("0", "1"), "imagenette": ("tench", "English springer"), "rendered-sst2": ("negative", "positive"),
    "oxford-iiit-pet": ("Abyssinian", "American Bulldog"), "stanford-cars": ("AM General Hummer", "Acura RL"),
    "sun397": ("abbey", "airport"),
}  # fmt: skip


def recipe_of(name: str, root: Path, **settings: Any) -> DatasetRecipe:
    return DatasetRecipe(name=name, data_dir=root, **{"test_split": None, **settings})


def labels_by_key(images: ImageSet) -> dict[bytes, int]:
    return {key.tobytes(): int(label) for key, label in zip(images.keys, images.labels, strict=True)}


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_every_set_of_files(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    split = WRITERS[name](tmp_path, monkeypatch)
    found = open_images(recipe_of(name, tmp_path, split=split, image_size=8))
    kind = {"gtsrb": "PPM", "rendered-sst2": "PNG"}.get(name, "JPEG")
    assert found.class_names[:2] == NAMES[name]
    assert labels_by_key(found) == {sample_key(jpeg(number, kind)): number % 2 for number in range(COUNT)}
    assert found.load(slice(None)).shape == (COUNT, 3, 8, 8)
    if len(found.class_names) == 2:
        turned = open_images(recipe_of(name, tmp_path, split=split, class_order=NAMES[name][::-1]))
        assert np.array_equal(turned.labels, 1 - found.labels)
    assert recipe_of(name, tmp_path).title == name
    with pytest.raises(DataError, match=rf"{name} has no such split"):
        open_images(recipe_of(name, tmp_path), "nowhere")


def test_every_set_is_a_source() -> None:
    assert set(SETS) == set(TORCHVISION_SETS) == set(WRITERS) == set(NAMES)
    assert set(SOURCES) >= {*SETS, "stl10", "svhn"}


@pytest.mark.parametrize("name", [*TORCHVISION_SETS, "stl10", "svhn"])
def test_a_missing_set_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name} not found.*--data-dir.*--download"):
        open_images(recipe_of(name, tmp_path))
    assert not list(tmp_path.iterdir())


def test_missing_images_are_named(tmp_path: Path, monkeypatch: Patch) -> None:
    split = food101(tmp_path, monkeypatch)
    (tmp_path / "food-101/images/baklava/3.jpg").unlink()
    with pytest.raises(DataError, match=r"1 image of a list is missing .*baklava/3.jpg"):
        open_images(recipe_of("food101", tmp_path, split=split))
    (tmp_path / "food-101/meta/test.json").write_text("{")
    with pytest.raises(DataError, match="food101 not found, or damaged"):
        open_images(recipe_of("food101", tmp_path, split=split))


def write_stl10(root: Path, patch: Patch) -> np.ndarray[Any, Any]:
    folder = root / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 96, 96), dtype=np.uint8)
    pixels.transpose(0, 1, 3, 2).tofile(folder / "train_X.bin")  # columns come first in its files
    np.array([1, 10, 2, 1], np.uint8).tofile(folder / "train_y.bin")
    (folder / "unlabeled_X.bin").write_bytes(b"")
    (folder / "test_X.bin").write_bytes((folder / "train_X.bin").read_bytes())
    (folder / "test_y.bin").write_bytes((folder / "train_y.bin").read_bytes())
    for table in ("train_list", "test_list"):
        rows = [[name, md5(folder / name)] for name, _ in getattr(datasets.STL10, table)]
        patch.setattr(datasets.STL10, table, rows)
    return pixels


def test_stl10(tmp_path: Path, monkeypatch: Patch) -> None:
    pixels = write_stl10(tmp_path, monkeypatch)
    for place in (tmp_path, tmp_path / "stl10_binary"):
        found = open_images(recipe_of("stl10", place))
        assert np.array_equal(found.load(slice(None)), pixels)
        assert (found.class_names, found.labels.tolist(), found.image_size) == (STL10_NAMES, [0, 9, 1, 0], (96, 96))
    (tmp_path / "stl10_binary/train_y.bin").write_bytes(b"")
    with pytest.raises(DataError, match="stl10 not found, or damaged"):
        open_images(recipe_of("stl10", tmp_path))
    with pytest.raises(ValueError, match="stl10 has its own size, 96"):
        recipe_of("stl10", tmp_path, image_size=32)


def test_svhn(tmp_path: Path, monkeypatch: Patch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    splits = {}
    for split, (url, name, _) in datasets.SVHN.split_list.items():
        scipy.io.savemat(tmp_path / name, {"X": pixels, "y": np.array([[1], [10], [9], [1], [2]], np.uint8)})
        splits[split] = [url, name, md5(tmp_path / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", splits)
    for split in ("train", "test", "extra"):
        found = open_images(recipe_of("svhn", tmp_path), split)
        assert np.array_equal(found.load(slice(None)), pixels.transpose(3, 2, 0, 1))
        assert [found.class_names[label] for label in found.labels] == ["one", "zero", "nine", "one", "two"]
