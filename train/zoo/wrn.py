"""Wide residual networks (Zagoruyko & Komodakis, arXiv 1605.07146): pre-activation blocks, three stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from train.zoo.base import ZooNetwork, conv, initialise


class WideResNet(ZooNetwork):
    """WRN-depth-factor: stages of (depth − 4) / 6 blocks, 16, 32 and 64 × `factor` wide, at strides 1, 2, 2."""

    def __init__(self, num_classes: int, in_chans: int = 3, *, depth: int, factor: int) -> None:
        super().__init__()
        assert (depth - 4) % 6 == 0, depth
        blocks = (depth - 4) // 6
        self.num_classes, self.num_features = num_classes, 64 * factor
        self.conv1 = conv(in_chans, 16, 3)
        self.block1 = Stage(16, 16 * factor, blocks, 1)
        self.block2 = Stage(16 * factor, 32 * factor, blocks, 2)
        self.block3 = Stage(32 * factor, 64 * factor, blocks, 2)
        self.bn1 = nn.BatchNorm2d(self.num_features)
        self.fc = nn.Linear(self.num_features, num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(images_NCHW))))
        return F.relu(self.bn1(x), inplace=True)

    def get_classifier(self) -> nn.Linear:
        return self.fc


class Stage(nn.Module):
    """A sequence of blocks, in a child `layer` (`block1.layer.0…`) as in the checkpoints."""

    def __init__(self, width_in: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = [WideBlock(width, width, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(WideBlock(width_in, width, stride), *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideBlock(nn.Module):
    """skip(x) + conv(relu(bn(conv(relu(bn(x)))))).

    If the width changes, the 1×1 skip reads the activated input. (Only the width is checked: every strided stage of
    this family is also wider.)
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = conv(width_in, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.convShortcut = None if width_in == width else conv(width_in, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        skip = x if self.convShortcut is None else self.convShortcut(activated)
        x = F.relu(self.bn2(self.conv1(activated)), inplace=True)
        return self.conv2(x).add_(skip)
