"""The names of students, as people type them and as recipes store them. Importable without torch."""

from __future__ import annotations

# The names of mdistiller's networks, in its order.
ZOO_NAMES = (
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet8x4", "resnet32x4",
    "ResNet18", "ResNet50", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2", "vgg8", "vgg11", "vgg13", "vgg16", "vgg19",
    "MobileNetV2", "ShuffleV1", "ShuffleV2",
)  # fmt: skip
STUDENT_ALIASES = {"ShuffleNetV1": "ShuffleV1", "ShuffleNetV2": "ShuffleV2"}
_CANONICAL_NAMES = {name.lower(): name for name in ZOO_NAMES} | {
    alias.lower(): name for alias, name in STUDENT_ALIASES.items()
}


def canonical_student_name(name: str) -> str:
    """A student's name in its published spelling; an unknown name is returned unchanged.

    Case matters only in timm's own names.
    """
    source, separator, rest = name.partition(":")
    if not separator:
        return _CANONICAL_NAMES.get(name.lower(), name)
    if source.lower() == "torchvision":
        return f"torchvision:{rest.lower()}"
    return f"timm:{rest}" if source.lower() == "timm" else name
