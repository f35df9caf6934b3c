"""`cache-tools tune-fusion`: likelihoods against plain float64 loops, and a fusion that is known to be the best."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache_tools.analysis import tune_grid
from cache_tools.analysis.tune import Scale, TuneResult, to_json, tune_fusion
from cache_tools.analysis.tune_grid import factors, nll_sums, parse_scales, parse_weights, stratified_holdout
from cache_tools.analysis.tune_passes import Setting
from cache_tools.analysis.tune_plot import _draw, plot_surface
from cache_tools.analysis.tune_text import print_tuning
from cache_tools.errors import IncompleteError, NotFoundError, RecipeError
from cache_tools.format.recipe import FusionRecipe, PromptEnsemble
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support.cache_factory import build, create, tiny_constants, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.stats_case import labelled_images, reference_summary, softmax, write_cache
from tests.support.turns import some

WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0]
SCALES = (["model", "match"], [1.0, 5.0, 20.0])
SEED, HOLDOUT = 3, 0.4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    return write_cache(tmp_path_factory.mktemp("tune") / "c.zarr", labelled_images(), store="components")


@pytest.fixture(scope="module")
def result(cache: TeacherCache) -> TuneResult:
    return tune_fusion(cache, weights=WEIGHTS, scales=SCALES, holdout=HOLDOUT, seed=SEED)


@pytest.fixture(scope="module")
def logits_and_cosines(cache: TeacherCache) -> list[tuple[np.ndarray, np.ndarray]]:
    """The teacher logits and the cosines of each view, float64."""
    everything = slice(None)
    views = [cache.load_view(view) for view in range(cache.num_views)]
    return [(v.teacher_logits(everything).double().numpy(), v.cosine(everything).double().numpy()) for v in views]


def reference_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    return -sum(math.log(softmax(row)[label]) for row, label in zip(logits, labels, strict=True)) / len(labels)


def by_name(result: TuneResult) -> dict[str, Setting]:
    return {setting.name: setting for setting in result.settings}


def rescaled(result: TuneResult, name: str) -> Setting:
    (setting,) = [setting for setting in result.settings if setting.name.startswith(f"{name} alone, logits ×")]
    return setting


def test_the_surface_is_the_likelihood_on_the_chosen_part(
    cache: TeacherCache, result: TuneResult, logits_and_cosines: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    chooses = ~stratified_holdout(cache.labels, HOLDOUT, SEED)
    assert result.samples_chosen_on == chooses.sum() == 60 - result.samples_held_out
    assert result.weights == tuple(WEIGHTS)
    values = [scale.value for scale in result.scales]
    match = FusionChoice(clip_scale="match").resolve(cache).clip_scale
    assert values == sorted([1.0, 5.0, 20.0, 100.0, match])
    assert {scale.name: scale.value for scale in result.scales if scale.name} == {"model": 100.0, "match": match}
    labels = cache.labels[chooses]
    surface = np.zeros((len(WEIGHTS), len(values)))
    for (row, weight), (column, scale) in itertools.product(enumerate(WEIGHTS), enumerate(values)):
        for teacher, cosine in logits_and_cosines:
            fused = weight * teacher + (1 - weight) * scale * cosine
            surface[row, column] += reference_nll(fused[chooses], labels) / len(logits_and_cosines)
    np.testing.assert_allclose(result.nll, surface, rtol=1e-5)
    row, column = (int(place) for place in np.unravel_index(surface.argmin(), surface.shape))
    assert 0 < row < len(WEIGHTS) - 1
    assert (result.chosen_weight, result.chosen_scale.value) == (WEIGHTS[row], values[column])


def test_settings_are_evaluated_on_held_out_samples(
    cache: TeacherCache, result: TuneResult, logits_and_cosines: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    held = stratified_holdout(cache.labels, HOLDOUT, SEED)

    def nll_by_sample(logits: list[np.ndarray]) -> np.ndarray:
        views = [[-math.log(softmax(row)[y]) for row, y in zip(v, cache.labels, strict=True)] for v in logits]
        return np.mean(views, axis=0)

    own = nll_by_sample([0.7 * teacher + 0.3 * 100 * cosine for teacher, cosine in logits_and_cosines])
    for setting in result.settings:
        clip_factor = setting.clip_factor * (setting.clip_scale or 0.0)
        logits = [setting.teacher_factor * teacher + clip_factor * cosine for teacher, cosine in logits_and_cosines]
        rows = [row for view in logits for row in view[held]]
        expected = reference_summary(rows, list(cache.labels[held]) * len(logits_and_cosines))
        found = {name: getattr(setting, name) for name in ("nll", "top1", "ece")}
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6), setting.name
        nll = nll_by_sample(logits)
        assert setting.nll_chosen_on == pytest.approx(nll[~held].mean(), rel=1e-6)
        count = math.sqrt(held.sum())
        assert setting.nll_error == pytest.approx(nll[held].std(ddof=1) / count, rel=1e-6)
        difference = (nll - own)[held]
        assert setting.difference == pytest.approx(difference.mean(), rel=1e-5, abs=1e-9)
        assert setting.difference_error == pytest.approx(difference.std(ddof=1) / count, rel=1e-5, abs=1e-9)


def test_settings_match_their_names(cache: TeacherCache, result: TuneResult) -> None:
    settings = by_name(result)
    assert next(iter(settings)) == "chosen"
    chosen = settings["chosen"]
    assert (chosen.teacher_factor, chosen.clip_factor) == factors(result.chosen_weight, 1.0)
    assert chosen.clip_scale == result.chosen_scale.value
    assert settings["chosen"].nll_chosen_on == pytest.approx(np.min(result.nll), rel=1e-5)
    own = settings["as the cache was built"]
    assert (own.teacher_weight, own.clip_scale, own.difference) == (0.7, 100.0, 0.0)
    for title, scale in (("official", 1.0), ("model", 100.0)):
        column = [scale.value for scale in result.scales].index(scale)
        best = min(range(len(WEIGHTS)), key=lambda row: result.nll[row][column])
        setting = settings[f"scale {title}, best weight"]
        assert (setting.teacher_weight, setting.clip_scale) == (WEIGHTS[best], scale)
    assert settings["teacher alone"].teacher_factor == 1.0
    assert settings["teacher alone"].clip_factor == settings["CLIP alone, scale model"].teacher_factor == 0.0
    clip = settings["CLIP alone, scale model"]
    assert (clip.clip_factor, clip.clip_scale) == (1.0, 100.0)


def test_each_source_alone_gets_the_factor_of_least_nll(
    cache: TeacherCache, result: TuneResult, logits_and_cosines: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    """The derivative of the NLL with respect to the factor, E[Σ p z − z_y], is 0 there."""
    chooses = ~stratified_holdout(cache.labels, HOLDOUT, SEED)
    labels = torch.from_numpy(cache.labels[chooses])
    teacher, clip = (rescaled(result, name) for name in ("teacher", "CLIP"))
    assert f"× {teacher.teacher_factor:.3g}" in teacher.name
    assert f"× {clip.clip_factor:.3g}" in clip.name
    assert clip.clip_scale == 100.0
    for half, factor in ((0, teacher.teacher_factor), (1, 100 * clip.clip_factor)):
        z = torch.from_numpy(np.concatenate([view[half][chooses] for view in logits_and_cosines]))
        y = labels.repeat(len(logits_and_cosines))[:, None]

        def slope(value: float, z: torch.Tensor = z, y: torch.Tensor = y) -> float:
            return float(((value * z).softmax(1) * z).sum(1).sub(z.gather(1, y)[:, 0]).mean())

        assert slope(0.998 * factor) < 0 < slope(1.002 * factor)


def test_temperature_divides_both_sources(
    cache: TeacherCache, result: TuneResult, logits_and_cosines: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    cool = tune_fusion(cache, weights=[0.5], scales=([], [20.0]), holdout=HOLDOUT, seed=SEED, temperature=2.0)
    chooses = ~stratified_holdout(cache.labels, HOLDOUT, SEED)
    fused = [(0.5 * teacher + 0.5 * 20 * cosine)[chooses] / 2 for teacher, cosine in logits_and_cosines]
    expected = np.mean([reference_nll(view, cache.labels[chooses]) for view in fused])
    np.testing.assert_allclose(cool.nll, [[expected]], rtol=1e-5)
    assert by_name(cool)["as the cache was built"].teacher_factor == pytest.approx(0.35)
    # The factor that rescales the logits compensates the temperature.
    for name in ("teacher", "CLIP"):
        cold, warm = (rescaled(found, name) for found in (cool, result))
        assert cold.teacher_factor + cold.clip_factor == pytest.approx(warm.teacher_factor + warm.clip_factor, rel=2e-3)
        assert cold.nll == pytest.approx(warm.nll, rel=1e-3)


def planted(path: Path, weight: float, scale: float, *, count: int = 3000) -> TeacherCache:
    """A cache whose labels are drawn from the softmax of this fusion, which is then the most likely one."""
    shape: dict[str, Any] = {"num_views": 1, "block_rows": 1024, "linear_head": False, "clip_dim": 24}
    recipe: dict[str, Any] = {"codec": "float32", "store": "components"}
    images = tiny_images(count, 6)
    manifest = tiny_manifest(images, **shape, **recipe)
    targets, embeddings = tiny_targets(manifest), tiny_constants(manifest)["class_embeddings"]
    targets["teacher_logits"] *= 1.5
    features = targets["clip_features"][0].astype(np.float64)
    cosine = features / np.linalg.norm(features, axis=1, keepdims=True) @ embeddings.T
    fused = weight * targets["teacher_logits"][0] + (1 - weight) * scale * cosine
    noise = np.random.default_rng(11).gumbel(size=fused.shape)
    labelled = dataclasses.replace(images, labels=(fused + noise).argmax(axis=1))
    write(create(path, tiny_manifest(labelled, **shape, **recipe), labelled), targets)
    return TeacherCache(path)


def test_finds_the_fusion_that_the_labels_were_drawn_from(tmp_path: Path) -> None:
    found = tune_fusion(planted(tmp_path / "c.zarr", 0.3, 40.0), weights=parse_weights("0:1:0.05"))
    assert found.chosen_weight == pytest.approx(0.3, abs=0.051)
    assert found.chosen_scale.value == pytest.approx(40.0, rel=0.25)
    settings = by_name(found)
    for name in ("as the cache was built", "scale official, best weight", "teacher alone", "CLIP alone, scale model"):
        assert settings[name].nll > settings["chosen"].nll + 0.05, name
    assert settings["chosen"].ece < 0.03 < settings["as the cache was built"].ece
    assert not found.at_edge


def test_held_out_samples_do_not_affect_the_choice(tmp_path: Path) -> None:
    images, results = labelled_images(), []
    held = stratified_holdout(images.labels, HOLDOUT, SEED)
    for number in range(2):
        manifest = tiny_manifest(images, linear_head=False, codec="float32", store="components")
        targets = tiny_targets(manifest)
        targets["teacher_logits"][:, held] *= 1 - 2 * number  # the second cache's teacher predicts the opposite there
        write(create(tmp_path / f"{number}.zarr", manifest, images), targets)
        cache = TeacherCache(tmp_path / f"{number}.zarr")
        results.append(tune_fusion(cache, weights=WEIGHTS, scales=(["model"], [3.0]), holdout=HOLDOUT, seed=SEED))
    first, second = results
    assert first.nll == second.nll
    assert first.settings[0].nll_chosen_on == second.settings[0].nll_chosen_on
    assert by_name(first)["teacher alone"].nll != pytest.approx(by_name(second)["teacher alone"].nll, rel=0.01)


def test_the_scale_is_the_models_if_the_teacher_alone_is_best(tmp_path: Path) -> None:
    found = tune_fusion(planted(tmp_path / "c.zarr", 1.0, 1.0, count=600), weights=[0.0, 0.5, 1.0], scales=SCALES)
    assert (found.chosen_weight, found.chosen_scale.name) == (1.0, "model")
    assert not found.at_edge
    assert found.train_options == "--teacher-weight 1 --clip-scale model"


def test_a_best_scale_at_the_edge_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = planted(tmp_path / "c.zarr", 0.2, 60.0, count=600)
    found = tune_fusion(cache, weights=[0.2, 0.5], scales=([], [1.0, 5.0]))
    assert found.chosen_scale == Scale(value=5.0)
    assert found.at_edge
    print_tuning(found)
    assert "edge" in capsys.readouterr().out


# The grid


@pytest.mark.parametrize("numbers", [7, 100, 1 << 16])
def test_sums_of_many_fusions_at_once_equal_plain_loops(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_grid, "_NUMBERS", {"cpu": numbers})
    monkeypatch.setattr(tune_grid, "_ROW_NUMBERS", {"cpu": numbers})
    rng = np.random.default_rng(0)
    teacher, cosine = rng.normal(0, 8, (23, 5)).astype(np.float32), rng.normal(0, 0.2, (23, 5)).astype(np.float32)
    labels = rng.integers(0, 5, 23)
    pairs = [(a, b) for a in (0.0, 0.3, 1.0, 12.0) for b in (0.0, 1.0, 50.0, 1000.0)]
    got = nll_sums(torch.from_numpy(teacher), torch.from_numpy(cosine), torch.from_numpy(labels), pairs)
    for value, (a, b) in zip(got.tolist(), pairs, strict=True):
        fused = a * teacher.astype(np.float64) + b * cosine.astype(np.float64)
        largest = fused.max(axis=1, keepdims=True)
        plain = np.log(np.exp(fused - largest).sum(axis=1)) + largest[:, 0] - fused[np.arange(23), labels]
        assert value == pytest.approx(plain.sum(), rel=2e-6)


@given(
    labels=st.lists(st.integers(0, 5), min_size=4, max_size=200),
    share=st.floats(0.1, 0.9),
    seed=st.integers(0, 2**32),
)
def test_holdout_takes_the_share_of_every_class(labels: list[int], share: float, seed: int) -> None:
    numbers = np.array(labels)
    if int(len(labels) * share) in {0, len(labels)}:
        return
    held = stratified_holdout(numbers, share, seed)
    assert abs(held.sum() - share * len(labels)) <= 1
    for label in set(labels):
        assert abs(held[numbers == label].sum() - share * (numbers == label).sum()) <= 1 + 1e-6
    np.testing.assert_array_equal(held, stratified_holdout(numbers, share, seed))


def test_holdout_is_drawn_by_the_seed() -> None:
    labels = np.arange(200) % 4
    first, second = (stratified_holdout(labels, 0.5, seed) for seed in (0, 1))
    assert 0.3 < (first == second).mean() < 0.7
    assert first.sum() == second.sum() == 100


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (1.0, 10), (-0.5, 10), (math.nan, 10), (0.2, 2)])
def test_a_holdout_with_an_empty_part_is_refused(share: float, count: int) -> None:
    with pytest.raises(RecipeError, match="--holdout"):
        stratified_holdout(np.zeros(count, np.int64), share, 0)


def test_weights_and_scales_are_parsed() -> None:
    assert parse_weights("0:1:0.05") == [round(0.05 * step, 2) for step in range(21)]
    assert parse_weights("0.7,0.1,0.7") == [0.1, 0.7]
    assert parse_weights("0.2:0.5:0.2") == [0.2, 0.4]
    assert parse_scales("match,3,model,1") == (["model", "match"], [1.0, 3.0])
    names, numbers = parse_scales("1:1000:4")
    assert names == []
    assert numbers == pytest.approx([1, 10, 100, 1000])


@pytest.mark.parametrize(
    "text",
    ["", "a", "0:1", "0:1:0", "1:0:0.1", "0:2:0.5", "-0.1,0.5", "nan", "0:1:1e-9", "0:inf:1", "inf:inf:1", "0:1:nan"],
)
def test_malformed_weights_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--weights"):
        parse_weights(text)


@pytest.mark.parametrize(
    "text", ["", "modle", "0", "-3", "1:2", "10:1:5", "1:10:2.5", "0:10:3", "inf", "1:10:1", "1:10:inf", "1:10:nan"]
)
def test_malformed_scales_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--scales"):
        parse_scales(text)


# Errors, text and plot


def test_a_fused_cache_is_refused_with_the_next_step(tmp_path: Path) -> None:
    build(tmp_path / "fused.zarr", tiny_manifest(tiny_images()), tiny_images())
    with pytest.raises(NotFoundError) as caught:
        tune_fusion(TeacherCache(tmp_path / "fused.zarr"), weights=WEIGHTS)
    for words in ("fused.zarr", "expected a component cache", "found fused targets only", "store=components"):
        assert words in str(caught.value)


def test_too_many_fusions_are_refused(cache: TeacherCache) -> None:
    many = parse_weights("0:1:0.0001")
    with pytest.raises(RecipeError, match=r"too many fusions.*at most 1,000,000; found 10,001 weights × 10,000 scales"):
        tune_fusion(cache, weights=many, scales=parse_scales("1:10:10000"))


def test_missing_views_are_refused(cache: TeacherCache, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such view"):
        tune_fusion(cache, [9], weights=WEIGHTS, scales=SCALES)
    images = tiny_images()
    manifest = tiny_manifest(images, store="components")
    create(tmp_path / "half.zarr", manifest, images)
    with pytest.raises(IncompleteError, match="no view of this cache"):
        tune_fusion(TeacherCache(tmp_path / "half.zarr"), weights=WEIGHTS)


def test_one_view_is_enough(cache: TeacherCache, result: TuneResult) -> None:
    one = tune_fusion(cache, [1], weights=WEIGHTS, scales=SCALES, holdout=HOLDOUT, seed=SEED)
    assert one.views == (1,)
    assert one.nll != result.nll
    assert by_name(one)["as the cache was built"].nll != by_name(result)["as the cache was built"].nll


def test_text_names_the_choice_and_the_exact_options(result: TuneResult, capsys: pytest.CaptureFixture[str]) -> None:
    print_tuning(result)
    text = capsys.readouterr().out
    assert f"--set fusion.teacher_weight={result.chosen_weight:g} --set fusion.clip_scale=" in text
    assert f"--teacher-weight {result.chosen_weight:g} --clip-scale {result.chosen_scale.option}" in text
    assert f"train-student --cache {result.path} --teacher-weight" in text
    assert f"build-cache {result.name}" not in text, "the name of a cache is no recipe"
    assert f"{np.min(result.nll):.4f}*" in text
    for setting in result.settings:
        assert setting.name in text
        assert f"{setting.nll:.4f} ± {setting.nll_error:.4f}" in text
    assert "If the teacher was trained on these images" in text


def test_json_is_plain_and_complete(result: TuneResult) -> None:
    found = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert found["nll"] == [list(row) for row in result.nll]
    assert found["train_options"] == result.train_options
    assert len(found["settings"]) == len(result.settings)


def test_the_plot_marks_the_choice_and_the_known_settings(result: TuneResult, tmp_path: Path) -> None:
    plot_surface(result, tmp_path / "surface.png")
    with Image.open(tmp_path / "surface.png") as image:
        assert (image.format, image.size) == ("PNG", (1400, 868))
    axes, _ = _draw(result).axes
    marks = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines}
    assert marks["chosen"] == (result.chosen_weight, result.chosen_scale.value)
    assert marks["as the cache was built"] == (0.7, 100.0)
    texts = " ".join(text.get_text() for text in axes.texts)
    assert "model 100" in texts
    assert "match" in texts
    assert "official 1" in texts


@pytest.mark.parametrize("grid", [{"weights": [0.5], "scales": SCALES}, {"weights": WEIGHTS, "scales": ([], [7.0])}])
def test_one_weight_or_one_scale_is_plotted_as_a_curve(
    cache: TeacherCache, grid: dict[str, Any], tmp_path: Path
) -> None:
    found = tune_fusion(cache, [0], **grid)
    plot_surface(found, tmp_path / "curve.png")
    (axes,) = _draw(found).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.ravel(found.nll))
    assert not found.at_edge or len(found.scales) > 1


@pytest.mark.medium
@pytest.mark.parametrize("ensemble", some(["logits", "embedding", "probabilities"], 1))
def test_several_networks_are_tuned_as_they_are_fused(tmp_path: Path, ensemble: PromptEnsemble) -> None:
    """With two teachers and two CLIPs, the surface is the likelihood of the targets that each choice gives."""
    images = tiny_images()
    shares: dict[str, Any] = {"teacher_weights": (0.3, 0.7), "clip_weights": (0.4, 0.6)}
    recipe = FusionRecipe(feature_dim=8, prompt_ensemble=ensemble)
    build(tmp_path / "c", tiny_manifest(images, store="components", num_views=2, fusion=recipe, **shares), images)
    cache = TeacherCache.open(tmp_path / "c")
    result = tune_fusion(cache, weights=[0.0, 0.4], scales=(["model", "match"], [2.0]), holdout=HOLDOUT, seed=SEED)
    held = stratified_holdout(cache.labels, HOLDOUT, SEED)

    def nll(rows: np.ndarray, **choice: object) -> float:
        how = FusionChoice.model_validate(choice).resolve(cache)
        views = [cache.load_view(view, fusion=how).logits(slice(None)).double().numpy() for view in range(2)]
        return float(np.mean([reference_nll(view[rows], cache.labels[rows]) for view in views]))

    for weight, row in zip(result.weights, result.nll, strict=True):
        for scale, found in zip(result.scales, row, strict=True):
            expected = nll(~held, teacher_weight=weight, clip_scale=scale.name or scale.value)
            assert found == pytest.approx(expected, rel=1e-5)
    assert by_name(result)["as the cache was built"].nll == pytest.approx(nll(held), rel=1e-5)
