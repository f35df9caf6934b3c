"""What students are called, each in one spelling. No torch here: recipes are read before anything heavy is imported."""

from __future__ import annotations

# mdistiller's, in its order.
ZOO_NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "ResNet18", "ResNet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19",
    "MobileNetV2", "ShuffleV1", "ShuffleV2",
)  # fmt: skip
ALIASES = {"ShuffleNetV1": "ShuffleV1", "ShuffleNetV2": "ShuffleV2"}
_SPELLED = {name.lower(): name for name in ZOO_NAMES} | {alias.lower(): name for alias, name in ALIASES.items()}


def spelled(name: str) -> str:
    """A student's name as it is published, `timm:NAME` or `torchvision:name`; what no student is called stays as it is.

    Case matters in timm's own names alone.
    """
    source, separator, rest = name.partition(":")
    if not separator:
        return _SPELLED.get(name.lower(), name)
    if source.lower() == "torchvision":
        return f"torchvision:{rest.lower()}"
    return f"timm:{rest}" if source.lower() == "timm" else name
