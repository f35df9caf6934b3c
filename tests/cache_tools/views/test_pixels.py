"""Pixels of views against slow per-image references, bit for bit."""

import hashlib
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_tools.errors import DataError, RecipeError
from cache_tools.views import ColourJitter, pixels
from cache_tools.views.recipe import ViewRecipe

SEED = 11
INDEX = np.array([7, 3, 2**40, 0, 12, 5, 6, 900, 1, 2])


def photos(count: int, height: int, width: int) -> torch.Tensor:
    """Smooth colour with noise, full range; [N, 3, H, W] uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    waves = rng.uniform(0.02, 0.4, (count, 3, 2))
    smooth = np.sin(waves[..., 0, None, None] * y + waves[..., 1, None, None] * x + rng.uniform(0, 6, (count, 3, 1, 1)))
    return torch.from_numpy((127.5 * smooth + 127.5 + rng.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8))


def run(ops: Any, images: torch.Tensor, index: Any = INDEX, view: int = 1, **fields: Any) -> tuple[Any, Any]:
    """(views as numpy, parameters by op position and name) of a recipe."""
    recipe = ViewRecipe(base_seed=SEED, ops=ops, **fields)
    made = recipe.apply(images, index, view)
    assert made.dtype == torch.uint8
    height, width = images.shape[2:]
    assert tuple(made.shape) == (len(images), 3, *recipe.output_size((height, width)))
    drawn: dict[int, dict[str, Any]] = {}
    for key, values in recipe.parameters(index, view, (height, width)).items():
        position, _, name = key.split(".")
        drawn.setdefault(int(position), {})[name] = values
    return made.numpy(), drawn


def reference_move(image: Any, op: dict[str, Any], values: Any) -> Any:
    """One pad-crop or flip of one image [3, H, W] with numpy's own padding and slicing."""
    if op["op"] == "flip":
        return image[:, :, ::-1] if values["flipped"] else image
    padding, fill = op.get("padding", 4), op.get("fill", 0)
    around = ((0, 0), (padding, padding), (padding, padding))
    padded = np.pad(image, around, mode="reflect") if fill == "reflect" else np.pad(image, around, constant_values=fill)
    _, height, width = image.shape
    return padded[:, values["top"] : values["top"] + height, values["left"] : values["left"] + width]


@pytest.mark.parametrize(
    "ops",
    [
        [{"op": "pad-crop"}, {"op": "flip"}],
        [{"op": "flip"}, {"op": "pad-crop", "padding": 9, "fill": 200}],
        [{"op": "pad-crop", "padding": 5, "fill": "reflect"}, {"op": "flip"}],
        [{"op": "pad-crop", "padding": 40, "fill": 3}],
        [{"op": "pad-crop", "padding": 0, "fill": "reflect"}],
        [{"op": "flip", "probability": 0.7}, {"op": "flip"}],
        [
            {"op": "pad-crop", "padding": 3, "fill": 10},
            {"op": "flip"},
            {"op": "pad-crop", "padding": 8, "fill": "reflect"},
            {"op": "pad-crop", "padding": 2, "fill": 10},
            {"op": "pad-crop", "padding": 4, "fill": 250},
            {"op": "flip"},
        ],
    ],
    ids=lambda ops: "+".join(op["op"] for op in ops),
)
@pytest.mark.parametrize("size", [(32, 32), (9, 14)])
def test_pad_crop_and_flip_equal_a_plain_per_image_reference(ops: list[Any], size: Any) -> None:
    images = photos(60, *size)
    made, drawn = run(ops, images, index=np.arange(60))
    for i, image in enumerate(images.numpy()):
        for position, op in enumerate(ops):
            image = reference_move(image, op, {name: values[i] for name, values in drawn[position].items()})
        np.testing.assert_array_equal(made[i], image)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 12), st.integers(2, 12), st.integers(0, 15), st.sampled_from(["reflect", 0, 255]), st.integers(0, 99)
)
def test_pad_crop_of_any_size_equals_the_reference(height: int, width: int, padding: int, fill: Any, view: int) -> None:
    if fill == "reflect":
        padding %= min(height, width)
    ops = [{"op": "pad-crop", "padding": padding, "fill": fill}, {"op": "flip"}]
    images = photos(6, height, width)
    made, drawn = run(ops, images, index=np.arange(6), view=view)
    for i, image in enumerate(images.numpy()):
        for position, op in enumerate(ops):
            image = reference_move(image, op, {name: values[i] for name, values in drawn[position].items()})
        np.testing.assert_array_equal(made[i], image)


