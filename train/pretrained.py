"""Weights that timm and torchvision publish, found by their tags before anything is downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from cache_tools.errors import WeightsError
from train.students import create_student
from train.weights.names import load_local_first
from train.weights.text import first_line, nearest


class Published(NamedTuple):
    """Published weights of a network.

    Attributes:
        name: of the network, with the tag if the library puts it there.
        tag: the library's name of the weights.
        num_classes: that they were trained for.
        options: of `create_student`, to get them.
    """

    name: str
    tag: str
    num_classes: int
    options: dict[str, Any]


def find_published(name: str, tag: str) -> Published:
    """The weights of `timm:NAME` or `torchvision:NAME` with a tag; `pretrained` is the library's default tag.

    Raises:
        RecipeError: unknown architecture.
        WeightsError: the tag is unknown; the message lists the known ones.
    """
    library, _, model = name.partition(":")
    if library == "timm":
        return _timm(model, tag)
    if library == "torchvision":
        return _torchvision(model, tag)
    create_student(name, 10)  # raises RecipeError if the name itself is unknown
    raise WeightsError("no such weights", where=name, expected="a .safetensors or .pth file", found=repr(tag))


def download(published: Published) -> nn.Module:
    """The network with its published weights, for the classes they were trained for; local copies are used first.

    Raises:
        WeightsError: they cannot be downloaded.
    """
    try:
        return load_local_first(lambda: create_student(published.name, published.num_classes, **published.options))
    except WeightsError as error:
        raise WeightsError(
            "cannot get the pretrained weights",
            where=f"{published.name}, {published.tag}",
            found=first_line(error.__cause__ or error),
            next_step="run once with network access, or give a checkpoint file",
        ) from error


def _timm(model: str, tag: str) -> Published:
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

    if ":" in model:
        return _of_a_hub(model, tag)
    architecture, _, named_tag = model.partition(".")
    wanted = named_tag if tag == "pretrained" else tag
    full = f"{architecture}.{wanted}" if wanted else architecture
    if not timm.is_model(architecture):
        create_student(f"timm:{model}", 10)  # raises RecipeError with the most similar name
    known = {key.partition(".")[2]: value for key, value in get_arch_pretrained_cfgs(architecture).items()}
    tags = sorted(key for key, value in known.items() if key and value.has_weights)
    config = get_pretrained_cfg(full) if not wanted or wanted in known else None
    if config is None or not config.has_weights:
        raise _no_such_tag(f"timm:{architecture}", wanted or "pretrained", tags)
    return Published(f"timm:{full}", config.tag or wanted or "pretrained", config.num_classes, {"pretrained": True})


def _of_a_hub(model: str, tag: str) -> Published:
    """The weights of `hf-hub:ORG/NAME` or `local-dir:FOLDER`, which timm resolves."""
    import timm

    if tag != "pretrained":
        raise _no_such_tag(f"timm:{model}", tag, [])
    try:
        num_classes = load_local_first(lambda: timm.create_model(model)).num_classes
    except Exception as error:  # whatever timm or the hub raises
        raise WeightsError(
            "cannot get the config of the network",
            where=f"timm:{model}",
            found=first_line(error),
            next_step="check the name and the network connection",
        ) from error
    return Published(f"timm:{model}", tag, num_classes, {"pretrained": True})


def _torchvision(model: str, tag: str) -> Published:
    import torchvision

    if model.lower() not in torchvision.models.list_models(module=torchvision.models):
        create_student(f"torchvision:{model}", 10)  # raises RecipeError with the most similar name
    published = torchvision.models.get_model_weights(model.lower())
    known = {entry.name: entry for entry in published} | {"pretrained": published.DEFAULT, "DEFAULT": published.DEFAULT}
    if tag not in known:
        raise _no_such_tag(f"torchvision:{model}", tag, [entry.name for entry in published])
    weights = known[tag]
    return Published(f"torchvision:{model}", weights.name, len(weights.meta["categories"]), {"weights": weights})


def _no_such_tag(where: str, tag: str, tags: list[str]) -> WeightsError:
    return WeightsError(
        "no such pretrained weights",
        where=where,
        expected=f"a checkpoint file, pretrained, or one of {', '.join(tags)}" if tags else "a checkpoint file",
        found=repr(tag),
        next_step=nearest(tag, tags),
    )
