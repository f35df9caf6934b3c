"""The builder's forward pass on a pretended GPU: nothing waits, and copies to the host go into pinned buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cache_tools.format.manifest import Fusion, Manifest
from pipeline.build.blocks import LoadedBatch, _compute, _copy_event, _host_buffers
from pipeline.networks.clip import Clip
from pipeline.networks.ensemble import NetworkPixels, TeacherEnsemble
from pipeline.networks.teachers import Teacher
from pipeline.networks.weights import freeze
from tests.support import cache_factory
from tests.support.fake_cuda import FakeGpu, fake_cuda
from train.loop import repeatable
from train.students import create_student


@pytest.mark.parametrize("deterministic", [False, True])
def test_forward_passes_use_quick_kernels_unless_a_run_must_repeat(deterministic: bool) -> None:
    seen: list[tuple[bool, str]] = []

    def look(module: nn.Module, inputs: object) -> None:
        seen.append(kernels())

    def kernels() -> tuple[bool, str]:
        return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()

    images = cache_factory.tiny_images(4)
    manifest, before = cache_factory.tiny_manifest(images, teacher_dim=64), kernels()
    with fake_cuda() as gpu:
        ensemble = make_ensemble(gpu, manifest, "float32")
        for network in (*ensemble.teachers, *ensemble.clips):
            network.register_forward_pre_hook(look)
        with repeatable(gpu.device, deterministic):
            inside = kernels()
            ensemble.outputs(torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=gpu.device))
            assert kernels() == inside
    assert kernels() == before
    assert seen == [inside if deterministic else (True, "high")] * 2


class ImageTower(nn.Module):
    """In place of an open_clip model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, stride=4)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).mean((2, 3))


def make_ensemble(gpu: FakeGpu, manifest: Manifest, precision: Any) -> TeacherEnsemble:
    recipe = manifest.recipe
    (teacher,), (clip,) = recipe.teachers, recipe.clips
    network = freeze(create_student("resnet8", 5), gpu.device)
    tower: Any = freeze(ImageTower(clip.feature_dim), gpu.device)
    text = torch.ones(len(clip.templates), 5, clip.feature_dim, device=gpu.device)
    return TeacherEnsemble(
        [Teacher(network, teacher, precision)],
        [Clip(tower, clip, text, precision=precision)],
        recipe.fusion,
        Fusion.stored(manifest),
    )


@pytest.mark.parametrize("store", ["fused", "components"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_is_computed_without_waiting(store: str, precision: str) -> None:
    images = cache_factory.tiny_images(16)
    manifest = cache_factory.tiny_manifest(images, store=store, teacher_dim=64)
    samples = np.arange(16, dtype=np.int64)
    with fake_cuda() as gpu:
        ensemble = make_ensemble(gpu, manifest, precision)
        buffers = _host_buffers(manifest, 16, gpu.device)
        pixels = NetworkPixels(torch.from_numpy(images.load(slice(None))).pin_memory(), None)
        _compute(LoadedBatch(0, 0, samples, pixels), manifest, ensemble, buffers)
        with gpu.watch() as watch:
            _compute(LoadedBatch(1, 0, samples, pixels), manifest, ensemble, buffers)
        assert _copy_event(gpu.device) is not None
        assert gpu.events == [{"blocking": True}], "a thread that waits spins"
    assert all(transfer.pinned for transfer in watch.transfers), "a copy from or to memory that is not page-locked"
    assert [transfer.to for transfer in watch.transfers].count("cpu") == len(buffers)
