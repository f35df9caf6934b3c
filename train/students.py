"""Student networks by name: the CIFAR zoo, `timm:NAME`, `torchvision:NAME` and one's own, all with timm's interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from cache_tools.errors import RecipeError, WeightsError
from train import own
from train.recipe.student_names import STUDENT_ALIASES, canonical_student_name
from train.weights.text import nearest
from train.zoo import torchvision_net
from train.zoo.base import ZooNetwork
from train.zoo.mobilenet import MobileNetV2
from train.zoo.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from train.zoo.shufflenet import ShuffleNetV1, ShuffleNetV2
from train.zoo.vgg import VGG
from train.zoo.wrn import WideResNet

_WIDE = (32, 64, 128, 256)

# mdistiller's CIFAR networks. Its checkpoints load: state-dict keys, order and shapes are the same.
ZOO: dict[str, Callable[..., ZooNetwork]] = {
    "resnet8": partial(CifarResNet, depth=8),
    "resnet14": partial(CifarResNet, depth=14),
    "resnet20": partial(CifarResNet, depth=20),
    "resnet32": partial(CifarResNet, depth=32),
    "resnet44": partial(CifarResNet, depth=44),
    "resnet56": partial(CifarResNet, depth=56),
    "resnet110": partial(CifarResNet, depth=110),
    "resnet8x4": partial(CifarResNet, depth=8, widths=_WIDE),
    "resnet32x4": partial(CifarResNet, depth=32, widths=_WIDE),
    "ResNet18": partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "ResNet50": partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3)),
    "wrn_16_1": partial(WideResNet, depth=16, factor=1),
    "wrn_16_2": partial(WideResNet, depth=16, factor=2),
    "wrn_40_1": partial(WideResNet, depth=40, factor=1),
    "wrn_40_2": partial(WideResNet, depth=40, factor=2),
    "vgg8": partial(VGG, convolutions=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convolutions=(2, 2, 4, 4, 4)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
}


def create_student(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a student, with random weights from torch's default generator unless `kwargs` ask for others.

    Every student has timm's interface: `forward` [N, 3, H, W] → logits [N, num_classes]; `forward_features` → the
    last map before pooling (tokens for transformers); `forward_head(map, pre_logits=False)` → logits, or pooled
    features [N, num_features] with `pre_logits=True`; `num_classes`, `num_features` and `get_classifier()`, the
    `nn.Linear` between the two. (A few timm families classify with a 1×1 convolution or several heads; for them
    `get_classifier()` returns whatever timm does.)

    Args:
        name: a zoo name (case does not matter), `timm:NAME`, `torchvision:NAME`, or `package.module:function` for a
            network of one's own (`train.own`).
        num_classes: width of the logits.
        kwargs: for the zoo `in_chans`; for timm and torchvision whatever their builders take: `pretrained=True`,
            `in_chans`, `img_size`, `weights`, …; for one's own, whatever the function takes.

    Raises:
        RecipeError: no such network, options it does not take, or no usable classifier.
        WeightsError: pretrained weights that cannot be loaded.
    """
    if num_classes < 1:
        raise RecipeError("a student needs classes", where=name, expected="num_classes ≥ 1", found=num_classes)
    source, separator, rest = name.partition(":")
    if not separator:
        return _create_zoo(name, num_classes, kwargs)
    if source.lower() == "timm":
        return _create_timm(rest, num_classes, kwargs)
    if source.lower() == "torchvision":
        return _create_torchvision(rest, num_classes, kwargs)
    if own.is_own(name):
        return own.create(name, num_classes, kwargs)
    raise RecipeError(
        "no such source of architectures",
        where=name,
        expected="a zoo name, timm:NAME, torchvision:NAME or package.module:function",
        found=f"'{source}:'",
        next_step=nearest(source, ("timm", "torchvision")),
    )


def student_names() -> tuple[str, ...]:
    """The names of the zoo, without timm's and torchvision's networks."""
    return tuple(ZOO)


def _create_zoo(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if (known := canonical_student_name(name)) not in ZOO:
        if os.path.exists(os.path.expanduser(name)):
            raise RecipeError(
                "a student is the name of an architecture, and this is a file or folder",
                where=name,
                next_step=f"to start from its weights: --student ARCHITECTURE --student-weights {name}",
            )
        raise RecipeError(
            "no such student",
            where=name,
            expected=f"one of {', '.join((*ZOO, *STUDENT_ALIASES))}, or timm:NAME, torchvision:NAME",
            next_step=nearest(name, (*ZOO, *STUDENT_ALIASES)),
        )
    unknown = sorted(options.keys() - {"in_chans"})
    if unknown:
        raise RecipeError(
            "the zoo's networks do not take this option",
            where=name,
            expected="in_chans or nothing",
            found=", ".join(unknown),
            next_step="load published weights with load_state_dict" if "pretrained" in unknown else None,
        )
    return ZOO[known](num_classes, **options)


def _create_timm(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    import timm

    # timm itself resolves a name with a scheme (hf-hub:…, local-dir:…).
    if ":" not in name and not timm.is_model(name):
        raise RecipeError(
            "timm has no such model",
            where=f"timm:{name}",
            next_step=nearest(name.partition(".")[0], timm.list_models()),
        )
    options = {"pretrained": False, **options}
    try:
        network: Any = timm.create_model(name, num_classes=num_classes, **options)
    except Exception as error:  # whatever a third party's constructor or download raises
        raise _not_built(f"timm:{name}", options, error) from error
    classifier = getattr(network, "get_classifier", lambda: None)()
    if classifier is None or isinstance(classifier, nn.Identity):
        raise RecipeError(
            "this timm model has no classifier",
            where=f"timm:{name}",
            expected="a classification model",
            found=type(network).__name__,
            next_step="choose a model with a classification head",
        )
    # Where a wider layer follows the pool (MobileNetV3, VGG, …), timm's num_features is the channels of the last map;
    # a student's is the width with `pre_logits=True`.
    width = getattr(network, "head_hidden_size", None) or network.num_features
    if width != network.num_features:
        network.num_features = width
    return network


def _create_torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    known = torchvision_net.names()
    if name.lower() not in known:
        raise RecipeError(
            "torchvision has no such classifier", where=f"torchvision:{name}", next_step=nearest(name, known)
        )
    try:
        return torchvision_net.create(name, num_classes, **options)
    except RecipeError:
        raise
    except Exception as error:  # whatever a third party's constructor or download raises
        raise _not_built(f"torchvision:{name}", options, error) from error


def _not_built(name: str, options: dict[str, Any], error: Exception) -> RecipeError | WeightsError:
    reason = f"{type(error).__name__}: {error}".removesuffix(": ")
    if options.get("pretrained") or options.get("weights"):
        return WeightsError(
            "could not build the student with pretrained weights",
            where=name,
            found=reason,
            next_step="check the name and the network connection, or start from random weights",
        )
    return RecipeError("could not build the student", where=name, expected="valid options", found=reason)
