"""Error of the KD gradient of `product` targets against their bytes, beside the other codecs: one JSON line.

Targets and student are those of `codec_table.py` and `sampled_targets.py`: 1000 ImageNet classes on 1024 views
of nine photos, a student after 200 steps. Codebooks are fitted to other views:

* `same photos`: later views of the nine photos. Rows of a cache are as near to its sample, or less near;
* `other photos`: for each third of the photos, to later views of the other six. Rows of a data set are nearer.

`g` is the relative error of the gradient with respect to the student's logits, in per cent, at temperatures 1 and 4; of
`top-k` and `sampled` that of their own loss, at their own temperature. `kl` is KL(teacher ‖ decoded) in nats.

    python benchmarks/product_targets.py --saved photos.npz
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from codec_arrays import PHOTOS, Photos, SavedOutputs, photo_targets, with_students
from codec_rivals import components_in_steps
from codec_table import stored_bytes
from side_by_side import Threads, environment, prepared_device

from cache_tools.analysis import fidelity
from cache_tools.codecs import Codec, Companded, Product, Sampled, SparseCodec, TopK
from cache_tools.console import command

VIEWS, STAGE, TEMPERATURES = 1024, 200, (1.0, 4.0)
COUNT = len(PHOTOS) + 2  # photos, which the views take in turn
PARTS, STEPS = (16, 32, 64), (2.0, 1.0)
Rows = npt.NDArray[np.float32]


@command
def main(
    fit_views: Annotated[int, typer.Option("--fit-views", min=512, help="Further views to fit codebooks to.")] = 3072,
    saved: SavedOutputs = None,
    threads: Threads = 1,
) -> None:
    """Bytes and gradient errors of product quantisers."""
    device = prepared_device("cpu", threads)
    photos = photo_targets(VIEWS + fit_views, saved)
    result = {"views": VIEWS, "fit_views": len(photos.features) - VIEWS, "student_steps": STAGE}
    print(
        json.dumps({"benchmark": "product_targets", **result, "rows": list(_rows(photos)), **environment(device)}),
        flush=True,
    )


def _rows(photos: Photos) -> Iterator[dict[str, Any]]:
    targets = with_students("imagenet-1000", photos.logits[:VIEWS], photos.pixels[:VIEWS])
    logits, student = targets.logits, targets.students[STAGE]
    later = photos.logits[VIEWS:]
    later = later - later.mean(axis=1, keepdims=True)
    for parts in PARTS:
        codec = Product(parts=parts)
        size, decoded = _product(codec, logits.numpy(), later)
        yield _row({"codec": codec.model_dump(mode="json"), "fitted_to": "same photos"}, size, logits, decoded, student)
    codec = Product()
    size, decoded = _of_other_photos(codec, logits.numpy(), later)
    yield _row({"codec": codec.model_dump(mode="json"), "fitted_to": "other photos"}, size, logits, decoded, student)
    for step in STEPS:
        arrays, rows = components_in_steps(later, logits.numpy(), step)
        row = {"rival": "principal components in steps", "step": step, "fitted_to": "same photos"}
        yield _row(row, stored_bytes(arrays), logits, torch.from_numpy(rows), student)
    dense = Companded(step=1 / 48, spread=12.0, reference="mean")
    stored = dense.encode(logits.numpy())
    yield _row({"codec": dense.model_dump(mode="json")}, _bytes(dense, stored), logits, dense.decode(stored), student)
    for sparse in (
        TopK(num_classes=1000, min_probability=8e-3),
        TopK(num_classes=1000, min_probability=2e-3),
        TopK(num_classes=1000, max_classes=32, temperature=4.0),
        TopK(num_classes=1000, max_classes=512, temperature=4.0),
        Sampled(num_classes=1000, draws=32),
        Sampled(num_classes=1000, draws=32, temperature=4.0),
    ):
        yield _sparse(sparse, logits, student)


def _product(codec: Product, rows: Rows, sample: Rows) -> tuple[float, torch.Tensor]:
    constants = codec.fit(sample)
    stored = codec.encode(rows, constants)
    return _bytes(codec, stored), codec.decode(stored, constants)


def _of_other_photos(codec: Product, rows: Rows, later: Rows) -> tuple[float, torch.Tensor]:
    """The rows of each third of the photos, with codebooks of the other photos."""
    photo, photo_of_later = np.arange(len(rows)) % COUNT, np.arange(VIEWS, VIEWS + len(later)) % COUNT
    decoded, size = torch.empty(rows.shape), 0.0
    for third in range(3):
        own = photo % 3 == third
        size, found = _product(codec, rows[own], later[photo_of_later % 3 != third])
        decoded[torch.from_numpy(own)] = found
    return size, decoded


def _bytes(codec: Codec, stored: dict[str, npt.NDArray[Any]]) -> float:
    return stored_bytes([(array, stored[array.suffix]) for array in codec.arrays(1000)])


def _row(
    row: dict[str, Any], size: float, logits: torch.Tensor, decoded: torch.Tensor, student: torch.Tensor
) -> dict[str, Any]:
    return {
        **row,
        "bytes": round(size, 1),
        "g": {f"{t:g}": _percent(fidelity.gradient_error(logits, decoded, student, t)) for t in TEMPERATURES},
        "kl": {f"{t:g}": float(f"{fidelity.divergence(logits, decoded, t):.3g}") for t in TEMPERATURES},
        "top1_agreement": round(fidelity.agreement(logits, decoded), 4),
    }


def _sparse(codec: SparseCodec, logits: torch.Tensor, student: torch.Tensor) -> dict[str, Any]:
    stored = codec.encode(logits.numpy())
    p = fidelity.sparse_probabilities(codec.sparse(stored), logits.shape[1])
    if isinstance(codec, TopK):
        g = fidelity.tail_gradient_error(logits, p, student, codec.temperature)
    else:
        exact = fidelity.softmax(logits, codec.temperature)
        g = float((p - exact).norm()) / fidelity.gradient_norm(logits, student, codec.temperature)
    return {
        "codec": codec.model_dump(mode="json"),
        "bytes": round(_bytes(codec, stored), 1),
        "g": {f"{codec.temperature:g}": _percent(g)},
    }


def _percent(share: float) -> float:
    return round(100 * share, 1)


if __name__ == "__main__":
    typer.run(main)