def reference_jitter(image: Any, strengths: dict[str, float], values: Any) -> Any:
    """Colour jitter of one image on Python integers, as the documentation says."""

    def grey(pixel: Any) -> int:
        return (19_595 * pixel[0] + 38_470 * pixel[1] + 7_471 * pixel[2] + 32_768) >> 16

    def level(fixed: int) -> int:
        return min(max((fixed + 32_768) >> 16, 0), 255)

    one = 65_536
    _, height, width = image.shape
    flat = [tuple(int(image[c, y, x]) for c in range(3)) for y in range(height) for x in range(width)]
    factor = {name: int(values[name]) for name in ("brightness", "contrast", "saturation")}
    flat = [tuple(level(v * factor["brightness"]) for v in p) for p in flat]
    mean = (sum(grey(p) for p in flat) + len(flat) // 2) // len(flat)
    flat = [tuple(level(v * factor["contrast"] + mean * (one - factor["contrast"])) for v in p) for p in flat]
    flat = [tuple(level(v * factor["saturation"] + grey(p) * (one - factor["saturation"])) for v in p) for p in flat]
    angle = 2 * math.pi * int(values["hue"]) / 1024
    following = round(one * ((1 - math.cos(angle)) / 3 - math.sin(angle) / math.sqrt(3)))
    previous = round(one * ((1 - math.cos(angle)) / 3 + math.sin(angle) / math.sqrt(3)))
    same = one - following - previous
    flat = [
        tuple(level(p[c] * same + p[(c + 1) % 3] * following + p[c - 1] * previous) for c in range(3)) for p in flat
    ]
    return np.array(flat, dtype=np.uint8).T.reshape(3, height, width)


@pytest.mark.parametrize(
    "strengths",
    [
        {"brightness": 1.0},
        {"contrast": 1.0},
        {"saturation": 1.0},
        {"hue": 0.5},
        {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    ],
    ids="+".join,
)
def test_colour_jitter_equals_integer_arithmetic(strengths: dict[str, float]) -> None:
    images = photos(10, 7, 9)
    made, drawn = run([{"op": "colour-jitter", **strengths}], images)
    for i, image in enumerate(images.numpy()):
        expected = reference_jitter(image, strengths, {name: values[i] for name, values in drawn[0].items()})
        np.testing.assert_array_equal(made[i], expected)
    assert (made != images.numpy()).any()


def test_colour_jitter_is_close_to_torchvision() -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = photos(10, 16, 16)
    for name in ("brightness", "contrast", "saturation"):
        made, drawn = run([{"op": "colour-jitter", name: 0.8}], images)
        for i, image in enumerate(images):
            expected = getattr(functional, f"adjust_{name}")(image, int(drawn[0][name][i]) / 65_536)
            assert np.abs(made[i].astype(int) - expected.numpy().astype(int)).max() <= 2, name


def test_hue_keeps_greys_and_swaps_channels_at_a_third() -> None:
    table = pixels._hue_table(torch.device("cpu"))
    assert table.sum(0).eq(65_536).all()
    assert table[:, 0].tolist() == [65_536, 0, 0]
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(10, 3, 16, 16)
    made, _ = run([{"op": "colour-jitter", "hue": 0.5}], grey)
    np.testing.assert_array_equal(made, grey.numpy())
    red = torch.tensor([200, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    third = pixels.jitter(
        red,
        ColourJitter(hue=0.5),
        {
            name: torch.tensor([value])
            for name, value in {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 341}.items()
        },
    )
    assert third.flatten().tolist()[1] >= 198  # red has become green
    assert max(third.flatten().tolist()[0::2]) <= 2


def test_no_hue_weight_is_near_a_rounding_boundary() -> None:
    """So a mathematics library whose sine differs in the last digit gives the same table."""
    weights = np.array([pixels.hue_weights(step) for step in range(1024)])
    assert np.abs(weights - np.floor(weights) - 0.5).min() > 1e-6


def reference_resize(column: Any, start: int, length: int, size: Any) -> Any:
    """One line of pixels, resampled on Python integers."""
    out = []
    for i in range(size):
        width, centre = 2 * max(length, size), (2 * i + 1) * length
        raw = [max(0, width - abs((2 * j + 1) * size - centre)) for j in range(length)]
        weights = [(value << 15) // sum(raw) for value in raw]
        weights[raw.index(max(raw))] += (1 << 15) - sum(weights)
        out.append((sum(w * int(column[start + j]) for j, w in enumerate(weights)) + (1 << 14)) >> 15)
    return out


@pytest.mark.parametrize(
    ("source", "size"), [((12, 12), 12), ((9, 17), [5, 6]), ((6, 5), 13), ((40, 30), [7, 33]), ((1, 1), 3), ((5, 8), 1)]
)
def test_random_resized_crop_equals_integer_arithmetic(source: Any, size: Any) -> None:
    images = photos(4, *source)
    made, drawn = run([{"op": "random-resized-crop", "size": size}], images, index=INDEX[:4])
    height, width = made.shape[2:]
    for i, image in enumerate(images.numpy()):
        top, left, rows, columns = (int(drawn[0][name][i]) for name in ("top", "left", "height", "width"))
        for channel in range(3):
            upright = np.array([reference_resize(image[channel, :, x], top, rows, height) for x in range(source[1])]).T
            expected = [reference_resize(upright[y], left, columns, width) for y in range(height)]
            np.testing.assert_array_equal(made[i, channel], expected)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_resampling_weights_add_up_and_stay_in_the_box(source: int, size: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, source))
    place, weights = pixels.triangle_taps(torch.tensor([length]), source, size)
    assert weights.sum(2).eq(1 << 15).all()
    assert weights.ge(0).all()
    assert place.ge(0).all()
    assert place.lt(length).all()
    if length == size:
        assert place[0][weights[0] == 1 << 15].tolist() == list(range(size))


@pytest.mark.parametrize(("source", "size"), [(64, 32), (48, 48), (40, 97), (224, 64)])
def test_random_resized_crop_is_close_to_pil_and_torchvision(source: Any, size: Any) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    from PIL import Image

    images = photos(10, source, source)
    made, drawn = run([{"op": "random-resized-crop", "size": size}], images)
    for i, image in enumerate(images):
        top, left, height, width = (int(drawn[0][name][i]) for name in ("top", "left", "height", "width"))
        by_torchvision = functional.resized_crop(image, top, left, height, width, [size, size], antialias=True).numpy()
        cropped = Image.fromarray(image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy())
        by_pil = np.asarray(cropped.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        for expected in (by_torchvision, by_pil):
            difference = made[i].astype(int) - expected.astype(int)
            assert np.abs(difference).max() <= 1
            assert np.abs(difference).mean() < 0.3  # they round the columns first
            assert abs(difference.mean()) < 0.03


@pytest.mark.parametrize("fill", [0, 255, [10, 20, 30], "random"])
def test_random_erasing_equals_slicing(fill: Any) -> None:
    images = photos(10, 20, 30)
    op = {"op": "random-erasing", "probability": 0.7, "fill": fill}
    made, drawn = run([op], images)
    erased = 0
    for i, image in enumerate(images.numpy().copy()):
        values = {name: int(column[i]) for name, column in drawn[0].items()}
        box = (
            slice(values["top"], values["top"] + values["height"]),
            slice(values["left"], values["left"] + values["width"]),
        )
        image[:, *box] = np.array([values["red"], values["green"], values["blue"]], dtype=np.uint8)[:, None, None]
        np.testing.assert_array_equal(made[i], image)
        erased += values["height"] > 0
    assert 0 < erased < 10


EVERY_OP = {
    "identity": [{"op": "identity"}],
    "none": [],
    "pad-crop": [{"op": "pad-crop", "fill": 128}],
    "reflect": [{"op": "pad-crop", "fill": "reflect"}],
    "flip": [{"op": "flip"}],
    "cifar": [{"op": "pad-crop"}, {"op": "flip"}],
    "colour-jitter": [{"op": "colour-jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}],
    "random-resized-crop": [{"op": "random-resized-crop", "size": [20, 28]}],
    "random-erasing": [{"op": "random-erasing", "probability": 1.0, "fill": "random"}],
    "imagenet": [
        {"op": "random-resized-crop", "size": 40},
        {"op": "flip"},
        {"op": "colour-jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        {"op": "random-erasing", "fill": [123, 116, 103]},
    ],
}
PINNED_PIXELS = {
    "identity": "8f692ad8b561bb0f",
    "none": "8f692ad8b561bb0f",
    "pad-crop": "4b36178b81bbf379",
    "reflect": "bbfa68cb54dedcb0",
    "flip": "c97f482deb83af4c",
    "cifar": "7b39027eb80f68b7",
    "colour-jitter": "db4e0c4c98f8f6a3",
    "random-resized-crop": "c34c0753b9eb2204",
    "random-erasing": "48bf3c3a17008989",
    "imagenet": "c7c52040d5d186dd",
}


def noise(count: int, size: Any) -> torch.Tensor:
    """Pixels that depend on no library: position arithmetic, all 256 levels."""
    place = torch.arange(count * 3 * size * size, dtype=torch.int64)
    return ((place * place * 7_919 + place * 40_503 >> 7) & 255).to(torch.uint8).view(count, 3, size, size)


@pytest.mark.parametrize("name", EVERY_OP)
def test_pixels_are_pinned(name: str) -> None:
    """A change here changes the pixels of every existing cache: it needs a new ViewRecipe version."""
    recipe = ViewRecipe(base_seed=2024, ops=EVERY_OP[name])
    made = recipe.apply(noise(50, 32), range(100, 150), 2)
    assert hashlib.blake2b(made.numpy().tobytes(), digest_size=8).hexdigest() == PINNED_PIXELS[name]


@pytest.mark.parametrize("name", EVERY_OP)
def test_order_batch_size_chunks_threads_and_memory_layout_do_not_matter(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ViewRecipe(base_seed=SEED, ops=EVERY_OP[name])
    images, index = noise(37, 32), torch.arange(37) * 3
    whole = recipe.apply(images, index, 5)
    untouched = images.clone()
    order = torch.from_numpy(np.random.default_rng(0).permutation(37))
    assert torch.equal(recipe.apply(images[order], index[order], 5), whole[order])
    assert torch.equal(
        torch.cat([recipe.apply(images[i : i + 5], index[i : i + 5], 5) for i in range(0, 37, 5)]), whole
    )
    assert torch.equal(recipe.apply(images.to(memory_format=torch.channels_last), index, 5), whole)
    assert torch.equal(recipe.apply(images.transpose(2, 3).contiguous().transpose(2, 3), index, 5), whole)
    threads = torch.get_num_threads()
    monkeypatch.setitem(pixels.BATCH_ELEMENTS, "cpu", 3 * 64 * 64 * 3)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(recipe.apply(images, index, 5), whole)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(images, untouched)
    whole.zero_()
    assert torch.equal(images, untouched)


@pytest.mark.parametrize("name", EVERY_OP)
def test_clean_first_returns_the_image_unchanged(name: str) -> None:
    images = photos(10, 32, 32)
    made, _ = run(EVERY_OP[name], images, view=0, clean_first=True)
    if "resized" in name or name == "imagenet":
        whole = pixels.crop_and_resize(
            images,
            {"top": torch.zeros(10, dtype=torch.int64), "left": torch.zeros(10, dtype=torch.int64)}
            | {"height": torch.full((10,), 32), "width": torch.full((10,), 32)},
            made.shape[2:],
        )
        np.testing.assert_array_equal(made, whole.numpy())
    else:
        np.testing.assert_array_equal(made, images.numpy())


@pytest.mark.medium
def test_worker_threads_do_not_change_the_thread_count_of_others() -> None:
    """In a separate process: a thread that starts after a view was made gets the thread count that was set.

    A forked process can apply views too. The code avoids OpenMP otherwise, which would not survive the fork.
    """
    code = """
import os, threading, numpy as np, torch
from cache_tools.views import pixels
from cache_tools.views import ViewRecipe
torch.set_num_threads(3)
images, recipe = torch.from_numpy(np.ones((2000, 3, 16, 16), dtype=np.uint8)), ViewRecipe(ops=["pad-crop", "flip"])
made = recipe.apply(images, range(2000), 0).numpy()
counts = [torch.get_num_threads()]
later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
later.start()
later.join()
assert counts == [3, 3], counts
assert pixels._workers.cache_info().currsize == 1
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(recipe.apply(images, range(2000), 0).numpy(), made) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_images_and_one_image() -> None:
    for name, ops in EVERY_OP.items():
        recipe = ViewRecipe(ops=ops)
        size = recipe.output_size((32, 32))
        assert recipe.apply(torch.empty(0, 3, 32, 32, dtype=torch.uint8), [], 1).shape == (0, 3, *size), name
        images = noise(3, 32)
        assert torch.equal(recipe.apply(images[2:], 2, 1), recipe.apply(images, range(3), 1)[2:])


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        np.zeros((2, 3, 8, 8), dtype=np.uint8),
    ],
    ids=["float", "grey", "one image", "numpy"],
)
def test_images_of_the_wrong_type_are_refused(images: Any) -> None:
    with pytest.raises(DataError, match="uint8"):
        ViewRecipe(ops=["flip"]).apply(images, [0, 1], 0)


def test_images_and_indices_must_match() -> None:
    with pytest.raises(DataError, match="expected 3 images; found 2"):
        ViewRecipe(ops=["flip"]).apply(noise(2, 8), [0, 1, 2], 0)
    with pytest.raises(RecipeError, match="padding below 4"):
        ViewRecipe(ops=[{"op": "pad-crop", "fill": "reflect"}]).apply(noise(2, 4), [0, 1], 0)


@pytest.mark.cuda
@pytest.mark.parametrize("name", EVERY_OP)
def test_cuda_makes_the_same_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    recipe = ViewRecipe(base_seed=SEED, ops=EVERY_OP[name])
    images, index = noise(500, 32), torch.arange(500)
    expected = recipe.apply(images, index, 5)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    on_device = images.cuda()
    made = recipe.apply(on_device, index.cuda(), 5)
    assert made.is_cuda
    assert torch.equal(made.cpu(), expected)
    monkeypatch.setitem(pixels.BATCH_ELEMENTS, "cuda", 3 * 64 * 64 * 7)
    assert torch.equal(recipe.apply(on_device, index, 5).cpu(), expected)
