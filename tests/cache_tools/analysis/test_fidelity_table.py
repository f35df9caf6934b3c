"""analysis/fidelity_table.py, fidelity_bench.py: bytes as in a recoded cache, errors as in a slow float64 reference."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache_tools.analysis.fidelity_bench import STAGES, Bench, CodecCost
from cache_tools.analysis.fidelity_table import AS_IT_IS, CostTable, default_codecs, measure
from cache_tools.analysis.fidelity_text import print_costs
from cache_tools.codecs.sparse import MAX_CLASSES
from cache_tools.derive.block_reader import BlockReader
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.derive.recode import recode
from cache_tools.errors import FormatError, IncompleteError, NotFoundError, RecipeError
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.turns import some
from train.losses.tail import kd_tail

HAS_PCODEC = importlib.util.find_spec("pcodec") is not None
IMAGES = tiny_images(num_classes=7)
TEMPERATURES = (1.0, 3.0)
SAMPLED = "sampled:draws=8,temperature=3"
STORES: dict[str, dict[str, Any]] = {
    "fused": {"store": "fused"},
    "components": {"store": "components"},
    "mixed": {"store": "components", "teacher_weights": (0.3, 0.7), "clip_weights": (0.5, 0.5)},
}
SPECS = {
    "fused": ["float16", "compact", "row-step", "fixed-step:step=1/4+", "top-k:max_classes=3", "top-k", SAMPLED],
    "components": ["float16", "compact", "row-step", "feature-steps:resolution=3"],
    "mixed": ["compact", "coarse", "top-k:max_classes=3", "fixed-step+feature-steps:resolution=3"],
}
CASES = [(store, spec) for store, specs in SPECS.items() for spec in specs]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TeacherCache]:
    folder = tmp_path_factory.mktemp("fidelity")
    for name, options in STORES.items():
        build(folder / name, tiny_manifest(IMAGES, codec="float32", **options), IMAGES)
    return {name: TeacherCache.open(folder / name) for name in STORES}


@pytest.fixture(scope="module")
def tables(caches: dict[str, TeacherCache]) -> dict[str, CostTable]:
    return {name: measure(cache, SPECS[name], temperatures=TEMPERATURES) for name, cache in caches.items()}


@pytest.fixture(scope="module")
def recoded(
    caches: dict[str, TeacherCache], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], TeacherCache]:
    """The cache of a store in other codecs, made when a test first asks for it."""
    folder = tmp_path_factory.mktemp("recoded")

    @functools.cache
    def make(store: str, spec: str) -> TeacherCache:
        out = folder / str(CASES.index((store, spec)))
        recode(caches[store], codecs_for(spec, caches[store].recipe), "other", out)
        return TeacherCache.open(out)

    return make


def cost_of(table: CostTable, spec: str) -> CodecCost:
    (cost,) = (cost for cost in table.codecs if cost.spec == spec)
    return cost


def chunk_bytes(cache: TeacherCache, view: int, target: str | None = None) -> int:
    """Bytes of the chunk files of one view."""
    arrays = [a for spec in cache.targets.values() if target in (None, spec.name) for a in spec.arrays]
    return sum(file.stat().st_size for array in arrays for file in (cache.path / array.name).glob(f"c.{view}.*"))


def softmax(rows: np.ndarray, temperature: float) -> np.ndarray:
    scaled = rows.astype(np.float64) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def relative(decoded: np.ndarray, truth: np.ndarray) -> float:
    decoded, truth = decoded.astype(np.float64), truth.astype(np.float64)
    return float(np.linalg.norm(decoded - truth) / np.linalg.norm(truth - truth.mean(axis=0)))


# Bytes


@pytest.mark.medium
@pytest.mark.parametrize(("store", "spec"), some(CASES, 5))
def test_bytes_equal_the_size_of_the_files(
    tables: dict[str, CostTable], recoded: Callable[[str, str], TeacherCache], store: str, spec: str
) -> None:
    cost, cache = cost_of(tables[store], spec), recoded(store, spec)
    assert cost.bytes is not None
    assert cost.bytes * 75 == pytest.approx(chunk_bytes(cache, 1), abs=1e-6)
    assert cost.targets.keys() == cache.targets.keys()
    for name, target in cost.targets.items():
        assert target.bytes * 75 == pytest.approx(chunk_bytes(cache, 1, name), abs=1e-6)
        assert target.codec == cache.targets[name].codec.model_dump(mode="json")


@pytest.mark.parametrize("store", STORES)
def test_the_caches_own_codecs_have_no_error(
    caches: dict[str, TeacherCache], tables: dict[str, CostTable], store: str
) -> None:
    cost = cost_of(tables[store], AS_IT_IS)
    assert cost.bytes is not None
    assert cost.bytes * 75 == pytest.approx(chunk_bytes(caches[store], 1), abs=1e-6)
    assert set(cost.g.values()) == set(cost.kl.values()) == {0.0}
    assert (cost.top1_agreement, cost.feature_error, cost.largest_feature_error) == (1.0, 0.0, 0.0)
    assert {target.error for target in cost.targets.values()} == {0.0}


def test_rows_of_a_larger_cache_cost_about_as_much(caches: dict[str, TeacherCache]) -> None:
    table = measure(caches["fused"], ["row-step", "compact"], rows=40)
    assert table.rows == 40
    whole = measure(caches["fused"], ["row-step", "compact"])
    for spec in ("row-step", "compact", AS_IT_IS):
        some, every = cost_of(table, spec).bytes, cost_of(whole, spec).bytes
        assert some is not None
        assert every is not None
        assert some == pytest.approx(every, rel=0.5)


# Errors


@pytest.mark.parametrize(("store", "spec"), some(CASES, 5))
def test_errors_against_a_slow_reference(
    caches: dict[str, TeacherCache],
    tables: dict[str, CostTable],
    recoded: Callable[[str, str], TeacherCache],
    store: str,
    spec: str,
) -> None:
    """Compares the targets that both caches give to training, with softmax and norms in float64."""
    cost = cost_of(tables[store], spec)
    before, after = (cache.load_view(1) for cache in (caches[store], recoded(store, spec)))
    truth, decoded = (view.logits(slice(None)).numpy() for view in (before, after))
    students = Bench(BlockReader(caches[store]), 1, 75, TEMPERATURES).students
    dense = cost.g_even_tail or cost.g
    assert dense.keys() == {f"{stage}@{t:g}" for stage in STAGES for t in TEMPERATURES}
    for t in TEMPERATURES:
        p, d = softmax(truth, t), softmax(decoded, t)
        assert cost.kl[f"{t:g}"] == pytest.approx(float((p * np.log(p / d)).sum(axis=1).mean()), rel=1e-3, abs=1e-10)
        for stage in STAGES:
            q = softmax(students[stage].numpy(), t)
            expected = np.linalg.norm(d - p) / np.linalg.norm(q - p)
            assert dense[f"{stage}@{t:g}"] == pytest.approx(float(expected), rel=1e-3, abs=1e-7)
    assert cost.top1_agreement == (truth.argmax(axis=1) == decoded.argmax(axis=1)).mean()
    features = [view.features(slice(None)).numpy() for view in (after, before)]
    assert cost.feature_error == pytest.approx(relative(*features), rel=1e-3, abs=1e-7)
    assert cost.largest_feature_error == pytest.approx(
        float(np.abs(features[0] - features[1]).max()), rel=1e-3, abs=1e-7
    )


@pytest.mark.parametrize(("store", "spec"), some(CASES, 5))
def test_errors_of_each_stored_target(
    caches: dict[str, TeacherCache],
    tables: dict[str, CostTable],
    recoded: Callable[[str, str], TeacherCache],
    store: str,
    spec: str,
) -> None:
    for name, target in cost_of(tables[store], spec).targets.items():
        decoded, truth = (cache.read_array(name, 1) for cache in (recoded(store, spec), caches[store]))
        if "logits" in name:
            decoded, truth = (rows - rows.mean(axis=1, keepdims=True) for rows in (decoded, truth))
        assert target.error == pytest.approx(relative(decoded, truth), rel=1e-3, abs=1e-6)
        assert target.largest_error == pytest.approx(float(np.abs(decoded - truth).max()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("spec", ["top-k:max_classes=3", "top-k"])
def test_top_k_is_measured_with_its_own_loss(
    caches: dict[str, TeacherCache],
    tables: dict[str, CostTable],
    recoded: Callable[[str, str], TeacherCache],
    spec: str,
) -> None:
    """The gradient of `train.losses.tail.kd_tail` by autograd against that of KD on the cache's logits."""
    cost = cost_of(tables["fused"], spec)
    assert cost.g.keys() == {f"{stage}@1" for stage in STAGES}, "the codec's temperature alone"
    truth = caches["fused"].load_view(1).logits(slice(None))
    sparse = recoded("fused", spec).load_view(1).sparse_logits(slice(None), 1.0)
    for stage, student in Bench(BlockReader(caches["fused"]), 1, 75, TEMPERATURES).students.items():
        student = student.clone().requires_grad_()
        (found,) = torch.autograd.grad(kd_tail(student, *sparse, 1.0), student)
        exact = (softmax(student.detach().numpy(), 1.0) - softmax(truth.numpy(), 1.0)) / 75
        expected = np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact)
        assert cost.g[f"{stage}@1"] == pytest.approx(float(expected), rel=1e-2, abs=1e-5)
    kept = sparse.classes < 7
    p = softmax(truth.numpy(), 1.0)
    mass = np.where(kept, np.take_along_axis(p, sparse.classes.clamp_max(6).numpy(), axis=1), 0.0).sum(axis=1)
    assert cost.captured_mass == pytest.approx(float(mass.mean()), abs=2e-3)
    assert cost.classes_kept == pytest.approx(float(kept.sum(dim=1).double().mean()))


