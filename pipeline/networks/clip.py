"""Frozen CLIPs through open_clip: image features of view canvases, and their cosines with the class embeddings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import open_clip
import torch
from torch import nn

from cache_tools import fusion
from cache_tools.errors import WeightsError
from cache_tools.format.recipe import ClipIdentity, Precision, Preprocessing
from cache_tools.preprocess import prepare
from pipeline.networks.class_words import class_words
from pipeline.networks.clip_source import ClipSource, load_network, names_in_folder, needs_hub, resolve_source
from pipeline.networks.compiled import CompiledNetwork, NetworkFunction
from pipeline.networks.prompts import render_prompts, template_set
from pipeline.networks.weights import as_network_input, convert_weights, freeze, mixed_precision, noise, weights_digest
from train.weights.names import load_local_first, only_named
from train.weights.text import first_line

if TYPE_CHECKING:
    from pipeline.recipe import ClipSpec

TEXT_BATCH = 256


class ClipOutput(NamedTuple):
    """A CLIP's float32 outputs for a batch."""

    features: torch.Tensor  # [B, D] image features, not normalised
    cosine: torch.Tensor  # [B, C] raw cosines with the class embeddings


class Clip(nn.Module):
    """A frozen CLIP with its class embeddings.

    Attributes:
        identity: describes it in the manifest.
        precision: of the forward pass; outputs are always float32.
        logit_bias: SigLIP's bias. It is the same for every class, so it changes neither softmax nor stored targets.
        text_features: [P, C, D] float32, unit rows: prompt template × class.
        class_embeddings: [C, D] float32, unit rows.
    """

    text_features: torch.Tensor
    class_embeddings: torch.Tensor

    def __init__(
        self,
        network: Any,
        identity: ClipIdentity,
        text_features_PCD: torch.Tensor,
        *,
        precision: Precision = "float32",
        logit_bias: float | None = None,
        resize_mode: str = "shortest",
    ) -> None:
        super().__init__()
        self.network, self.identity, self.precision = network, identity, precision
        self.logit_bias, self.resize_mode = logit_bias, resize_mode
        self._run: NetworkFunction = self._features_of
        self.register_buffer("text_features", text_features_PCD, persistent=False)
        self.register_buffer("class_embeddings", fusion.class_embeddings(text_features_PCD), persistent=False)

    @torch.no_grad()
    def forward(self, pixels_NCHW_u8: torch.Tensor) -> ClipOutput:
        """uint8 [B, 3, H, W] view canvases on this model's device → features [B, D] and cosines [B, C]."""
        height, width = pixels_NCHW_u8.shape[2:]
        if height != width and self.resize_mode != "shortest":
            raise WeightsError(
                f"this CLIP resizes by '{self.resize_mode}', which needs square view canvases",
                where=self.identity.architecture,
                found=f"{height}×{width}",
                next_step="make the views square, for example with random-resized-crop",
            )
        images = as_network_input(prepare(pixels_NCHW_u8, self.identity.preprocessing))
        (features,) = self._run(images)
        return ClipOutput(features, fusion.cosine(features, self.class_embeddings))

    def compile_for(self, rows: int) -> None:
        """Compile the image tower for batches of `rows` images, and use it for these and for shorter ones."""
        self._run = CompiledNetwork(self._features_of, rows)

    def _features_of(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        with mixed_precision(images.device, self.precision):
            features = self.network.encode_image(images)
        return (features.float(),)

    def train(self, mode: bool = True) -> Clip:
        """Do nothing: a frozen network stays in eval mode."""
        return super().train(False)


def load_clip(
    spec: ClipSpec,
    class_names: Sequence[str],
    device: torch.device,
    *,
    precision: Precision = "float32",
    for_timing: bool = False,
) -> Clip:
    """Load an open_clip model with all its weights, and embed the prompts of every class.

    Args:
        spec: name, weights, templates, and class words if the dataset's names are poor ones for prompts.
        class_names: of the dataset, in label order; see `class_words`.
        precision: of the image tower's forward pass; the text tower always runs in float32.
        for_timing: embed one prompt and use it for all, which gives useless cosines at the usual speed.

    Raises:
        WeightsError: the name or tag is unknown, weights are missing, unreadable, cannot be downloaded or do not fit
            the config, or OpenAI's weights are used with a config without QuickGELU.
        RecipeError: bad templates, another number of `class_names` than the dataset has, or unknown WordNet ids.
    """
    words = class_words(class_names, spec.class_names)
    templates = template_set(spec.templates)
    source = resolve_source(spec.name, spec.weights)
    with only_named(names_in_folder(source), source.model_name):
        network = load_network(source)
        digest = weights_digest(network)
        freeze(network, device)
        text_features = _embed_prompts(network, source, templates, words, device, limit=1 if for_timing else None)
    visual = network.visual
    identity = ClipIdentity(
        architecture=source.architecture,
        config_digest=_config_digest(source),
        weights_digest=digest,
        feature_dim=text_features.shape[2],
        logit_scale=float(network.logit_scale.exp()),
        preprocessing=_preprocessing(visual.preprocess_cfg),
        templates=templates,
        class_names=words,
    )
    bias = getattr(network, "logit_bias", None)
    clip = Clip(
        network,
        identity,
        text_features,
        precision=precision,
        logit_bias=None if bias is None else float(bias),
        resize_mode=visual.preprocess_cfg["resize_mode"],
    )
    pixels = noise(identity.preprocessing.size or (224, 224), device)
    convert_weights(visual, precision, lambda: clip(pixels))
    return clip


@torch.no_grad()
def _embed_prompts(
    network: Any,
    source: ClipSource,
    templates: tuple[str, ...],
    words: tuple[str, ...],
    device: torch.device,
    *,
    limit: int | None,
) -> torch.Tensor:
    """Text features [P, C, D] float32, unit rows. Always computed in float32: they are computed only once.

    Args:
        limit: the number of prompts to embed, of which the last stands for the others; None for all.
    """
    tokenizer = _tokenizer(source)
    prompts = render_prompts(templates, words)[:limit]
    rows = [
        network.encode_text(tokenizer(prompts[start : start + TEXT_BATCH]).to(device), normalize=True).float()
        for start in range(0, len(prompts), TEXT_BATCH)
    ]
    embedded = torch.cat(rows)
    rest = embedded[-1:].expand(len(templates) * len(words) - len(embedded), -1)
    return torch.cat([embedded, rest]).reshape(len(templates), len(words), -1)


def _tokenizer(source: ClipSource) -> Any:
    def load() -> Any:
        return open_clip.get_tokenizer(source.model_name)

    try:
        return load_local_first(load) if needs_hub(source) else load()
    except Exception as error:  # hub tokenizers fail in many ways: network, missing files, missing packages
        raise WeightsError(
            "cannot load CLIP's tokenizer",
            where=source.architecture,
            found=first_line(error),
            next_step="run once with network access, or use a local-dir: model with its own tokenizer",
        ) from error


def _preprocessing(config: dict[str, Any]) -> Preprocessing:
    """open_clip's evaluation transform: bicubic unless the config says bilinear."""
    size = config["size"]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Preprocessing(
        size=(size, size) if isinstance(size, int) else tuple(size),
        interpolation=interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _config_digest(source: ClipSource) -> str:
    """sha256 over the model config as JSON."""
    config = {"model_cfg": source.config}
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
