"""Parameters and FLOPs equal hand counts; latencies have the order that they must have on any machine."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from cache_tools.errors import RecipeError
from train.cost import MAX_RUNS, MIN_RUNS, count_flops, measure
from train.students import create_student

CPU = torch.device("cpu")


class Small(nn.Module):
    """Strided convolution, grouped convolution, batch norm, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.grouped(self.wide(x))).relu().mean((2, 3)))


class Attention(nn.Module):
    """One head of scaled dot products over pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.linear(x.flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value).mean((1, 2))


class MultiheadAttention(nn.Module):
    """torch's own module with two heads over pixels as tokens. In eval mode it runs a fused kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2).repeat(1, 1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


class Slow(nn.Module):
    """Takes at least 3 ms per image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.003 * len(x))
        return self.linear(x.mean((2, 3)))


def test_parameters_and_flops_by_hand() -> None:
    cost = measure(Small(), (10, 14), CPU, batch_sizes=(1,), budget_s=0)
    assert cost.parameters == (3 * 8 * 9 + 8) + (8 // 4 * 12 * 9) + 2 * 12 + (12 * 5 + 5)
    wide = 5 * 7 * 8 * (3 * 9)  # output positions × channels × multiply-accumulates of each
    grouped = 5 * 7 * 12 * (8 // 4 * 9)
    assert cost.flops == 2 * (wide + grouped + 12 * 5)


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_is_counted_whichever_kernel_is_selected(backend: SDPBackend | None) -> None:
    tokens, width = 6 * 4, 8
    projections, scores_and_mixing = tokens * 3 * 24, 2 * tokens * tokens * width
    with nullcontext() if backend is None else sdpa_kernel(backend):
        assert count_flops(Attention().eval(), (6, 4)) == 2 * (projections + scores_and_mixing)


def test_attention_is_counted_on_devices_without_data() -> None:
    """On the meta device, and in a fake mode that pretends a GPU."""
    counted = count_flops(Attention().eval(), (6, 4))
    with torch.device("meta"):
        assert count_flops(Attention().eval(), (6, 4)) == counted
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device):
            assert count_flops(Attention().eval(), (6, 4)) == counted


@pytest.mark.parametrize("fast_path", [True, False])
def test_multihead_attention_is_counted_with_and_without_its_fast_path(fast_path: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        tokens, width = 6 * 4, 6
        projections, scores_and_mixing = tokens * width * 4 * width, 2 * tokens * tokens * width
        assert count_flops(MultiheadAttention().eval(), (6, 4)) == 2 * (projections + scores_and_mixing)
        assert torch.backends.mha.get_fastpath_enabled() is fast_path
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", ["timm:test_vit", "torchvision:vit_b_32"])
def test_transformers_count_the_same_with_data_and_without(name: str) -> None:
    size = (160, 160) if name.startswith("timm") else (224, 224)
    with torch.device("meta"):
        without = count_flops(create_student(name, 10).eval(), size)
    assert count_flops(create_student(name, 10).eval(), size) == without


def test_known_networks() -> None:
    """Multiply-accumulates in billions, as timm, torchvision (at 224 × 224) and the CIFAR literature publish them."""
    expected = {
        ("timm:resnet18", 224): 1.82,
        ("timm:vit_tiny_patch16_224", 224): 1.26,
        ("torchvision:vit_b_16", 224): 17.56,
        ("resnet56", 32): 0.126,
    }
    for (name, size), giga in expected.items():
        with torch.device("meta"):  # shapes are enough
            student = create_student(name, 1000 if size == 224 else 10).eval()
        assert count_flops(student, (size, size)) / 2e9 == pytest.approx(giga, rel=0.02)


def test_flops_grow_with_image_size_depth_and_width() -> None:
    def flops(name: str, size: int = 32) -> int:
        return count_flops(create_student(name, 10).eval(), (size, size))

    assert flops("resnet8") < flops("resnet20") < flops("resnet56")
    assert flops("resnet8") < flops("resnet8x4")
    assert flops("resnet8", 64) == pytest.approx(4 * flops("resnet8", 32), rel=0.001)


def test_latency_is_per_batch_of_each_size() -> None:
    cost = measure(Slow(), (4, 4), CPU, batch_sizes=(1, 8), budget_s=0)
    one, eight = cost.latency
    assert (one.batch_size, eight.batch_size) == (1, 8)
    assert 3 <= one.low_ms <= one.median_ms <= one.high_ms
    assert eight.median_ms >= 24
    assert one.runs == eight.runs == MIN_RUNS
    assert eight.images_per_s == pytest.approx(8000 / eight.median_ms)
    assert cost.latency_ms(8) == eight.median_ms
    assert (cost.device, cost.threads) == ("cpu", torch.get_num_threads())


def test_a_larger_budget_gives_more_runs() -> None:
    more = measure(Slow(), (4, 4), CPU, batch_sizes=(1,), budget_s=0.2).latency[0].runs
    assert MIN_RUNS < more <= 0.2 / 0.003 + 1 <= MAX_RUNS


def test_more_arithmetic_takes_longer() -> None:
    """resnet110 has more than 20 times the FLOPs of resnet8: far more than the noise of a busy machine."""
    small, large = (measure(create_student(name, 10), (32, 32), CPU, batch_sizes=(1,), budget_s=0.2)
                    for name in ("resnet8", "resnet110"))  # fmt: skip
    assert large.flops > 20 * small.flops
    assert large.latency[0].median_ms > small.latency[0].median_ms


def test_measuring_changes_neither_the_student_nor_the_random_state() -> None:
    student = create_student("resnet8", 3).train()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    random_state = torch.get_rng_state()
    measure(student, (16, 16), CPU, batch_sizes=(2,), budget_s=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert student.training
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    assert student.get_parameter("conv1.weight").is_contiguous()


def test_images_of_a_wrong_size_are_an_error() -> None:
    with pytest.raises(RecipeError, match=r"cannot take images of this size.*30 × 30 pixels"):
        measure(create_student("timm:test_vit", 3), (30, 30), CPU)


@pytest.mark.cuda
def test_a_gpu_counts_the_same_flops() -> None:
    cost = measure(create_student("resnet8", 10), (32, 32), "cuda", budget_s=0.1)
    on_cpu = measure(create_student("resnet8", 10), (32, 32), CPU, batch_sizes=(1,), budget_s=0)
    assert (cost.flops, cost.parameters) == (on_cpu.flops, on_cpu.parameters)
    assert cost.device == torch.cuda.get_device_name()
    assert [entry.batch_size for entry in cost.latency] == [1, 128]
