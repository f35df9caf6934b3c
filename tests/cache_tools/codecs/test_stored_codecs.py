"""Caches of every codec: written, and read in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from cache_tools.codecs import FeatureSteps, FixedStep, Float32, Product, RowStep, Sampled, SparseCodec, TopK
from cache_tools.codecs.presets import PRESETS, TargetCodecs, resolve_codecs
from cache_tools.errors import FormatError, NotFoundError, RecipeError
from cache_tools.format.arrays import targets
from cache_tools.integrity.local import verify
from cache_tools.places import LocalPlace
from cache_tools.places.transfer import copy_cache
from cache_tools.reader import TeacherCache
from cache_tools.store.encoding import Encoder, fit_codecs, fitted_targets, sample_rows
from tests.support.cache_factory import build, create, tiny_images, tiny_manifest, tiny_targets, write
from tests.support.turns import some

pytestmark = pytest.mark.medium

IMAGES = tiny_images()
CHOICES: dict[str, Any] = {
    **{name: name for name in PRESETS},
    "row-step": TargetCodecs(logits=RowStep(), features=RowStep()),
    "sampled": TargetCodecs(logits=Sampled()),
    "product": TargetCodecs(logits=Product(parts=2, width=2)),
    "fixed-step": TargetCodecs(logits=FixedStep(), features=FixedStep(pack="pcodec")),
}


@pytest.mark.parametrize(
    ("choice", "store"), some([(choice, store) for store in ("fused", "components") for choice in CHOICES], 6)
)
def test_every_way_of_reading_gives_the_decoded_rows(tmp_path: Path, choice: str, store: str) -> None:
    manifest = tiny_manifest(IMAGES, codec=CHOICES[choice], store=store, linear_head=False)
    written = build(tmp_path / "cache", manifest, IMAGES)
    cache = TeacherCache.open(tmp_path / "cache")
    encoder = Encoder(cache.recipe, cache.constant)
    order = np.random.default_rng(0).permutation(cache.num_samples)
    for view in range(cache.num_views):
        resident = cache.load_view(view)
        for name, spec in cache.targets.items():
            plain = cache.read_array(name, view)
            assert plain.dtype == np.float32
            rows = getattr(resident, {"fused_logits": "logits", "fused_features": "features"}.get(name, name))(order)
            np.testing.assert_array_equal(rows.numpy(), plain[order])
            if not isinstance(spec.codec, SparseCodec):
                values = written[name][view].astype(np.float64)
                shift = values.mean(axis=1, keepdims=True) if spec.codec.codec == "companded" else 0.0
                bound = spec.codec.error_bound(values, encoder.constants[name])
                assert (np.abs(plain - (values - shift)) <= bound + 1e-6).all()
    assert verify(tmp_path / "cache").sound
    copy_cache(LocalPlace(tmp_path / "cache"), LocalPlace(tmp_path / "copy"))
    assert verify(tmp_path / "copy").sound


def test_a_resident_view_is_as_large_as_its_codes(tmp_path: Path) -> None:
    sizes = {}
    for choice in ("float32", "float16", "compact"):
        build(tmp_path / choice, tiny_manifest(IMAGES, codec=choice), IMAGES)
        sizes[choice] = TeacherCache.open(tmp_path / choice).load_view(0, features=False).nbytes
    assert sizes["float16"] == sizes["float32"] // 2 == 2 * sizes["compact"]  # 5 classes: one byte each


def test_zarr_alone_reads_the_documented_arrays(tmp_path: Path) -> None:
    manifest = tiny_manifest(IMAGES, codec=TargetCodecs(logits=FixedStep(), features=FeatureSteps()))
    build(tmp_path / "cache", manifest, IMAGES)
    group: Any = zarr.open_group(tmp_path / "cache", mode="r")
    cache = TeacherCache.open(tmp_path / "cache")
    logits = group["fused_logits"]
    assert logits.attrs["scale_factor"] == 1 / 64
    np.testing.assert_array_equal(logits[1] * np.float32(1 / 64), cache.read_array("fused_logits", 1))
    steps = group["fused_features_steps"][:]
    np.testing.assert_array_equal(group["fused_features"][2] * steps, cache.read_array("fused_features", 2))


def test_axes_of_the_same_name_have_the_same_length(tmp_path: Path) -> None:
    """Tools that align arrays by dimension names rely on that."""
    for choice in ("top-k", "compact", "product"):
        manifest = tiny_manifest(
            IMAGES, codec=CHOICES[choice], store="components", linear_head=False, teacher_weights=(0.5, 0.5)
        )
        create(tmp_path / choice, manifest, IMAGES)
        lengths: dict[str, int] = {}
        group: Any = zarr.open_group(tmp_path / choice, mode="r")
        for _, array in group.arrays():
            assert array.metadata.dimension_names is not None
            for axis, length in zip(array.metadata.dimension_names, array.shape, strict=True):
                assert lengths.setdefault(str(axis), length) == length


def test_features_are_rounded_for_their_head(tmp_path: Path) -> None:
    """Logits through the stored head are closer than those of features rounded to nearest."""
    codecs = TargetCodecs(logits=Float32(), features=FeatureSteps(resolution=2.0))
    manifest = tiny_manifest(IMAGES, codec=codecs, store="components", teacher_dim=24)
    written = tiny_targets(manifest)
    writer = create(tmp_path / "cache", manifest, IMAGES)
    write(writer, written)
    cache = TeacherCache.open(tmp_path / "cache")
    head, steps = cache.constant("teacher_head_weight"), cache.constant("teacher_features_steps")
    exact = written["teacher_features"][0]
    nearest = np.rint(exact / steps) * steps

    def error(features: np.ndarray) -> float:
        logits = (features - exact) @ (head - head.mean(axis=0)).T
        return float(np.linalg.norm(logits))

    assert error(cache.read_array("teacher_features", 0)) < 0.8 * error(nearest)


def test_codecs_are_fitted_to_evenly_spaced_rows() -> None:
    manifest = tiny_manifest(IMAGES, codec="compact")
    assert [spec.name for spec in fitted_targets(manifest.recipe)] == ["fused_features"]
    rows = tiny_targets(manifest)["fused_features"][0]
    found = fit_codecs(manifest.recipe, {"fused_features": rows})
    deviation = rows.astype(np.float64).std(axis=0)
    np.testing.assert_allclose(found["fused_features_steps"], np.exp(np.log(deviation).mean()) / 19, rtol=1e-6)
    assert sample_rows(10, 4).tolist() == [0, 2, 5, 7]
    assert sample_rows(3, 4).tolist() == [0, 1, 2]
    assert not fitted_targets(tiny_manifest(IMAGES).recipe)


def test_rows_out_of_range_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    writer = create(tmp_path / "cache", tiny_manifest(IMAGES, codec="compact"), IMAGES)
    logits = np.zeros((16, 5), np.float32)
    logits[3, 2] = 60.0
    with pytest.raises(FormatError, match=r"fused_logits, view 1, samples 32–47, row 3.*larger spread"):
        writer.write_block(1, 2, {"fused_logits": logits, "fused_features": np.zeros((16, 8), np.float32)}, 1)
    assert len(writer.missing_blocks()) == 15


def test_presets_and_their_limits() -> None:
    assert resolve_codecs("dense", 10).logits.reference == "max"
    assert resolve_codecs("dense", 100).logits.reference == "mean"
    chosen = TargetCodecs.model_validate({"logits": "companded"})
    assert resolve_codecs(chosen, 10) is chosen
    assert str(chosen) == "companded logits, float16 features"
    with pytest.raises(RecipeError, match="no such codec"):
        resolve_codecs("zip", 10)  # type: ignore[arg-type]
    for wrong in (
        {"logits": "feature-steps"},
        {"features": "top-k"},
        {"features": "sampled"},
        {"features": "product"},
        {"features": "companded"},
    ):
        with pytest.raises(ValueError, match=r"for features there are|are for features"):
            TargetCodecs.model_validate(wrong)
    assert "gradient" in str(TargetCodecs(logits=TopK(temperature=4.0)).caution)
    assert TargetCodecs(logits=TopK()).caution is None


@pytest.mark.parametrize("codec", [TopK(), Sampled()], ids=lambda codec: codec.codec)
def test_sparse_targets_are_read_as_stored(tmp_path: Path, codec: SparseCodec) -> None:
    build(tmp_path / "cache", tiny_manifest(IMAGES, codec=TargetCodecs(logits=codec)), IMAGES)
    cache = TeacherCache.open(tmp_path / "cache")
    resident = cache.load_view(0)
    found = resident.sparse_logits([3, 1], 1.0)
    mass = found.log_p.exp().sum(dim=1) + found.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones(2), rtol=0, atol=0.02)
    with pytest.raises(FormatError, match="one temperature"):
        resident.sparse_logits([0], 4.0)
    build(tmp_path / "plain", tiny_manifest(IMAGES), IMAGES)
    with pytest.raises(NotFoundError, match="not sparse"):
        TeacherCache.open(tmp_path / "plain").load_view(0).sparse_logits([0], 1.0)


def test_a_missing_pcodec_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "cache", tiny_manifest(IMAGES, codec="dense"), IMAGES)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for attempt in (
        lambda: TeacherCache.open(tmp_path / "cache"),
        lambda: targets(tiny_manifest(IMAGES, codec="dense").recipe, 16)[1].arrays[0].stored.create_arguments(),
    ):
        with pytest.raises(FormatError, match=r"teacher-cache\[codecs\]"):
            attempt()
