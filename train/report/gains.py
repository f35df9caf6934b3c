"""The gain of a distilled student over the same student on labels alone: their difference in top-1, seed by seed.

For images with several labels it is the difference in mean average precision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.recipe.loss import CE_SETTINGS

# Keys of a recipe that a run on labels alone does not have, or that do not change what it learns.
_OF_TARGETS = ("loss.", "fusion.", "dataset", "views", "cache", "evaluate_every", "num_views")
_OF_LABELS = {f"loss.{name}" for name in CE_SETTINGS}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What decides which runs are a pair.

    Attributes:
        key: equal for a run and the same run on labels alone, with the same seed.
        on_labels: whether this run is the one on labels alone.
        num_views: views to cycle through; None for a new one in every epoch.
        images: digest of the training images; None if it is not known.
        figure: top-1 (mAP with several labels) on the test split; None for a run that is not finished.
    """

    key: str
    on_labels: bool
    num_views: int | None
    images: str | None
    figure: float | None


def pairing(
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    *,
    seed: int,
    on_labels: bool,
    figure: float | None,
    images: str | None = None,
) -> Paired:
    """The `Paired` of a run.

    Args:
        settings: dotted recipe key → value, of everything that determines the result.
        data: identity of images and targets, as in the run's identity.
        images: digest of the images of the cache, for a run with targets.
    """
    kept = {key: value for key, value in settings.items() if key in _OF_LABELS or not key.startswith(_OF_TARGETS)} | {
        "seed": seed
    }
    fraction = settings.get("label_fraction") or 1.0
    if fraction < 1.0 and not on_labels:  # the run on labels alone sees as many images: see `TrainRecipe.on_labels`
        times = round(1 / fraction)
        for name in ("epochs", "schedule.warmup_epochs"):
            kept[name] = times * kept.get(name, 0)
        kept["schedule.milestones"] = [times * epoch for epoch in kept.get("schedule.milestones") or ()]
    views = data.get("num_views", settings.get("num_views"))
    return Paired(
        key=json.dumps(kept, sort_keys=True, default=str),
        on_labels=on_labels,
        num_views=None if views in {None, "None"} else int(views),
        images=data.get("images", images) if fraction == 1.0 else None,  # else one has the labelled images only
        figure=figure,
    )


def twins(runs: Sequence[Paired]) -> list[int | None]:
    """For each run, the place in `runs` of the same run on labels alone; None if there is none with a result."""
    by_key: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        if run.on_labels and run.figure is not None:
            by_key.setdefault(run.key, []).append(place)
    return [None if run.on_labels else _twin(run, runs, by_key.get(run.key, ())) for run in runs]


def gains(runs: Sequence[Paired]) -> list[float | None]:
    """For each run, its figure minus that of its twin on labels alone; None without a pair of results."""
    return [
        None if run.figure is None or place is None else run.figure - (runs[place].figure or 0.0)
        for run, place in zip(runs, twins(runs), strict=True)
    ]


def _twin(run: Paired, runs: Sequence[Paired], places: Sequence[int]) -> int | None:
    """The first with the same images and number of views, or else with a new view in every epoch."""
    same = [place for place in places if None in {run.images, runs[place].images} or run.images == runs[place].images]
    ranked = [place for views in (run.num_views, None) for place in same if runs[place].num_views == views]
    return ranked[0] if ranked else None