def test_bias_and_noise_are_told_apart(
    caches: dict[str, TeacherCache], tables: dict[str, CostTable], recoded: Callable[[str, str], TeacherCache]
) -> None:
    """Against stored caches of several seeds, with the gradients of `kd_tail` by autograd."""
    top_k, sampled = cost_of(tables["fused"], "top-k"), cost_of(tables["fused"], SAMPLED)
    assert top_k.g_bias == top_k.g
    assert set(top_k.g_noise.values()) == set(top_k.g_bias_error.values()) == {0.0}
    assert top_k.resamplings is None
    assert sampled.captured_mass is None
    assert sampled.g.keys() == sampled.g_noise.keys() == {f"{stage}@3" for stage in STAGES}
    truth = caches["fused"].load_view(1).logits(slice(None))
    sparse = recoded("fused", SAMPLED).load_view(1).sparse_logits(slice(None), 3.0)
    for stage, student in Bench(BlockReader(caches["fused"]), 1, 75, TEMPERATURES).students.items():
        student = student.clone().requires_grad_()
        (found,) = torch.autograd.grad(kd_tail(student, *sparse, 3.0), student)
        exact = 3.0 * (softmax(student.detach().numpy(), 3.0) - softmax(truth.numpy(), 3.0)) / 75
        size = float(np.linalg.norm(exact))
        assert sampled.g[f"{stage}@3"] == pytest.approx(float(np.linalg.norm(found.numpy() - exact)) / size, rel=1e-3)
        scaled = 8 * softmax(truth.numpy(), 3.0)
        noise = np.sqrt(((scaled % 1) * (1 - scaled % 1)).sum()) / 8 * 3.0 / 75 / size
        assert sampled.g_noise[f"{stage}@3"] == pytest.approx(float(noise), rel=0.05)
        assert sampled.g_bias_error[f"{stage}@3"] == pytest.approx(float(noise) / 32**0.5, rel=0.05)
        assert 0.7 * sampled.g_bias_error[f"{stage}@3"] < sampled.g_bias[f"{stage}@3"]
        assert sampled.g_bias[f"{stage}@3"] < 1.3 * sampled.g_bias_error[f"{stage}@3"]


