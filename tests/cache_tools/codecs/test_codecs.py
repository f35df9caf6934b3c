"""All codecs: round trips within their bounds, refused numbers, indices, JSON, and other readers of zarr."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache_tools.codecs import (
    CODECS,
    Codec,
    Companded,
    FeatureSteps,
    FixedStep,
    Float16,
    Float32,
    RowStep,
    Sampled,
    SparseCodec,
    TopK,
    parse_codec,
)
from cache_tools.errors import FormatError, RecipeError
from tests.support.codec_rows import WIDTH, centred, constants, described, logits

HAS_PCODEC = importlib.util.find_spec("pcodec") is not None
needs_pcodec = pytest.mark.skipif(not HAS_PCODEC, reason="needs pcodec (the codecs extra)")
NATIVE: list[Codec] = [
    Float16(),
    Float32(),
    FixedStep(),
    FixedStep(step=0.3),
    RowStep(),
    Companded(),
    Companded(step=1 / 48, spread=12.0, reference="mean"),
    FeatureSteps(),
    FeatureSteps(spread="column", resolution=4.0),
    TopK(num_classes=WIDTH),
    TopK(num_classes=WIDTH, max_classes=4, min_probability=0.01),
    Sampled(num_classes=WIDTH),
    Sampled(num_classes=WIDTH, draws=8, temperature=4.0),
]
DENSE = [FixedStep(pack="pcodec"), Companded(reference="mean", pack="pcodec"), FeatureSteps(pack="pcodec")]
ELEMENTWISE = [codec for codec in NATIVE if not isinstance(codec, Companded | SparseCodec)]
LOGITS = hnp.arrays(np.float32, (5, WIDTH), elements=st.floats(-18.0, 18.0, width=32))


@pytest.mark.parametrize("codec", ELEMENTWISE, ids=described)
@given(values=LOGITS)
@settings(max_examples=60, deadline=None)
def test_decoded_numbers_are_within_the_stated_bound(codec: Codec, values: npt.NDArray[np.float32]) -> None:
    fitted = constants(codec)
    decoded = codec.decode(codec.encode(values, fitted), fitted).numpy()
    assert decoded.dtype == np.float32
    assert (np.abs(decoded.astype(np.float64) - values) <= codec.error_bound(values, fitted)).all()


@pytest.mark.parametrize("codec", [c for c in NATIVE if isinstance(c, Companded)], ids=described)
@given(values=LOGITS)
@settings(max_examples=100, deadline=None)
def test_companded_logits_are_centred_and_within_the_stated_bound(
    codec: Companded, values: npt.NDArray[np.float32]
) -> None:
    decoded = codec.decode(codec.encode(values)).numpy()
    assert (np.abs(decoded - centred(values)) <= codec.error_bound(values)).all()


def test_companded_steps_are_finest_for_probable_classes() -> None:
    row = np.array([[0.0, -1.0, -3.0, -6.0]], np.float32)
    bound = Companded().error_bound(row)[0]
    assert (np.diff(bound) > 0).all()
    assert Companded(step=1 / 64, spread=4.0).error_bound(row)[0, 0] < bound[0]


@pytest.mark.parametrize("codec", NATIVE, ids=described)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_position(codec: Codec, bad: float) -> None:
    values = logits()
    values[7, 5] = bad
    with pytest.raises(FormatError, match=r"fused_logits, row 7, column 5.*finite"):
        codec.encode(values, constants(codec), where="fused_logits")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_is_no_matter_of_the_codec(dtype: type[np.floating[Any]]) -> None:
    values = np.zeros((3, WIDTH), dtype)
    values[0, 1], values[1, 2] = np.inf, np.nan
    with pytest.raises(FormatError, match=r"row 1, column 2\); expected finite; found nan\. Check the weights\.?$"):
        Float16().encode(values)
    values[1, 2] = 0
    with pytest.raises(FormatError, match=r"row 0, column 1.*found inf"):
        Float16().encode(values)


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (Float16(), 1e5),
        (FixedStep(), 513.0),
        (FixedStep(), -513.0),
        (FixedStep(step=1e-30), 1.0),
        (Companded(), -80.0),
        (Companded(reference="mean"), -90.0),
        (Companded(reference="mean", spread=2.0, step=1e-3), 50.0),
        (Companded(reference="mean", spread=1e-2, step=1e-4), 3e38),
        (FeatureSteps(), 1e6),
        (FeatureSteps(), -1e6),
    ],
    ids=lambda part: described(part) if isinstance(part, Codec) else str(part),
)
def test_a_number_out_of_range_is_refused_and_never_wrapped(codec: Codec, value: float) -> None:
    values = np.zeros((3, WIDTH), np.float32)
    values[1, 2] = value
    with pytest.raises(FormatError, match=r"row 1, column.*(Choose|Store)"):
        codec.encode(values, constants(codec))


@pytest.mark.parametrize("codec", NATIVE, ids=described)
@given(values=hnp.arrays(np.float64, (3, WIDTH), elements=st.floats()))
@settings(max_examples=80, deadline=None)
def test_any_numbers_are_stored_within_bounds_or_refused(codec: Codec, values: npt.NDArray[np.float64]) -> None:
    fitted = constants(codec)
    try:
        stored = codec.encode(values, fitted)
    except FormatError:
        return
    decoded = codec.decode(stored, fitted).numpy().astype(np.float64)
    assert np.isfinite(decoded).all()
    if not isinstance(codec, SparseCodec):
        rows = values.astype(np.float32)
        truth = centred(rows) if isinstance(codec, Companded) else rows
        assert (np.abs(decoded - truth) <= codec.error_bound(rows, fitted) + 1e-6 * np.abs(truth).max()).all()


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_wrong_shapes_and_dtypes_are_refused(codec: Codec) -> None:
    for wrong in (logits()[0], logits().astype(np.int32), logits()[None]):
        with pytest.raises(FormatError, match="wrong rows to encode"):
            codec.encode(wrong, constants(codec))


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_decoding_an_index_equals_indexing_the_decoded_rows(codec: Codec) -> None:
    fitted = constants(codec)
    stored = codec.encode(logits(), fitted)
    tensors = {suffix: torch.from_numpy(array) for suffix, array in stored.items()}
    whole = codec.decode(stored, fitted)
    mask = np.arange(40) % 3 == 0
    for index in ([3, 1, 3, 39], np.array([5, 0]), torch.tensor([7]), slice(4, 9), torch.from_numpy(mask), range(3)):
        expected = whole[list(index) if isinstance(index, range) else index]
        assert torch.equal(codec.decode(tensors, fitted, index), expected)
    assert codec.decode(tensors, fitted, slice(0, 2)).data_ptr() not in {t.data_ptr() for t in tensors.values()}


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_decoding_does_not_change_the_stored_arrays(codec: Codec) -> None:
    fitted = constants(codec)
    stored = codec.encode(logits(), fitted)
    before = {suffix: array.copy() for suffix, array in stored.items()}
    codec.decode(stored, fitted).zero_()
    for suffix, array in stored.items():
        np.testing.assert_array_equal(array, before[suffix])


@pytest.mark.parametrize("codec", NATIVE + DENSE, ids=described)
def test_json_round_trip(codec: Codec) -> None:
    assert parse_codec(json.loads(json.dumps(codec.model_dump(mode="json")))) == codec


def test_a_name_stands_for_the_codec_with_its_defaults() -> None:
    assert {name: parse_codec(name) for name in CODECS} == {name: kind() for name, kind in CODECS.items()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("float8", "float16"),
        ({"codec": "fixed-step", "stride": 1}, "stride"),
        ({"codec": "fixed-step", "step": 0}, "greater than 0"),
        ({"codec": "fixed-step", "step": "nan"}, "step"),
        ({"codec": "companded", "spread": 100}, "spread/step must be"),
        ({"codec": "companded", "pack": "pcodec"}, "reference=mean"),
        ({"codec": "top-k", "max_classes": 40000}, "32767"),
        ({"codec": "top-k", "step": 1e-6}, "spread/step must be"),
        ({"codec": "sampled", "draws": 7}, "greater than or equal to 8"),
        ({"codec": "sampled", "draws": 256}, "less than or equal to 255"),
        ({"codec": "sampled", "seed": -1}, "seed"),
        ({"codec": "sampled", "max_classes": 5}, "max_classes"),
        ({"step": 1}, "codec"),
        (7, "codec"),
    ],
)
def test_bad_codecs_are_refused(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_codec(data)


def stored_with_zarr(folder: Path, codec: Codec, rows: int = 64) -> dict[str, npt.NDArray[Any]]:
    """Write two views as a cache does, without half of the second; return the encoded first view."""
    fitted = constants(codec)
    encoded = codec.encode(logits(rows), fitted)
    group = zarr.create_group(folder)
    for array in codec.arrays(WIDTH):
        assert encoded[array.suffix].dtype == array.dtype
        assert encoded[array.suffix].shape == (rows, array.width)
        made = group.create_array(
            f"logits{array.suffix}",
            shape=(2, rows, array.width),
            chunks=(1, rows // 2, array.width),
            config={"write_empty_chunks": True},
            **array.create_arguments(),
        )
        made[0] = encoded[array.suffix]
        made[1, : rows // 2] = encoded[array.suffix][: rows // 2]
    return encoded


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_tensorstore_reads_every_array(codec: Codec, tmp_path: Path) -> None:
    for suffix, array in stored_with_zarr(tmp_path / "g", codec).items():
        path = tmp_path / "g" / f"logits{suffix}"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        np.testing.assert_array_equal(tensorstore.open(spec).result()[0].read().result(), array)


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_a_missing_chunk_is_seen_in_the_first_column(codec: Codec, tmp_path: Path) -> None:
    stored_with_zarr(tmp_path / "g", codec)
    group = zarr.open_group(tmp_path / "g", mode="r")
    for array in codec.arrays(WIDTH):
        first = np.asarray(group[f"logits{array.suffix}"][1])[:, 0]  # type: ignore[index]
        missing = np.isnan(first) if np.isnan(array.fill_value) else first == array.fill_value
        np.testing.assert_array_equal(missing, np.arange(64) >= 32)


@needs_pcodec
@pytest.mark.parametrize("codec", DENSE, ids=described)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_pcodec_arrays_are_read_back(codec: Codec, tmp_path: Path) -> None:
    encoded = stored_with_zarr(tmp_path / "g", codec)
    group = zarr.open_group(tmp_path / "g", mode="r")
    np.testing.assert_array_equal(group["logits"][0], encoded[""])  # type: ignore[index]


def test_without_pcodec_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match=r"teacher-cache\[codecs\]"):
        FixedStep(pack="pcodec").arrays(WIDTH)[0].create_arguments()
