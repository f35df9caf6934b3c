"""How targets are stored: the codecs by name, and which to take.

| codec | for | bytes per number |
|---|---|---|
| `float32`, `float16` | anything | 4; 2 |
| `fixed-step` | logits or features of known scale | 2 before packing |
| `row-step` | anything; a float32 scale per row | 1 |
| `companded` | logits: `reference: max` for few classes, `mean` for many | 1; 2 before packing |
| `feature-steps` | features whose linear head is in the cache: logits are made from them | 2 before packing |
| `top-k` | logits at temperature 1, thousands of classes; opt-in | none for most |

`benchmarks/codec_table.py` measures bytes and gradient errors of all of them on real arrays. Those that do not say
`pack: pcodec` open in every zarr v3 reader.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cache_tools.codecs.base import NO_CONSTANTS, Codec, Constants, Pack, StoredArray
from cache_tools.codecs.dense import Companded, FixedStep, Float16, Float32, RowStep
from cache_tools.codecs.features import FeatureSteps
from cache_tools.codecs.top_k import SparseTargets, TopK
from cache_tools.config import Frozen, validate

__all__ = [
    "CODECS",
    "CODECS_VERSION",
    "NO_CONSTANTS",
    "AnyCodec",
    "Codec",
    "Companded",
    "Constants",
    "FeatureSteps",
    "FixedStep",
    "Float16",
    "Float32",
    "Pack",
    "RowStep",
    "SparseTargets",
    "StoredArray",
    "TopK",
    "parse_codec",
]

CODECS_VERSION = 1  # raise when a codec stores other bytes for the same rows; see pipeline/build/known.py

AnyCodec = Annotated[
    Float16 | Float32 | FixedStep | RowStep | Companded | FeatureSteps | TopK, Field(discriminator="codec")
]
CODECS: dict[str, type[Codec]] = {
    "float16": Float16,
    "float32": Float32,
    "fixed-step": FixedStep,
    "row-step": RowStep,
    "companded": Companded,
    "feature-steps": FeatureSteps,
    "top-k": TopK,
}


class _Holder(Frozen):
    codec: AnyCodec


def parse_codec(data: Any, *, where: str = "codec") -> Codec:
    """A codec from its plain form, `codec.model_dump(mode="json")`, or from its name alone.

    Raises:
        RecipeError: an unknown codec or field, or a value out of range.
    """
    plain = {"codec": data} if isinstance(data, str) else data
    return validate(_Holder, {"codec": plain}, where=where).codec
