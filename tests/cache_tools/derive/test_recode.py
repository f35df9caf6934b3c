"""Recoding: errors within the codecs' bounds, only missing blocks are made, by one or several processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cache_tools.files
from cache_tools.alignment import make_canaries
from cache_tools.codecs import Companded, FeatureSteps, SparseCodec
from cache_tools.derive.base import CODE_VERSIONS
from cache_tools.derive.block_reader import BlockReader
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.derive.lineage import lineage
from cache_tools.derive.recode import Recoded, recode
from cache_tools.errors import FormatError, IncompleteError, MismatchError, StorageError
from cache_tools.home import registry
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace
from cache_tools.places.claims import GROW, claims_place, newest_claims
from cache_tools.reader import TeacherCache
from cache_tools.store.encoding import Encoder, fit_codecs, sample_rows
from cache_tools.store.writer import CacheWriter
from tests.support.cache_factory import (
    VIEWS,
    build,
    create,
    tiny_constants,
    tiny_images,
    tiny_manifest,
    tiny_targets,
    write,
)
from tests.support.turns import slow, some

pytestmark = pytest.mark.medium

IMAGES = tiny_images()
STORES: dict[str, dict[str, Any]] = {
    "fused": {"store": "fused"},
    "components": {"store": "components"},
    "mixed": {"store": "components", "teacher_weights": (0.3, 0.7), "clip_weights": (0.5, 0.5)},
}
SPECS = [
    "compact",
    "dense",
    "float32",
    "float16",
    "coarse",
    "top-k",
    "row-step",
    "fixed-step:step=1/16",
    "sampled:draws=8+float16",
]


# `mixed` has all that `components` has.
@pytest.fixture(scope="module", params=["fused", slow("components"), "mixed"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    path = tmp_path_factory.mktemp("source") / "c"
    build(path, tiny_manifest(IMAGES, codec="float32", **STORES[request.param]), IMAGES)
    return TeacherCache.open(path)


def convert(cache: TeacherCache, spec: str, path: Path, **options: Any) -> Recoded:
    return recode(cache, codecs_for(spec, cache.recipe), "other", path, **options)


def files(path: Path) -> dict[str, bytes]:
    """Every file below `path` except the manifest, which has a date and a command."""
    found = (file for file in path.rglob("*") if file.is_file() and file.suffix != cache_tools.files.PARTIAL)
    return {str(file.relative_to(path)): file.read_bytes() for file in found if file != path / "zarr.json"}


def centred(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return wide - wide.mean(axis=1, keepdims=True)


def softmax(rows: np.ndarray) -> np.ndarray:
    raised = np.exp(centred(rows))
    return raised / raised.sum(axis=1, keepdims=True)


# Numbers


@pytest.mark.parametrize("spec", some(SPECS, 2))
def test_decoded_numbers_are_within_the_bound_of_their_codec(source: TeacherCache, spec: str, tmp_path: Path) -> None:
    done = convert(source, spec, tmp_path / "c")
    made = TeacherCache.open(tmp_path / "c")
    assert (done.blocks, done.blocks_there, done.blocks_missing) == (15, 0, 0)
    assert verify(made.path).sound
    held = Encoder(made.recipe, made.constant).constants  # with the statistics that make rounding aware of the head
    for name, target in made.targets.items():
        for view in range(3):
            values, decoded = (cache.read_array(name, view) for cache in (source, made))
            bound = target.codec.error_bound(values, held[name])
            if isinstance(target.codec, SparseCodec):  # its bound is on the probabilities that it keeps
                sparse = target.codec.sparse({a.suffix: made.read_stored(a.name, view) for a in target.arrays})
                rows, places = np.nonzero(sparse.classes.numpy() < 5)
                classes = sparse.classes.numpy()[rows, places]
                errors = np.exp(sparse.log_p.numpy()[rows, places]) - softmax(values)[rows, classes]
                assert (np.abs(errors) <= bound[rows, classes]).all(), name
                continue
            if isinstance(target.codec, Companded):
                values = centred(values)
            assert (np.abs(decoded - values) <= bound + 1e-6 * np.abs(values).max()).all(), name
            if isinstance(target.codec, FeatureSteps):  # its bound is for the worst row
                steps = made.constant(f"{name}_steps")
                assert np.sqrt(np.mean(((decoded - values) / steps) ** 2)) <= 0.5, name


@pytest.mark.parametrize(("block_rows", "blocks"), some([(32, 9), (100, 3), (7, 33), (75, 3)], 1))
def test_float32_in_other_blocks_is_exact(source: TeacherCache, tmp_path: Path, block_rows: int, blocks: int) -> None:
    done = convert(source, "float32", tmp_path / "c", block_rows=block_rows)
    made = TeacherCache.open(tmp_path / "c")
    assert made.manifest.block_rows == block_rows
    assert done.blocks == blocks
    assert done.caution is None
    for name in source.targets:
        for view in range(3):
            np.testing.assert_array_equal(made.read_array(name, view), source.read_array(name, view))
    assert verify(made.path).sound


@pytest.mark.parametrize("spec", some(["compact", "coarse", "row-step", "product:width=2+feature-steps"], 1))
def test_a_float32_cache_recoded_is_the_cache_that_a_build_writes(
    source: TeacherCache, spec: str, tmp_path: Path
) -> None:
    """The same sample gives the same steps, rounding and files."""
    convert(source, spec, tmp_path / "recoded")
    codecs, recipe = codecs_for(spec, source.recipe), source.recipe
    recipe = recipe.model_copy(update={"codecs": codecs})
    rows = {name: np.stack([source.read_array(name, view) for view in range(3)]) for name in source.targets}
    sample = {name: values[0, sample_rows(75)] for name, values in rows.items()}
    writer = CacheWriter.create(
        tmp_path / "built",
        source.manifest.model_copy(update={"recipe": recipe, "fingerprint": recipe.fingerprint}),
        labels=IMAGES.labels,
        sample_keys=IMAGES.keys,
        constants=tiny_constants(source.manifest) | fit_codecs(recipe, sample),
    )
    write(writer, rows)
    assert files(tmp_path / "recoded") == files(tmp_path / "built")


def test_targets_whose_codec_stays_are_copied(tmp_path: Path) -> None:
    """They are not even rounded again, which would change top-k and fitted steps."""
    build(tmp_path / "a", tiny_manifest(IMAGES, codec="top-k"), IMAGES)
    first = TeacherCache.open(tmp_path / "a")
    done = convert(first, "+float32", tmp_path / "b")
    assert done.caution is not None
    assert "fused_features from feature-steps to float32" in done.caution
    assert "fused_logits" not in done.caution
    convert(first, "float32+", tmp_path / "c")
    assert {k: v for k, v in files(tmp_path / "b").items() if k.startswith("fused_logits")} == {
        k: v for k, v in files(tmp_path / "a").items() if k.startswith("fused_logits")
    }
    for name in ("fused_features/c.1.2.0", "fused_features_steps/c.0"):
        assert files(tmp_path / "c")[name] == files(tmp_path / "a")[name]


def test_another_packing_keeps_codes_and_steps(source: TeacherCache, tmp_path: Path) -> None:
    pytest.importorskip("pcodec")
    convert(source, "compact", tmp_path / "a")
    first = TeacherCache.open(tmp_path / "a")
    done = convert(first, "+feature-steps:pack=pcodec", tmp_path / "b")
    second = TeacherCache.open(tmp_path / "b")
    assert done.caution is None
    for spec in first.targets.values():
        for array in spec.arrays:
            np.testing.assert_array_equal(first.read_stored(array.name, 1), second.read_stored(array.name, 1))
        for name in spec.constants:
            np.testing.assert_array_equal(first.constant(name), second.constant(name))
    assert files(first.path).keys() == files(second.path).keys()
    assert files(first.path) != files(second.path)


# Identity


def test_the_manifest_names_the_source(source: TeacherCache, tmp_path: Path) -> None:
    done = convert(source, "compact", tmp_path / "c")
    old, new = source.manifest, TeacherCache.open(tmp_path / "c").manifest
    assert new.recipe.derived_from == old.fingerprint == done.source_fingerprint
    assert new.fingerprint == done.fingerprint == new.recipe.fingerprint != old.fingerprint
    assert (new.name, old.name) == ("other", "tiny")
    same = {"codecs": old.recipe.codecs, "derived_from": None}
    assert new.recipe.model_copy(update=same) == old.recipe
    for field in ("dataset", "num_views", "block_rows", "clip_scales", "canaries", "build_recipe"):
        assert getattr(new, field) == getattr(old, field)
    (record,) = lineage(new)
    assert (record.name, record.fingerprint, record.path) == ("tiny", old.fingerprint, str(source.path))
    assert (record.store, record.codecs, record.source) == (old.recipe.store, old.recipe.codecs, None)
    assert new.provenance["preflight"] == old.provenance["preflight"]
    assert BlockReader(TeacherCache.open(tmp_path / "c")).constants.keys() >= set(tiny_constants(old))


def test_the_default_path_is_in_the_cache_home(
    source: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registry.HOME_VARIABLE, str(tmp_path))
    done = recode(source, codecs_for("float16", source.recipe), "tiny-float16")
    assert done.path == registry.cache_path("tiny-float16", done.fingerprint)
    assert TeacherCache.open("tiny-float16").recipe.derived_from == source.manifest.fingerprint


# Warnings and errors


@pytest.mark.parametrize(
    ("first", "second", "warned"),
    some(
        [
            ("float16", "float32", True),
            ("compact", "coarse", False),
            ("coarse", "compact", True),
            ("compact", "float16", True),
            ("float16", "compact", False),
            ("float16", "float16", False),
            ("fixed-step:step=1/4", "fixed-step:step=1/64", True),
            ("fixed-step:step=1/64", "fixed-step:step=1/4", False),
            ("top-k", "row-step", True),
            ("row-step", "top-k", False),
            ("sampled", "row-step", True),
            ("float16", "sampled:temperature=4", False),
        ],
        3,
    ),
)
def test_a_finer_codec_gives_a_warning(first: str, second: str, warned: bool, tmp_path: Path) -> None:
    build(tmp_path / "a", tiny_manifest(IMAGES, codec="float32"), IMAGES)
    done = convert(TeacherCache.open(tmp_path / "a"), first, tmp_path / "b")
    assert done.caution is None
    done = convert(TeacherCache.open(tmp_path / "b"), second, tmp_path / "c")
    if not warned:
        assert done.caution is None or "fused_logits" not in done.caution
    else:
        assert done.caution is not None
        assert "stays lost" in done.caution


def test_values_out_of_a_codecs_range_fail_before_anything_is_made(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, codec="float32")
    targets = tiny_targets(manifest)
    targets["fused_features"][0, 9, 2] = 1e5
    write(create(tmp_path / "a", manifest, IMAGES), targets)
    with pytest.raises(FormatError, match=r"fused_features, a sample of view 0, row 9, column 2"):
        convert(TeacherCache.open(tmp_path / "a"), "float16", tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a"]


def test_fitting_codecs_needs_view_0(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES)
    write(create(tmp_path / "a", manifest, IMAGES), tiny_targets(manifest), [(1, 0), (0, 0)])
    with pytest.raises(IncompleteError, match="view 0"):
        convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_existing_targets_are_not_overwritten(source: TeacherCache, tmp_path: Path) -> None:
    convert(source, "compact", tmp_path / "c")
    for spec, path in (("float16", tmp_path / "c"), ("float16", source.path)):
        with pytest.raises(MismatchError, match="another recipe"):
            convert(source, spec, path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("…")
    with pytest.raises(StorageError, match="taken"):
        convert(source, "float16", tmp_path / "full")


def test_another_copy_of_the_source_cannot_continue_a_cache(tmp_path: Path) -> None:
    """The same recipe built on another machine has embeddings that differ in a bit."""
    manifest = tiny_manifest(IMAGES, codec="float32")
    build(tmp_path / "a", manifest, IMAGES)
    held = tiny_constants(manifest)
    held["class_embeddings"] = np.nextafter(held["class_embeddings"], np.float32(2))
    write(
        CacheWriter.create(tmp_path / "b", manifest, labels=IMAGES.labels, sample_keys=IMAGES.keys, constants=held),
        tiny_targets(manifest),
    )
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    (tmp_path / "c/commits/c.1.1.0").unlink()
    with pytest.raises(MismatchError, match="another copy of the source"):
        convert(TeacherCache.open(tmp_path / "b"), "compact", tmp_path / "c")
    assert convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c").blocks == 1


# Continuing


def test_the_second_run_does_nothing(source: TeacherCache, tmp_path: Path) -> None:
    convert(source, "compact", tmp_path / "c")
    before, times = files(tmp_path / "c"), {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("*")}
    done = convert(source, "compact", tmp_path / "c")
    assert (done.blocks, done.blocks_there, done.blocks_missing) == (0, 15, 0)
    assert files(tmp_path / "c") == before
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("*")} == times


def test_rows_of_codecs_that_store_other_bytes_are_not_mixed(
    source: TeacherCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, "compact", tmp_path / "c")
    commit = tmp_path / "c" / "commits" / "c.1.1.0"
    commit.unlink()
    with monkeypatch.context() as patch:
        patch.setitem(CODE_VERSIONS, "codecs", CODE_VERSIONS["codecs"] + 1)
        with pytest.raises(MismatchError, match="another version of teacher-cache"):
            convert(source, "compact", tmp_path / "c")
        assert not commit.exists()
    assert convert(source, "compact", tmp_path / "c").blocks == 1


def test_a_recoded_cache_grows_with_its_source(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, codec="float32")
    targets = tiny_targets(manifest.model_copy(update={"num_views": 5}))
    writer = create(tmp_path / "a", manifest, IMAGES)
    write(writer, targets, [(0, block) for block in range(5)] + [(1, 2)])
    done = convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    assert (done.blocks, done.blocks_there, done.blocks_missing) == (6, 0, 9)
    assert TeacherCache.open(tmp_path / "c").complete_views == (0,)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("c.0.*")}
    write(writer.grow(5, canaries=make_canaries(VIEWS, IMAGES, 5, first=3)), targets)
    done = convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    assert (done.blocks, done.blocks_there, done.blocks_missing) == (19, 6, 0)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "c").rglob("c.0.*")} == before
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "at-once")
    canaries = [TeacherCache.open(tmp_path / name).manifest.canaries for name in ("a", "c", "at-once")]
    assert canaries[0] == canaries[1] == canaries[2]
    assert {canary.view for canary in canaries[0]} == set(range(5))
    assert files(tmp_path / "c") == files(tmp_path / "at-once")


def test_growing_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "a", tiny_manifest(IMAGES, codec="float32"), IMAGES)
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    CacheWriter.resume(tmp_path / "a", TeacherCache.open(tmp_path / "a").manifest.fingerprint).grow(5)
    whole, claimed = CacheWriter.grow, []

    def grow(writer: CacheWriter, *arguments: Any, **options: Any) -> CacheWriter:
        claimed.append(GROW in newest_claims(claims_place(LocalPlace(writer.path))))
        return whole(writer, *arguments, **options)

    monkeypatch.setattr(CacheWriter, "grow", grow)
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    assert claimed == [True]
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    assert claimed == [True]


def test_a_damaged_block_stops_recoding_and_keeps_the_rest(tmp_path: Path) -> None:
    build(tmp_path / "a", tiny_manifest(IMAGES, codec="float32"), IMAGES)
    chunk = tmp_path / "a/fused_features/c.2.1.0"
    sound = chunk.read_bytes()
    shutil.copy(tmp_path / "a/fused_features/c.1.1.0", chunk)
    with pytest.raises(FormatError, match=r"fused_features, view 2, block 1.*cache-tools repair"):
        convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    made = TeacherCache.open(tmp_path / "c")
    assert made.complete_views == (0, 1)
    assert not made.committed_blocks()[2, 1]
    assert verify(made.path).sound
    chunk.write_bytes(sound)
    done = convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "c")
    assert done.blocks == 15 - done.blocks_there >= 1
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "at-once")
    assert files(tmp_path / "c") == files(tmp_path / "at-once")


_RECODE = """
import sys
import torch, zarr  # imported before the start, so that both start at the same time
from pathlib import Path
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.reader import TeacherCache
from cache_tools.derive.recode import recode
from cache_tools.store import writer
cache = TeacherCache.open(Path(sys.argv[1]))
codecs = codecs_for("compact", cache.recipe)
print("ready", flush=True)
sys.stdin.readline()
print(recode(cache, codecs, "other", Path(sys.argv[2])).blocks, flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_the_blocks(tmp_path: Path) -> None:
    images = tiny_images(960)
    build(tmp_path / "a", tiny_manifest(images, num_views=2, codec="float32", canaries=False), images)
    convert(TeacherCache.open(tmp_path / "a"), "compact", tmp_path / "plain")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _RECODE, str(tmp_path / "a"), str(tmp_path / "c")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    made = [int(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(made) == 120, "no block was made twice"
    assert min(made) > 0
    assert files(tmp_path / "c") == files(tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "c", "plain"}, "no claim is left"
