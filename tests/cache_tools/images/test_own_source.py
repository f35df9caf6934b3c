"""Images that a function of one's own opens: what it may return, and whose code is imported."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_tools.config import Changes
from cache_tools.errors import CacheError, DataError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.arrays import ArrayImages
from cache_tools.images.recipe import DatasetRecipe, as_received, changed_dataset
from cache_tools.integrity.images import check_images
from cache_tools.reader import TeacherCache
from tests.support import tiny_run

MODULE = """
from pathlib import Path
Path({mark!r}).write_text("imported")
NAMES = ("blue", "green", "red")
def files(recipe, split):
    found = sorted((Path(recipe.data_dir) / split).glob("*/*"))
    labels = [NAMES.index(file.parent.name) for file in found]
    return [str(file.relative_to(recipe.data_dir)) for file in found], labels, NAMES
def below_data_dir(recipe, split):
    found = sorted((Path(recipe.data_dir) / split).glob("*/*"))
    return found, [NAMES.index(file.parent.name) for file in found], NAMES
def arrays(recipe, split):
    import numpy as np
    pixels = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)
    return pixels, np.array([0, 1, 1, 0, 1]), ["a", "b"]
def whole(recipe, split):
    from cache_tools.images import open_images
    from cache_tools.images.recipe import DatasetRecipe
    return open_images(DatasetRecipe(name="folder", data_dir=recipe.data_dir, image_size=recipe.image_size), split)
def wrong(recipe, split):
    import numpy as np
    return eval(split)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("TEACHER_CACHE_MODULES", raising=False)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of this test's own name; importing it leaves a mark."""
    name = f"images_of_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(mark=str(tmp_path / "mark")))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return name


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_run.write_pictures(tmp_path / "pictures", train=9, test=4)


def test_data_dir_may_be_relative(module: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures.parent)
    place = Path(pictures.name)
    recipe = DatasetRecipe(name=f"{module}:below_data_dir", data_dir=place, image_size=tiny_run.SIDE)
    assert np.array_equal(open_images(recipe, "train").keys, open_images(tiny_run.dataset(pictures), "train").keys)


def test_paths_are_the_images_of_a_folder(module: str, pictures: Path) -> None:
    for function in ("files", "whole"):
        recipe = DatasetRecipe(name=f"{module}:{function}", data_dir=pictures, image_size=tiny_run.SIDE)
        for split in ("train", "test"):
            found, wanted = open_images(recipe, split), open_images(tiny_run.dataset(pictures), split)
            assert found.content_digest == wanted.content_digest
            assert np.array_equal(found.load(slice(None)), wanted.load(slice(None)))
            assert (found.identity().name, found.split) == (recipe.name, split)
        assert np.array_equal(open_images(recipe, "train[::2]").keys, open_images(recipe).keys[::2])
    assert recipe.title == "pictures"


