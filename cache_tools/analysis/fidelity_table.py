"""Compare codecs on an existing cache: the bytes each would need, and the errors it would cause."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache_tools.analysis import fidelity
from cache_tools.analysis.fidelity_bench import Bench, CodecCost
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.codecs.sparse import MAX_CLASSES
from cache_tools.config import Frozen
from cache_tools.console import Progress
from cache_tools.derive import codec_spec
from cache_tools.derive.block_reader import BlockReader
from cache_tools.errors import FormatError, IncompleteError, NotFoundError
from cache_tools.format.arrays import target_arrays
from cache_tools.format.recipe import CacheRecipe
from cache_tools.images.recipe import require_one_label
from cache_tools.reader import TeacherCache

AS_IT_IS = "(as it is)"  # the spec of the cache's own codecs
MANY_CLASSES = 100


class StudentFit(Frozen):
    """The student of the gradient errors, and how well it fits the targets after each number of steps.

    Attributes:
        agreement: share of samples with the targets' top-1, by steps.
        kl: KL(targets ‖ student) by `STEPS@TEMPERATURE`, in nats.
    """

    what: str
    agreement: dict[str, float]
    kl: dict[str, float]


GOOD = 0.02


class CostTable(Frozen):
    """The result of `measure`, smallest codec first; `reference` names the cache's own codecs, the reference of all."""

    name: str
    fingerprint: str
    dataset: str
    store: str
    classes: int
    num_samples: int
    num_views: int
    view: int
    rows: int
    temperatures: tuple[float, ...]
    reference: str
    student: StudentFit
    codecs: tuple[CodecCost, ...]
    left_out: tuple[str, ...] = ()

    @property
    def smallest_good(self) -> CodecCost | None:
        """The codec of fewest bytes whose KD gradient, at every temperature, and features are off by at most GOOD."""
        known = [cost for cost in self.codecs if cost.bytes is not None and cost.g and not cost.g_even_tail]
        good = [cost for cost in known if max(*cost.g.values(), cost.feature_error or 0.0) <= GOOD]
        return min(good, key=lambda cost: cost.bytes or 0.0, default=None)


def measure(
    cache: TeacherCache,
    specs: Sequence[str] = (),
    *,
    temperatures: Sequence[float] = (1.0, 4.0),
    rows: int = 8192,
    view: int | None = None,
) -> CostTable:
    """Measure codecs on a cache.

    Args:
        specs: arguments of `codec_spec.codecs_for`; empty for a list that suits the cache.
        temperatures: of the KD loss.
        rows: the number of samples, evenly spaced. With all of them, the bytes are exactly those of a recoded cache.
        view: None for the second complete view, or the only one: view 0 often is the clean image.

    Raises:
        RecipeError: a spec does not apply to this cache.
        IncompleteError, NotFoundError: the view is missing, or view 0, to which steps are fitted.
        FormatError: a block is damaged, or a spec needs pcodec, which is not installed.
    """
    require_one_label(
        cache.recipe.dataset.multi_label,
        "cache-tools fidelity, which measures the gradient of a softmax,",
        cache.path,
        "make a copy with `cache-tools recode` and compare the students of both",
    )
    if not cache.recipe.has_features:
        raise NotFoundError(
            "fidelity fits a student to features, and imported targets are logits alone",
            where=cache.path,
            next_step="make a copy with `cache-tools recode` and compare the students of both",
        )
    chosen, left_out = default_codecs(cache.recipe) if not specs else ({}, [])
    chosen |= {spec: codec_spec.codecs_for(spec, cache.recipe) for spec in specs}
    for codecs in chosen.values():
        _check_readable(cache.recipe, codecs)
    view, temperatures = _default_view(cache) if view is None else view, tuple(dict.fromkeys(temperatures))
    bench = Bench(BlockReader(cache), view, rows, temperatures)
    costs = [bench.cost(AS_IT_IS, cache.recipe.codecs)]
    with Progress("measure", len(chosen), "codecs") as progress:
        for spec, codecs in chosen.items():
            costs.append(bench.cost(spec, codecs))
            progress.advance(1, spec)
    recipe = cache.recipe
    return CostTable(
        name=cache.manifest.name,
        fingerprint=cache.manifest.fingerprint,
        dataset=f"{recipe.dataset.name}/{recipe.dataset.split}",
        store=recipe.store,
        classes=cache.num_classes,
        num_samples=cache.num_samples,
        num_views=cache.num_views,
        view=view,
        rows=len(bench.index),
        temperatures=temperatures,
        reference=str(recipe.codecs),
        student=_student_fit(bench),
        codecs=tuple(sorted(costs, key=lambda cost: np.inf if cost.bytes is None else cost.bytes)),
        left_out=tuple(left_out),
    )


def default_codecs(recipe: CacheRecipe) -> tuple[dict[str, TargetCodecs], list[str]]:
    """Codecs that suit a cache, by spec, and the specs left out because pcodec is not installed."""
    specs = ["float16", "compact", "dense", "coarse", "row-step"]
    if "logits" in codec_spec.kinds(recipe):
        specs += ["fixed-step+", "fixed-step:pack=pcodec+"]
        if MANY_CLASSES <= len(recipe.dataset.class_names) <= MAX_CLASSES:
            specs.append("top-k")
    if recipe.store == "components":
        specs += ["feature-steps:resolution=32,pack=pcodec", "feature-steps:resolution=8,pack=pcodec"]
    chosen: dict[str, TargetCodecs] = {}
    left_out = []
    for spec in specs:
        codecs = codec_spec.codecs_for(spec, recipe)
        if codecs == recipe.codecs or codecs in chosen.values():
            continue
        try:
            _check_readable(recipe, codecs)
        except FormatError:
            left_out.append(spec)
        else:
            chosen[spec] = codecs
    return chosen, left_out


def _check_readable(recipe: CacheRecipe, codecs: TargetCodecs) -> None:
    for array in target_arrays(recipe.model_copy(update={"codecs": codecs}), 1):
        array.stored.check_readable()


def _default_view(cache: TeacherCache) -> int:
    complete = cache.complete_views
    if not complete:
        raise IncompleteError(
            "no view is complete", where=cache.path, next_step="run the command that builds this cache again"
        )
    return complete[min(1, len(complete) - 1)]


def _student_fit(bench: Bench) -> StudentFit:
    return StudentFit(
        what=f"linear on the {bench.features.shape[1]} fused features, fitted to KD at all these temperatures",
        agreement={str(stage): fidelity.agreement(bench.logits, logits) for stage, logits in bench.students.items()},
        kl={
            f"{stage}@{t:g}": fidelity.divergence(bench.logits, logits, t)
            for stage, logits in bench.students.items()
            for t in bench.temperatures
        },
    )
