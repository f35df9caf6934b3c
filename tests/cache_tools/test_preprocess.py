"""`prepare` against float64 arithmetic, and against PIL by way of torchvision's transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from cache_tools.format.recipe import Preprocessing
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.preprocess import _resample_in_passes, prepare

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PIL_MODES = {
    "nearest": transforms.InterpolationMode.NEAREST,
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
}


def random_pixels(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise with flat patches, at whose edges bicubic interpolation overshoots and must be clamped."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (batch, 3, height, width), dtype=np.uint8)
    pixels[:, :, : height // 2, : width // 3] = 255
    pixels[:, :, height // 2 :, : width // 3] = 0
    return torch.from_numpy(pixels)


def reference(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.double() / 255 - mean) / std


@pytest.mark.parametrize("size", [None, (32, 20)])
def test_without_resizing_pixels_are_only_normalised(size: tuple[int, int] | None) -> None:
    pixels = random_pixels(5, 32, 20)
    before = pixels.clone()
    prepared = prepare(pixels, Preprocessing(size=size, mean=MEAN, std=STD))
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared.double(), reference(pixels), rtol=0, atol=1e-6)
    assert torch.equal(pixels, before)


def test_every_byte_value_in_every_dtype() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    plain = Preprocessing(mean=MEAN, std=STD)
    exact = reference(pixels)
    for dtype in (torch.float16, torch.bfloat16):
        prepared = prepare(pixels, plain, dtype)
        assert prepared.dtype == dtype
        error = (prepared.double() - exact).abs() / exact.abs()
        assert error.max() < torch.finfo(dtype).eps


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("canvas", "size"),
    [
        ((32, 32), (96, 96)),  # up, as a 224-pixel CLIP sees CIFAR
        ((96, 96), (32, 32)),  # down, where antialias matters
        ((50, 75), (32, 32)),  # shorter side, then centre crop
        ((40, 30), (64, 64)),
        ((33, 33), (64, 64)),
        ((60, 60), (32, 48)),
    ],
)
def test_resize_is_torchvisions_on_pil_images(
    interpolation: str, canvas: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = random_pixels(3, *canvas)
    ratio = max(size[0] / canvas[0], size[1] / canvas[1])
    whole = [max(round(canvas[axis] * ratio), size[axis]) for axis in (0, 1)]
    transform = transforms.Compose([transforms.Resize(whole, PIL_MODES[interpolation]), transforms.CenterCrop(size)])
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    expected = np.stack([np.asarray(transform(image)) for image in images]).transpose(0, 3, 1, 2)
    prepared = prepare(pixels, Preprocessing(size=size, interpolation=interpolation, mean=MEAN, std=STD))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    levels = ((prepared * std + mean) * 255).numpy()
    difference = np.abs(levels - expected.astype(np.float64))
    assert np.abs(levels - levels.round()).max() < 1e-2  # whole grey levels, as uint8 pixels are
    if interpolation == "nearest":  # PIL accumulates positions, so an odd ratio may pick the neighbouring pixel
        assert (difference > 0.5).mean() < 0.05
    else:  # at noise and hard edges the two implementations may round ties differently
        assert difference.max() < 2.01
        assert difference.mean() < 0.06


def test_real_images_differ_by_a_grey_level_at_most() -> None:
    digits = open_images(DatasetRecipe(name="digits")).load(slice(0, 50))
    plain = Preprocessing(size=(224, 224), mean=MEAN, std=STD)
    expected = np.stack(
        [
            np.asarray(Image.fromarray(digit.transpose(1, 2, 0)).resize((224, 224), Image.Resampling.BICUBIC))
            for digit in digits
        ]
    ).transpose(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    levels = ((prepare(torch.from_numpy(digits), plain) * std + mean) * 255).numpy()
    difference = np.abs(levels - expected.astype(np.float64))
    assert difference.max() < 2.01
    assert (difference > 1.01).mean() < 1e-5  # 27 of 7.5 million


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("canvas", "size"), [((32, 32), (96, 96)), ((96, 96), (32, 32)), ((50, 75), (32, 48))])
def test_resampling_in_passes_equals_the_integer_kernel(
    interpolation: str, canvas: tuple[int, int], size: tuple[int, int]
) -> None:
    pixels = random_pixels(4, *canvas)
    integer = F.interpolate(pixels, size, mode=interpolation, antialias=True).float()
    difference = (_resample_in_passes(pixels, size, interpolation) - integer).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.01


def test_memory_format_is_kept() -> None:
    pixels = random_pixels(4, 32, 32)
    nhwc = pixels.contiguous(memory_format=torch.channels_last)
    for size in (None, (64, 64)):
        plain = Preprocessing(size=size, mean=MEAN, std=STD)
        assert prepare(pixels, plain).is_contiguous()
        prepared = prepare(nhwc, plain)
        assert prepared.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(prepared, prepare(pixels, plain), rtol=0, atol=1.001 / 255 / 0.25)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    """Any batch size gives the same bits, so cached targets can equal online ones."""
    pixels = random_pixels(37, 32, 32)
    for size in (None, (48, 48)):
        plain = Preprocessing(size=size, mean=MEAN, std=STD)
        whole = prepare(pixels, plain)
        pieces = torch.cat([prepare(pixels[start : start + 5], plain) for start in range(0, 37, 5)])
        assert torch.equal(whole, pieces)


def test_constants_made_in_inference_mode_can_be_used_in_training() -> None:
    plain = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = random_pixels(2, 8, 8)
    with torch.inference_mode():
        prepare(pixels, plain)
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    (prepare(pixels, plain) * weight).sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [None, (64, 64)])
def test_cuda_equals_cpu(size: tuple[int, int] | None) -> None:
    pixels = random_pixels(8, 32, 32)
    plain = Preprocessing(size=size, mean=MEAN, std=STD)
    on_cuda = prepare(pixels.cuda(), plain)
    assert on_cuda.is_cuda
    # after resampling a value may round to the neighbouring grey level
    level = 1.001 / 255 / min(STD) if size else 1e-6
    torch.testing.assert_close(on_cuda.cpu(), prepare(pixels, plain), rtol=0, atol=level)
