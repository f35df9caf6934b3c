"""Choose the teacher weight and the CLIP scale of a component cache by the likelihood of its labels; train nothing.

One part of the samples makes the choice, and the held-out part evaluates it. docs/analysis.md interprets the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cache_tools.analysis.stats import check_temperature, label_views
from cache_tools.analysis.tune_grid import factors, log_grid, stratified_holdout
from cache_tools.analysis.tune_passes import PASSES, Candidate, Passes, Setting
from cache_tools.config import Frozen
from cache_tools.console import Progress, resolve_device
from cache_tools.errors import NotFoundError, RecipeError
from cache_tools.format.manifest import Fusion
from cache_tools.images.recipe import require_one_label
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice, describe_fusion

OFFICIAL_SCALE = 1.0
MAX_FUSIONS = 1_000_000  # each is evaluated on every sample and view


class Scale(Frozen):
    """A CLIP scale. A named one (`model`, `match`) has its `name` and, as `value`, the scale of the first CLIP."""

    value: float
    name: str | None = None

    @property
    def option(self) -> str:
        """The value for `--clip-scale`. `match` becomes a number: on other samples it would give another scale."""
        return "model" if self.name == "model" else f"{self.value:.6g}"


class TuneResult(Frozen):
    """The result of `tune-fusion`.

    Attributes:
        nll: [weights][scales] mean NLL on the part used for the choice.
        settings: the choice first, then the settings to compare it with.
        chosen_weight, chosen_scale: those with the least NLL of the grid.
        own_weight, own_scale: those of the cache.
    """

    path: str
    name: str
    fingerprint: str
    dataset: str
    views: tuple[int, ...]
    samples_chosen_on: int
    samples_held_out: int
    seed: int
    temperature: float
    weights: tuple[float, ...]
    scales: tuple[Scale, ...]
    nll: tuple[tuple[float, ...], ...]
    settings: tuple[Setting, ...]
    chosen_weight: float
    chosen_scale: Scale
    own_weight: float
    own_scale: float

    @property
    def at_edge(self) -> bool:
        """Whether the best scale is the smallest or largest tried, so a better one may lie beyond."""
        ends = (self.scales[0].value, self.scales[-1].value)
        return self.chosen_weight < 1.0 and len(self.scales) > 1 and self.chosen_scale.value in ends

    @property
    def build_options(self) -> str:
        """Options for `build-cache`."""
        return f"--set fusion.teacher_weight={self.chosen_weight:g} --set fusion.clip_scale={self.chosen_scale.option}"

    @property
    def train_options(self) -> str:
        """Options for `train-student` with this component cache."""
        return f"--teacher-weight {self.chosen_weight:g} --clip-scale {self.chosen_scale.option}"


def tune_fusion(
    cache: TeacherCache,
    views: Iterable[int] | None = None,
    *,
    weights: Sequence[float],
    scales: tuple[Sequence[str], Sequence[float]] | None = None,
    holdout: float = 0.5,
    seed: int = 0,
    temperature: float = 1.0,
    device: str = "cpu",
) -> TuneResult:
    """Evaluate every teacher weight with every CLIP scale.

    Args:
        views: None for all complete views. All views of a sample are in the same part.
        weights: teacher weights (α), ascending.
        scales: names (`model`, `match`) and numbers; None for both names, the official 1.0 and a grid around them.
        holdout: share of the samples, the same in every class, to hold out.
        seed: of the split into two parts.
        temperature: divides all logits.

    Raises:
        NotFoundError: the cache is fused, has no teacher or no CLIP, or there is no such view.
        RecipeError: the holdout or the temperature is out of range, or there are too many fusions.
        PreflightError: `match`, but CLIP or the teacher predicts the same for every class.
        IncompleteError, FormatError, DeviceError: as `TeacherCache.load_view`.
    """
    require_choice(cache)
    assert cache.recipe.only_group is None, "the shares of one group are tuned by tune_shares"
    check_temperature(temperature)
    chosen_views = label_views(cache, views)
    held = stratified_holdout(cache.labels, holdout, seed)
    grid = _scales(cache, scales)
    if len(weights) * len(grid) > MAX_FUSIONS:
        raise RecipeError(
            "too many fusions to try",
            where="--weights, --scales",
            expected=f"at most {MAX_FUSIONS:,}",
            found=f"{len(weights):,} weights × {len(grid):,} scales",
            next_step="try a coarse grid first, then a finer one around the best",
        )
    scaled = [_resolve(cache, scale.name or scale.value) for scale in grid]
    run = Passes(cache, chosen_views, held, resolve_device(device, needs_float64=True))
    weighted = [factors(weight, temperature) for weight in weights]
    own, model = (_resolve(cache, scale) for scale in (None, "model"))
    with Progress("tune-fusion", PASSES * len(chosen_views) * cache.num_samples, "samples") as progress:
        surface, teacher_factor, clip_factor = run.grid_and_alone(scaled, weighted, model, progress)
        best = _best(surface, weights, grid)
        candidates = [
            *_fusions(surface, weights, grid, scaled, best, own, temperature),
            Candidate("teacher alone", model, factors(1.0, temperature), 1.0),
            Candidate(f"teacher alone, logits × {teacher_factor * temperature:.3g}", model, (teacher_factor, 0.0)),
            Candidate("CLIP alone, scale model", model, factors(0.0, temperature), 0.0),
            Candidate(f"CLIP alone, logits × {clip_factor * temperature:.3g}", model, (0.0, clip_factor)),
        ]
        settings = run.evaluate(candidates, progress)
    dataset = cache.recipe.dataset
    return TuneResult(
        path=str(cache.path),
        name=cache.manifest.name,
        fingerprint=cache.manifest.fingerprint,
        dataset=f"{dataset.name}/{dataset.split}",
        views=chosen_views,
        samples_chosen_on=int((~held).sum()),
        samples_held_out=int(held.sum()),
        seed=seed,
        temperature=temperature,
        weights=tuple(weights),
        scales=tuple(grid),
        nll=tuple(tuple(row) for row in surface.tolist()),
        settings=tuple(settings),
        chosen_weight=weights[best[0]],
        chosen_scale=grid[best[1]],
        own_weight=own.teacher_weight,
        own_scale=own.clip_scale,
    )


def to_json(result: TuneResult) -> dict[str, Any]:
    """Plain JSON with the options to use."""
    options = {"build_options": result.build_options, "train_options": result.train_options, "at_edge": result.at_edge}
    return result.model_dump(mode="json") | options


def _fusions(
    surface: npt.NDArray[np.float64],
    weights: Sequence[float],
    scales: Sequence[Scale],
    scaled: Sequence[Fusion],
    best: tuple[int, int],
    own: Fusion,
    temperature: float,
) -> list[Candidate]:
    """The choice, the cache's own setting, and each known scale at its best weight."""

    def candidate(name: str, fusion: Fusion, weight: float) -> Candidate:
        return Candidate(name, fusion, factors(weight, temperature), weight)

    known = [
        candidate(f"scale {name}, best weight", scaled[column], weights[int(surface[:, column].argmin())])
        for column, scale in enumerate(scales)
        if (name := scale.name or ("official" if scale.value == OFFICIAL_SCALE else None))
    ]
    chosen = candidate("chosen", scaled[best[1]], weights[best[0]])
    return [chosen, candidate("as the cache was built", own, own.teacher_weight), *known]


