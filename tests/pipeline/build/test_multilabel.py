"""Caches of images with any number of labels: what is stored, the preflight, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import zarr

from cache_tools.analysis.average_precision import average_precisions
from cache_tools.analysis.fidelity_table import measure
from cache_tools.analysis.stats import analyse
from cache_tools.analysis.tune import tune_fusion
from cache_tools.codecs.presets import TargetCodecs
from cache_tools.derive.recode import recode
from cache_tools.errors import PreflightError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.image_set import ImageSet
from cache_tools.integrity.local import verify
from cache_tools.preprocess import prepare
from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.build.multilabel_preflight import MultiLabelPreflight, run_multilabel_preflight
from tests.support import multilabel
from train.checkpoints import load_student


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multilabel.prepare(tmp_path_factory.mktemp("multilabel"))


@pytest.fixture(scope="module")
def fused(root: Path) -> TeacherCache:
    return TeacherCache.open(build_cache(multilabel.build_recipe(root, root / "fused.zarr")).path)


@pytest.fixture(scope="module")
def components(root: Path) -> TeacherCache:
    recipe = multilabel.build_recipe(root, root / "components.zarr", store="components")
    return TeacherCache.open(build_cache(recipe).path)


def teacher_logits(root: Path, cache: TeacherCache, view: int) -> torch.Tensor:
    images = open_images(multilabel.dataset(root / "squares"))
    pixels = cache.recipe.views.apply(torch.from_numpy(images.load(slice(None))), range(len(images)), view)
    model, _ = load_student(root / "teacher.safetensors")
    with torch.inference_mode():
        return torch.as_tensor(model(prepare(pixels, cache.recipe.teacher.preprocessing)))


@pytest.mark.parametrize("store", ["fused", "components"])
def test_logits_keep_their_level(root: Path, request: pytest.FixtureRequest, store: str) -> None:
    """They are the teacher's own, not centred: a sigmoid sees the shift of a row."""
    cache: TeacherCache = request.getfixturevalue(store)
    for view in range(2):
        expected = teacher_logits(root, cache, view)
        torch.testing.assert_close(cache.load_view(view).logits(slice(None)), expected, rtol=1e-4, atol=1e-4)
        assert float(expected.mean(dim=1).abs().min()) > 1e-3


def test_labels_are_stored_as_a_table(root: Path, fused: TeacherCache) -> None:
    images = open_images(multilabel.dataset(root / "squares"))
    assert fused.recipe.dataset.multi_label
    assert fused.labels.tolist() == images.labels.tolist()
    stored: Any = zarr.open_group(fused.path, mode="r")["labels"]
    assert (stored.shape, stored.dtype.name, stored.metadata.dimension_names) == ((64, 4), "uint8", ("sample", "class"))
    assert not verify(fused.path).problems
    fused.check_dataset(images)


