"""Shares of several networks of one group: the likelihood and the figures equal a plain recomputation in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cache_tools.analysis.tune_grid import stratified_holdout
from cache_tools.analysis.tune_shares import ShareResult, tune_shares
from cache_tools.cli import app
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.turns import some

GROUPS: dict[str, dict[str, Any]] = {
    "teachers": {"teacher_weights": (0.3, 0.7), "clip_weights": ()},
    "clips": {"teacher_weights": (), "clip_weights": (0.4, 0.6)},
    "three": {"teacher_weights": (0.2, 0.3, 0.5), "clip_weights": ()},
}
EVERYTHING = slice(None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, images = tmp_path_factory.mktemp("shares"), tiny_images()
    for name, weights in GROUPS.items():
        for store in ("fused", "components"):
            manifest = tiny_manifest(images, store=store, codec="float32", num_views=2, name=name, **weights)
            build(root / f"{name}-{store}", manifest, images)
    return root


def sample_nll(cache: TeacherCache, shares: tuple[float, ...], temperature: float) -> np.ndarray[Any, Any]:
    """[V, N], −ln p of the labels, and 0 or 1 for a right prediction, in float64: [2, V, N]."""
    found = []
    for view in range(cache.num_views):
        targets = cache.load_view(view)
        one = targets.teacher_logits if cache.recipe.teachers else targets.clip_logits
        z = sum(share * one(EVERYTHING, number).double().numpy() for number, share in enumerate(shares))
        z = np.asarray(z) / temperature
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        rows = np.arange(len(z))
        found.append(np.stack([-log_p[rows, cache.labels], z.argmax(1) == cache.labels]))
    return np.stack(found, axis=1)


@pytest.mark.parametrize(("name", "temperature"), some([("clips", 3.0), ("teachers", 1.0), ("three", 1.0)], 1))
def test_the_choice_and_its_figures_equal_a_plain_recomputation(root: Path, name: str, temperature: float) -> None:
    cache = TeacherCache.open(root / f"{name}-components")
    result = tune_shares(cache, temperature=temperature, seed=4)
    held = stratified_holdout(cache.labels, 0.5, 4)
    expected = [sample_nll(cache, shares, temperature)[0][:, ~held].mean() for shares in result.tried]
    np.testing.assert_allclose(result.nll, expected, rtol=1e-5)
    assert result.chosen == result.tried[int(np.argmin(expected))]
    own = GROUPS[name]["teacher_weights"] or GROUPS[name]["clip_weights"]
    assert result.settings[1].shares == own
    base = sample_nll(cache, own, temperature)[0].mean(axis=0)[held]
    for setting in result.settings:
        nll, right = sample_nll(cache, setting.shares, temperature)
        each = nll.mean(axis=0)
        assert setting.nll_chosen_on == pytest.approx(each[~held].mean(), rel=1e-5)
        assert setting.nll == pytest.approx(each[held].mean(), rel=1e-5)
        assert setting.nll_error == pytest.approx(each[held].std(ddof=1) / np.sqrt(held.sum()), rel=1e-5)
        assert setting.top1 == pytest.approx(right[:, held].mean())
        assert setting.difference == pytest.approx((each[held] - base).mean(), abs=1e-5)
    assert result.settings[0].nll_chosen_on <= min(setting.nll_chosen_on for setting in result.settings[3:]) + 1e-6


def test_the_mixes_that_are_tried(root: Path) -> None:
    def tried(name: str, **options: Any) -> tuple[tuple[float, ...], ...]:
        return tune_shares(TeacherCache.open(root / f"{name}-components"), [0], **options).tried

    assert len(tried("teachers")) == 21
    assert tried("teachers", weights=[0.0, 0.25, 1.0]) == ((0.0, 1.0), (0.25, 0.75), (1.0, 0.0))
    three = tried("three")
    assert len(set(three)) == len(three) == 66
    assert all(sum(shares) == pytest.approx(1.0) for shares in three)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune-fusion", *map(str, arguments)])


def test_the_command_prints_options_that_training_takes(root: Path) -> None:
    path = root / "teachers-components"
    data = json.loads(run(path, "--json").stdout)
    result = ShareResult.model_validate({key: value for key, value in data.items() if not key.endswith("_options")})
    share, other = result.chosen
    assert data["train_options"] == f"--set fusion.teacher_weights='[{share:g}, {other:g}]'"
    assert data["build_options"] == f"--set teacher.0.weight={share:g} --set teacher.1.weight={other:g}"
    cache = TeacherCache.open(path)
    fused = cache.load_view(0, fusion=FusionChoice(teacher_weights=result.chosen).resolve(cache)).logits(EVERYTHING)
    parts = [cache.load_view(0).teacher_logits(EVERYTHING, number) for number in range(2)]
    mixed = share * parts[0] + other * parts[1]
    torch.testing.assert_close(fused, mixed - mixed.mean(dim=1, keepdim=True), rtol=1e-4, atol=1e-4)
    text = run(path).stdout
    assert data["train_options"] in text
    assert data["build_options"] in text
    assert f"cache-tools fuse {path} --teacher-weights {share:g},{other:g}\n" in text
    assert "tiny_teacher alone" in text
    assert "CLIP" not in text
    assert "--set clip.0.weight=" in run(root / "clips-components").stdout


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("teachers-components", ["--scales", "model"], "one group of networks: only their shares are tuned (--scales)"),
        ("clips-components", ["--plot", "surface.png"], "(--plot); found surface.png. Leave --plot out"),
        ("three-components", ["--weights", "0.5"], "--weights are shares of the first of two networks"),
        ("teachers-fused", [], "found fused targets only: 2 teachers, no CLIP"),
        ("clips-fused", [], "found fused targets only: CLIP alone"),
    ],
)
def test_options_that_have_no_effect_are_refused(root: Path, name: str, arguments: list[str], words: str) -> None:
    done = run(root / name, *arguments)
    assert done.exit_code == 2
    assert words in done.stderr
