"""Agreement equals counting image by image in float64. The teachers are those of the cache, or it is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tools.errors import NotFoundError, WeightsError
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.refusion import FusionChoice
from pipeline.build.cache import build_cache
from pipeline.evaluate.agreement import agreement, load_teachers
from tests.support import tiny_build, tiny_run
from train.evaluate.canvas import evaluation_preprocessing
from train.run import train_student
from train.runs.stored import StoredRun, open_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tiny_build.prepare(tmp_path_factory.mktemp("agreement"), train=24)
    build_cache(tiny_build.recipe(root, num_views=1, store="components"))
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> StoredRun:
    train_student(tiny_run.recipe(root / "cache.zarr", root / "run", epochs=1))
    return open_run(root / "run")[0]


@pytest.fixture(scope="module")
def images(root: Path) -> ImageSet:
    return open_images(tiny_run.dataset(root / "pictures"), "test")


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.exp(row.astype(np.float64) - row.max())
    return powers / powers.sum()


def test_figures_equal_counting(run: StoredRun, images: ImageSet):
    ensemble = load_teachers(run, images, CPU)
    rng = np.random.default_rng(0)
    student = rng.normal(0, 2, (len(images), 3)).astype(np.float32)
    advanced: list[int] = []
    found = agreement(torch.from_numpy(student), ensemble, images, batch_size=8, advance=advanced.append)
    assert advanced == [8, 8, 5]
    (teacher,), (clip,) = ensemble.outputs(torch.from_numpy(images.load(slice(None))))
    scaled = ensemble.fusion.clip_scale * clip.cosine
    fused = 0.7 * teacher.logits + 0.3 * scaled
    sources = {"teacher": teacher.logits, "CLIP": scaled, "fusion": fused}
    assert [row.source for row in found] == list(sources)
    for row, logits in zip(found, sources.values(), strict=True):
        same = right = follows = corrects = 0
        kl = 0.0
        for own, other, label in zip(student, logits.numpy(), images.labels, strict=True):
            q, p = softmax(own), softmax(other)
            kl += float((p * np.log(p / q)).sum())
            same += q.argmax() == p.argmax()
            right += p.argmax() == label
            follows += p.argmax() != label and q.argmax() == p.argmax()
            corrects += p.argmax() != label and q.argmax() == label
        wrong = len(images) - right
        assert wrong > 0
        assert (row.n, row.wrong) == (len(images), wrong)
        assert row.top1 == pytest.approx(right / len(images))
        assert row.agreement == pytest.approx(same / len(images))
        assert row.kl == pytest.approx(kl / len(images), rel=1e-5)
        assert row.follows_when_wrong == pytest.approx(follows / wrong)
        assert row.right_when_wrong == pytest.approx(corrects / wrong)


def test_a_student_equal_to_its_teacher_agrees_with_it(run: StoredRun, images: ImageSet):
    ensemble = load_teachers(run, images, CPU)
    (teacher,), _ = ensemble.outputs(torch.from_numpy(images.load(slice(None))))
    same = agreement(teacher.logits, ensemble, images, batch_size=len(images))[0]
    assert (same.agreement, same.follows_when_wrong, same.right_when_wrong) == (1.0, 1.0, 0.0)
    assert same.kl == pytest.approx(0.0, abs=1e-9)


def test_the_teachers_see_the_part_that_the_student_is_tested_on(run: StoredRun, images: ImageSet):
    ensemble = load_teachers(run, images, CPU)
    tested = evaluation_preprocessing((14, 14), images.image_size, ((0.5,) * 3, (0.2,) * 3))
    (teacher,), _ = ensemble.outputs(torch.from_numpy(images.load(slice(None))[:, :, 1:15, 1:15]))
    cropped = agreement(teacher.logits, ensemble, images, batch_size=len(images), tested=tested)[0]
    assert cropped.agreement == 1.0
    assert cropped.kl == pytest.approx(0.0, abs=1e-9)
    assert agreement(teacher.logits, ensemble, images, batch_size=len(images))[0].kl > 1e-6


def test_the_fusion_of_the_run_is_used(run: StoredRun, images: ImageSet):
    ensemble = load_teachers(run, images, CPU)
    assert ensemble.fusion.teacher_weight == 0.7
    assert run.manifest is not None
    assert ensemble.fusion.clip_scales == run.manifest.clip_scales
    choice = FusionChoice(teacher_weight=0.2, clip_scale=5.0)
    other = StoredRun(
        folder=run.folder,
        recipe=run.recipe.model_copy(update={"fusion": choice}),
        dataset=run.dataset,
        manifest=run.manifest,
        cache=run.cache,
    )
    changed = load_teachers(other, images, CPU)
    assert (changed.fusion.teacher_weight, changed.fusion.clip_scales) == (0.2, (5.0,))


def test_missing_and_changed_weights_are_errors(run: StoredRun, images: ImageSet, root: Path):
    weights = (root / "teacher.safetensors").read_bytes()
    try:
        (root / "teacher.safetensors").unlink()
        with pytest.raises(WeightsError, match=r"teacher\.safetensors"):
            load_teachers(run, images, CPU)
        (root / "teacher.safetensors").write_bytes((run.folder / "last.safetensors").read_bytes())
        with pytest.raises(WeightsError, match="not the weights that the cache was built with"):
            load_teachers(run, images, CPU)
    finally:
        (root / "teacher.safetensors").write_bytes(weights)


def test_a_cache_without_a_build_recipe_is_an_error(run: StoredRun, images: ImageSet):
    assert run.manifest is not None
    without_recipe = StoredRun(
        folder=run.folder,
        recipe=run.recipe,
        dataset=run.dataset,
        manifest=run.manifest.model_copy(update={"build_recipe": {}}),
        cache=run.cache,
    )
    with pytest.raises(NotFoundError, match="does not record how its teachers were loaded"):
        load_teachers(without_recipe, images, CPU)