def test_pixels_are_images_in_memory(module: str) -> None:
    recipe = DatasetRecipe(name=f"{module}:arrays")
    found = open_images(recipe)
    assert isinstance(found, ArrayImages)
    assert (found.class_names, found.labels.tolist(), found.image_size) == (("a", "b"), [0, 1, 1, 0, 1], (8, 8))
    pixels = np.arange(5 * 8 * 8 * 3, dtype=np.uint8).reshape(5, 8, 8, 3)
    assert np.array_equal(found.load(slice(None)), pixels.transpose(0, 3, 1, 2))
    assert recipe.title == "arrays"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("7", r"returns something else .*expected \(images, labels, class_names\).*found int"),
        ("([], [], ['a'])", "no image of the split"),
        ("(['x.png'], [0], [])", "names of classes that are no text"),
        ("(['x.png'], [0], ['a', 'a'])", "a class twice: a, a"),
        ("(['x.png'], [0, 1], ['a', 'b'])", r"1 images, labels int64 \[2\]"),
        ("(['x.png'], ['a'], ['a', 'b'])", r"1 images, labels <U1 \[1\]"),
        ("(['x.png'], [2], ['a', 'b'])", "labels from 2 to 2 for 2 classes"),
        ("(['x.png'], [-1], ['a', 'b'])", "labels from -1 to -1"),
        ("([7], [0], ['a'])", "a list of int"),
        ("(np.zeros((1, 8, 8), np.uint8), [0], ['a'])", r"an array uint8 \[1, 8, 8\]"),
        ("(np.zeros((1, 8, 8, 3)), [0], ['a'])", r"an array float64 \[1, 8, 8, 3\]"),
        ("(['gone.png'], [0], ['a'])", "1 image of a list is missing"),
        ("1 / 0", r"the function that opens the images failed .*ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_image_is_one_error(module: str, result: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_images(DatasetRecipe(name=f"{module}:wrong", test_split=None), result)


def test_names_of_no_function_are_refused(module: str) -> None:
    with pytest.raises(RecipeError, match="the module has no function 'none'"):
        open_images(DatasetRecipe(name=f"{module}:none"))
    with pytest.raises(RecipeError, match=r"no module 'no_such_module_here' .*a module of the current folder"):
        open_images(DatasetRecipe(name="no_such_module_here:f"))
    for name in ("a b:c", "x", ":f", "m:", "timm:resnet"):
        with pytest.raises(ValueError, match="no such source of images"):
            DatasetRecipe(name=name)


# Whose code is imported


def test_a_received_name_is_not_imported(
    module: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = DatasetRecipe(name=f"{module}:files", data_dir=pictures, image_size=tiny_run.SIDE)
    cache = TeacherCache.open(tiny_run.write_cache(tmp_path / "c.zarr", pictures))
    manifest = cache.manifest.model_copy(update={"dataset": recipe})
    monkeypatch.setattr(cache, "manifest", manifest)
    for step in (
        lambda: as_received(recipe, "a run"),
        lambda: check_images(cache),
        lambda: check_images(cache, pictures),
        lambda: changed_dataset(recipe, manifest.recipe.dataset, None, where="cache"),
        lambda: changed_dataset(recipe, manifest.recipe.dataset, Changes(split="train"), where="cache"),
    ):
        with pytest.raises(RecipeError, match=rf"have not named it before .*{module}:files.*TEACHER_CACHE_MODULES="):
            step()
    assert not (tmp_path / "mark").exists()
    # Another source of the user's for the same images.
    changes = Changes(name="folder", data_dir=str(pictures))
    assert changed_dataset(recipe, manifest.recipe.dataset, changes, where="cache").name == "folder"
    assert not (tmp_path / "mark").exists()
    # Named by the user: in the environment, or in a recipe.
    monkeypatch.setenv("TEACHER_CACHE_MODULES", module)
    assert as_received(recipe, "a run") == recipe
    monkeypatch.delenv("TEACHER_CACHE_MODULES")
    open_images(recipe)
    assert (tmp_path / "mark").exists()
    assert check_images(cache)[0].problem is None


def test_a_bad_function_ends_a_command_in_one_line(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.kill_cases import Command, run

    words = ("imagefolder", "--set", f"dataset.name={module}:wrong", "--set", "dataset.split=1/0")
    assert run(Command("build-cache", (*words, "--set", "dataset.test_split=null"))) == {"code": 2}
    error = capsys.readouterr().err
    assert error.startswith("error: the function that opens the images failed")
    assert error.count("\n") == 1
    with pytest.raises(CacheError):
        open_images(DatasetRecipe(name=f"{module}:wrong"), "1/0")


def test_the_documented_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parents[3] / "docs/datasets.md").read_text()
    [code] = [block for block in re.findall(r"^```python\n(.*?)^```", document, re.M | re.S) if "open_photos" in block]
    (tmp_path / "photos_of_the_document.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for number, name in enumerate(["cat_1", "dog_1", "cat_2"]):
        path = tmp_path / "photos/train" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    recipe = DatasetRecipe(name="photos_of_the_document:open_photos", data_dir=tmp_path / "photos")
    images = open_images(recipe)
    assert (images.class_names, images.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
