"""Students trained on `sampled`, `top-k` and `product` targets of 1000 classes: held-out KL, five seeds.

A ReLU network of one hidden layer on the pooled pixels of photo views (`codec_arrays.py`) is trained for 300 steps of
128 rows on 800 views and tested on the others: KL(teacher ‖ student) at the temperature. V is the number of times that
each row was sampled; the steps cycle through them as epochs cycle through views. `--product` trains on `product`
targets instead, whose codebooks are fitted to 3072 further views.

    python benchmarks/sampled_students.py --saved photos.npz --temperature 4 [--product]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from codec_arrays import photo_targets
from side_by_side import Threads, environment, prepared_device

from cache_tools.codecs import Product, Sampled, SparseCodec, TopK
from cache_tools.console import command
from train import losses
from train.losses.tail import kd_tail

BATCH, STEPS_PER_SAMPLE = 128, 7  # about an epoch
TRAINED = 25 / 32  # the share of views to train on
FIT_VIEWS, PARTS = 3072, (32,)


@command
def main(
    views: Annotated[int, typer.Option("--views", min=64, help="Views of the photos.")] = 1024,
    temperature: Annotated[float, typer.Option("--temperature", min=0.1, help="Of KD and the codecs.")] = 1.0,
    seeds: Annotated[int, typer.Option("--seeds", min=2, help="Students of each kind.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of each student.")] = 300,
    saved: Annotated[Path | None, typer.Option("--saved", help="File (.npz) of the network's outputs.")] = None,
    product: Annotated[bool, typer.Option("--product", help="Product targets instead of the others.")] = False,
    threads: Threads = 1,
) -> None:
    """Held-out KL of students of each codec."""
    device = prepared_device("cpu", threads)
    photos = photo_targets(views + FIT_VIEWS * product, saved)
    logits, pixels = torch.from_numpy(photos.logits).float(), torch.from_numpy(photos.pixels[:views]).float()
    logits = logits - logits.mean(dim=1, keepdim=True)
    logits, further = logits[:views], logits[views:]
    quantised = {f"product, {parts} B": _quantised(Product(parts=parts), logits, further) for parts in PARTS if product}
    pixels = (pixels - pixels.mean(dim=0)) / (pixels.std(dim=0) + 1e-6)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, codecs in _codecs(temperature, seed).items() if not product else ():
            kl = _held_out_kl(logits, logits, pixels, codecs, temperature, seed, steps)
            found.setdefault(name, []).append(kl)
        for name, decoded in quantised.items():
            kl = _held_out_kl(logits, decoded, pixels, (), temperature, seed, steps)
            found.setdefault(name, []).append(kl)
    kinds = {
        name: [round(float(f(kl)), 4) for f in (np.mean, lambda x: np.std(x, ddof=1))] for name, kl in found.items()
    }
    result = {"temperature": temperature, "views": views, "seeds": seeds, "steps": steps, "kl_mean_std": kinds}
    print(json.dumps({"benchmark": "sampled_students", **result, **environment(device)}), flush=True)


def _codecs(temperature: float, seed: int) -> dict[str, Sequence[SparseCodec]]:
    """The codecs of each kind of student, one for each time that rows are sampled; none for dense targets."""
    fields = {"min_probability": 2e-3} if temperature <= 1 else {"max_classes": 32}
    common = {"num_classes": 1000, "temperature": temperature}

    def sampled(draws: int, times: int) -> list[SparseCodec]:
        return [Sampled.model_validate(common | {"draws": draws, "seed": 100 * seed + time}) for time in range(times)]

    return {
        "dense": [],
        "top-k": [TopK.model_validate(common | fields)],
        "sampled, 32 draws, V=1": sampled(32, 1),
        "sampled, 32 draws, V=8": sampled(32, 8),
        "sampled, 255 draws, V=8": sampled(255, 8),
    }


def _quantised(codec: Product, logits: torch.Tensor, further: torch.Tensor) -> torch.Tensor:
    """The decoded logits, with codebooks of further rows."""
    constants = codec.fit(further.numpy())
    return codec.decode(codec.encode(logits.numpy(), constants), constants)


def _held_out_kl(
    logits: torch.Tensor,
    dense: torch.Tensor,
    pixels: torch.Tensor,
    codecs: Sequence[SparseCodec],
    temperature: float,
    seed: int,
    steps: int,
) -> float:
    """Train on the stored rows of the codecs, or on dense logits without any; test on `logits`."""
    count = int(TRAINED * len(logits))
    stored = [codec.sparse(codec.encode(logits[:count].numpy())) for codec in codecs]
    torch.manual_seed(seed)
    student = torch.nn.Sequential(torch.nn.Linear(768, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1000))
    optimiser = torch.optim.Adam(student.parameters(), 1e-3)
    for step in range(steps):
        index = torch.randint(count, (BATCH,))
        output = student(pixels[index])
        if stored:
            targets = stored[step // STEPS_PER_SAMPLE % len(stored)]
            loss = kd_tail(output, *(part[index] for part in targets), temperature)
        else:
            loss = losses.kd(output, dense[index], temperature)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    with torch.no_grad():
        return float(losses.kd(student(pixels[count:]), logits[count:], temperature)) / temperature**2


if __name__ == "__main__":
    typer.run(main)
