"""Pretrained weights of timm and torchvision, and the preprocessing that they were trained with."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from cache_tools.errors import WeightsError
from cache_tools.format.recipe import Preprocessing
from pipeline.networks.references import load_local_first
from pipeline.networks.weights import class_count_error, first_line, nearest
from train.students import create_student


def load_pretrained(name: str, tag: str, num_classes: int) -> tuple[nn.Module, Preprocessing]:
    """Load `timm:NAME` or `torchvision:NAME` with a pretrained tag; `pretrained` is the library's default tag.

    Raises:
        RecipeError: unknown architecture.
        WeightsError: the tag is unknown (the message lists the known ones), the weights are for another class count, or
            they cannot be downloaded.
    """
    library, _, model = name.partition(":")
    if library == "timm":
        return _timm(model, tag, num_classes)
    if library == "torchvision":
        return _torchvision(model, tag, num_classes)
    create_student(name, num_classes)  # raises RecipeError if the name itself is unknown
    raise WeightsError("no such weights", where=name, expected="a .safetensors or .pth file", found=repr(tag))


def library_preprocessing(name: str, network: Any) -> Preprocessing:
    """The preprocessing of the library's own weights for this architecture."""
    library, _, model = name.partition(":")
    if library == "torchvision":
        import torchvision

        return _torchvision_preprocessing(torchvision.models.get_model_weights(model).DEFAULT)
    config = network.pretrained_cfg
    return Preprocessing(
        size=tuple(config["input_size"][1:]),
        interpolation=_interpolation(config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _timm(model: str, tag: str, num_classes: int) -> tuple[nn.Module, Preprocessing]:
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    architecture, _, named_tag = model.partition(".")
    wanted = named_tag if tag == "pretrained" else tag
    full = f"{architecture}.{wanted}" if wanted else architecture
    if not timm.is_model(architecture):
        create_student(f"timm:{model}", num_classes)  # raises RecipeError with the most similar name
    known = {key.partition(".")[2]: value for key, value in get_arch_pretrained_cfgs(architecture).items()}
    tags = sorted(key for key, value in known.items() if key and value.has_weights)
    config = get_pretrained_cfg(full) if not wanted or wanted in known else None
    if config is None or not config.has_weights:
        raise _no_such_tag(f"timm:{architecture}", wanted or "pretrained", tags)
    if config.num_classes != num_classes:
        raise class_count_error(f"timm:{full}", num_classes, config.num_classes)
    network = _download(f"timm:{full}", num_classes, pretrained=True)
    return network, library_preprocessing(f"timm:{full}", network)


def _torchvision(model: str, tag: str, num_classes: int) -> tuple[nn.Module, Preprocessing]:
    import torchvision

    if model.lower() not in torchvision.models.list_models(module=torchvision.models):
        create_student(f"torchvision:{model}", num_classes)  # raises RecipeError with the most similar name
    published = torchvision.models.get_model_weights(model.lower())
    known = {entry.name: entry for entry in published} | {"pretrained": published.DEFAULT, "DEFAULT": published.DEFAULT}
    if tag not in known:
        raise _no_such_tag(f"torchvision:{model}", tag, [entry.name for entry in published])
    weights = known[tag]
    found = len(weights.meta["categories"])
    if found != num_classes:
        raise class_count_error(f"torchvision:{model}, {weights.name}", num_classes, found)
    return _download(f"torchvision:{model}", num_classes, weights=weights), _torchvision_preprocessing(weights)


def _download(name: str, num_classes: int, **options: Any) -> nn.Module:
    try:
        return load_local_first(lambda: create_student(name, num_classes, **options))
    except WeightsError as error:
        raise WeightsError(
            "cannot get the teacher's pretrained weights",
            where=name,
            found=first_line(error.__cause__ or error),
            next_step="run once with network access, or give a checkpoint file",
        ) from error


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
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


def _no_such_tag(where: str, tag: str, tags: list[str]) -> WeightsError:
    return WeightsError(
        "no such pretrained weights",
        where=where,
        expected=f"a checkpoint file, pretrained, or one of {', '.join(tags)}" if tags else "a checkpoint file",
        found=repr(tag),
        next_step=nearest(tag, tags),
    )
