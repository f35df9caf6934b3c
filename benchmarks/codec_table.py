"""Bytes and fidelity of every codec on real targets, side by side: one JSON line per row.

`bytes` is the size of the files of the zarr arrays per (image, view), checksums included. `g` is the relative error of
the KD gradient with respect to the student's logits, against float32 targets, in per cent, at temperatures 1 and 4, for
a student at two stages of training (keys `STEPS@T`; the students are those of `codec_arrays.py`). If features are
stored, the head computes the logits from them, and the bytes cover both. For top-k, `g` is for its own loss,
`train.losses.tail.kd_tail`, and `g_even_tail` for a dense loss on its even tail.

    python benchmarks/codec_table.py --saved photos.npz
    python benchmarks/codec_table.py --saved photos.npz --cache fashion-mnist    # and a cache of ten classes
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
import zarr
from codec_arrays import Photos, SavedOutputs, Targets, hundred_classes, photo_targets, ten_classes, with_students
from codec_rivals import Arrays, MassTopK, rotated, top_smoothed
from side_by_side import Threads, environment, prepared_device

from cache_tools.analysis import fidelity
from cache_tools.codecs import Codec, Companded, FeatureSteps, FixedStep, Float16, Float32, RowStep, TopK
from cache_tools.console import command

TEMPERATURES = (1.0, 4.0)
CHUNK_BYTES = 8 << 20
BATCH = 256


@command
def main(
    views: Annotated[int, typer.Option("--views", min=32, help="Views of the photos.")] = 4096,
    saved: SavedOutputs = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="A cache of ten classes: path, name or fingerprint.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Bytes and gradient errors of all codecs."""
    device = prepared_device("cpu", threads)
    warnings.filterwarnings("ignore", "Numcodecs codecs are not in the Zarr version 3 specification")
    photos = photo_targets(views, saved)
    shared = environment(device)
    for row in _rows(photos, cache):
        print(json.dumps({"benchmark": "codec_table", **row, **shared}), flush=True)


def _rows(photos: Photos, cache: str | None) -> Iterator[dict[str, Any]]:
    thousand = with_students("imagenet-1000", photos.logits, photos.pixels)
    yield from _thousand(thousand, photos)
    for name, logits in hundred_classes(photos).items():
        targets = with_students(f"imagenet-100-{name}", logits, photos.pixels)
        bar = "≤ 105 B, g ≤ 1 %"
        yield dense(targets, Float16())
        yield dense(targets, FixedStep(step=1 / 48, pack="pcodec"), bar)
        yield dense(targets, Companded(step=1 / 32, spread=8.0))
        for pack in ("blosc", "pcodec"):
            yield dense(targets, Companded(step=1 / 48, spread=12.0, reference="mean", pack=pack), bar)
    if cache is not None:
        yield from _ten(with_students(f"{Path(cache).name}-10", *ten_classes(cache)))


def _ten(targets: Targets) -> Iterator[dict[str, Any]]:
    bar = "≤ 9 B, g ≤ 1 %"
    for codec in (
        Float16(),
        RowStep(),
        FixedStep(step=1 / 24, pack="pcodec"),
        Companded(reference="mean", step=1 / 12, pack="pcodec"),
    ):
        yield dense(targets, codec)
    yield dense(targets, Companded(), bar)
    yield dense(targets, Companded(step=1 / 32, spread=6.0), bar)


def _thousand(targets: Targets, photos: Photos) -> Iterator[dict[str, Any]]:
    one, five = "≤ 640 B with features, g ≤ 1 %", "≤ 410 B with features, g ≤ 5 %"
    for codec in (
        Float32(),
        Float16(),
        RowStep(),
        FixedStep(),
        FixedStep(pack="pcodec"),
        Companded(),
        Companded(step=1 / 32, spread=12.0, reference="mean", pack="pcodec"),
        Companded(step=1 / 48, spread=12.0, reference="mean"),
        Companded(step=1 / 48, spread=12.0, reference="mean", pack="pcodec"),
    ):
        yield dense(targets, codec)
    yield through_head(targets, photos, Float16(), aware=False)
    yield through_head(targets, photos, FeatureSteps(spread="column", resolution=32.0, pack="pcodec"), aware=False)
    for resolution, bar in ((19.0, one), (3.8, five)):
        for aware in (False, True):
            codec = FeatureSteps(resolution=resolution, pack="pcodec")
            yield through_head(targets, photos, codec, aware=aware, bar=bar)
        yield through_head(targets, photos, FeatureSteps(resolution=resolution), aware=True)
    arrays, features = rotated(photos.features, 16.0)
    logits = torch.from_numpy(features @ photos.weight.T + photos.bias)
    yield _row(targets, {"rival": "principal components", "steps_per_deviation": 16}, stored_bytes(arrays), logits)
    for k in (100, 10, 5):
        arrays, logits = top_smoothed(targets.logits, k)
        yield _row(targets, {"rival": f"top-{k}, even tail"}, stored_bytes(arrays), logits)
    for probability in (2e-3, 1e-3, 5e-4):
        codec = TopK(num_classes=1000, min_probability=probability)
        yield sparse(targets, codec, "≤ 134 B, g ≤ 5 % at T = 1")
    yield sparse(targets, MassTopK(num_classes=1000, max_classes=1000), rival="top-k by mass")
    yield sparse(targets, TopK(num_classes=1000, temperature=4.0))


def dense(targets: Targets, codec: Codec, bar: str | None = None) -> dict[str, Any]:
    """A row for logits that are stored directly."""
    size, stored, times = _encoded(codec, targets.logits.numpy(), {})
    return _row(targets, {"codec": codec.model_dump(mode="json")}, size, codec.decode(stored), bar) | times