def test_top_k_in_a_component_cache_is_dense_when_it_is_fused(tables: dict[str, CostTable]) -> None:
    cost = cost_of(tables["mixed"], "top-k:max_classes=3")
    assert len(cost.g) == 4
    assert cost.g_even_tail == {}
    assert cost.captured_mass is not None
    assert 0.3 < cost.captured_mass <= 1.0


def test_top_k_warns_above_temperature_1_only(caches: dict[str, TeacherCache], tables: dict[str, CostTable]) -> None:
    caution = cost_of(tables["fused"], "top-k").caution
    assert caution is not None
    assert "temperature 3" in caution
    assert cost_of(tables["fused"], "compact").caution is None
    assert cost_of(measure(caches["fused"], ["top-k"], temperatures=(1.0,)), "top-k").caution is None
    # The preset names top-k for logits, which this cache does not store.
    assert cost_of(measure(caches["components"], ["top-k"]), "top-k").caution is None


def test_a_cache_of_top_k_is_its_own_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "a", tiny_manifest(IMAGES, codec="top-k"), IMAGES)
    table = measure(TeacherCache.open(tmp_path / "a"), ["float16+"])
    as_it_is, half = cost_of(table, AS_IT_IS), cost_of(table, "float16+")
    assert set(as_it_is.g_even_tail.values()) == {0.0}
    assert as_it_is.g == {}, "its own loss has nothing exact to be compared with"
    assert max(half.g.values()) < 0.05
    print_costs(table)
    assert "even tail itself" in capsys.readouterr().out


# Which codecs, which rows


