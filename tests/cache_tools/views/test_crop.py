"""Version 2 from pictures to views: crops against torchvision and PIL, batches against lists, and sizes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from cache_tools.errors import DataError
from cache_tools.images import open_images
from cache_tools.views import ViewRecipe, load_each
from cache_tools.views.crop import crop_picture, filter_weights
from tests.cache_tools.views.test_pixels import noise, photos
from tests.support.pictures import photo, photographs, recipe_for

CROP: dict[str, Any] = {"op": "random-resized-crop", "size": 24}
STRONG: list[Any] = [CROP, "flip", "rand-augment", {"op": "random-erasing", "probability": 1.0}]
SIZES = [(24, 24), (75, 50), (30, 61), (5, 9), (1, 1), (64, 3)]


def pictures() -> list[torch.Tensor]:
    return [photos(1, *size)[0] for size in SIZES]


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "view"), [((75, 50), 24), ((30, 61), 100), ((78, 90), (40, 33)), ((60, 60), 60)])
def test_crops_are_those_of_torchvision_and_pil(size: Any, view: Any, how: Any) -> None:
    """To within one level, or two for the overshoot of bicubic, where torchvision rounds its weights more coarsely."""
    recipe = ViewRecipe(version=2, ops=[{**CROP, "size": view, "interpolation": how}])
    images = torch.cat([photos(2, *size), photographs(*size)])
    made = recipe.apply(images, range(4), 1)
    drawn = {name.rsplit(".", 1)[1]: values for name, values in recipe.parameters(range(4), 1, size).items()}
    height, width = recipe.output_size(size)
    mode = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}[how]
    pil_mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[how]
    for i, image in enumerate(images):
        top, left, rows, columns = (int(drawn[name][i]) for name in ("top", "left", "height", "width"))
        theirs = F.resized_crop(image, top, left, rows, columns, [height, width], interpolation=mode, antialias=True)
        part = Image.fromarray(image[:, top : top + rows, left : left + columns].permute(1, 2, 0).numpy())
        by_pil = torch.from_numpy(np.array(part.resize((width, height), pil_mode))).permute(2, 0, 1)
        for expected, bound in ((by_pil, 1), (theirs, 1 if how == "bilinear" else 2)):
            difference = (made[i].int() - expected.int()).abs()
            assert int(difference.max()) <= bound
            assert float(difference.float().mean()) < 0.1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 300), st.sampled_from(["bilinear", "bicubic"]))
def test_weights_add_up_and_are_those_of_the_filter(length: int, size: int, how: Any) -> None:
    place, weights = filter_weights(length, size, how)
    assert (weights.sum(axis=1) == 1 << 15).all()
    assert place.min() >= 0
    assert place.max() < length
    scale = max(1.0, length / size)
    for i in {0, size // 3, size - 1}:
        t = np.abs(np.arange(length) + 0.5 - (i + 0.5) * length / size) / scale
        if how == "bilinear":
            exact = np.maximum(0.0, 1 - t)
        else:
            near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
            exact = np.where(t < 1, near, np.where(t < 2, far, 0.0))
        found = np.zeros(length)
        np.add.at(found, place[i], weights[i])
        assert np.abs(found / 2**15 - exact / exact.sum()).max() <= 1.001 * 2.0**-15


def test_weights_of_very_long_sides_do_not_overflow() -> None:
    for how in ("bilinear", "bicubic"):
        for length in (16_384, 16_385, 65_536):
            _, weights = filter_weights(length, 3, how)
            assert weights.sum(axis=1).tolist() == [1 << 15] * 3
            assert weights.min() >= -2
            assert weights.max() <= 12


@pytest.mark.parametrize("ops", [[CROP], [{**CROP, "interpolation": "bicubic"}, "flip"], STRONG], ids=len)
def test_a_list_of_pictures_equals_each_picture_alone_and_in_a_batch(ops: Any) -> None:
    recipe = ViewRecipe(version=2, ops=ops)
    many = pictures()
    made = recipe.apply(many, range(len(many)), 3)
    assert made.shape == (len(many), 3, 24, 24)
    for i, picture in enumerate(many):
        assert torch.equal(recipe.apply([picture], [i], 3)[0], made[i])
        assert torch.equal(recipe.apply(picture[None], [i], 3)[0], made[i])
        turned = picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as a decoder lays it out
        assert torch.equal(recipe.apply([turned], [i], 3)[0], made[i])
    same = photos(5, 31, 40)
    batch = recipe.apply(same, range(5), 3)
    assert torch.equal(recipe.apply(list(same), range(5), 3), batch)
    assert torch.equal(recipe.finish(recipe.crop(same, range(5), 3), range(5), 3), batch)


def test_a_crop_of_the_whole_picture_at_its_own_size_is_the_picture() -> None:
    image = photos(1, 40, 30)[0]
    for how in ("bilinear", "bicubic"):
        assert torch.equal(crop_picture(image.permute(1, 2, 0), (0, 0, 40, 30), (40, 30), how), image)


def test_pixels_of_version_2_are_pinned() -> None:
    """A change here breaks every cache of version 2: it needs a new version of ViewRecipe."""
    from cache_tools.alignment import pixel_digest

    for how, expected in PINNED.items():
        ops = [{**CROP, "interpolation": how}, "flip", {"op": "colour-jitter", "brightness": 0.4, "hue": 0.1}]
        ops += [{"op": "random-erasing", "fill": "random"}]
        made = ViewRecipe(version=2, base_seed=3, ops=ops).apply(noise(16, 37), range(16), 2)
        assert pixel_digest(made) == expected


PINNED = {"bilinear": "495450341e4ea1e739cde02846e947ce", "bicubic": "cb029f90c845e2ae091bff1bcff052c6"}


def test_networks_may_see_the_box_at_other_sizes() -> None:
    """A larger view shows the same box and the same operations; shrunk, it looks like the smaller one."""
    recipe = ViewRecipe(
        ops=[
            {**CROP, "size": 40},
            "flip",
            {"op": "rotation", "degrees": 20},
            {"op": "random-erasing", "probability": 1},
        ],
        sizes={"clip": 80, "student": 24},
    )
    assert recipe.version == 2
    many = [photos(1, 90, 120)[0], photos(1, 75, 50)[0]]
    seen = {network: recipe.seen_by(network) for network in ("student", "teacher", "clip")}
    made = {network: views.apply(many, range(2), 1) for network, views in seen.items()}
    assert {network: tuple(views.shape[2:]) for network, views in made.items()} == {
        "student": (24, 24),
        "teacher": (40, 40),
        "clip": (80, 80),
    }
    assert {network: views.output_size((1, 1)) for network, views in seen.items()} == {
        network: tuple(views.shape[2:]) for network, views in made.items()
    }
    assert torch.equal(made["teacher"], recipe.apply(many, range(2), 1))
    shrunk = F.resize(made["clip"], [40, 40], antialias=True)
    assert float((shrunk.float() - made["teacher"].float()).abs().mean()) < 6
    other = recipe.apply(many, range(2), 2)
    assert float((shrunk.float() - other.float()).abs().mean()) > 20
    again = ViewRecipe.model_validate_json(seen["clip"].model_dump_json())
    assert again == recipe  # how a network sees it is no part of the recipe
    plain = ViewRecipe(version=2, ops=[CROP])
    assert "sizes" not in plain.model_dump(mode="json")


@pytest.mark.parametrize(
    "recipe",
    [
        {"ops": ["flip"], "sizes": {"clip": 8}},
        {"version": 1, "ops": [CROP], "sizes": {"clip": 8}},
        {"ops": [CROP, "pad-crop"], "sizes": {"clip": 8}},
        {"ops": [CROP], "sizes": {"clip": 0}},
        {"ops": [CROP], "sizes": {"teachers": 8}},
    ],
)
def test_sizes_without_a_crop_are_refused(recipe: Any) -> None:
    with pytest.raises(ValidationError):
        ViewRecipe.model_validate(recipe)


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.zeros(3, 4, 4)],
        [torch.zeros(1, 4, 4, dtype=torch.uint8)],
        [np.zeros((3, 4, 4), np.uint8)],
        torch.zeros(1, 4, 4, 3, dtype=torch.uint8),
        [torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2,
    ],
)
def test_what_is_no_picture_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError):
        ViewRecipe(version=2, ops=[CROP]).apply(wrong, [0], 1)


def make_folder(root: Path) -> Path:
    """Two classes of four PNGs each, every picture of another size."""
    for number in range(8):
        file = root / "train" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        photo(40 + 7 * number, 90 - 8 * number, seed=number).save(file)
    return root


def test_an_image_folder_gives_its_pictures(tmp_path: Path) -> None:
    images = open_images(recipe_for(make_folder(tmp_path), test_split=None))
    found = images.pictures(slice(0, 8))
    files = [file for name in "ab" for file in sorted((tmp_path / "train" / name).iterdir())]
    for picture, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(picture, np.asarray(Image.open(file)).transpose(2, 0, 1))
    recipe = ViewRecipe(ops=STRONG, sizes={"clip": 48})
    index = np.array([5, 0, 3])
    student, clip = load_each(images, index, index + 100, [(recipe.seen_by("student"), 2), (recipe.seen_by("clip"), 2)])
    chosen = [torch.from_numpy(found[row]) for row in index]
    assert torch.equal(recipe.finish(student, index + 100, 2), recipe.apply(chosen, index + 100, 2))
    views = recipe.seen_by("clip")
    assert torch.equal(views.finish(clip, index + 100, 2), views.apply(chosen, index + 100, 2))
    canvas = ViewRecipe(ops=["rand-augment"])  # without a crop, the canvas
    loaded = torch.from_numpy(images.load(index))
    assert torch.equal(canvas.finish(canvas.load(images, index, index, 1), index, 1), canvas.apply(loaded, index, 1))


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    file = root / "train" / "a" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    images = open_images(recipe_for(root, test_split=None))
    with pytest.raises(DataError, match=r"a/2\.png"):
        ViewRecipe(ops=STRONG).load(images, np.arange(8), np.arange(8), 1)


@pytest.mark.cuda
@pytest.mark.parametrize("ops", [STRONG, [CROP, "trivial-augment-wide"], [CROP, "three-augment"]], ids=str)
def test_a_gpu_makes_the_same_pixels(ops: Any) -> None:
    recipe = ViewRecipe(version=2, ops=ops)
    images = photos(32, 50, 60)
    assert torch.equal(recipe.apply(images.cuda(), range(32), 1).cpu(), recipe.apply(images, range(32), 1))
