"""`cache-tools export-hf`: what is in the files is what is in the cache, and the card says what it is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet

from cache_tools.reader import TeacherCache
from tests.support import tiny_run
from tests.support.cache_factory import build, tiny_images, tiny_manifest
from tests.support.in_process import invoke

pytestmark = pytest.mark.medium

IMAGES = tiny_images()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("caches") / "tiny.zarr"
    build(path, tiny_manifest(IMAGES, name="t|ny`<b>"), IMAGES)
    return TeacherCache.open(path)


def export(cache: TeacherCache, out: Path, *options: object) -> dict[str, Any]:
    done = invoke("cache-tools", "export-hf", cache.path, out, *options, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def read(out: Path) -> Any:
    return parquet.ParquetDataset(sorted((out / "data").glob("*.parquet"))).read()


def card_of(out: Path) -> tuple[dict[str, Any], str]:
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_rows_are_those_of_the_cache(cache: TeacherCache, tmp_path: Path) -> None:
    done = export(cache, tmp_path / "out", "--features")
    table = read(tmp_path / "out")
    assert done["rows"] == len(table) == cache.num_views * cache.num_samples
    assert table["view"].to_pylist() == np.repeat(np.arange(cache.num_views), cache.num_samples).tolist()
    assert table["key"].to_pylist()[:2] == [key.tobytes().hex() for key in cache.sample_keys[:2]]
    np.testing.assert_array_equal(table["label"].to_numpy()[: cache.num_samples], cache.labels)
    for view in range(cache.num_views):
        rows = slice(view * cache.num_samples, (view + 1) * cache.num_samples)
        for column, target in (("logits", "fused_logits"), ("features", "fused_features")):
            stored = np.array(table[column].to_pylist(), dtype=np.float32)[rows]
            np.testing.assert_array_equal(stored, cache.read_array(target, view))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"names": list(cache.class_names), "_type": "ClassLabel"}
    header, text = card_of(tmp_path / "out")
    assert header["license"] == "unknown"
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "# Targets of t\\|ny\\`&lt;b&gt;" in text
    for words in ("pad-crop", "tiny_teacher", "tiny_clip", "teacher_weight", cache.manifest.fingerprint):
        assert words in text.replace("\\", "")


def test_it_loads_with_the_package_datasets(cache: TeacherCache, tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("needs the package datasets")
    from datasets import load_dataset

    export(cache, tmp_path / "out")
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == cache.num_views * cache.num_samples
    assert rows.features["label"].names == list(cache.class_names)
    np.testing.assert_array_equal(np.array(rows[3]["logits"], np.float32), cache.read_array("fused_logits", 0)[3])


def test_sparse_targets_stay_sparse_and_top_makes_them(cache: TeacherCache, tmp_path: Path) -> None:
    spec = ("--logits", "top-k:min_probability=0.1", "--out", tmp_path / "k.zarr")
    assert invoke("cache-tools", "recode", cache.path, *spec).exit_code == 0
    sparse = TeacherCache.open(tmp_path / "k.zarr")
    export(sparse, tmp_path / "sparse", "--view", "1")
    export(cache, tmp_path / "two", "--top", "2", "--view", "1")
    dense = cache.read_array("fused_logits", 1).astype(np.float64)
    p = np.exp(dense - dense.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    for name, tolerance in (("sparse", 0.02), ("two", 1e-6)):
        table = read(tmp_path / name)
        assert len(table) == cache.num_samples
        for row, (classes, stored, rest) in enumerate(
            zip(*(table[column].to_pylist() for column in ("classes", "probabilities", "rest")), strict=True)
        ):
            np.testing.assert_allclose(stored, p[row][classes], atol=tolerance)
            assert abs(sum(stored) + rest - 1) < 5 * tolerance
            assert len(classes) == 2 or name == "sparse"


def test_shards_and_file_names(tmp_path: Path) -> None:
    pictures = tiny_run.write_pictures(tmp_path / "pictures", train=20, test=3)
    path = tmp_path / "tiny.zarr"
    tiny_run.write_cache(path, pictures, num_views=2, block_rows=16)
    cache = TeacherCache.open(path)
    from cache_tools.exchange.hf_export import export_hf

    done = export_hf(cache, tmp_path / "out", file_names=True, shard_bytes=1)
    assert done.shards == 4, "a file for each block of each view"
    assert sorted(file.name for file in (tmp_path / "out" / "data").iterdir())[0] == "train-00000-of-00004.parquet"
    names = read(tmp_path / "out")["file_name"].to_pylist()
    assert names[:2] == ["blue/000.png", "blue/003.png"]


def test_nothing_else_is_overwritten(cache: TeacherCache, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(cache, out, "--view", "0")
    again = invoke("cache-tools", "export-hf", cache.path, out)
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert export(cache, out, "--overwrite")["rows"] == cache.num_views * cache.num_samples
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        refused = invoke("cache-tools", "export-hf", cache.path, target, "--overwrite")
        assert refused.exit_code == 2
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top", "5"], "bad --top"),
        (["--view", "7"], "no such view"),
        (["--data-dir", "x"], "add --file-names"),
        (["--shard-size", "1kB"], "at least 1MB"),
        (["--file-names"], "have no files"),
    ],
)
def test_bad_options(options: list[str], words: str, cache: TeacherCache, tmp_path: Path) -> None:
    done = invoke("cache-tools", "export-hf", cache.path, tmp_path / "out", *options)
    assert done.exit_code == 2
    assert words in done.stderr.lower() or words in done.stderr
    assert not (tmp_path / "out").exists()
