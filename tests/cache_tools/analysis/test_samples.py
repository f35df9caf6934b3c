"""`cache-tools show`: every number against plain numpy, and which samples are chosen."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools import plugins
from cache_tools.analysis.choice import Choice, even_places, even_samples
from cache_tools.analysis.samples import Shown, show_samples
from cache_tools.analysis.stats import analyse
from cache_tools.errors import DataError, IncompleteError, MismatchError, NotFoundError, RecipeError
from cache_tools.images import open_images
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.reader import TeacherCache
from cache_tools.views import Flip, PadCrop, ViewRecipe
from tests.support.cache_factory import create, tiny_manifest, tiny_targets, write
from tests.support.show_case import CLASSES, NUM_VIEWS, SAMPLES, SIDE, write_cache, write_pictures

SOURCES = ("teacher", "clip", "fusion")
TEMPERATURE = 2.5
SEED: dict[str, Any] = {"base_seed": 7, "clean_first": True, "ops": (PadCrop(), Flip())}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("show") / "c.zarr", pictures, store="components")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("show") / "f.zarr", pictures, store="fused")


def probabilities(cache: TeacherCache, view: int, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Source → p [N, C] of whole views, by the exponentials themselves."""
    targets, everything = cache.load_view(view), slice(None)
    logits = {
        "teacher": targets.teacher_logits(everything),
        "clip": targets.clip_logits(everything),
        "fusion": targets.logits(everything),
    }
    found = {}
    for source, rows in logits.items():
        scaled = rows.double().numpy() / temperature
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        found[source] = powers / powers.sum(axis=1, keepdims=True)
    return found


def entropy(p: np.ndarray) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def assert_says(opinion: Any, p: np.ndarray, label: int) -> None:
    ranked = sorted(range(len(p)), key=lambda number: (-p[number], number))[:5]
    assert [number for number, _ in opinion.top] == ranked
    assert [value for _, value in opinion.top] == pytest.approx(p[ranked].tolist(), rel=1e-9)
    assert opinion.right == (ranked[0] == label)
    assert opinion.label_probability == pytest.approx(p[label])


def test_top_five_of_each_source_and_view(cache: TeacherCache) -> None:
    samples = (44, 3, 17, 16)  # in two blocks that are not neighbours, in no order
    shown = show_samples(cache, Choice("samples", samples=samples), [0, 2], temperature=TEMPERATURE)
    p = {view: probabilities(cache, view, TEMPERATURE) for view in (0, 2)}
    assert [each.sample for each in shown.samples] == list(samples)
    assert shown.sources == SOURCES
    assert shown.views == (0, 2)
    rights = []
    for each in shown.samples:
        label = int(cache.labels[each.sample])
        assert each.label == label
        for view in each.views:
            for source in SOURCES:
                assert_says(view.opinions[source], p[view.view][source][each.sample], label)
                rights.append(view.opinions[source].right)
            both = [p[view.view][source][each.sample] for source in ("teacher", "clip")]
            assert view.divergence == pytest.approx(divergence(*both))
        for source in SOURCES:
            assert_says(each.mean[source], np.mean([p[view][source][each.sample] for view in (0, 2)], axis=0), label)
    assert set(rights) == {True, False}, "both are tried"
    assert (shown.helped, shown.hurt) == (None, None), "named samples need no statistics"


def test_pixels_are_those_of_the_views(cache: TeacherCache, pictures: Path) -> None:
    images = open_images(DatasetRecipe(name="folder", data_dir=pictures, image_size=SIDE), "train")
    chosen = np.array([5, 40])
    shown = show_samples(cache, Choice("samples", samples=(5, 40)))
    assert shown.views == (0, 1, 2), "the first three of four"
    canvases = torch.from_numpy(images.load(chosen))
    for view in shown.views:
        expected = cache.recipe.views.apply(canvases, chosen, view).permute(0, 2, 3, 1).numpy()
        got = [each.views[view].pixels for each in shown.samples]
        assert np.array_equal(np.stack(got), expected)
    assert np.array_equal(shown.samples[0].views[0].pixels, images.load(chosen)[0].transpose(1, 2, 0)), "clean"
    assert [each.name for each in shown.samples] == [images.name_of(5), images.name_of(40)]  # type: ignore[attr-defined]


def means(cache: TeacherCache, figure: Callable[[dict[str, np.ndarray], int], float], views: Any) -> list[float]:
    by_view = [probabilities(cache, view) for view in views]
    return [float(np.mean([figure(p, sample) for p in by_view])) for sample in range(SAMPLES)]


@pytest.mark.parametrize("views", [None, [1], [3, 1]])
def test_disagree_and_confused_rank_by_means_over_the_views(cache: TeacherCache, views: list[int] | None) -> None:
    figures: dict[Any, Any] = {
        "disagree": lambda p, sample: divergence(p["teacher"][sample], p["clip"][sample]),
        "confused": lambda p, sample: entropy(p["fusion"][sample]),
    }
    for order, figure in figures.items():
        expected = means(cache, figure, range(NUM_VIEWS) if views is None else views)
        ranked = sorted(range(SAMPLES), key=lambda sample: -expected[sample])[:6]
        shown = show_samples(cache, Choice(order, count=6), views)
        assert [each.sample for each in shown.samples] == ranked
        assert [each.figure for each in shown.samples] == pytest.approx([expected[sample] for sample in ranked])
        assert shown.about.views == tuple(range(NUM_VIEWS) if views is None else views)


