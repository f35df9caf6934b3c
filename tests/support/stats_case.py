"""A cache whose targets lean towards the labels, and the figures of its statistics in plain loops."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.images.arrays import ArrayImages
from cache_tools.reader import TeacherCache
from cache_tools.refusion import FusionChoice
from tests.support.cache_factory import tiny_images, tiny_manifest, write_leaning

CLASSES, VIEWS = 7, 3
# At its own scale of 100 this CLIP is sure of everything; at 12 all four quadrants have samples.
SCALE, CONFIDENT = 12.0, 0.6
CHOICE = FusionChoice(clip_scale=SCALE)


def labelled_images(num_classes: int = CLASSES) -> ArrayImages:
    """The last class has no sample, the one before it a single one."""
    images = tiny_images(60, num_classes)
    labels = np.random.default_rng(5).integers(0, num_classes - 2, 60)
    labels[17] = num_classes - 2
    return dataclasses.replace(images, labels=labels)


def write_cache(path: Path, images: ArrayImages, **recipe: Any) -> TeacherCache:
    """Targets that lean towards the labels, so that there are right, wrong, confident and unsure answers."""
    manifest = tiny_manifest(images, num_views=VIEWS, linear_head=False, clip_dim=24, codec="float32", **recipe)
    return write_leaning(path, manifest, images)


def softmax(logits: np.ndarray) -> list[float]:
    exponentials = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def reference_summary(rows: list[np.ndarray], labels: list[int]) -> dict[str, float]:
    """Plain loops over samples; a bin of the confidence at a time."""
    sums: defaultdict[str, float] = defaultdict(float)
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label in zip(rows, labels, strict=True):
        p = softmax(row)
        confidence, said = max((value, -number) for number, value in enumerate(p))
        right = -said == label
        sums["top1"] += right
        sums["top5"] += sum(value > p[label] for value in p) < 5
        sums["nll"] -= math.log(p[label])
        sums["brier"] += sum((value - (number == label)) ** 2 for number, value in enumerate(p))
        sums["confidence"] += confidence
        sums["entropy"] -= sum(value * math.log(value) for value in p if value > 0)
        sure = "confident" if confidence >= CONFIDENT else "unsure"
        sums[f"{sure}_{'right' if right else 'wrong'}"] += 1
        bins[min(int(confidence * 15), 14)].append((confidence, right))
    for members in bins:
        if members:
            sums["ece"] += abs(sum(right - confidence for confidence, right in members))
    return {name: value / len(rows) for name, value in sums.items()}
