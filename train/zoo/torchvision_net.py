"""timm's interface over torchvision's classifiers, with torchvision's own state-dict keys.

torchvision is imported on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cache_tools.errors import RecipeError

_INCEPTION_TRUNK = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2 "
    "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c"
)
_GOOGLENET_TRUNK = (
    "conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3 "
    "inception4a inception4b inception4c inception4d inception4e maxpool4 inception5a inception5b"
)

# class → (steps to the last map, steps that pool it). A step is a child module or one of _OPERATIONS.
# Layers before the linear one inside `classifier`, `head` or `heads` run after pooling and are not listed.
FAMILIES: dict[str, tuple[str, str]] = {
    "AlexNet": ("features", "avgpool flatten"),
    "ConvNeXt": ("features", "avgpool"),
    "DenseNet": ("features relu", "mean"),
    "EfficientNet": ("features", "avgpool flatten"),
    "GoogLeNet": (_GOOGLENET_TRUNK, "avgpool flatten dropout"),
    "Inception3": (_INCEPTION_TRUNK, "avgpool dropout flatten"),
    "MNASNet": ("layers", "mean"),
    "MaxVit": ("stem blocks", ""),
    "MobileNetV2": ("features", "mean"),
    "MobileNetV3": ("features", "avgpool flatten"),
    "RegNet": ("stem trunk_output", "avgpool flatten"),
    "ResNet": ("conv1 bn1 relu maxpool layer1 layer2 layer3 layer4", "avgpool flatten"),
    "ShuffleNetV2": ("conv1 maxpool stage2 stage3 stage4 conv5", "mean"),
    "SwinTransformer": ("features norm permute", "avgpool flatten"),
    "VGG": ("features", "avgpool flatten"),
    "VisionTransformer": ("patch_tokens encoder", "class_token_of"),
}


class TorchvisionNetwork(nn.Module):
    """A torchvision classifier as a student: `forward_features` returns its last map, or a ViT's tokens.

    It keeps the children of `network` under their own names, so that state dicts are torchvision's. It drops auxiliary
    classifiers (GoogLeNet, Inception).

    Raises:
        RecipeError: the last layer is not linear (SqueezeNet), or the class is not in FAMILIES.
    """

    def __init__(self, network: nn.Module, name: str, num_classes: int) -> None:
        super().__init__()
        self._head_name = _head_name(network, name)
        trunk, pool = FAMILIES[type(network).__name__]
        self._trunk, self._pool = trunk.split(), pool.split()
        if getattr(network, "transform_input", False):
            self._trunk.insert(0, "inception_range")
        for key, parameter in network.named_parameters(recurse=False):
            self.register_parameter(key, parameter)
        for key, child in network.named_children():
            if "aux" not in key.lower():
                self.add_module(key, child)
        linear = self.get_classifier()
        self.num_classes, self.num_features = num_classes, linear.in_features
        if linear.out_features != num_classes:  # pretrained on another set of classes
            self._replace(nn.Linear(linear.in_features, num_classes, bias=linear.bias is not None))

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → logits [N, num_classes]."""
        return self.forward_head(self.forward_features(images_NCHW))

    def forward_features(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] → the last map [N, channels, h, w] before pooling; tokens [N, 1 + hw, channels] of a ViT."""
        return self._run(self._trunk, images_NCHW)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last map → logits [N, num_classes], or with `pre_logits` the linear layer's input [N, num_features]."""
        pooled = self._run(self._pool, features)
        head = self.get_submodule(self._head_name)
        if isinstance(head, nn.Sequential):
            for layer in list(head)[:-1]:
                pooled = layer(pooled)
        return pooled if pre_logits else self.get_classifier()(pooled)

    def get_classifier(self) -> nn.Linear:
        """The linear layer from pooled features to logits."""
        head = self.get_submodule(self._head_name)
        linear = head[-1] if isinstance(head, nn.Sequential) else head
        assert isinstance(linear, nn.Linear)
        return linear

    def _replace(self, linear: nn.Linear) -> None:
        head = self.get_submodule(self._head_name)
        if isinstance(head, nn.Sequential):
            head[-1] = linear
        else:
            setattr(self, self._head_name, linear)

    def _run(self, steps: list[str], x: torch.Tensor) -> torch.Tensor:
        for step in steps:
            child = self._modules.get(step)
            if child is None:
                x = _OPERATIONS[step](self, x)
            elif isinstance(child, nn.ModuleList):
                for block in child:
                    x = block(x)
            else:
                x = child(x)
        return x


def create(name: str, num_classes: int, **kwargs: Any) -> TorchvisionNetwork:
    """Build torchvision's `name`; `pretrained=True` means `weights="DEFAULT"`.

    A pretrained network is built for the classes it was trained on, then gets a new linear layer if `num_classes`
    differs. Errors of torchvision's builder are passed on.
    """
    import torchvision

    if kwargs.pop("pretrained", False):
        kwargs.setdefault("weights", "DEFAULT")
    if kwargs.get("weights") is None:
        kwargs["num_classes"] = num_classes
        if name.lower() in {"googlenet", "inception_v3"}:
            kwargs = {"aux_logits": False, "init_weights": True, **kwargs}
    network = torchvision.models.get_model(name, **kwargs)
    return TorchvisionNetwork(network, name, num_classes)


def names() -> list[str]:
    """The names of torchvision's classification networks, including those without a linear classifier."""
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _head_name(network: nn.Module, name: str) -> str:
    """The name of the child that ends in the linear classifier."""
    last = None
    for head_name in ("fc", "classifier", "head", "heads"):
        head = getattr(network, head_name, None)
        if head is not None:
            last = list(head)[-1] if isinstance(head, nn.Sequential) else head
            if isinstance(last, nn.Linear) and type(network).__name__ in FAMILIES:
                return head_name
    raise RecipeError(
        "this torchvision network cannot be a student",
        where=f"torchvision:{name}",
        expected=f"a linear last layer and one of {', '.join(FAMILIES)}",
        found=f"{type(network).__name__} ending in {type(last).__name__}",
        next_step="choose another network, or timm:NAME",
    )


def _patch_tokens(network: nn.Module, images_NCHW: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] → [N, 1 + hw, D]: the class token, then the patches row by row."""
    patches_NLD = network.get_submodule("conv_proj")(images_NCHW).flatten(2).transpose(1, 2)
    class_token = network.get_parameter("class_token").expand(len(patches_NLD), -1, -1)
    return torch.cat([class_token, patches_NLD], dim=1)


def _inception_range(network: nn.Module, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Rescale from ImageNet's mean and deviation to [−1, 1], the input of the published GoogLeNet and Inception."""
    mean = images_NCHW.new_tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = images_NCHW.new_tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return images_NCHW * (std / 0.5) + (mean - 0.5) / 0.5


_OPERATIONS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "class_token_of": lambda network, tokens_NLD: tokens_NLD[:, 0],
    "flatten": lambda network, x: x.flatten(1),
    "inception_range": _inception_range,
    "mean": lambda network, map_NCHW: map_NCHW.mean(dim=(2, 3)),
    "patch_tokens": _patch_tokens,
    "relu": lambda network, x: F.relu(x, inplace=True),
}