def test_suspicious_labels_and_gains_are_those_of_stats(cache: TeacherCache) -> None:
    stats = analyse(cache)
    shown = show_samples(cache, Choice("suspicious", count=7))
    rows = stats.suspicious(7).to_dicts()
    assert len(rows) == 7
    assert [each.suspicion for each in shown.samples] == rows
    assert [each.figure for each in shown.samples] == [row["against"] for row in rows]
    gains = {row["class"]: row["gain_over_teacher"] for row in stats.classes.to_dicts()}
    assert shown.helped is not None
    assert shown.hurt is not None
    helped = sorted((name for name in gains if gains[name] > 0), key=lambda name: -gains[name])[:3]
    hurt = sorted((name for name in gains if gains[name] < 0), key=lambda name: gains[name])[:3]
    assert helped
    assert [gains[name] for name in shown.helped["class"]] == [gains[name] for name in helped]
    assert [gains[name] for name in shown.hurt["class"]] == [gains[name] for name in hurt]


def test_even_places_and_samples() -> None:
    assert even_places(3, 10).tolist() == [0, 3, 6]
    assert even_places(5, 3).tolist() == [0, 1, 2]
    assert even_places(4, 0).tolist() == []
    labels = np.array([0] * 8 + [2] * 2 + [3] * 5)
    assert even_samples(labels, 4, 3).tolist() == [0, 8, 10], "one of each class that has samples"
    assert even_samples(labels, 4, 2).tolist() == [0, 8]
    counts = Counter(labels[even_samples(labels, 4, 9)].tolist())
    assert counts == {0: 4, 2: 2, 3: 3}, "a class with too few leaves its places to others"
    assert even_samples(labels, 4, 99).tolist() == list(range(15))
    assert even_samples(labels, 4, 4).tolist() == [0, 4, 8, 10]


def test_the_default_is_spread_over_the_classes(cache: TeacherCache, fused: TeacherCache) -> None:
    for each in (cache, fused):
        shown = show_samples(each, Choice(count=len(CLASSES)))
        assert [sample.label for sample in shown.samples] == list(range(len(CLASSES)))
    samples = [[s.sample for s in show_samples(each, Choice(count=9)).samples] for each in (cache, fused)]
    assert samples[0] == samples[1], "a function of the labels alone"


def test_samples_of_one_class(cache: TeacherCache) -> None:
    members = np.flatnonzero(cache.labels == 1)
    shown = show_samples(cache, Choice("class", class_name="bee", count=2))
    assert [each.sample for each in shown.samples] == [members[0], members[len(members) // 2]]
    every = show_samples(cache, Choice("class", class_name="bee"))
    assert [each.sample for each in every.samples] == members.tolist()


def test_a_fused_cache_has_the_fusion_only(fused: TeacherCache) -> None:
    shown = show_samples(fused, Choice("confused", count=2))
    assert shown.sources == ("fusion",)
    assert (shown.helped, shown.hurt) == (None, None)
    assert all(view.divergence is None for each in shown.samples for view in each.views)
    with pytest.raises(NotFoundError, match=r"teacher and CLIP separately.*found store: fused.*store=components"):
        show_samples(fused, Choice("disagree"))


@pytest.mark.parametrize("group", ["teacher", "clip"])
def test_a_cache_of_one_group_has_its_predictions(tmp_path: Path, pictures: Path, group: str) -> None:
    weights: dict[str, Any] = {"clip_weights": ()} if group == "teacher" else {"teacher_weights": ()}
    cache = write_cache(tmp_path / "c.zarr", pictures, store="components", **weights)
    shown = show_samples(cache, Choice("suspicious", count=3))
    assert shown.sources == (group,)
    with pytest.raises(NotFoundError, match=f"found {'CLIP' if group == 'clip' else 'the teacher'} alone"):
        show_samples(cache, Choice("disagree"))


def test_mixed_views_name_the_other_image(tmp_path: Path, pictures: Path) -> None:
    views = ViewRecipe(**SEED, mix={"mixup_alpha": 0.8, "probability": 0.7})
    cache = write_cache(tmp_path / "c.zarr", pictures, store="components", views=views)
    shown = show_samples(cache, Choice("samples", samples=tuple(range(20))), [0, 1])
    mixing = cache.recipe.views.mixing(np.arange(20), 1, (SIDE, SIDE))
    assert mixing is not None
    partners = [each.views[1].partner for each in shown.samples]
    expected = [None if share == 1.0 else int(other) for other, share in zip(*mixing, strict=True)]
    assert partners == expected
    assert len({partner is None for partner in partners}) == 2, "some are mixed, others are not"
    assert [each.views[1].share for each in shown.samples] == mixing.share.tolist()
    assert all(each.views[0].partner is None for each in shown.samples), "view 0 is clean"


class HalfStudent:
    """Rates classes by the means of the channels of a view."""

    name, run, fingerprint = "half", "runs/half", "0" * 64

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3)) @ torch.arange(21.0).reshape(3, 7) / 99