def test_a_damaged_table_of_labels_is_found(root: Path, tmp_path: Path) -> None:
    path = build_cache(multilabel.build_recipe(root, tmp_path / "cache.zarr")).path
    table: Any = zarr.open_group(path, mode="r+")["labels"]
    table[3, 1] = 1 - table[3, 1]
    (problem,) = verify(path).problems
    assert problem.what.startswith("the array labels is damaged: its digest is not the stored one")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": {"name": "local-dir:package:digits-clip"}}, "CLIP cannot teach images with any number of labels"),
        ({"codec": "compact"}, "codec keeps only what a softmax sees.*float16"),
        ({"codec": "top-k"}, "codec keeps only what a softmax sees"),
        ({"codec": {"logits": "sampled"}}, "codec keeps only what a softmax sees"),
        ({"codec": {"logits": {"codec": "companded", "spread": 4.0}}}, "codec keeps only what a softmax sees"),
    ],
)
def test_what_a_sigmoid_cannot_read_is_refused(root: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        multilabel.build_recipe(root, root / "unused.zarr", **changes)


@pytest.mark.parametrize("codec", ["fixed-step", "row-step"])
def test_codecs_that_keep_the_level_are_allowed(fused: TeacherCache, tmp_path: Path, codec: str) -> None:
    codecs = TargetCodecs.model_validate({"logits": codec, "features": "float16"})
    done = recode(fused, codecs, "recoded", tmp_path / "recoded.zarr")
    logits = TeacherCache.open(done.path).load_view(1).logits(slice(None))
    expected = fused.load_view(1).logits(slice(None))
    assert float((logits - expected).abs().max()) < 0.02
    with pytest.raises(RecipeError, match="codec keeps only what a softmax sees"):
        recode(fused, TargetCodecs.model_validate({"logits": "companded"}), "bad", tmp_path / "bad.zarr")


def test_statistics_of_one_label_are_refused(components: TeacherCache) -> None:
    for call, words in (
        (lambda: analyse(components), "^analyse"),
        (lambda: tune_fusion(components, weights=[0.0, 1.0]), "likelihood of a softmax, .*by training"),
        (lambda: measure(components), "gradient of a softmax, .*recode"),
    ):
        with pytest.raises(RecipeError, match=f"{words}.*") as raised:
            call()
        assert "is for images with one label each" in str(raised.value)


class Teachers:
    """Teachers of given logits, in the interface that the preflight uses."""

    device = torch.device("cpu")

    def __init__(self, images: ImageSet, *logits: np.ndarray) -> None:
        self.by_row = [torch.from_numpy(each) for each in logits]
        self.teachers = [Named() for _ in logits]
        self.clips = ()
        self.start = 0

    def outputs(self, pixels: torch.Tensor) -> Any:
        rows = slice(self.start, self.start + len(pixels))
        self.start += len(pixels)
        return Output([Logits(each[rows]) for each in self.by_row])

    def teacher_logits(self, teachers: Any) -> torch.Tensor:
        return torch.stack([each.logits for each in teachers]).mean(dim=0)


class Output:
    def __init__(self, teachers: list[Any]) -> None:
        self.teachers = teachers
        self.clips = ()


class Logits(NamedTuple):
    logits: torch.Tensor


class Named:
    class identity:
        architecture = "resnet8"

    precision = "bfloat16"


def preflight(images: ImageSet, *logits: np.ndarray, limit: int = 100) -> MultiLabelPreflight:
    teachers: Any = Teachers(images, *logits)
    return run_multilabel_preflight(teachers, images, limit, batch_size=16)


def test_the_preflight_measures_each_teacher_against_shuffled_labels(root: Path) -> None:
    images = open_images(multilabel.dataset(root / "squares"), "test")
    rng = np.random.default_rng(5)
    good, fair = (images.labels + rng.normal(size=images.labels.shape) * noise for noise in (0.3, 1.0))
    found = preflight(images, good, fair)
    assert found.networks["teacher"] == pytest.approx(np.nanmean(average_precisions(good, images.labels)))
    assert found.networks["teacher_2"] == pytest.approx(np.nanmean(average_precisions(fair, images.labels)))
    assert found.teacher_map == pytest.approx(np.nanmean(average_precisions((good + fair) / 2, images.labels)))
    assert found.chance_map == pytest.approx(float(images.labels.mean()), abs=0.08)
    assert (found.n, found.split) == (40, "test")
    assert str(found).startswith("mAP on 40 clean images of the test split: teacher ")


@pytest.mark.parametrize("bad", ["noise", "reversed classes", "negated"])
def test_a_teacher_at_chance_is_refused(root: Path, bad: str) -> None:
    images = open_images(multilabel.dataset(root / "squares"), "test")
    rng = np.random.default_rng(6)
    logits = {
        "noise": rng.normal(size=images.labels.shape),
        "reversed classes": images.labels[:, ::-1] + rng.normal(size=images.labels.shape) * 0.1,
        "negated": 1.0 - images.labels + rng.normal(size=images.labels.shape) * 0.1,
    }[bad]
    with pytest.raises(PreflightError, match="no better than chance"):
        preflight(images, np.ascontiguousarray(logits, dtype=np.float64))


@pytest.mark.parametrize(("bad", "found"), [(np.nan, "NaN"), (-np.inf, "infinity")])
def test_a_teacher_that_is_not_finite_is_refused(root: Path, bad: float, found: str) -> None:
    images = open_images(multilabel.dataset(root / "squares"), "test")
    logits = images.labels.astype(np.float64)
    logits[-1, 0] = bad
    with pytest.raises(
        PreflightError, match=rf"outputs are not finite \(resnet8\).*found {found}.*--precision float32"
    ):
        preflight(images, logits)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_perfect_teacher_passes_on_any_sample(root: Path, count: int) -> None:
    images = open_images(multilabel.dataset(root / "squares"), "test").subset(slice(count))
    assert preflight(images, images.labels.astype(np.float64)).teacher_map == 1.0


def test_the_preflight_is_stored_and_found_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.build.multilabel_preflight._by_chance", lambda *_: [0.0])  # the teacher is untrained
    recipe = multilabel.build_recipe(root, tmp_path / "cache.zarr", preflight_samples=40)
    built = build_cache(recipe)
    assert isinstance(built.preflight, MultiLabelPreflight)
    assert built.manifest.preflight == built.preflight.model_dump(mode="json")
    assert build_cache(recipe).preflight == built.preflight
    data = recipe.dataset.model_copy(update={"test_split": "test[::2]"})
    corrected = build_cache(recipe.model_copy(update={"dataset": data})).manifest.preflight
    assert corrected is not None
    assert (corrected["split"], corrected["n"], corrected["teacher_map"] > 0) == ("test[::2]", 20, True)
