"""The codec `product` from the command line, from the build of a cache to its export: codebooks are fitted once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cache_tools.codecs import Product
from cache_tools.reader import TeacherCache
from tests.support.in_process import invoke
from tests.support.tiny_build import arrays_of
from train.runs.result import load_result

pytestmark = pytest.mark.medium

SAMPLES, ROWS = 320, 128
BUILD = (
    "build-cache",
    *("digits", "--set", "codec={logits: {codec: product, parts: 4, width: 2}}", "--set", "preflight_samples=64"),
    *("--set", f"dataset.split=train[:{SAMPLES}]", "--set", "dataset.test_split=test[:64]"),
    *("--set", f"block_rows={ROWS}"),
)
SPEC = "product:parts=4,width=2+"
CONSTANTS = tuple(f"fused_logits_{name}" for name in ("mean", "basis", "codebooks"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEACHER_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def done(*words: object) -> Any:
    result = invoke(*map(str, words))
    assert result.exit_code == 0, result.stderr
    return result


def constants(path: Path) -> dict[str, np.ndarray]:
    cache = TeacherCache.open(path)
    return {name: np.asarray(cache.constant(name)) for name in CONSTANTS}


def test_product_from_the_build_to_the_export(home: Path, tmp_path: Path) -> None:
    assert "off by tens of per cent" in done(*BUILD, "--views", 2).stdout
    (path,) = home.glob("digits-*.zarr")
    fitted = constants(path)
    done(*BUILD[:2], "--codec", "float32", *BUILD[4:], "--views", 2, "--out", tmp_path / "exact.zarr")

    # The constants and codes are those that the codec gives for the rows of view 0.
    rows = TeacherCache.open(tmp_path / "exact.zarr").read_array("fused_logits", 0)
    codec = Product(parts=4, width=2)
    for suffix, values in codec.fit(rows).items():
        np.testing.assert_allclose(fitted[f"fused_logits{suffix}"], values, atol=1e-5)
    cache = TeacherCache.open(path)
    stored = cache.read_stored("fused_logits", 0)
    assert (stored.shape, stored.dtype) == ((SAMPLES, 4), np.uint8)
    for view in (0, 1):
        decoded = cache.load_view(view).logits(torch.arange(SAMPLES)).numpy()
        np.testing.assert_array_equal(decoded, cache.read_array("fused_logits", view))
    error = np.linalg.norm(cache.read_array("fused_logits", 0) - rows) / np.linalg.norm(rows)
    assert 0 < error < 0.3

    # It is verified, also by running the networks again.
    for options in ([], ["--images"], ["--replay", 100]):
        done("cache-tools", "verify", "digits", *options)

    # A resumed and a grown build use the same codebooks, and give the codes of an uninterrupted one.
    whole = arrays_of(path)
    for commit in sorted((path / "commits").glob("c.*"))[1:]:
        commit.unlink()
    done(*BUILD, "--views", 2)
    assert arrays_of(path) == whole
    done(*BUILD, "--views", 3)
    grown = arrays_of(path)
    assert {name: grown[name] for name in whole if "/c." in name or "/c/" in name} == {
        name: data for name, data in whole.items() if "/c." in name or "/c/" in name
    }
    done("cache-tools", "verify", "digits")
    done("cache-tools", "verify", "digits", "--replay", 100)

    # A student learns from it.
    done("train-student", "digits", "--epochs", 1, "--no-compare-with-labels", "--set", "loggers=[]", "--out", "run")
    result = load_result(Path("run"))
    assert result is not None
    assert result.fingerprint == cache.manifest.fingerprint
    done("evaluate-student", "run")

    # Recoded from exact rows it is the built one; recoded to another codec it keeps what it has.
    done("cache-tools", "recode", tmp_path / "exact.zarr", "--codec", SPEC, "--out", "again.zarr")
    np.testing.assert_array_equal(
        TeacherCache.open("again.zarr").read_stored("fused_logits", 1),
        TeacherCache.open(path).read_stored("fused_logits", 1),
    )
    done("cache-tools", "recode", "digits", "--codec", "float32", "--out", "wide.zarr")
    np.testing.assert_array_equal(
        TeacherCache.open("wide.zarr").read_array("fused_logits", 2),
        TeacherCache.open(path).read_array("fused_logits", 2),
    )
    done("cache-tools", "recode", "digits", "--codec", "product:parts=2+", "--out", "fewer.zarr")
    assert TeacherCache.open("fewer.zarr").read_stored("fused_logits", 0).shape == (SAMPLES, 2)
    for name in ("again.zarr", "wide.zarr", "fewer.zarr"):
        done("cache-tools", "verify", name)

    # Its error is measured: the figures are recomputed from the exact rows and the recoded ones.
    words = ("fidelity", tmp_path / "exact.zarr", "--codec", SPEC, "--view", 1, "--json")
    (found,) = [cost for cost in json.loads(done("cache-tools", *words).stdout)["codecs"] if cost["spec"] == SPEC]
    exact, rough = (TeacherCache.open(name).read_array("fused_logits", 1) for name in ("exact.zarr", "again.zarr"))
    exact, rough = (logits - logits.mean(axis=1, keepdims=True) for logits in (exact, rough))
    expected = np.linalg.norm(rough - exact) / np.linalg.norm(exact - exact.mean(axis=0))
    assert found["targets"]["fused_logits"]["error"] == pytest.approx(expected, rel=1e-4)
    done("cache-tools", "fidelity", "digits")
    done("cache-tools", "stats", "digits", "--out", "stats")
    done("cache-tools", "show", "digits", "--sample", 7)

    # And others can read it.
    done("cache-tools", "export-hf", "digits", "hf")
    table = pl.concat([pl.read_parquet(file) for file in sorted(Path("hf").rglob("*.parquet"))])
    assert len(table) == 3 * SAMPLES
    for view in range(3):
        exported = np.stack(table.filter(pl.col("view") == view).sort("sample")["logits"].to_list())
        np.testing.assert_array_equal(exported, TeacherCache.open(path).read_array("fused_logits", view))
