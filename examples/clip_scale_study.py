"""The effect of the scale of CLIP's cosines on the fused softmax of a component cache, without any training.

    build-cache fashion-mnist --set dataset.split=test --set store=components --set name=fashion-mnist-test
    python examples/clip_scale_study.py fashion-mnist-test

`moved by CLIP` is the mean total variation between softmax(z_F / T) and softmax(α z_T / T): how far CLIP's share moves
the targets. Everything else is measured against the labels at T = 1.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import polars as pl
import torch
import typer
from torchmetrics.functional.classification import multiclass_calibration_error

from cache_tools.console import command
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice

CHOICES: dict[str, FusionChoice] = {
    "teacher alone": FusionChoice(teacher_weight=1.0),
    "CLIP alone, model": FusionChoice(teacher_weight=0.0, clip_scale="model"),
    "CLIP alone, match": FusionChoice(teacher_weight=0.0, clip_scale="match"),
    "fused, 1.0 (official)": FusionChoice(clip_scale=1.0),
    "fused, match": FusionChoice(clip_scale="match"),
    "fused, model": FusionChoice(clip_scale="model"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
@command
def scales(
    reference: Annotated[str, typer.Argument(metavar="CACHE", help="A component cache.")],
    view: Annotated[int, typer.Option("--view", help="The view to compare on.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per row.")] = False,
) -> None:
    """Compare CLIP scales on one view of a component cache."""
    cache = TeacherCache.open(reference)
    rows = [{"targets": name, **_figures(cache, choice, view)} for name, choice in CHOICES.items()]
    if as_json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        with pl.Config(tbl_rows=-1, tbl_cols=-1, float_precision=4, tbl_width_chars=160, tbl_hide_dataframe_shape=True):
            print(pl.DataFrame(rows))


def _figures(cache: TeacherCache, choice: FusionChoice, view: int) -> dict[str, Any]:
    fusion = choice.resolve(cache)
    targets = cache.load_view(view, fusion=fusion)
    logits, labels = targets.logits(slice(None)).double(), torch.from_numpy(cache.labels)
    teacher = fusion.teacher_weight * targets.teacher_logits(slice(None)).double()
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    confidence = p.amax(1)
    right = p.argmax(1) == labels
    return {
        "scale": fusion.clip_scale,
        "top1": right.double().mean().item(),
        "nll": torch.nn.functional.nll_loss(log_p, labels).item(),
        "ece": multiclass_calibration_error(p.float(), labels, cache.num_classes).item(),
        "entropy": -(p * log_p).sum(1).mean().item(),
        "confident right": (right & (confidence >= 0.8)).double().mean().item(),
        "confident wrong": (~right & (confidence >= 0.8)).double().mean().item(),
        **{
            f"moved by CLIP, T={temperature}": _total_variation(logits, teacher, temperature)
            for temperature in (1, 3)
            if fusion.teacher_weight > 0
        },
    }


def _total_variation(logits_NC: torch.Tensor, others_NC: torch.Tensor, temperature: float) -> float:
    """Mean over rows of ½ Σ_c |p_c − q_c|."""
    p, q = (values.div(temperature).softmax(1) for values in (logits_NC, others_NC))
    return (p - q).abs().sum(1).div(2).mean().item()


if __name__ == "__main__":
    app()
