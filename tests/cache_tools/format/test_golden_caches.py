"""Golden caches: every later version must read the same values from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_tools.cli import app
from cache_tools.format.digests import array_digests
from cache_tools.home.registry import read_record
from cache_tools.integrity.local import verify
from cache_tools.reader import TeacherCache

FOLDER = Path(__file__).parents[2] / "golden" / "caches"
NAMES = ("version-2-fused", "version-2-compact", "version-2-top-k")


def written(name: str) -> dict[str, np.ndarray]:
    """The rows that were written to a cache, by target, and its fingerprint."""
    with np.load(FOLDER / "version-2.npz") as file:
        return {key.removeprefix(f"{name}/"): file[key] for key in file if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", NAMES)
def test_golden_caches_read_as_written(name: str) -> None:
    cache, expected = TeacherCache.open(FOLDER / f"{name}.zarr"), written(name)
    assert cache.manifest.fingerprint == str(expected.pop("fingerprint"))
    assert cache.is_complete
    assert cache.manifest.format_version == 2
    for target, values in expected.items():
        for view in range(cache.num_views):
            found = cache.read_array(target, view)
            if f"{name}/decoded/{target}" in DECODED:
                np.testing.assert_allclose(found, DECODED[f"{name}/decoded/{target}"][view], rtol=1e-6, atol=1e-6)
            else:
                np.testing.assert_array_equal(found, values[view])
    assert len(cache.load_view(0).logits(range(20))) == 20


@pytest.mark.parametrize("name", NAMES)
def test_golden_caches_pass_verify_and_info(name: str) -> None:
    assert verify(FOLDER / f"{name}.zarr").problems == ()
    assert read_record(FOLDER / f"{name}.zarr").complete
    for command in ("info", "verify"):
        result = CliRunner().invoke(app, [command, str(FOLDER / f"{name}.zarr")])
        assert result.exit_code == 0, result.output


def test_the_golden_cache_with_array_digests_keeps_them() -> None:
    """The digests in the file, and those that this version computes."""
    path = FOLDER / "version-2-digests.zarr"
    cache = TeacherCache.open(path)
    digests = json.loads((path / "zarr.json").read_text())["attributes"]["array_digests"]
    assert digests["labels"] == "00d32d43362d65cf091dfbf22c1a7a5e"
    assert digests["text_features"] == "5eb45e706b6d216d8d0eb22f7d7972c3"
    assert cache.manifest.array_digests == digests
    values = {name: cache.constant(name) for name in digests if name not in ("labels", "sample_keys")}
    assert array_digests(cache.labels, cache.sample_keys, values) == digests
    found = verify(path)
    assert (found.problems, found.has_digests) == ((), True)
    cache.load_view(1)


@pytest.mark.parametrize("name", NAMES)
def test_golden_caches_without_array_digests_are_noted(name: str) -> None:
    assert verify(FOLDER / f"{name}.zarr").adds_digests


def _decoded() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "version-2-decoded.npz") as file:
        return dict(file)


DECODED = _decoded()