def through_head(
    targets: Targets, photos: Photos, codec: Codec, *, aware: bool, bar: str | None = None
) -> dict[str, Any]:
    """A row for features from which the head computes the logits. `aware` rounds them to suit the head."""
    constants = codec.fit(photos.features)
    if aware:
        assert isinstance(codec, FeatureSteps)
        constants |= codec.head_feedback(photos.weight)
    size, stored, times = _encoded(codec, photos.features, constants)
    features = codec.decode(stored, constants).numpy()
    logits = torch.from_numpy(features @ photos.weight.T + photos.bias)
    spread = np.linalg.norm(photos.features - photos.features.mean(axis=0))
    extra = {
        "codec": codec.model_dump(mode="json"),
        "features": True,
        "rounding": "head" if aware else "nearest",
        "feature_error": _percent(float(np.linalg.norm(features - photos.features) / spread)),
    }
    return _row(targets, extra, size, logits, bar) | times


def sparse(targets: Targets, codec: TopK, bar: str | None = None, *, rival: str | None = None) -> dict[str, Any]:
    """A row for top-k: g of the loss with a tail, only at the codec's temperature."""
    size, stored, times = _encoded(codec, targets.logits.numpy(), {})
    known = codec.sparse(stored)
    joint = torch.cat([known.log_p, known.log_tail[:, None]], dim=1).double().softmax(dim=1)[:, :-1]
    rows, classes = targets.logits.shape
    p = torch.zeros(rows, classes + 1, dtype=torch.float64).scatter_(1, known.classes, joint)[:, :classes]
    kept = (known.classes < classes).sum(dim=1)
    temperature = codec.temperature
    extra: dict[str, Any] = {"codec": codec.model_dump(mode="json")} | ({"rival": rival} if rival else {})
    row = _row(targets, extra, size, codec.decode(stored))
    row["g_even_tail"] = row.pop("g")
    row["g"] = {
        f"{stage}@{temperature:g}": _percent(fidelity.tail_gradient_error(targets.logits, p, student, temperature))
        for stage, student in targets.students.items()
    }
    row |= {"classes_mean": round(float(kept.double().mean()), 1), "classes_max": int(kept.max())}
    row["captured_mass"] = round(float(p.sum(dim=1).mean()), 4)
    return _judged(row, bar) | times


def _row(
    targets: Targets, extra: Mapping[str, Any], size: float, decoded: torch.Tensor, bar: str | None = None
) -> dict[str, Any]:
    row = {
        "targets": targets.name,
        "rows": len(targets.logits),
        **extra,
        "bytes": round(size, 2),
        "g": {
            f"{stage}@{temperature:g}": _percent(fidelity.gradient_error(targets.logits, decoded, student, temperature))
            for stage, student in targets.students.items()
            for temperature in TEMPERATURES
        },
        "kl": {f"{t:g}": float(f"{fidelity.divergence(targets.logits, decoded, t):.3g}") for t in TEMPERATURES},
        "top1_agreement": round(fidelity.agreement(targets.logits, decoded), 4),
    }
    return _judged(row, bar)


def _judged(row: dict[str, Any], bar: str | None) -> dict[str, Any]:
    """Add whether a row meets a bar `≤ BYTES B…, g ≤ PERCENT %…` at all of its stages and temperatures."""
    if bar is None:
        return row
    most_bytes, most_g = (float(part.split("≤ ")[1].split()[0]) for part in bar.split(", "))
    return row | {"bar": bar, "met": row["bytes"] <= most_bytes and max(row["g"].values()) <= most_g}


def _encoded(
    codec: Codec, values: npt.NDArray[np.float32], constants: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[float, dict[str, npt.NDArray[Any]], dict[str, float]]:
    """Bytes per row in zarr, the encoded arrays, and the times per row to encode all rows and decode a batch."""
    start = time.process_time()
    stored = codec.encode(values, constants)
    encode_us = (time.process_time() - start) / len(values) * 1e6
    size = stored_bytes([(array, stored[array.suffix]) for array in codec.arrays(values.shape[1])])
    tensors = {suffix: torch.from_numpy(array) for suffix, array in stored.items()}
    fixed = {suffix: torch.from_numpy(array) for suffix, array in constants.items()}
    index = torch.from_numpy(np.random.default_rng(0).permutation(len(values))[:BATCH])
    decode_s = []
    for _ in range(5):
        start = time.perf_counter()
        codec.decode(tensors, fixed, index)
        decode_s.append(time.perf_counter() - start)
    times = {"encode_us_per_row": encode_us, "decode_us_per_row": min(decode_s) / len(index) * 1e6}
    return size, stored, {name: round(value, 2) for name, value in times.items()}


def stored_bytes(arrays: Arrays) -> float:
    """Bytes per row of what zarr writes: chunks of (1, rows, width), rows a power of two, at most 8 MiB."""
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        group = zarr.create_group(folder)
        for array, values in arrays:
            fit = max(1, CHUNK_BYTES // array.row_bytes)
            chunk_rows = min(1 << int(math.log2(fit)), len(values))
            made = group.create_array(
                f"target{array.suffix}",
                shape=(1, *values.shape),
                chunks=(1, chunk_rows, values.shape[1]),
                config={"write_empty_chunks": True},
                **array.create_arguments(),
            )
            made[0] = values
            np.testing.assert_array_equal(made[0], values)
            total += sum(file.stat().st_size for file in Path(folder, made.path, "c").rglob("*") if file.is_file())
    return total / len(arrays[0][1])


def _percent(share: float) -> float:
    return round(100 * share, 3)


if __name__ == "__main__":
    typer.run(main)