def _scales(cache: TeacherCache, requested: tuple[Sequence[str], Sequence[float]] | None) -> list[Scale]:
    """The scales in ascending order, each value once; a named scale replaces an equal number."""
    names = ("model", "match") if requested is None else requested[0]
    named = [Scale(value=_resolve(cache, name).clip_scale, name=name) for name in names]
    if requested is None:
        known = [OFFICIAL_SCALE, *[scale.value for scale in named]]
        numbers = [OFFICIAL_SCALE, *log_grid(min(known) / 3, max(known) * 3, 25)]
    else:
        numbers = list(requested[1])
    named_values = {scale.value for scale in named}
    plain = [Scale(value=value) for value in sorted(set(numbers)) if value not in named_values]
    return sorted([*named, *plain], key=lambda scale: scale.value)


def _resolve(cache: TeacherCache, scale: str | float | None) -> Fusion:
    """The cache's fusion with another CLIP scale; None keeps its own."""
    return FusionChoice.model_validate({"clip_scale": scale}).resolve(cache)


def _best(surface: npt.NDArray[np.float64], weights: Sequence[float], scales: Sequence[Scale]) -> tuple[int, int]:
    """Row and column of the least NLL; at weight 1, where the scale has no effect, the column of `model` if any."""
    row, column = (int(place) for place in np.unravel_index(surface.argmin(), surface.shape))
    if weights[row] == 1.0:
        column = next((number for number, scale in enumerate(scales) if scale.name == "model"), column)
    return row, column


def require_choice(cache: TeacherCache) -> None:
    """Raise NotFoundError unless a cache has networks to weigh against each other, each with its own targets."""
    recipe = cache.recipe
    require_one_label(
        recipe.dataset.multi_label,
        "cache-tools tune-fusion, which maximises the likelihood of a softmax,",
        cache.path,
        "compare shares of the teachers by training: --set 'fusion.teacher_weights=[0.7, 0.3]'",
    )
    if len(recipe.teachers) + len(recipe.clips) == 1:
        name, missing = ("teacher", "CLIP") if recipe.teachers else ("CLIP", "teacher")
        raise NotFoundError(f"there is nothing to tune: the cache has one {name} and no {missing}", where=cache.path)
    if recipe.store == "components":
        return
    raise NotFoundError(
        "tune-fusion needs the targets of each network separately",
        where=cache.path,
        expected="a component cache",
        found=f"fused targets only: {describe_fusion(cache.manifest)}",
        next_step="build one from its recipe with --set store=components",
    )
