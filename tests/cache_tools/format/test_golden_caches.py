"""Golden caches: every later version must read the same values from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_tools.cli import app
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


def _decoded() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "version-2-decoded.npz") as file:
        return dict(file)


DECODED = _decoded()
