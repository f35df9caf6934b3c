"""cache_tools/codec*.py, top_k.py, fidelity.py: round trips within stated bounds, ranges, JSON, other zarr readers."""

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

from cache_tools.analysis import fidelity
from cache_tools.codecs import (
    CODECS,
    Codec,
    Companded,
    FeatureSteps,
    FixedStep,
    Float16,
    Float32,
    RowStep,
    TopK,
    parse_codec,
)
from cache_tools.codecs.features import FEEDBACK
from cache_tools.errors import FormatError, RecipeError

WIDTH = 12
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
]
DENSE = [FixedStep(pack="pcodec"), Companded(reference="mean", pack="pcodec"), FeatureSteps(pack="pcodec")]
ELEMENTWISE = [codec for codec in NATIVE if codec.codec not in {"companded", "top-k"}]  # type: ignore[attr-defined]
LOGITS = hnp.arrays(np.float32, (5, WIDTH), elements=st.floats(-18.0, 18.0, width=32))


def described(codec: Codec) -> str:
    return "-".join(str(value) for value in codec.model_dump().values())


def logits(rows: int = 40, width: int = WIDTH, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 3).astype(np.float32)


def constants(codec: Codec, width: int = WIDTH) -> dict[str, npt.NDArray[np.float32]]:
    return codec.fit(logits(200, width, seed=1))