def test_codecs_are_sorted_by_bytes_and_unusable_ones_are_last(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, codec="float32")
    targets = tiny_targets(manifest)
    targets["fused_logits"][1, 9, 2] = 1e5
    write(create(tmp_path / "a", manifest, IMAGES), targets)
    table = measure(TeacherCache.open(tmp_path / "a"), ["float16", "row-step", "companded"])
    assert [cost.bytes is None for cost in table.codecs] == [False, False, True, True]
    assert [cost.spec for cost in table.codecs[:2]] == ["row-step", AS_IT_IS]
    for cost in table.codecs[2:]:
        assert "fused_logits, row 9, column" in str(cost.problem)
        assert cost.g == {}


@pytest.mark.parametrize("store", STORES)
def test_default_codecs_have_no_duplicates_and_not_the_caches_own(
    caches: dict[str, TeacherCache], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = caches[store].recipe
    chosen, left_out = default_codecs(recipe)
    assert len(chosen) >= 4
    assert len(set(map(str, map(repr, chosen.values())))) == len(chosen)
    assert recipe.codecs not in chosen.values()
    assert "top-k" not in chosen  # of seven classes
    assert bool(left_out) is not HAS_PCODEC
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without, left_out = default_codecs(recipe)
    assert without.keys() == chosen.keys() - set(left_out)
    assert "coarse" in left_out
    with pytest.raises(FormatError, match="teacher-cache\\[codecs\\]"):
        measure(caches[store], ["coarse"])


def test_top_k_is_a_default_for_a_thousand_classes() -> None:
    recipe = tiny_manifest(tiny_images(num_classes=120), canaries=False).recipe
    assert "top-k" in default_codecs(recipe)[0]


def test_top_k_is_no_default_for_more_classes_than_it_can_number() -> None:
    recipe = tiny_manifest(tiny_images(), canaries=False).recipe
    dataset = recipe.dataset.model_copy(update={"class_names": tuple(map(str, range(MAX_CLASSES + 1)))})
    chosen, left_out = default_codecs(recipe.model_copy(update={"dataset": dataset}))
    assert "compact" in chosen
    assert "top-k" not in {*chosen, *left_out}


def test_the_default_view_is_the_second_complete_one(caches: dict[str, TeacherCache], tmp_path: Path) -> None:
    assert measure(caches["fused"], ["float16"]).view == 1
    assert measure(caches["fused"], ["float16"], view=2).view == 2
    with pytest.raises(NotFoundError, match="no such view"):
        measure(caches["fused"], ["float16"], view=9)
    manifest = tiny_manifest(IMAGES)
    writer = create(tmp_path / "a", manifest, IMAGES)
    with pytest.raises(IncompleteError, match="no view is complete"):
        measure(TeacherCache.open(tmp_path / "a"), ["float32"])
    write(writer, tiny_targets(manifest), [(0, block) for block in range(5)])
    assert measure(TeacherCache.open(tmp_path / "a"), ["float32"]).view == 0
    write(writer, tiny_targets(manifest), [(2, block) for block in range(5)])
    assert measure(TeacherCache.open(tmp_path / "a"), ["float32"]).view == 2, "the second complete one"


def test_a_spec_that_does_not_apply_is_refused(caches: dict[str, TeacherCache]) -> None:
    with pytest.raises(RecipeError, match="made from its features"):
        measure(caches["components"], ["companded"])


# Text


@pytest.mark.parametrize("store", STORES)
def test_the_text_has_every_figure_and_note(
    tables: dict[str, CostTable], store: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a line per codec
    table = tables[store]
    print_costs(table)
    text = capsys.readouterr().out
    lines = text.splitlines()
    for cost in table.codecs:
        (line,) = (line for line in lines if line.startswith(f"{cost.spec} "))
        assert f"{cost.bytes:.1f}" in line
        assert f"{cost.kl['3']:.1e}" in line
    assert "compared with: the decoded targets of the cache (float32)" in text
    assert "all samples of view 1, 7 classes" in text
    assert ("warning: top-k targets at temperature 3" in text) == (store != "components")
    if store == "fused":
        assert f"{100 * max(cost_of(table, 'top-k').g.values()):.2f} %" in text
        assert f"{100 * cost_of(table, 'top-k').g_even_tail['200@3']:.2f} % even" in text
        assert "% of the mass" in text
        assert f"{SAMPLED}: keeps " in text
        assert f"{SAMPLED}: g T=3 is noise, " in text
        assert "(mean of 32 resamplings)" in text
        assert "top-k: g T=1 is bias alone" in text
    assert json.loads(table.model_dump_json())["codecs"][0]["bytes"] == table.codecs[0].bytes
