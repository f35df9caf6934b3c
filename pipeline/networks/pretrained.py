"""Pretrained teachers of timm and torchvision, and the preprocessing that they were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from cache_tools.format.recipe import Preprocessing
from cache_tools.images.class_names import Names
from pipeline.networks.teacher_classes import TeacherClasses, classes_of_library
from train.pretrained import download, find_published
from train.weights.load import class_count_error


def load_pretrained(
    name: str, tag: str, class_names: Names, given: str | Names | None = None
) -> tuple[nn.Module, Preprocessing, TeacherClasses]:
    """Load `timm:NAME` or `torchvision:NAME` with a pretrained tag; `pretrained` is the library's default tag.

    Args:
        class_names: of the dataset, in label order.
        given: `teacher.classes` of the recipe.

    Raises:
        RecipeError: unknown architecture.
        WeightsError: the tag is unknown (the message lists the known ones), the weights are for another class count, or
            they cannot be downloaded.
    """
    published = find_published(name, tag)
    weights = published.options.get("weights")
    where = published.name if weights is None else f"{published.name}, {published.tag}"
    categories = () if weights is None else weights.meta["categories"]
    classes = classes_of_library(class_names, given, published.num_classes, categories, where=where)
    if published.num_classes != classes.total:
        raise class_count_error(where, classes.total, published.num_classes)
    network = download(published)
    preprocessing = library_preprocessing(published.name, network) if weights is None else _torchvisions(weights)
    return network, preprocessing, classes


def library_preprocessing(name: str, network: Any) -> Preprocessing:
    """The preprocessing of the library's own weights for this architecture."""
    library, _, model = name.partition(":")
    if library == "torchvision":
        import torchvision

        return _torchvisions(torchvision.models.get_model_weights(model).DEFAULT)
    config = network.pretrained_cfg
    return timm_preprocessing(config if isinstance(config, Mapping) else config.to_dict())


def timm_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing that timm's `pretrained_cfg` describes."""
    return Preprocessing(
        size=tuple(config["input_size"][1:]),
        interpolation=_interpolation(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _torchvisions(weights: Any) -> Preprocessing:
    preset = weights.transforms()
    side = preset.crop_size[0]
    return Preprocessing(
        size=(side, side),
        interpolation=_interpolation(preset.interpolation.value),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _interpolation(name: str) -> Literal["nearest", "bilinear", "bicubic"]:
    """The interpolation of a library's config; bicubic for `random` and modes that we do not have."""
    return "bilinear" if name == "bilinear" else "nearest" if name == "nearest" else "bicubic"
