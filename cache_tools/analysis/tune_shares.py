"""Choose the shares of several teachers without a CLIP, or of several CLIPs without a teacher.

As in `tune`, one part of the samples chooses by the likelihood of the labels, and the held-out part evaluates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from cache_tools.analysis.figures import row_chunks, sample_figures
from cache_tools.analysis.stats import check_temperature, label_views
from cache_tools.analysis.tables import bin_sums, calibration_error
from cache_tools.analysis.tune_grid import mixture_nll_sums, stratified_holdout
from cache_tools.analysis.tune_passes import HeldOutFigures, standard_error
from cache_tools.config import Frozen
from cache_tools.console import Progress, resolve_device
from cache_tools.errors import RecipeError
from cache_tools.fusion import mix
from cache_tools.images.recipe import require_one_label
from cache_tools.reader import TeacherCache
from cache_tools.targets import ComponentView, Index

Shares = tuple[float, ...]
STEPS = 10  # of a share, for three networks or more
MAX_MIXES = 100_000


class ShareSetting(HeldOutFigures):
    """Shares of the networks, and their figures."""

    shares: Shares


class ShareResult(Frozen):
    """The result of `tune-fusion` for a cache with several networks of one group.

    Attributes:
        networks: their architectures, in the order of the shares.
        tried: the shares tried, and `nll`, their mean NLL on the part used for the choice.
        settings: the choice first, then the cache's own shares, equal shares, and each network alone.
    """

    path: str
    fingerprint: str
    dataset: str
    group: Literal["teacher", "clip"]
    networks: tuple[str, ...]
    views: tuple[int, ...]
    samples_chosen_on: int
    samples_held_out: int
    seed: int
    temperature: float
    tried: tuple[Shares, ...]
    nll: tuple[float, ...]
    settings: tuple[ShareSetting, ...]

    @property
    def chosen(self) -> Shares:
        return self.settings[0].shares

    @property
    def build_options(self) -> str:
        """Options for `build-cache`."""
        return " ".join(f"--set {self.group}.{number}.weight={share:g}" for number, share in enumerate(self.chosen))

    @property
    def train_options(self) -> str:
        """Options for `train-student` with this component cache."""
        return f"--set fusion.{self.group}_weights='[{', '.join(f'{share:g}' for share in self.chosen)}]'"

    @property
    def fuse_options(self) -> str:
        """Options for `cache-tools fuse`."""
        return f"--{self.group}-weights {','.join(f'{share:g}' for share in self.chosen)}"


def tune_shares(
    cache: TeacherCache,
    views: Iterable[int] | None = None,
    *,
    weights: Sequence[float] | None = None,
    holdout: float = 0.5,
    seed: int = 0,
    temperature: float = 1.0,
    device: str = "cpu",
) -> ShareResult:
    """Evaluate mixes of the networks of a component cache that has several teachers and no CLIP, or the reverse.

    Args:
        weights: shares of the first of two networks; None for steps of 0.05, or of 0.1 for each of more networks.
        views, holdout, seed, temperature: as for `tune.tune_fusion`.

    Raises:
        RecipeError: weights for more than two networks, too many mixes, or an option out of range.
        IncompleteError, FormatError, DeviceError, NotFoundError: as `TeacherCache.load_view`.
    """
    require_one_label(
        cache.recipe.dataset.multi_label,
        "cache-tools tune-fusion, which maximises the likelihood of a softmax,",
        cache.path,
        "compare shares of the teachers by training: --set 'fusion.teacher_weights=[0.7, 0.3]'",
    )
    check_temperature(temperature)
    recipe, group = cache.recipe, cache.recipe.only_group
    assert group is not None, "teachers and CLIPs are weighed by tune_fusion"
    networks = [teacher.architecture for teacher in recipe.teachers] + [clip.architecture for clip in recipe.clips]
    own = recipe.teacher_weights or recipe.clip_weights
    tried = _shares(len(networks), weights)
    chosen_views = label_views(cache, views)
    held = stratified_holdout(cache.labels, holdout, seed)
    run = _Run(cache, chosen_views, held, temperature, resolve_device(device))
    with Progress("tune-fusion", 2 * len(chosen_views) * cache.num_samples, "samples") as progress:
        nll = run.choose(tried, progress)
        best = tried[int(np.argmin(nll))]
        alone = [tuple(float(number == other) for other in range(len(networks))) for number in range(len(networks))]
        named = [("chosen", best), ("as the cache was built", own)]
        named += [("equal shares", (1.0 / len(networks),) * len(networks))]
        named += [(f"{name} alone", shares) for name, shares in zip(networks, alone, strict=True)]
        settings = run.evaluate(named, progress)
    return ShareResult(
        path=str(cache.path),
        fingerprint=cache.manifest.fingerprint,
        dataset=f"{recipe.dataset.name}/{recipe.dataset.split}",
        group=group,
        networks=tuple(networks),
        views=chosen_views,
        samples_chosen_on=int((~held).sum()),
        samples_held_out=int(held.sum()),
        seed=seed,
        temperature=temperature,
        tried=tuple(tried),
        nll=tuple(nll.tolist()),
        settings=tuple(settings),
    )


def to_json(result: ShareResult) -> dict[str, Any]:
    """Plain JSON with the options to use."""
    options = {"build_options": result.build_options, "train_options": result.train_options}
    return result.model_dump(mode="json") | options


class _Run:
    """Passes over the views, one in memory at a time."""

    def __init__(
        self,
        cache: TeacherCache,
        views: tuple[int, ...],
        held: npt.NDArray[np.bool_],
        temperature: float,
        device: torch.device,
    ) -> None:
        self._cache, self._views, self._held = cache, views, held
        self._temperature, self._device = temperature, device
        self._labels = torch.from_numpy(cache.labels).to(device)

    def choose(self, tried: Sequence[Shares], progress: Progress) -> npt.NDArray[np.float64]:
        """Mean NLL of each mix, over the views and the samples used for the choice."""
        choosing = torch.from_numpy(np.flatnonzero(~self._held)).to(self._device)
        factors = [tuple(share / self._temperature for share in shares) for shares in tried]
        total = torch.zeros(len(tried), dtype=torch.float64, device=self._device)
        for view in self._views:
            targets = self._load(view)
            for rows in row_chunks(len(choosing), self._cache.num_classes):
                index = choosing[rows]
                total += mixture_nll_sums(self._parts(targets, index), self._labels[index], factors)
            progress.advance(self._cache.num_samples, f"view {view}")
        mean: npt.NDArray[np.float64] = (total / (len(choosing) * len(self._views))).cpu().numpy()
        return mean

    def evaluate(self, named: Sequence[tuple[str, Shares]], progress: Progress) -> list[ShareSetting]:
        """Evaluate named shares on both parts; the second entry is the cache's own."""
        views, held = len(self._views), self._held
        nll, right = np.zeros((len(named), self._cache.num_samples)), np.zeros(len(named))
        bins: list[pl.DataFrame] = []
        for view in self._views:
            targets = self._load(view)
            for rows in row_chunks(self._cache.num_samples, self._cache.num_classes):
                parts = self._parts(targets, rows)
                for number, (_, shares) in enumerate(named):
                    figures = sample_figures(mix(parts, shares).double() / self._temperature, self._labels[rows])
                    nll[number, rows] += figures["nll"].cpu().numpy() / views
                    columns = {key: figures[key].cpu().numpy()[held[rows]] for key in ("confidence", "right")}
                    right[number] += columns["right"].sum()
                    bins.append(bin_sums(pl.DataFrame(columns).with_columns(pl.lit(number).alias("source"))))
            joined = pl.concat(bins).group_by("source", "bin", maintain_order=True)
            bins = [joined.agg(pl.col("n", "confidence", "right").sum())]
            progress.advance(self._cache.num_samples, f"view {view}")
        ece = dict(calibration_error(bins[0], "source").iter_rows())
        difference = (nll - nll[1])[:, held]
        return [
            ShareSetting(
                name=name,
                shares=shares,
                nll_chosen_on=float(nll[number, ~held].mean()),
                nll=float(nll[number, held].mean()),
                nll_error=standard_error(nll[number, held]),
                top1=float(right[number] / (views * held.sum())),
                ece=ece[number],
                difference=float(difference[number].mean()),
                difference_error=standard_error(difference[number]),
            )
            for number, (name, shares) in enumerate(named)
        ]

    def _load(self, view: int) -> ComponentView:
        targets = self._cache.load_view(view, self._device, logits=False, features=False)
        assert isinstance(targets, ComponentView), "only component caches are tuned"
        return targets

    def _parts(self, targets: ComponentView, index: Index) -> list[torch.Tensor]:
        """The logits [B, C] of each network."""
        if self._cache.recipe.only_group == "teacher":
            return [targets.teacher_logits(index, number) for number in range(len(self._cache.recipe.teachers))]
        return [targets.clip_logits(index, number) for number in range(len(self._cache.recipe.clips))]


def _shares(count: int, weights: Sequence[float] | None) -> list[Shares]:
    """The mixes to try: for two networks those of `weights`, for more all multiples of 0.1 with the sum 1."""
    if count == 2:
        first = [number / 20 for number in range(21)] if weights is None else weights
        return [(weight, round(1.0 - weight, 10)) for weight in first]
    if weights is not None:
        raise RecipeError(
            "--weights are shares of the first of two networks",
            where="--weights",
            found=f"{count} networks",
            next_step="leave it out: all multiples of 0.1 are tried",
        )
    if STEPS ** (count - 1) > MAX_MIXES:
        raise RecipeError("too many networks to tune", expected="at most 6", found=count)
    whole = (steps for steps in product(range(STEPS + 1), repeat=count - 1) if sum(steps) <= STEPS)
    return [tuple(step / STEPS for step in (*steps, STEPS - sum(steps))) for steps in whole]
