"""VGG (Simonyan & Zisserman, arXiv 1409.1556) with batch norm, a global average pool and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from train.zoo.base import ZooNetwork, initialise


class VGG(ZooNetwork):
    """Five blocks of 3×3 convolutions with a max pool after each of the first three.

    The fourth pool, which takes ImageNet's 14×14 maps to 7×7, is skipped for images below 64×64: at 32×32 the last
    block then works on 4×4 maps.

    Args:
        convolutions: how many in each of the five blocks.
    """

    def __init__(self, num_classes: int, in_chans: int = 3, *, convolutions: Sequence[int]) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 512
        self.block0 = _block(in_chans, 64, convolutions[0])
        self.block1 = _block(64, 128, convolutions[1])
        self.block2 = _block(128, 256, convolutions[2])
        self.block3 = _block(256, 512, convolutions[3])
        self.block4 = _block(512, 512, convolutions[4])
        self.classifier = nn.Linear(self.num_features, num_classes)
        initialise(self, linear_std=0.01)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        large = min(images_NCHW.shape[-2:]) >= 64
        x = F.max_pool2d(self.block0(images_NCHW), 2)
        x = F.max_pool2d(self.block1(x), 2)
        x = F.max_pool2d(self.block2(x), 2)
        x = F.max_pool2d(self.block3(x), 2) if large else self.block3(x)
        return self.block4(x)

    def get_classifier(self) -> nn.Linear:
        return self.classifier


def _block(width_in: int, width: int, count: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for layer_width_in in (width_in, *[width] * (count - 1)):
        # The convolutions keep their bias, redundant before a batch norm, because the checkpoints have it.
        convolution = nn.Conv2d(layer_width_in, width, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
