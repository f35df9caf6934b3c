from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.errors import NotFoundError
from cache_tools.images import open_images
from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from train import losses
from train.data import open_data
from train.labelled import labelled_rows
from train.run import train_student

CPU = torch.device("cpu")
LABELS = np.random.default_rng(0).integers(0, 4, 1000)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return tiny_run.write_cache(tmp_path_factory.mktemp("cache") / "cache", pictures)


@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.001])
def test_every_class_keeps_its_fraction_and_at_least_one_label(fraction: float) -> None:
    rows = labelled_rows(LABELS, fraction, seed=3)
    for label, count in enumerate(np.bincount(LABELS)):
        assert (LABELS[rows] == label).sum() == max(1, round(fraction * count))
    assert np.array_equal(rows, np.unique(rows))


def test_a_smaller_fraction_is_a_subset_and_another_seed_draws_another() -> None:
    small, large = labelled_rows(LABELS, 0.1, seed=3), labelled_rows(LABELS, 0.4, seed=3)
    assert set(small) < set(large)
    assert set(small) != set(labelled_rows(LABELS, 0.1, seed=4))
    assert small[:6].tolist() == labelled_rows(LABELS, 0.1, 3)[:6].tolist() == [20, 21, 49, 59, 60, 63]


def test_cross_entropy_adds_labelled_samples_and_divides_by_the_batch() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.tensor([True, False, False, True, False, False])
    loss = losses.cross_entropy(logits, labels, mask)
    chosen = torch.nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum") / 6
    torch.testing.assert_close(loss, chosen)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[~mask] == 0).all()
    assert losses.cross_entropy(logits, labels, torch.zeros(6, dtype=torch.bool)) == 0.0


def test_the_labels_of_unlabelled_samples_have_no_effect(cache: Path, pictures: Path, tmp_path: Path) -> None:
    """Other labels of unlabelled samples change nothing in the training data."""
    recipe = tiny_run.recipe(cache, tmp_path / "run", label_fraction=0.3)
    data = open_data(recipe, CPU)
    assert data.known is not None
    targets = TeacherCache.open(cache).load_view(0).logits(slice(None)).argmax(1).numpy()
    known = data.known
    assert 0 < known.labelled.sum() < len(known.labelled)
    assert np.array_equal(known.labels[known.labelled], data.images.labels[known.labelled])
    assert np.array_equal(known.labels[~known.labelled], targets[~known.labelled])
    assert np.array_equal(data.real_labels, data.images.labels[known.labelled])
    batches = list(data.feed(recipe, CPU).epoch(0))
    for batch in batches:
        assert batch.labelled is not None
        assert np.array_equal(batch.labels.numpy(), known.labels[batch.index.numpy()])
        assert np.array_equal(batch.labelled.numpy(), known.labelled[batch.index.numpy()])
    assert sum(len(batch.index) for batch in batches) == len(data.images)


def test_a_run_on_labels_alone_leaves_out_unlabelled_samples(cache: Path, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": {"kind": "ce"}, "dataset": tiny_run.dataset(pictures).model_dump()}
    recipe = tiny_run.recipe(cache, tmp_path / "run", label_fraction=0.3, **settings)
    data = open_data(recipe, CPU)
    labels = open_images(tiny_run.dataset(pictures)).labels
    assert np.array_equal(data.images.labels, labels[labelled_rows(labels, 0.3, 0)])
    assert data.known is None


def test_the_comparison_sees_as_many_labelled_images(cache: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(
        cache, tmp_path / "run", label_fraction=0.25, epochs=2, batch_size=8, compare_with_labels=True
    )
    result = train_student(recipe)
    baseline = result.labels_only
    assert baseline is not None
    assert baseline.epochs == 8
    assert baseline.train_samples == len(labelled_rows(open_data(recipe, CPU).images.labels, 0.25, 0))
    assert baseline.last is not None


def test_a_run_may_use_fewer_views_than_the_cache_but_not_more(cache: Path, tmp_path: Path) -> None:
    data = open_data(tiny_run.recipe(cache, tmp_path / "run", num_views=2), CPU)
    assert data.num_views == 2
    with pytest.raises(NotFoundError, match=r"fewer views.*expected 9.*--views 9"):
        open_data(tiny_run.recipe(cache, tmp_path / "run", num_views=9), CPU)