def centred(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return wide - wide.mean(axis=1, keepdims=True)


def softmax(rows: npt.NDArray[Any], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    scaled = rows.astype(np.float64) / temperature
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("codec", ELEMENTWISE, ids=described)
@given(values=LOGITS)
@settings(max_examples=60, deadline=None)
def test_numbers_come_back_within_the_stated_bound(codec: Codec, values: npt.NDArray[np.float32]) -> None:
    fitted = constants(codec)
    decoded = codec.decode(codec.encode(values, fitted), fitted).numpy()
    assert decoded.dtype == np.float32
    assert (np.abs(decoded.astype(np.float64) - values) <= codec.error_bound(values, fitted)).all()


@pytest.mark.parametrize("codec", [c for c in NATIVE if isinstance(c, Companded)], ids=described)
@given(values=LOGITS)
@settings(max_examples=100, deadline=None)
def test_companded_logits_come_back_centred_within_the_stated_bound(
    codec: Companded, values: npt.NDArray[np.float32]
) -> None:
    decoded = codec.decode(codec.encode(values)).numpy()
    assert (np.abs(decoded - centred(values)) <= codec.error_bound(values)).all()


def test_companded_steps_are_finest_where_probability_is() -> None:
    row = np.array([[0.0, -1.0, -3.0, -6.0]], np.float32)
    bound = Companded().error_bound(row)[0]
    assert (np.diff(bound) > 0).all()
    assert Companded(step=1 / 64, spread=4.0).error_bound(row)[0, 0] < bound[0]


@pytest.mark.parametrize("kept", [WIDTH, 3])
@given(values=LOGITS)
@settings(max_examples=100, deadline=None)
def test_top_k_probabilities_within_the_stated_bound(kept: int, values: npt.NDArray[np.float32]) -> None:
    codec = TopK(num_classes=WIDTH, max_classes=kept, min_probability=1e-3)
    targets = codec.sparse(codec.encode(values))
    p = np.zeros((len(values), WIDTH + 1))
    np.put_along_axis(p, targets.classes.numpy(), targets.log_p.double().exp().numpy(), axis=1)
    true, stored = softmax(values), p[:, :WIDTH]
    assert (np.abs(stored - true) <= codec.error_bound(values) + 1e-12).all()
    counts = (targets.classes < WIDTH).sum(dim=1).numpy()
    assert (counts >= 1).all()
    assert (counts <= kept).all()
    known = np.zeros((len(values), WIDTH + 1), bool)
    np.put_along_axis(known, targets.classes.numpy(), True, axis=1)
    rest = np.where(known[:, :WIDTH], 0.0, true).sum(axis=1)
    np.testing.assert_allclose(targets.log_tail.double().exp().numpy(), rest, rtol=1e-5, atol=1e-30)


def test_top_k_decodes_an_even_tail_of_the_right_mass() -> None:
    values = logits(30)
    codec = TopK(num_classes=WIDTH, max_classes=4, min_probability=0.02)
    decoded = codec.decode(codec.encode(values)).numpy()
    p, true = softmax(decoded), softmax(values)
    largest = np.argsort(-true, axis=1)[:, :1]
    np.testing.assert_allclose(np.take_along_axis(p, largest, 1), np.take_along_axis(true, largest, 1), atol=0.01)
    np.testing.assert_allclose(decoded.mean(axis=1), 0.0, atol=1e-5)
    tails = [np.unique(row[np.argsort(row)][: WIDTH - 4].round(5)).size for row in p]
    assert max(tails) == 1


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_top_k_cautions_above_temperature_1_and_refuses_another(temperature: float) -> None:
    codec = TopK(num_classes=WIDTH, temperature=temperature)
    stored = codec.encode(logits())
    assert f"temperature {temperature:g}" in str(codec.caution(temperature))
    assert codec.sparse(stored, temperature=temperature).classes.shape == (40, WIDTH)
    with pytest.raises(FormatError, match="one temperature"):
        codec.sparse(stored, temperature=1.0)
    assert TopK().caution(1.0) is None


def test_top_k_keeps_everything_where_it_may() -> None:
    codec = TopK(num_classes=WIDTH, min_probability=0.0)
    targets = codec.sparse(codec.encode(logits()))
    assert (targets.classes.numpy() == np.arange(WIDTH)).all()
    assert (targets.log_tail == -1e30).all()


@pytest.mark.parametrize("codec", NATIVE, ids=described)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_place(codec: Codec, bad: float) -> None:
    values = logits()
    values[7, 5] = bad
    with pytest.raises(FormatError, match=r"fused_logits, row 7, column 5.*finite"):
        codec.encode(values, constants(codec), where="fused_logits")


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
def test_what_is_out_of_range_is_refused_never_wrapped(codec: Codec, value: float) -> None:
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
    if not isinstance(codec, TopK):
        rows = values.astype(np.float32)
        truth = centred(rows) if isinstance(codec, Companded) else rows
        assert (np.abs(decoded - truth) <= codec.error_bound(rows, fitted) + 1e-6 * np.abs(truth).max()).all()


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_wrong_shapes_and_dtypes_are_refused(codec: Codec) -> None:
    for wrong in (logits()[0], logits().astype(np.int32), logits()[None]):
        with pytest.raises(FormatError, match="wrong rows to encode"):
            codec.encode(wrong, constants(codec))


@pytest.mark.parametrize("codec", NATIVE, ids=described)
def test_decoding_an_index_is_indexing_what_is_decoded(codec: Codec) -> None:
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
def test_decoding_leaves_what_is_stored_alone(codec: Codec) -> None:
    fitted = constants(codec)
    stored = codec.encode(logits(), fitted)
    before = {suffix: array.copy() for suffix, array in stored.items()}
    codec.decode(stored, fitted).zero_()
    for suffix, array in stored.items():
        np.testing.assert_array_equal(array, before[suffix])


@pytest.mark.parametrize("codec", NATIVE + DENSE, ids=described)
def test_json_round_trip(codec: Codec) -> None:
    assert parse_codec(json.loads(json.dumps(codec.model_dump(mode="json")))) == codec


def test_names_are_codecs_with_their_defaults() -> None:
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
        ({"step": 1}, "codec"),
        (7, "codec"),
    ],
)
def test_bad_codecs_are_refused_in_words(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_codec(data)


def stored_with_zarr(folder: Path, codec: Codec, rows: int = 64) -> dict[str, npt.NDArray[Any]]:
    """Two views written as a cache would, half of the second left out; what was encoded of the first."""
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
def test_a_missing_chunk_shows_in_the_first_column(codec: Codec, tmp_path: Path) -> None:
    stored_with_zarr(tmp_path / "g", codec)
    group = zarr.open_group(tmp_path / "g", mode="r")
    for array in codec.arrays(WIDTH):
        first = np.asarray(group[f"logits{array.suffix}"][1])[:, 0]  # type: ignore[index]
        missing = np.isnan(first) if np.isnan(array.fill_value) else first == array.fill_value
        np.testing.assert_array_equal(missing, np.arange(64) >= 32)


@needs_pcodec
@pytest.mark.parametrize("codec", DENSE, ids=described)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
def test_pcodec_arrays_come_back(codec: Codec, tmp_path: Path) -> None:
    encoded = stored_with_zarr(tmp_path / "g", codec)
    group = zarr.open_group(tmp_path / "g", mode="r")
    np.testing.assert_array_equal(group["logits"][0], encoded[""])  # type: ignore[index]


def test_without_pcodec_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FormatError, match=r"teacher-cache\[codecs\]"):
        FixedStep(pack="pcodec").arrays(WIDTH)[0].create_arguments()


