"""Files of targets in the layouts that other tools publish: TinyViT's saved logits, reinforced datasets of ml-dr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Probabilities = npt.NDArray[np.float64]


def teacher_probabilities(labels: npt.NDArray[np.int64], num_classes: int, views: int, seed: int = 0) -> Probabilities:
    """[V, N, C]: what a good teacher could say of several views of images with these labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (views, len(labels), num_classes))
    logits[:, np.arange(len(labels)), labels] += 5
    p = np.exp(logits)
    return p / p.sum(axis=2, keepdims=True)


def write_tinyvit(
    root: Path, p_VNC: Probabilities, keys: list[str], *, top: int, ranks: int = 2
) -> npt.NDArray[np.int32]:
    """Write epochs as `save_logits.py` of TinyViT does; returns the seeds, int32 [V, N].

    Each rank has its share of the images in an order of its own, and the first image again, as its sampler pads.
    """
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 1 << 31, p_VNC.shape[:2]).astype(np.int32)
    for epoch, p_NC in enumerate(p_VNC):
        folder = root / f"logits_top{top}_epoch{epoch}"
        folder.mkdir(parents=True)
        for rank in range(ranks):
            samples = rng.permutation([*range(rank, len(keys), ranks), 0] if rank else range(0, len(keys), ranks))
            records = b""
            for sample in samples:
                classes = np.argsort(-p_NC[sample], kind="stable")[:top]
                records += seeds[epoch, sample].tobytes()
                records += classes.astype(np.int16).tobytes() + p_NC[sample, classes].astype(np.float16).tobytes()
            (folder / f"rank{rank}-keys.txt").write_text("".join(f"{keys[sample]}\n" for sample in samples))
            (folder / f"rank{rank}-values.bin").write_bytes(records)
    return seeds


def write_ml_dr(root: Path, p_VNC: Probabilities, *, top: int, mixed: tuple[int, ...] = ()) -> Path:
    """Write a reinforced dataset as `reinforce.py` of ml-dr does; the views `mixed` mix in another image."""
    root.mkdir(parents=True)
    augmentation: dict[str, Any] = {
        "uint8": {"enable": True},
        "random_resized_crop": {"enable": True, "size": 224},
        "random_horizontal_flip": {"enable": True, "p": 0.5},
        "to_tensor": {"enable": True},
        "mixup": {"enable": True, "alpha": 1.0, "p": 0.5},
    }
    reinforce = {"num_samples": len(p_VNC), "topk": top, "compress": True, "image_augmentation": augmentation}
    torch.save({"dataset": "imagenet", "reinforce": reinforce}, root / "config.pth.tar")
    for sample in range(p_VNC.shape[1]):
        views = []
        for view, p_C in enumerate(p_VNC[:, sample]):
            classes = np.argpartition(p_C, -top)[-top:]
            crop, flip = (3, 5, 100, 120), True
            params = [7, [crop, crop], [flip, flip], 0.25] if view in mixed else [None, crop, flip, None]
            views.append({"params": params, "prob": (p_C[classes].tolist(), classes.tolist())})
        torch.save((sample, views), root / f"{sample}.pth.tar", pickle_protocol=4)
    return root
