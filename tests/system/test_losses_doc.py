"""docs/losses.md against the code: every loss is listed, with its defaults and the arrays that it needs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from typer.testing import CliRunner

from train.cli import app
from train.feed import Batch, BatchTargets
from train.losses.contrastive import Components
from train.objective import Objective
from train.recipe.loss import LOSSES, LossRecipe, named_loss

TEXT = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
KINDS = get_args(LossRecipe.model_fields["kind"].annotation)
FEATURES = get_args(LossRecipe.model_fields["feature"].annotation)
CLASSES, SAMPLES, WIDTHS = 5, 40, Components((6, 7), (0.7, 0.3))


def table(heading: str) -> dict[str, dict[str, str]]:
    """Rows of the table whose first column has this heading, by the name in that column."""
    block = re.search(rf"^\| `{re.escape(heading)}` \|.*?(?=\n\n)", TEXT, re.MULTILINE | re.DOTALL)
    assert block, heading
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[0].splitlines()]
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


def named(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def needs(loss: LossRecipe) -> set[str]:
    found = {"fused_logits"} if loss.needs_logits else set()
    if loss.needs_features:
        found |= {"fused_features"}
    if loss.uses_components:
        found |= {"components"}
    return found | ({"labels"} if looks_at_labels(loss) else set())


def looks_at_labels(loss: LossRecipe) -> bool:
    """Whether other labels give another loss; everything else the same."""

    def value(labels: torch.Tensor) -> torch.Tensor:
        objective = Objective(loss, 4, 8, CLASSES, SAMPLES, labels, components=WIDTHS)
        generator = torch.Generator().manual_seed(0)
        draw = [torch.randn(6, width, generator=generator) for width in (CLASSES, 4, CLASSES, 8, *WIDTHS.widths)]
        targets = BatchTargets(draw[2], draw[3], tuple(draw[4:]))
        index = torch.arange(6)
        chosen = labels[index]
        if loss.multi_label:
            chosen = torch.nn.functional.one_hot(chosen, CLASSES)
        return objective(draw[0], draw[1], Batch(torch.empty(0), chosen, index, targets))["loss"].detach()

    number = torch.arange(SAMPLES)
    return not torch.equal(value(number % CLASSES), value(number // (SAMPLES // CLASSES)))


@pytest.mark.parametrize(("heading", "names"), [("loss.kind", KINDS), ("loss.feature", FEATURES)])
def test_every_term_is_in_its_table_and_needs_what_it_says(heading: str, names: tuple[str, ...]):
    rows = table(heading)
    assert tuple(rows) == names
    key = heading.removeprefix("loss.")
    for name, row in rows.items():
        alone: dict[str, Any] = {"ce_weight": 0.0, "kind": "ce"} | {key: name}
        if name in {"ce", "none"}:
            alone["ce_weight"] = 1.0
        wanted = needs(LossRecipe(**alone)) - ({"labels"} if name == "none" else set())
        assert named(row["needs"]) == wanted, name


def test_every_name_is_in_the_table_and_needs_what_it_says():
    rows = table("--loss")
    assert list(rows) == list(LOSSES)
    for name, row in rows.items():
        assert named(row["needs"]) == needs(LossRecipe(**named_loss(name))), name


def test_what_a_name_stands_for():
    """Weights, temperature and terms of each name, written as the table writes them."""
    for name, row in table("--loss").items():
        loss = LossRecipe(**named_loss(name))
        text = f"{number(loss.ce_weight)}CE"
        if loss.needs_logits:
            text += f" + {number(loss.distill_weight)}`{loss.kind}`, T {loss.temperature:g}"
            text += f", alpha {loss.dkd_alpha:g}, beta {loss.dkd_beta:g}" if loss.kind == "dkd" else ""
        if loss.needs_features:
            text += "," * loss.needs_logits + f" + {number(loss.feature_weight)}`{loss.feature}`"
        assert row["objective"].partition(":")[0] == text, name


def number(weight: float) -> str:
    return "" if weight == 1.0 else f"{weight:g} · "


def test_numbers_in_the_tables_are_the_defaults():
    default = LossRecipe()
    cells = [
        row["defaults and their origin"] for heading in ("loss.kind", "loss.feature") for row in table(heading).values()
    ]
    stated = dict(
        re.findall(r"`(\w+)` ([\d.]+(?: \d{3})?)(?=[,:;]|$)", ", ".join(cell.partition("theirs")[0] for cell in cells))
    )
    for key in ("ce_weight", "distill_weight", "temperature", "dkd_alpha", "dkd_beta", "crd_negatives", "crd_dim",
                "crd_temperature", "crd_momentum"):  # fmt: skip
        assert float(stated[key].replace(" ", "")) == getattr(default, key), key
    assert "`feature_weight` 0.8" in TEXT
    assert default.feature_weight == 0.8
    assert (default.rkd_distance_weight, default.rkd_angle_weight) == (25.0, 50.0)


def test_every_key_of_the_recipe_is_explained():
    for key in LossRecipe.model_fields:
        assert f"`{key}`" in TEXT or f"`loss.{key}`" in TEXT, key


def test_the_commands_give_the_losses_that_are_said():
    block, *_ = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    shown = []
    for line in block.splitlines():
        done = CliRunner().invoke(app, [*shlex.split(line.partition(" #")[0])[1:], "--show-recipe"])
        assert done.exit_code == 0, done.stderr
        shown.append(LossRecipe(**yaml.safe_load(done.stdout)["loss"]))
    assert [(loss.kind, loss.distill_weight, loss.temperature) for loss in shown] == [
        ("kd", 1.0, 2.0), ("kd", 3.0, 3.0), ("kd", 3.0, 2.0), ("dkd", 1.0, 4.0), ("kd", 3.0, 3.0), ("kd", 1.0, 2.0),
    ]  # fmt: skip
    assert (shown[3].dkd_beta, shown[3].warmup_epochs) == (6.0, 2)
    assert (shown[4].feature, shown[4].feature_source) == ("crd", "fused")
    assert (shown[5].feature, shown[5].feature_weight) == ("rkd", 1.0)


def test_the_commands_give_the_updates_that_are_said():
    *_, block = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    layered, accumulated, smoothed, _ = block.splitlines()
    shown = []
    for line in (accumulated, smoothed, layered):
        done = CliRunner().invoke(app, [*shlex.split(line)[1:], "--show-recipe"])
        assert done.exit_code == 0, done.stderr
        shown.append(yaml.safe_load(done.stdout))
    assert (shown[0]["optimiser"]["accumulate"], shown[0]["optimiser"]["clip_grad_norm"]) == (4, 1.0)
    assert (shown[1]["loss"]["label_smoothing"], shown[1]["loss"]["class_weights"]) == (0.1, "balanced")
    assert (shown[2]["optimiser"]["layer_decay"], shown[2]["optimiser"]["weight_decay_exclusions"]) == (0.75, True)
