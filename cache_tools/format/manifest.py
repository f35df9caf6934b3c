"""The manifest of a cache: recipe, geometry and provenance; and its fusion in plain numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from cache_tools.config import Frozen
from cache_tools.errors import MismatchError
from cache_tools.format.recipe import FORMAT_VERSION, CacheRecipe, Finite, PromptEnsemble
from cache_tools.format.rolling import Rolling
from cache_tools.images.recipe import DatasetRecipe, TestSplits
from cache_tools.images.sources import SOURCES

CODE = "code"  # in the provenance: the versions of the code that made the cache
DECODER = "decoder"  # in the provenance: the versions of the libraries that decoded its images


class Canary(Frozen):
    """Digest of one view of one sample. Training compares it first: if decoding or view code changed, it stops."""

    view: int
    index: int
    pixel_digest: str


class Manifest(Finite):
    """Recipe, geometry and provenance; stored as the zarr group's attribute `teacher_cache`.

    `constants_digest` covers the constants, the arrays that hold for all samples and views. Computed on another machine
    they may differ in their last bits, and blocks of caches with different constants must not be mixed. It is empty
    until the cache is created.

    `array_digests` has a digest of each array that holds for the whole cache (`format.digests`). It is stored beside
    the other fields, not among them. Caches of earlier versions have none. `rolling`, stored in the same way, is the
    state of a cache whose old views are dropped; None for all others.
    """

    format_version: Literal[2] = FORMAT_VERSION
    fingerprint: str
    name: str
    recipe: CacheRecipe
    dataset: DatasetRecipe
    num_views: PositiveInt
    block_rows: PositiveInt
    clip_scales: tuple[float, ...]
    constants_digest: str = ""
    array_digests: dict[str, str] = Field(default_factory=dict, exclude=True)
    rolling: Rolling | None = Field(None, exclude=True)
    canaries: tuple[Canary, ...] = ()
    build_recipe: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_scale_per_clip(self) -> Manifest:
        if len(self.clip_scales) != len(self.recipe.clips):
            raise ValueError(f"{len(self.recipe.clips)} CLIPs have {len(self.clip_scales)} scales")
        return self

    @property
    def data_name(self) -> str:
        """What to call the images: the cache's name, unless that is the name of another dataset."""
        return self.dataset.title if self.name in SOURCES.keys() - {self.dataset.name} else self.name

    @property
    def clip_scale(self) -> float:
        """The factor of the first CLIP's cosines; NotFoundError without a CLIP."""
        _ = self.recipe.clip
        return self.clip_scales[0]

    @property
    def preflight(self) -> dict[str, Any] | None:
        """Accuracies measured before the build; None for a build without preflight."""
        found = self.provenance.get("preflight")
        return found if isinstance(found, dict) else None

    def with_test_split(
        self, test_split: TestSplits | None, preflight: Mapping[str, Any] | None, folders: Mapping[str, Any] | None
    ) -> Manifest:
        """The manifest with other images to test students on; these determine no target.

        Args:
            preflight: the accuracy of the networks on them, as plain JSON; None keeps the earlier figures.
            folders: what the folders of the splits hold besides samples, as plain JSON; None keeps what is known.
        """
        update: dict[str, Any] = {"dataset": self.dataset.model_copy(update={"test_split": test_split})}
        if isinstance(built := self.build_recipe.get("dataset"), dict):
            changed = {"test_split": list(test_split) if isinstance(test_split, tuple) else test_split}
            update["build_recipe"] = {**self.build_recipe, "dataset": {**built, **changed}}
        found = {"preflight": preflight and dict(preflight), "folders": folders and dict(folders)}
        update["provenance"] = {**self.provenance, **{key: value for key, value in found.items() if value}}
        return self.model_copy(update=update)

    @property
    def num_dropped(self) -> int:
        """Views 0 … num_dropped − 1 are gone (see `format.rolling`)."""
        return 0 if self.rolling is None else self.rolling.dropped

    @property
    def num_samples(self) -> int:
        return self.recipe.dataset.num_samples

    @property
    def num_classes(self) -> int:
        return len(self.recipe.dataset.class_names)

    @property
    def num_blocks(self) -> int:
        """Blocks per view; the last one may be short."""
        return -(-self.num_samples // self.block_rows)

    def block(self, number: int) -> slice:
        """Rows of block `number`."""
        return slice(number * self.block_rows, min((number + 1) * self.block_rows, self.num_samples))


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How teachers and CLIPs are fused, in plain numbers: a `FusionRecipe` or a `FusionChoice`, resolved.

    Attributes:
        teacher_weight, feature_weight: α and λ; 1 without CLIPs, 0 without teachers.
        teacher_weights, clip_weights: share of each network in its group, summing to 1; empty for a missing group.
        clip_scales: the factor of each CLIP's cosines.
        prompt_ensemble: what is averaged over the prompt templates (see `FusionRecipe`).
        prompts: numbers of the templates to use; None for all.
        clip_view: the view to take CLIP's targets from; None for the view that is loaded.
        centred: whether rows of logits are mean-centred; not where a sigmoid reads them, which sees the shift.
    """

    teacher_weight: float
    feature_weight: float
    teacher_weights: tuple[float, ...]
    clip_weights: tuple[float, ...]
    clip_scales: tuple[float, ...]
    prompt_ensemble: PromptEnsemble = "embedding"
    prompts: tuple[int, ...] | None = None
    clip_view: int | None = None
    centred: bool = True

    @classmethod
    def stored(cls, manifest: Manifest) -> Fusion:
        """The fusion that the cache was built with."""
        recipe = manifest.recipe
        return cls(
            teacher_weight=recipe.fusion.teacher_weight,
            feature_weight=recipe.fusion.feature_weight,
            teacher_weights=recipe.teacher_weights,
            clip_weights=recipe.clip_weights,
            clip_scales=manifest.clip_scales,
            prompt_ensemble=recipe.fusion.prompt_ensemble,
            centred=not recipe.dataset.multi_label,
        )

    @property
    def clip_scale(self) -> float:
        """The scale of the first CLIP."""
        return self.clip_scales[0]


def check_code_versions(manifest: Manifest, versions: Mapping[str, int], where: object) -> None:
    """Check that blocks of this code may be mixed with those of the code that made a cache.

    Args:
        versions: of the parts of this code that determine what is stored.

    Raises:
        MismatchError: the cache was made by another version of a part. Earlier caches do not tell, and pass.
    """
    stored = manifest.provenance.get(CODE)
    made_by = stored if isinstance(stored, dict) else {}
    different = [name for name, number in versions.items() if made_by.get(name, number) != number]
    if different:
        raise MismatchError(
            "this cache was started by another version of teacher-cache, whose rows differ: they must not be mixed",
            where=where,
            expected=", ".join(f"{name} {versions[name]}" for name in different),
            found=", ".join(f"{name} {made_by[name]}" for name in different),
            next_step="continue it with that version, or choose another --out",
        )


def has_compiled(manifest: Manifest) -> bool:
    """Whether the networks of a cache were compiled by torch.compile, whose kernels round differently."""
    return manifest.build_recipe.get("compile") == "model"


_OUTPUT_OPTIONS = {"--json", "--plan", "--show-recipe"}  # what a command prints, not what it builds


def build_command(manifest: Manifest, option: str, value: str) -> str | None:
    """The command that built a cache, with another value of an option; None if it is not known."""
    try:
        program, *words = shlex.split(str(manifest.provenance.get("command", "")))
    except ValueError:
        return None
    if Path(program).name != "build-cache":
        return None
    for place in [place for place, word in enumerate(words) if word == option][::-1]:
        del words[place : place + 2]
    kept = [word for word in words if not word.startswith(f"{option}=") and word not in _OUTPUT_OPTIONS]
    return shlex.join(["build-cache", *kept, option, value])
