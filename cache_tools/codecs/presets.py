"""Which codec stores the logits and which the features of a cache, and presets for the two by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from cache_tools.codecs import (
    AnyCodec,
    Codec,
    Companded,
    FeatureSteps,
    Float16,
    Float32,
    Pack,
    Product,
    SparseCodec,
    TopK,
)
from cache_tools.config import Frozen
from cache_tools.errors import RecipeError

FEW_CLASSES = 32

PresetName = Literal["float16", "float32", "compact", "dense", "coarse", "top-k"]


class TargetCodecs(Frozen):
    """How the logits and the features of a cache are stored.

    A codec is given by its fields or by its name alone. A component cache does not store logits that a linear head or
    class embeddings compute from its features: then only the codec of the features matters.
    """

    logits: AnyCodec = Field(default_factory=Float16)
    features: AnyCodec = Field(default_factory=Float16)

    @field_validator("logits", "features", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"codec": value} if isinstance(value, str) else value

    @field_validator("logits")
    @classmethod
    def _for_logits(cls, codec: Codec) -> Codec:
        if isinstance(codec, FeatureSteps):
            raise ValueError("feature-steps are for features; for logits there are fixed-step and companded")
        return codec

    @field_validator("features")
    @classmethod
    def _for_features(cls, codec: Codec) -> Codec:
        if isinstance(codec, Companded | SparseCodec | Product):
            raise ValueError(f"{codec.codec} is for logits; for features there are feature-steps and row-step")
        return codec

    @property
    def caution(self) -> str | None:
        """A one-sentence warning for users of these codecs; None if there is nothing to warn of."""
        return self.logits.caution(self.logits.temperature if isinstance(self.logits, SparseCodec) else 1.0)

    def for_target(self, target: str) -> AnyCodec:
        """The codec of the target of that name."""
        return self.logits if target_kind(target) == "logits" else self.features

    @property
    def is_floating(self) -> bool:
        """Whether targets are stored as floating-point numbers, which have no range to check."""
        return all(isinstance(codec, Float16 | Float32) for codec in (self.logits, self.features))

    def __str__(self) -> str:
        """`float16`, or `companded logits, feature-steps features` if the two differ."""
        if self.logits == self.features:
            return self.logits.codec
        return f"{self.logits.codec} logits, {self.features.codec} features"


def target_kind(target: str) -> Literal["logits", "features"]:
    """The kind of the target of that name."""
    return "logits" if target.startswith(("fused_logits", "teacher_logits")) else "features"


def companded_for(num_classes: int, pack: Pack) -> Companded:
    """Single bytes relative to the largest logit for few classes; packed 16-bit codes relative to the mean for many."""
    if num_classes <= FEW_CLASSES:
        return Companded()
    return Companded(step=1 / 48, spread=12.0, reference="mean", pack="pcodec" if pack == "pcodec" else "blosc")


PRESETS: dict[PresetName, Callable[[int], TargetCodecs]] = {
    "float16": lambda classes: TargetCodecs(),
    "float32": lambda classes: TargetCodecs(logits=Float32(), features=Float32()),
    "compact": lambda classes: TargetCodecs(logits=companded_for(classes, "blosc"), features=FeatureSteps()),
    "dense": lambda classes: TargetCodecs(
        logits=companded_for(classes, "pcodec"), features=FeatureSteps(pack="pcodec")
    ),
    "coarse": lambda classes: TargetCodecs(
        logits=companded_for(classes, "pcodec"), features=FeatureSteps(resolution=3.8, pack="pcodec")
    ),
    "top-k": lambda classes: TargetCodecs(logits=TopK(), features=FeatureSteps()),
}


def resolve_codecs(choice: PresetName | TargetCodecs, num_classes: int) -> TargetCodecs:
    """The codecs of a preset for a number of classes; `TargetCodecs` are returned as they are.

    | preset | logits | features | opens in |
    |---|---|---|---|
    | `float16` | half precision | half precision | any zarr reader |
    | `float32` | single precision | single precision | any zarr reader |
    | `compact` | companded | steps of 1/19 deviation | any zarr reader |
    | `dense` | companded | steps of 1/19 deviation | readers that have pcodec |
    | `coarse` | companded | steps of 1/3.8 deviation | readers that have pcodec |
    | `top-k` | classes of probability ≥ 0.0005 | steps of 1/19 deviation | any zarr reader |

    Raises:
        RecipeError: there is no such preset.
    """
    if isinstance(choice, TargetCodecs):
        return choice
    if choice not in PRESETS:
        raise RecipeError("no such codec", where="codec", expected=", ".join(PRESETS), found=choice)
    return PRESETS[choice](num_classes)
