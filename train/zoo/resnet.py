"""Residual networks (He et al., arXiv 1512.03385) for small images: a 3×3 stem, no max pooling.

`CifarResNet` is the paper's own three-stage CIFAR network, 6n + 2 layers; `resnet8x4` and `resnet32x4` are its
wide variants. `ResNet` is the four-stage ImageNet network behind the small stem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from train.zoo.base import ZooNetwork, conv, initialise


class CifarResNet(ZooNetwork):
    """Three stages of (depth − 2) / 6 basic blocks, at strides 1, 2, 2.

    Args:
        depth: number of weight layers, 6n + 2.
        widths: channels of the stem and of the three stages.
    """

    def __init__(
        self, num_classes: int, in_chans: int = 3, *, depth: int, widths: Sequence[int] = (16, 16, 32, 64)
    ) -> None:
        super().__init__()
        assert (depth - 2) % 6 == 0, depth
        blocks = (depth - 2) // 6
        self.num_classes, self.num_features = num_classes, widths[3]
        self.conv1 = conv(in_chans, widths[0], 3)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(BasicBlock, widths[0], widths[1], blocks, 1, "downsample")
        self.layer2 = _stage(BasicBlock, widths[1], widths[2], blocks, 2, "downsample")
        self.layer3 = _stage(BasicBlock, widths[2], widths[3], blocks, 2, "downsample")
        self.fc = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images_NCHW)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def get_classifier(self) -> nn.Linear:
        return self.fc


class ResNet(ZooNetwork):
    """Four stages of width 64, 128, 256, 512 (× the block's expansion), at strides 1, 2, 2, 2."""

    def __init__(
        self, num_classes: int, in_chans: int = 3, *, block: type[ResidualBlock], blocks: Sequence[int]
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 512 * block.expansion
        self.conv1 = conv(in_chans, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(block, 64, 64, blocks[0], 1, "shortcut")
        self.layer2 = _stage(block, 64 * block.expansion, 128, blocks[1], 2, "shortcut")
        self.layer3 = _stage(block, 128 * block.expansion, 256, blocks[2], 2, "shortcut")
        self.layer4 = _stage(block, 256 * block.expansion, 512, blocks[3], 2, "shortcut")
        self.linear = nn.Linear(self.num_features, num_classes)
        initialise(self)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images_NCHW)), inplace=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def get_classifier(self) -> nn.Linear:
        return self.linear


class ResidualBlock(nn.Module):
    """relu(branch(x) + skip(x)), where skip is the identity or a strided 1×1 projection.

    The projection is registered last, as `skip_name`, the only difference between the two published layouts.
    """

    expansion: int

    def __init__(self, skip_name: str) -> None:
        super().__init__()
        self.skip_name = skip_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projection = self._modules.get(self.skip_name)
        skip = x if projection is None else projection(x)
        # In place is safe: batch norm keeps its input for the backward pass, never its output.
        return F.relu(self.branch(x).add_(skip), inplace=True)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def add_projection(self, width_in: int, width_out: int, stride: int) -> None:
        if stride != 1 or width_in != width_out:
            projection = nn.Sequential(conv(width_in, width_out, 1, stride), nn.BatchNorm2d(width_out))
            self.add_module(self.skip_name, projection)


class BasicBlock(ResidualBlock):
    """Two 3×3 convolutions."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, skip_name: str) -> None:
        super().__init__(skip_name)
        self.conv1 = conv(width_in, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_projection(width_in, width, stride)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1×1, 3×3 (which carries the stride), 1×1 to four times the width."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, skip_name: str) -> None:
        super().__init__(skip_name)
        self.conv1 = conv(width_in, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, self.expansion * width, 1)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.add_projection(width_in, self.expansion * width, stride)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))


def _stage(
    block: type[ResidualBlock], width_in: int, width: int, blocks: int, stride: int, skip_name: str
) -> nn.Sequential:
    make: type = block
    rest = [make(width * block.expansion, width, 1, skip_name) for _ in range(blocks - 1)]
    return nn.Sequential(make(width_in, width, stride, skip_name), *rest)