def test_a_student_sees_the_views(cache: TeacherCache, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def open_student(*arguments: Any) -> HalfStudent:
        asked.append(arguments)
        return HalfStudent()

    monkeypatch.setattr(plugins, "load", {"student": open_student}.__getitem__)
    shown = show_samples(cache, Choice("samples", samples=(30, 2)), [1], student="runs/half")
    assert asked == [("runs/half", CLASSES, (SIDE, SIDE), torch.device("cpu"))]
    assert shown.sources == (*SOURCES, "student")
    for each in shown.samples:
        pixels = torch.from_numpy(each.views[0].pixels.copy()).permute(2, 0, 1)[None]
        p = HalfStudent().logits(pixels).double().softmax(dim=1)[0].numpy()
        assert_says(each.views[0].opinions["student"], p, each.label)
    student = {"name": "half", "run": "runs/half", "fingerprint": "0" * 64}
    assert shown.to_dict()["student"] == student


def test_json_has_every_number(cache: TeacherCache) -> None:
    shown: Shown = show_samples(cache, Choice("disagree", count=3), [1, 2])
    data = json.loads(json.dumps(shown.to_dict()))
    assert data["about"]["fingerprint"] == cache.manifest.fingerprint
    assert data["views"] == [1, 2]
    for row, each in zip(data["samples"], shown.samples, strict=True):
        assert (row["sample"], row["class"], row["file"]) == (each.sample, CLASSES[each.label], each.name)
        assert row["figure"] == each.figure
        for by_view, view in zip(row["views"], each.views, strict=True):
            for source in SOURCES:
                opinion, said = view.opinions[source], by_view["sources"][source]
                top = [(entry["label"], entry["probability"]) for entry in said["top"]]
                assert top == list(opinion.top)
                assert [entry["class"] for entry in said["top"]] == [CLASSES[number] for number, _ in opinion.top]
                assert said["right"] == opinion.right
    assert len(data["helped"]) == len(shown.helped if shown.helped is not None else [])


@pytest.mark.parametrize(
    ("choice", "views", "error", "message"),
    [
        (Choice("samples", samples=(45,)), None, NotFoundError, r"no such sample.*expected 0 to 44; found 45"),
        (Choice("samples", samples=(3, -1)), None, NotFoundError, r"no such sample.*found -1"),
        (Choice("class", class_name="e"), None, NotFoundError, r"no such class.*one of 'bee', 'eel'; found 'e'"),
        (Choice(), [4], NotFoundError, "no such view"),
        (Choice(count=50), list(range(NUM_VIEWS)) * 2, RecipeError, r"45 samples in 8 views\).*at most 200; found 360"),
    ],
)
def test_what_is_not_there_is_refused(
    cache: TeacherCache, choice: Choice, views: list[int] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        show_samples(cache, choice, views)


def test_missing_and_changed_images_are_refused(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    cache = write_cache(tmp_path / "c.zarr", pictures)
    moved = pictures.rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"not found.*--data-dir"):
        show_samples(cache, Choice())
    assert len(show_samples(cache, Choice(), data_dir=moved).samples) == 12
    (moved / "train/ant/00.png").unlink()
    with pytest.raises(MismatchError, match="1 image is missing"):
        show_samples(cache, Choice(), data_dir=moved)


def test_other_pixels_are_refused(tmp_path: Path, pictures: Path) -> None:
    cache = write_cache(tmp_path / "c.zarr", pictures)
    wrong = tuple(canary.model_copy(update={"pixel_digest": "0" * 32}) for canary in cache.manifest.canaries)
    cache.manifest = cache.manifest.model_copy(update={"canaries": wrong})
    with pytest.raises(MismatchError, match="not the pixels that the teachers saw"):
        show_samples(cache, Choice())


def test_unfinished_views_are_not_shown(tmp_path: Path, pictures: Path) -> None:
    source = DatasetRecipe(name="folder", data_dir=pictures, image_size=SIDE)
    images: Any = open_images(source, "train")
    manifest = tiny_manifest(images, num_views=2).model_copy(update={"dataset": source})
    write(create(tmp_path / "c.zarr", manifest, images), tiny_targets(manifest), [(1, 0), (1, 1), (1, 2), (0, 0)])
    cache = TeacherCache(tmp_path / "c.zarr")
    assert show_samples(cache, Choice()).views == (1,)
    with pytest.raises(IncompleteError):
        show_samples(cache, Choice(), [0, 1])


def test_several_labels_are_refused(cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = cache.recipe.dataset.model_copy(update={"multi_label": True})
    recipe = cache.recipe.model_copy(update={"dataset": dataset})
    several = TeacherCache(cache.path)
    several.manifest = cache.manifest.model_copy(update={"recipe": recipe})
    with pytest.raises(RecipeError, match="show is for images with one label each"):
        show_samples(several, Choice())
