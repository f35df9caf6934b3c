"""ShuffleNet V1 (Zhang et al., arXiv 1707.01083, 3 groups) and V2 (Ma et al., arXiv 1807.11164, 1×) for CIFAR.

Both start with a 1×1 stem at full resolution and have stages of 4, 8 and 4 blocks, the first of each at stride 2.
The reference leaves them at torch's default initialisation, and so do we.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from train.zoo.base import ZooNetwork, conv

BLOCKS = (4, 8, 4)


class ShuffleNetV1(ZooNetwork):
    """Grouped 1×1 bottlenecks, 240, 480 and 960 wide, with shuffled channels in between."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 960
        self.conv1 = conv(in_chans, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        # The stem has too few channels for groups.
        self.layer1 = _stage_v1(24, 240, BLOCKS[0], groups_in=1)
        self.layer2 = _stage_v1(240, 480, BLOCKS[1])
        self.layer3 = _stage_v1(480, 960, BLOCKS[2])
        self.linear = nn.Linear(960, num_classes)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images_NCHW)), inplace=True)
        return self.layer3(self.layer2(self.layer1(x)))

    def get_classifier(self) -> nn.Linear:
        return self.linear


class ShuffleNetV2(ZooNetwork):
    """Half of the channels pass each block unchanged; stages 116, 232 and 464 wide, then 1×1 to 1024."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 1024
        self.conv1 = conv(in_chans, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage_v2(24, 116, BLOCKS[0])
        self.layer2 = _stage_v2(116, 232, BLOCKS[1])
        self.layer3 = _stage_v2(232, 464, BLOCKS[2])
        self.conv2 = conv(464, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images_NCHW)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return F.relu(self.bn2(self.conv2(x)), inplace=True)

    def get_classifier(self) -> nn.Linear:
        return self.linear


class GroupedBottleneck(nn.Module):
    """V1: the input is added, or, at stride 2, average-pooled and concatenated."""

    def __init__(self, width_in: int, width: int, stride: int, groups_in: int, groups: int = 3) -> None:
        super().__init__()
        branch = width - width_in if stride == 2 else width
        hidden = branch // 4
        self.stride, self.groups_in = stride, groups_in
        self.conv1 = conv(width_in, hidden, 1, groups=groups_in)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = conv(hidden, hidden, 3, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv(hidden, branch, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.bn1(self.conv1(x)), inplace=True)
        branch = F.relu(self.bn2(self.conv2(_shuffle(branch, self.groups_in))), inplace=True)
        branch = self.bn3(self.conv3(branch))
        if self.stride == 1:
            return F.relu(branch.add_(x), inplace=True)
        pooled = F.avg_pool2d(x, 3, stride=2, padding=1)
        return F.relu(torch.cat([branch, pooled], dim=1), inplace=True)


class SplitBlock(nn.Module):
    """V2 at stride 1: half of the channels go through 1×1, depthwise 3×3 and 1×1, half pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        passing, branch = x.chunk(2, dim=1)
        branch = F.relu(self.bn1(self.conv1(branch)), inplace=True)
        branch = self.bn2(self.conv2(branch))
        branch = F.relu(self.bn3(self.conv3(branch)), inplace=True)
        return _shuffle(torch.cat([passing, branch], dim=1), 2)


class DownBlock(nn.Module):
    """V2 at stride 2: both halves are computed from all channels."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = conv(width_in, width_in, 3, stride=2, groups=width_in)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv2 = conv(width_in, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv(width_in, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return _shuffle(torch.cat([left, right], dim=1), 2)


def _stage_v1(width_in: int, width: int, blocks: int, groups_in: int = 3) -> nn.Sequential:
    rest = [GroupedBottleneck(width, width, 1, groups_in=3) for _ in range(blocks - 1)]
    return nn.Sequential(GroupedBottleneck(width_in, width, 2, groups_in), *rest)


def _stage_v2(width_in: int, width: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(DownBlock(width_in, width), *(SplitBlock(width) for _ in range(blocks - 1)))


def _shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel k of group g moves to position k·groups + g."""
    return x if groups == 1 else F.channel_shuffle(x, groups)
