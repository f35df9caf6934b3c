"""Codecs and views on a pretended GPU: rows stay on the device, nothing waits, parameters come from pinned memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.codecs import Codec, Companded, FeatureSteps, FixedStep, Float16, Float32, RowStep, Sampled, TopK
from cache_tools.views import (
    ColourJitter,
    Flip,
    PadCrop,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
    Rotation,
    ThreeAugment,
    TrivialAugmentWide,
    ViewRecipe,
)
from tests.support.fake_cuda import DEVICE, fake_cuda

CODECS: list[Codec] = [
    Float16(),
    Float32(),
    FixedStep(),
    RowStep(),
    Companded(),
    Companded(reference="mean"),
    FeatureSteps(),
    FeatureSteps(spread="column"),
    TopK(num_classes=20),
    Sampled(num_classes=20),
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.codec)
def test_a_batch_is_decoded_on_the_device(codec: Codec) -> None:
    rows = np.random.default_rng(0).normal(0, 3, (12, 20)).astype(np.float32)
    fitted = codec.fit(rows)
    stored = codec.encode(rows, fitted)
    with fake_cuda() as gpu:
        on_device = {suffix: torch.from_numpy(array).to(DEVICE) for suffix, array in stored.items()}
        held = {suffix: torch.from_numpy(array).to(DEVICE) for suffix, array in fitted.items()}
        index = torch.arange(5, device=DEVICE)
        with gpu.watch() as watch:
            decoded = codec.decode(on_device, held, index)
    assert (decoded.device, decoded.dtype, decoded.shape) == (DEVICE, torch.float32, (5, 20))
    assert watch.transfers == []


OPS: dict[str, Any] = {
    "crop, flip": (PadCrop(), Flip()),
    "resized": (RandomResizedCrop(size=16), ColourJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)),
    "erasing": (RandomErasing(),),
    "rotation": (Rotation(degrees=15),),
    "randaugment": (RandAugment(),),
    "trivialaugment": (TrivialAugmentWide(),),
    "three": (ThreeAugment(),),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", OPS)
def test_views_are_made_on_the_device(name: str) -> None:
    views, index = ViewRecipe(ops=OPS[name]), np.arange(8)
    with fake_cuda() as gpu:
        pixels = torch.zeros(8, 3, 24, 24, dtype=torch.uint8, device=DEVICE)
        views.apply(pixels, index, 1)
        with gpu.watch() as watch:
            shown = views.apply(pixels, index, 2)
    assert (shown.device, shown.dtype) == (DEVICE, torch.uint8)
    assert [transfer for transfer in watch.transfers if transfer.to != "cuda" or not transfer.is_safe] == []
