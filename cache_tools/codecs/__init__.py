"""How targets are stored: the codecs by name, and what each is for.

| codec | for | bytes per number |
|---|---|---|
| `float32`, `float16` | anything | 4; 2 |
| `fixed-step` | logits or features of known scale | 2 before packing |
| `row-step` | anything | 1, and a float32 scale per row |
| `companded` | logits: `reference: max` for few classes, `mean` for many | 1; 2 before packing |
| `feature-steps` | features whose linear head is in the cache, which turns them into logits | 2 before packing |
| `product` | logits of hundreds of classes in some tens of bytes, roughly; opt-in | a byte for about thirty |
| `top-k` | logits of thousands of classes at temperature 1; opt-in | none for most classes |
| `sampled` | logits of thousands of classes at one temperature: unbiased, noisy; opt-in | none for most classes |

`benchmarks/codec_table.py` measures their bytes and gradient errors on real arrays. Every zarr v3 reader opens arrays
that are not packed with pcodec.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cache_tools.codecs.base import NO_CONSTANTS, Codec, Constants, Pack, StoredArray
from cache_tools.codecs.dense import Companded, FixedStep, Float16, Float32, RowStep
from cache_tools.codecs.features import FeatureSteps
from cache_tools.codecs.product import Product
from cache_tools.codecs.sampled import Sampled
from cache_tools.codecs.sparse import SparseCodec, SparseTargets
from cache_tools.codecs.top_k import TopK
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
    "Product",
    "RowStep",
    "Sampled",
    "SparseCodec",
    "SparseTargets",
    "StoredArray",
    "TopK",
    "parse_codec",
]

CODECS_VERSION = 1  # raise when a codec stores other bytes for the same rows; see pipeline/build/known.py

AnyCodec = Annotated[
    Float16 | Float32 | FixedStep | RowStep | Companded | FeatureSteps | TopK | Sampled | Product,
    Field(discriminator="codec"),
]
CODECS: dict[str, type[Codec]] = {
    "float16": Float16,
    "float32": Float32,
    "fixed-step": FixedStep,
    "row-step": RowStep,
    "companded": Companded,
    "feature-steps": FeatureSteps,
    "top-k": TopK,
    "sampled": Sampled,
    "product": Product,
}


def parse_codec(data: Any, *, where: str = "codec") -> Codec:
    """Make a codec from its fields, `codec.model_dump(mode="json")`, or from its name alone.

    Raises:
        RecipeError: an unknown codec or field, or a value out of range.
    """
    fields = {"codec": data} if isinstance(data, str) else data
    return validate(_CodecField, {"codec": fields}, where=where).codec


class _CodecField(Frozen):
    codec: AnyCodec
