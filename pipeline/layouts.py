"""Checkpoint layouts of other packages, renamed tensor by tensor to the layout of the network that is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def efficientnet_pytorch_to_timm(tensors: Mapping[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Names of the EfficientNet-PyTorch package, which numbers blocks throughout, as timm's, which has stages.

    Those weights come from TensorFlow: timm's `tf_efficientnet_*` has the padding and batch-norm constant they need.
    """
    stages: Any = network.blocks
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"} | squeeze
    inverted = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | squeeze
    inverted |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}

    def translate(key: str) -> str:
        part, _, rest = key.partition(".")
        if part != "_blocks":
            return f"{outside.get(part, part)}.{rest}"
        number, _, rest = rest.partition(".")
        layer, _, rest = rest.partition(".")
        names = inverted if f"_blocks.{number}._expand_conv.weight" in tensors else separable
        known = int(number) < len(blocks) and layer in names
        return f"{blocks[int(number)]}.{names[layer]}.{rest}" if known else key

    return {translate(key): value for key, value in tensors.items()}
