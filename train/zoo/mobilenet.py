"""MobileNetV2 (Sandler et al., arXiv 1801.04381) at half width, as the distillation benchmarks use it on CIFAR."""

from __future__ import annotations

import torch
from torch import nn

from train.zoo.base import ZooNetwork, conv, initialise

# (expansion, width, blocks, stride) of each stage, at half the paper's widths.
STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


class MobileNetV2(ZooNetwork):
    """Inverted residuals between a strided stem and a 1280-wide 1×1 convolution; ReLU, not ReLU6."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 1280
        self.conv1 = nn.Sequential(conv(in_chans, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        stages, width_in = [], 16
        for expansion, width, blocks, stride in STAGES:
            first = InvertedResidual(width_in, width, stride, expansion)
            stages.append(
                nn.Sequential(first, *(InvertedResidual(width, width, 1, expansion) for _ in range(blocks - 1)))
            )
            width_in = width
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(conv(width_in, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialise(self, linear_std=0.01)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.blocks(self.conv1(images_NCHW)))

    def get_classifier(self) -> nn.Linear:
        (linear,) = self.classifier
        assert isinstance(linear, nn.Linear)
        return linear


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; a skip if neither size nor width changes."""

    def __init__(self, width_in: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * width_in
        self.skips = stride == 1 and width_in == width
        self.conv = nn.Sequential(
            conv(width_in, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv(hidden, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).add_(x) if self.skips else self.conv(x)