class TestFeatureSteps:
    def test_steps_follow_the_spread(self) -> None:
        sample = logits(2000) * np.linspace(1, 12, WIDTH, dtype=np.float32)
        by_column = FeatureSteps(spread="column", resolution=10.0).fit(sample)["_steps"]
        np.testing.assert_allclose(by_column, sample.std(axis=0) / 10, rtol=1e-4)
        common = FeatureSteps(resolution=10.0).fit(sample)["_steps"]
        np.testing.assert_allclose(common, np.exp(np.log(sample.std(axis=0)).mean()) / 10, rtol=1e-4)

    def test_a_column_at_rest_gets_a_step(self) -> None:
        sample = logits(100)
        sample[:, 3] = 0.0
        assert (FeatureSteps(spread="column").fit(sample)["_steps"] > 0).all()

    def test_a_sample_without_spread_is_refused(self) -> None:
        with pytest.raises(FormatError, match="no spread"):
            FeatureSteps().fit(np.ones((10, WIDTH), np.float32))

    def test_missing_constants_are_named(self) -> None:
        with pytest.raises(FormatError, match="'_steps'"):
            FeatureSteps().encode(logits())

    @pytest.mark.parametrize("width", [40, 300])  # more than one block of columns
    def test_feedback_keeps_the_logits_of_the_head(self, width: int) -> None:
        generator = np.random.default_rng(3)
        features = np.maximum(generator.standard_normal((200, width)), 0).astype(np.float32)
        head = generator.standard_normal((width // 4, width)).astype(np.float32)
        codec = FeatureSteps(resolution=4.0)
        plain = codec.fit(features)
        aware = plain | codec.head_feedback(head)

        def errors(fitted: dict[str, npt.NDArray[np.float32]]) -> tuple[float, float]:
            decoded = codec.decode(codec.encode(features, fitted), plain).numpy()
            difference = decoded - features
            assert (np.abs(difference) <= codec.error_bound(features, fitted)).all()
            return float(np.linalg.norm(centred(difference @ head.T))), float(np.linalg.norm(difference))

        plain_logits, plain_features = errors(plain)
        aware_logits, aware_features = errors(aware)
        assert aware_logits < 0.7 * plain_logits
        assert aware_features < 1.5 * plain_features

    def test_feedback_is_one_column_after_the_other(self) -> None:
        """Against the plain loop over columns, in float64."""
        features, head = logits(20, 150, seed=5), logits(30, 150, seed=6)
        codec = FeatureSteps(resolution=3.0)
        fitted = codec.fit(features) | codec.head_feedback(head)
        pending, steps = features.astype(np.float64), fitted["_steps"].astype(np.float64)
        expected = np.empty_like(pending)
        for column in range(150):
            expected[:, column] = np.rint(pending[:, column] / steps[column])
            error = pending[:, column] - expected[:, column] * steps[column]
            pending[:, column + 1 :] -= error[:, None] * fitted[FEEDBACK][column, column + 1 :]
        different = (codec.encode(features, fitted)[""] != expected).any(axis=1)
        assert different.mean() < 0.2  # a tie decided the other way changes the rest of its row

    def test_without_a_direction_to_hide_in_it_is_rounding_to_nearest(self) -> None:
        codec = FeatureSteps(damping=1e9)
        fitted = constants(codec)
        aware = fitted | codec.head_feedback(logits(5))
        np.testing.assert_array_equal(codec.encode(logits(), fitted)[""], codec.encode(logits(), aware)[""])


class TestFidelity:
    """Against the definitions, written out in numpy float64."""

    def test_gradient_error(self) -> None:
        target, decoded, student = (logits(20, seed=s) for s in (0, 1, 2))
        tensors = [torch.from_numpy(rows) for rows in (target, decoded, student)]
        for temperature in (1.0, 4.0):
            p, d, q = (softmax(rows, temperature) for rows in (target, decoded, student))
            found = fidelity.gradient_error(tensors[0], tensors[1], tensors[2], temperature)
            assert found == pytest.approx(np.linalg.norm(d - p) / np.linalg.norm(q - p), rel=1e-9)
        assert fidelity.gradient_error(tensors[0], tensors[0], tensors[2], 4.0) == 0.0

    def test_gradient_error_is_that_of_the_loss(self) -> None:
        from train import losses

        target, student = torch.from_numpy(logits(20)), torch.from_numpy(logits(20, seed=1)).requires_grad_()
        decoded = target + 0.1 * torch.from_numpy(logits(20, seed=2))
        exact, other = (torch.autograd.grad(losses.kd(student, rows, 4.0), student)[0] for rows in (target, decoded))
        assert fidelity.gradient_error(target, decoded, student.detach(), 4.0) == pytest.approx(
            float((other - exact).norm() / exact.norm()), rel=1e-4
        )

    def test_tail_gradient_error_is_that_of_the_loss(self) -> None:
        from train import losses
        from train.losses.tail import kd_tail

        values = logits(20)
        target, student = torch.from_numpy(values), torch.from_numpy(logits(20, seed=1)).requires_grad_()
        codec = TopK(num_classes=WIDTH, max_classes=3)
        targets = codec.sparse(codec.encode(values))
        joint = torch.cat([targets.log_p, targets.log_tail[:, None]], dim=1).softmax(dim=1)
        known = torch.zeros(20, WIDTH + 1).scatter_(1, targets.classes, joint[:, :-1])[:, :WIDTH]
        exact = torch.autograd.grad(losses.kd(student, target, 1.0), student)[0]
        found = torch.autograd.grad(kd_tail(student, *targets, 1.0), student)[0]
        error = fidelity.tail_gradient_error(target, known, student.detach(), 1.0)
        assert error == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-4)

    def test_divergence_and_agreement(self) -> None:
        target, decoded = logits(20), logits(20, seed=1)
        p, d = softmax(target, 2.0), softmax(decoded, 2.0)
        tensors = torch.from_numpy(target), torch.from_numpy(decoded)
        assert fidelity.divergence(*tensors, 2.0) == pytest.approx((p * np.log(p / d)).sum(axis=1).mean(), rel=1e-9)
        assert fidelity.agreement(*tensors) == (target.argmax(1) == decoded.argmax(1)).mean()
