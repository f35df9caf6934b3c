"""What a user asks `build-cache` for: one frozen recipe per cache, built-in ones by name, YAML files otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from cache_tools.config import Frozen, load_recipe
from cache_tools.format import FloatType, FusionRecipe, Precision, Store
from cache_tools.images import DatasetRecipe
from cache_tools.views import ViewRecipe


class TeacherSpec(Frozen):
    """The conventional teacher and where its weights are.

    name: a CIFAR-zoo name (`resnet32x4`), `timm:NAME`, `torchvision:NAME`, or a run folder or `.safetensors` file
        that `train-student` wrote (it names its own architecture).
    weights: a `.safetensors` or `.pth` file, `package:FILE` (shipped), or a pretrained tag of timm or torchvision.
    size, interpolation, mean, std: its preprocessing, where the library's or the checkpoint's own is not wanted.
    """

    name: str
    weights: str | None = None
    size: PositiveInt | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class ClipSpec(Frozen):
    """The open_clip model and its prompts.

    name: an open_clip model name, `hf-hub:ORG/MODEL` or `local-dir:FOLDER` (`local-dir:package:FOLDER` is shipped).
    weights: a pretrained tag of open_clip or a checkpoint file; only with a plain model name.
    templates: `richkd` (the 12 of the paper's code), `openai` (80), `siglip` (1), or a file with one per line.
    class_names: words for the prompts where the dataset's class names are not good ones; same order.
    """

    name: str
    weights: str | None = None
    templates: str = "richkd"
    class_names: tuple[str, ...] | None = None


class BuildRecipe(Frozen):
    """One cache: whose images, which views of them, which teachers, how they are fused and how it is stored.

    `batch_size`, `block_rows`, `device` and `out` say how the work is done; the rest says what the values are.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dataset: DatasetRecipe
    views: ViewRecipe = ViewRecipe()
    num_views: PositiveInt = 8
    teacher: TeacherSpec
    clip: ClipSpec
    fusion: FusionRecipe = FusionRecipe()
    store: Store = "fused"
    dtype: FloatType = "float16"
    precision: Precision = "float32"
    batch_size: PositiveInt = 256
    block_rows: PositiveInt | None = None
    preflight_samples: int = Field(2000, ge=0)
    device: str = "auto"
    out: Path | None = None


def builtin_recipes() -> Traversable:
    """The folder of built-in build recipes."""
    return files("pipeline") / "recipes"


def load_build_recipe(
    source: str | None, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None
) -> BuildRecipe:
    """A built-in name or YAML file with options laid over it; see `cache_tools.config.load_recipe`."""
    return load_recipe(BuildRecipe, source, builtin_recipes(), overrides, options)
