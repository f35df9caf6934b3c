"""Training from caches of every codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tools.codecs import Sampled, SparseCodec, SparseTargets, TopK
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.errors import RecipeError
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from train import losses
from train.data import open_data
from train.objective import Objective
from train.run import train_student

CPU = torch.device("cpu")


@pytest.mark.medium
@pytest.mark.parametrize("codec", ["float16", "compact", "dense", "coarse"])
@pytest.mark.parametrize("store", ["fused", "components"])
def test_dense_codecs_train_like_float32_targets(pictures: Path, tmp_path: Path, codec: str, store: str) -> None:
    """The batches are the same, but for the rounding of the targets."""
    targets_of = {}
    for choice in ("float32", codec):
        cache = tiny_run.write_cache(tmp_path / choice, pictures, codec=choice, store=store, linear_head=False)
        recipe = tiny_run.recipe(cache, tmp_path / f"run-{choice}", epochs=1, loss={"kind": "kd", "feature": "mse"})
        feed = open_data(recipe, CPU).feed(recipe, CPU)
        targets_of[choice] = [batch.targets for batch in feed.epoch(0)]
        feed.close()
        assert train_student(recipe).last is not None
    for exact, coded in zip(targets_of["float32"], targets_of[codec], strict=True):
        assert isinstance(exact.logits, torch.Tensor)
        assert isinstance(coded.logits, torch.Tensor)
        p, q = exact.logits.softmax(dim=1), coded.logits.softmax(dim=1)
        torch.testing.assert_close(p, q, rtol=0, atol=0.35 if codec == "coarse" and store == "components" else 0.15)
        torch.testing.assert_close(coded.features, exact.features, rtol=0, atol=1.0)


def test_top_k_targets_reach_the_loss_undecoded(pictures: Path, tmp_path: Path) -> None:
    """With every class stored in fine steps, the loss equals that of dense targets."""
    fine = TopK(min_probability=0.0, step=1 / 127, spread=2.0)
    kd = {"kind": "kd", "temperature": 1.0}
    exact = tiny_run.write_cache(tmp_path / "exact", pictures, codec="float32")
    cache = tiny_run.write_cache(tmp_path / "cache", pictures, codec=TargetCodecs(logits=fine))
    recipe = tiny_run.recipe(cache, tmp_path / "run", epochs=1, loss=kd)
    data = open_data(recipe, CPU)
    feed = data.feed(recipe, CPU)
    objective = Objective(recipe.loss, 64, 8, 3, len(data.images), data.labels)
    dense = TeacherCache.open(exact).load_view(0)
    for batch in feed.epoch(0):
        assert isinstance(batch.targets.logits, SparseTargets)
        student = torch.randn(len(batch.index), 3, generator=torch.Generator().manual_seed(0))
        found = objective(student, None, batch)["loss_logit"]
        expected = objective.logit_weight * losses.kd(student, dense.logits(batch.index), 1.0)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
    feed.close()
    result = train_student(recipe)
    assert result.last is not None
    assert np.isfinite(result.last.nll)


def test_a_student_trains_on_sampled_targets(pictures: Path, tmp_path: Path) -> None:
    """The loss takes count / draws, and over many seeds its mean gradient is that of dense targets."""
    kd = {"kind": "kd", "temperature": 4.0, "ce_weight": 0.0}
    exact = TeacherCache.open(tiny_run.write_cache(tmp_path / "exact", pictures, codec="float32")).load_view(0)
    gradients, dense = [], torch.zeros(())
    for seed in range(12):
        codec = TargetCodecs(logits=Sampled(draws=64, temperature=4.0, seed=seed))
        cache = tiny_run.write_cache(tmp_path / str(seed), pictures, codec=codec)
        recipe = tiny_run.recipe(cache, tmp_path / f"run-{seed}", epochs=1, loss=kd)
        data = open_data(recipe, CPU)
        feed = data.feed(recipe, CPU)
        objective = Objective(recipe.loss, 64, 8, 3, len(data.images), data.labels)
        batch = next(iter(feed.epoch(0)))
        feed.close()
        assert isinstance(batch.targets.logits, SparseTargets)
        student = torch.randn(len(batch.index), 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(student, None, batch)["loss"], student)
        expected = objective.logit_weight * losses.kd(student, exact.logits(batch.index), 4.0)
        (dense,) = torch.autograd.grad(expected, student)
        gradients.append(gradient)
    found = torch.stack(gradients)
    error = found.std(dim=0).norm() / 12**0.5
    assert (found.mean(dim=0) - dense).norm() < 1.5 * error
    assert error < 0.1 * dense.norm()
    result = train_student(recipe)
    assert result.last is not None
    assert np.isfinite(result.last.nll)


@pytest.mark.parametrize(
    "loss", [{"kind": "kd", "temperature": 4.0}, {"kind": "dkd", "temperature": 1.0}, {"kind": "standardised_kd"}]
)
@pytest.mark.parametrize("codec", [TopK(), Sampled()], ids=lambda codec: codec.codec)
def test_sparse_targets_are_refused_for_other_losses(
    pictures: Path, tmp_path: Path, loss: dict[str, object], codec: SparseCodec
) -> None:
    cache = tiny_run.write_cache(tmp_path / "cache", pictures, codec=TargetCodecs(logits=codec))
    with pytest.raises(
        RecipeError, match=rf"^{codec.codec} targets hold.*expected loss.kind=kd, loss.temperature=1; found loss.kind"
    ):
        open_data(tiny_run.recipe(cache, tmp_path / "run", loss=loss), CPU)
    labels = tiny_run.recipe(cache, tmp_path / "run", loss={"kind": "ce", "feature": "mse"})
    assert open_data(labels, CPU).target_dim == 8
