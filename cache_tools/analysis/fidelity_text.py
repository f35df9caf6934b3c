"""`cache-tools fidelity` on a terminal: one line per codec, and notes that explain the figures."""

from __future__ import annotations

from collections.abc import Mapping

from cache_tools.analysis.fidelity_bench import CodecCost
from cache_tools.analysis.fidelity_table import CostTable
from cache_tools.analysis.stats_text import new_table, percent
from cache_tools.console import print_line
from cache_tools.errors import printable
from cache_tools.screen import TextTable
from cache_tools.units import human_bytes

_MISSING = "–"


def print_costs(costs: CostTable) -> None:
    """Print heading, table and notes."""
    print(_heading(costs))
    print(f"\n{_table(costs).text()}")
    print()
    for line in _notes(costs):
        print_line(line)


def _heading(costs: CostTable) -> str:
    samples = f"{costs.rows:,} of {costs.num_samples:,} samples" if costs.rows < costs.num_samples else "all samples"
    student = "; ".join(
        f"{steps} steps: same top-1 for {percent(share)}, KL "
        + ", ".join(f"{costs.student.kl[f'{steps}@{t:g}']:.2g} at T={t:g}" for t in costs.temperatures)
        for steps, share in costs.student.agreement.items()
    )
    return "\n".join(
        [
            f"{printable(costs.dataset)}, cache {costs.fingerprint[:12]}: {samples} of view {costs.view}, "
            f"{costs.classes} classes, store {costs.store}",
            f"compared with: the decoded targets of the cache ({costs.reference})",
            f"student: {costs.student.what}; {student}",
        ]
    )


def _table(costs: CostTable) -> TextTable:
    names = list(dict.fromkeys(name for cost in costs.codecs for name in cost.targets))
    titles = [f"{name} B" for name in names] + (["all B"] if len(names) > 1 else [])
    titles += ["whole cache", *(f"g T={t:g}" for t in costs.temperatures), *(f"KL T={t:g}" for t in costs.temperatures)]
    titles += ["top-1 kept", "features", "largest", "opens in"]
    table = new_table("codec", titles)
    for cost in costs.codecs:
        if cost.bytes is not None:
            sizes = [f"{cost.targets[name].bytes:.1f}" for name in names] + [f"{cost.bytes:.1f}"] * (len(names) > 1)
            whole = human_bytes(round(cost.bytes * costs.num_samples * costs.num_views))
            table.add_row(cost.spec, *sizes, whole, *_errors(cost, costs.temperatures))
    return table


def _errors(cost: CodecCost, temperatures: tuple[float, ...]) -> list[str]:
    packs = {target.codec.get("pack") for target in cost.targets.values()}
    return [
        *(_gradient(cost, t) for t in temperatures),
        *(f"{cost.kl[f'{t:g}']:.1e}" for t in temperatures),
        percent(cost.top1_agreement),
        percent(cost.feature_error),
        _MISSING if cost.largest_feature_error is None else f"{cost.largest_feature_error:.1e}",
        "pcodec" if "pcodec" in packs else "any zarr",
    ]


def _gradient(cost: CodecCost, temperature: float) -> str:
    """g at the worse stage; `even` marks a dense loss on an even tail."""
    own, even = (_worst(errors, temperature) for errors in (cost.g, cost.g_even_tail))
    return percent(own) if own is not None or even is None else f"{percent(even)} even"


def _bias_and_noise(cost: CodecCost, temperatures: tuple[float, ...]) -> list[str]:
    """The parts of g of a loss on sparse targets."""
    notes = []
    for t in temperatures:
        bias, chance, noise = (_worst(errors, t) for errors in (cost.g_bias, cost.g_bias_error, cost.g_noise))
        if cost.resamplings is not None and bias is not None:
            notes.append(
                f"{cost.spec}: g T={t:g} is noise, {percent(noise)} in one view; bias {percent(bias)}, where "
                f"{percent(chance)} is chance (mean of {cost.resamplings} resamplings). A student that sees V views "
                "averages it over V views"
            )
        elif bias is not None:
            notes.append(f"{cost.spec}: g T={t:g} is bias alone, the same in every epoch")
    return notes


def _worst(errors: Mapping[str, float], temperature: float) -> float | None:
    return max((error for key, error in errors.items() if key.endswith(f"@{temperature:g}")), default=None)


def _notes(costs: CostTable) -> list[str]:
    notes = [
        "B: bytes per (image, view) in the chunk files of zarr, checksums included. g: error of the KD gradient with "
        "respect to the student's logits, relative to the gradient; the worse of the two stages.",
        "KL: KL(cache ‖ decoded) of the softmax, in nats. features: error of the fused features relative to "
        "their spread; largest: of a single number.",
    ]
    if costs.rows < costs.num_samples:
        notes.append(
            "Samples are evenly spaced. If neighbours are alike (folders by class), real files are a little smaller."
        )
    notes += [
        f"The cache holds {codec} logits, so the reference has an even tail itself."
        for codec in ("top-k", "sampled")
        if f"{codec} logits" in costs.reference
    ]
    for cost in costs.codecs:
        if cost.classes_kept is not None:
            mass = "" if cost.captured_mass is None else f", {percent(cost.captured_mass)} of the mass"
            even = "; even: a dense loss that spreads the rest evenly" if cost.g_even_tail else ""
            notes.append(f"{cost.spec}: keeps {cost.classes_kept:.1f} classes of a row on average{mass}{even}")
        notes += _bias_and_noise(cost, costs.temperatures)
    notes += [f"{cost.spec}: cannot store this cache: {cost.problem}" for cost in costs.codecs if cost.problem]
    notes += [f"warning: {caution}" for caution in dict.fromkeys(cost.caution for cost in costs.codecs) if caution]
    if costs.left_out:
        notes.append(
            f"Left out because they need pcodec (pip install 'teacher-cache[codecs]'): {', '.join(costs.left_out)}"
        )
    return notes
