"""Shared by the networks of the zoo: timm's interface, bias-free convolutions, the initialisation of the papers."""

from __future__ import annotations

import torch
from torch import nn


class ZooNetwork(nn.Module):
    """timm's classification interface over a convolutional trunk.

    A network sets `num_classes` and `num_features` and defines `forward_features` and `get_classifier`.
    Pooling is global, so any input size works that is large enough for the strides.
    """

    num_classes: int
    num_features: int

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        return self.forward_head(self.forward_features(images_NCHW))

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → the last map [N, num_features, h, w], activated, not pooled."""
        raise NotImplementedError

    def forward_head(self, map_NCHW: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map → logits [N, num_classes], or pooled features [N, num_features] with `pre_logits`."""
        pooled = map_NCHW.mean(dim=(2, 3))
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Linear:
        """The linear layer from pooled features to logits."""
        raise NotImplementedError


def conv(width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with "same" padding and without bias, because a batch norm follows every one of them."""
    return nn.Conv2d(width_in, width_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


def initialise(network: nn.Module, linear_std: float | None = None) -> None:
    """He et al. 2015, fan-out: convolutions N(0, 2 / (k²·width_out)) with zero bias.

    Args:
        network: initialised in place, from torch's default generator. Batch norms are the identity already.
        linear_std: standard deviation for linear layers (zero bias); None keeps torch's uniform initialisation.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
