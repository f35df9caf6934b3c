"""Weights of frozen networks that are converted once give the bits that autocast gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.networks.clip import load_clip
from pipeline.networks.weights import convert_weights, freeze, kernel_settings, mixed_precision
from pipeline.recipe import ClipSpec
from tests.support.fake_cuda import fake_cuda
from tests.support.tiny_clip import make_folder
from train.students import create_student

CPU = torch.device("cpu")


def outputs_of(network: nn.Module, side: int) -> Callable[[], list[Tensor]]:
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))

    def outputs() -> list[Tensor]:
        with torch.no_grad(), mixed_precision(CPU, "bfloat16"):
            return [network(images)]

    return outputs


def dtypes(network: nn.Module, kind: type[nn.Module]) -> set[torch.dtype]:
    return {
        parameter.dtype
        for module in network.modules()
        if isinstance(module, kind)
        for parameter in module.parameters(recurse=False)
    }


@pytest.mark.parametrize("name", ["resnet8", "MobileNetV2", "timm:test_vit", "timm:test_convnext"])
def test_converted_weights_give_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    side = 160 if name.startswith("timm:") else 32
    network = freeze(create_student(name, 10), CPU)
    norms = nn.LayerNorm if "timm" in name else nn.BatchNorm2d
    outputs = outputs_of(network, side)
    before, state = outputs(), {key: value.clone() for key, value in network.state_dict().items()}
    assert convert_weights(network, "bfloat16", outputs)
    assert dtypes(network, nn.Conv2d) | dtypes(network, nn.Linear) == {torch.bfloat16}
    assert dtypes(network, norms) == {torch.float32}, "norms stay as autocast has them"
    images = torch.randn(5, 3, side, side)
    with torch.no_grad(), mixed_precision(CPU, "bfloat16"):
        converted = network(images)
        plain = create_student(name, 10)
        plain.load_state_dict(state)
        assert torch.equal(converted, freeze(plain, CPU)(images))
    assert torch.equal(outputs()[0], before[0])


def test_the_image_tower_of_a_clip_is_converted_and_its_text_tower_is_not(tmp_path: Path) -> None:
    spec = ClipSpec(name=f"local-dir:{make_folder(tmp_path / 'clip')}")
    pixels = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    clip = load_clip(spec, ["cat", "dog"], CPU, precision="bfloat16")
    assert dtypes(clip.network.visual, nn.Linear) == dtypes(clip.network.visual, nn.Conv2d) == {torch.bfloat16}
    assert dtypes(clip.network.visual, nn.MultiheadAttention) == {torch.float32}, "the CPU's own kernel"
    assert dtypes(clip.network.visual, nn.LayerNorm) == dtypes(clip.network.transformer, nn.Linear) == {torch.float32}
    plain = load_clip(spec, ["cat", "dog"], CPU)
    plain.precision = "bfloat16"
    assert torch.equal(clip(pixels).features, plain(pixels).features)
    assert torch.equal(clip.text_features, plain.text_features)


class OwnUse(nn.Module):
    """Also uses the numbers of its weights itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.mean((2, 3))) * self.fc.weight.float().square().sum()
        return logits


def test_a_network_that_uses_its_weights_otherwise_keeps_them() -> None:
    network = freeze(OwnUse(), CPU)
    weight = network.fc.weight
    assert not convert_weights(network, "bfloat16", outputs_of(network, 8))
    assert network.fc.weight is weight

    def fail() -> Any:
        if network.fc.weight is not weight:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return []

    assert not convert_weights(network, "bfloat16", fail)
    assert network.fc.weight is weight
    assert not convert_weights(network, "float32", outputs_of(network, 8))


def test_the_settings_of_kernels_are_recorded_on_cuda() -> None:
    assert kernel_settings(CPU) == {}
    with fake_cuda() as gpu:
        assert kernel_settings(gpu.device) == {"float32_products": "tf32", "convolutions": "tf32, quickest of cudnn"}
