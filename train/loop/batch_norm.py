"""Batch norm over the samples of all ranks: torch's on CUDA, and the same on the CPU, where torch has none."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cache_tools.errors import RecipeError
from cache_tools.system.joined import Joined


def known_batch_norms() -> set[type]:
    """torch's batch norms, and timm's: a network can have these only where timm is imported, which takes seconds."""
    timm_layers = sys.modules.get("timm.layers")
    of_timm = set() if timm_layers is None else {timm_layers.BatchNormAct2d}
    return {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *of_timm}


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def is_synchronised(network: nn.Module) -> bool:
    """Whether every batch norm of a network takes the samples of all ranks."""
    return all(
        isinstance(module, nn.SyncBatchNorm | JoinedBatchNorm)
        for module in network.modules()
        if isinstance(module, _BatchNorm)
    )


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with batch norms over all ranks, in place. Its weights and buffers, and their names, stay.

    Raises:
        RecipeError: a batch norm of a kind whose statistics are not known.
    """
    known = known_batch_norms()
    unknown = {
        type(module).__name__
        for module in network.modules()
        if isinstance(module, _BatchNorm) and type(module) not in known
    }
    if unknown:
        raise RecipeError(
            "the student has batch norms that cannot be synchronised",
            where="--sync-batchnorm",
            expected="torch's batch norms, or timm's",
            found=", ".join(sorted(unknown)),
            next_step="leave --sync-batchnorm out, or choose another student",
        )
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        converted: nn.Module = convert_sync_batchnorm(network)
        return converted
    return _on_cpu(network)


def average_statistics(network: nn.Module, ranks: Joined) -> None:
    """Make the running statistics of batch norms that each rank has of its own samples the mean over the ranks."""
    own = [
        buffer
        for module in network.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm | JoinedBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not own:
        return
    mean = ranks.add(torch.cat([buffer.flatten() for buffer in own]).double()) / ranks.rank.count
    for buffer, value in zip(own, mean.split([buffer.numel() for buffer in own]), strict=True):
        buffer.copy_(value.view_as(buffer))


class JoinedBatchNorm(_BatchNorm):
    """Batch norm over the samples of all ranks, for the CPU: `torch.nn.SyncBatchNorm` runs on CUDA only.

    In training it needs at least two values per channel over all ranks. In eval mode it is the plain one.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.training = norm.training
        self.drop, self.act = (getattr(norm, name, None) for name in ("drop", "act"))  # of timm's

    def _check_input_dim(self, values: Tensor) -> None:
        pass

    def forward(self, values: Tensor) -> Tensor:
        if self.training or self.running_mean is None:
            normalised = self._normalised(values)
        else:
            normalised = F.batch_norm(
                values, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        for layer in (self.drop, self.act):
            normalised = normalised if layer is None else layer(normalised)
        return normalised

    def _normalised(self, values: Tensor) -> Tensor:
        weight = torch.ones(self.num_features) if self.weight is None else self.weight
        bias = torch.zeros(self.num_features) if self.bias is None else self.bias
        normalised: Tensor
        normalised, mean, variance, count = _Normalised.apply(values, weight, bias, self.eps)
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None, "it counts batches where it has running statistics"
                self.num_batches_tracked.add_(1)
                share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                unbiased = variance * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        return normalised


class _Normalised(torch.autograd.Function):
    """Values normalised by the mean and the variance over the values of all ranks, and these in float64."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [dim for dim in range(values.ndim) if dim != 1]
        wide = values.double()
        own_count = torch.full((1,), values.numel() / values.shape[1], dtype=torch.float64)
        sums = torch.cat([wide.sum(dims), own_count])
        dist.all_reduce(sums)
        count, mean = sums[-1], sums[:-1] / sums[-1]
        # The second pass is over differences: a sum of squares loses its digits where the mean is large.
        variance = (wide - _along(mean, values)).square().sum(dims)
        dist.all_reduce(variance)
        variance = variance / count
        inverse = (variance + eps).rsqrt()
        unit = ((wide - _along(mean, values)) * _along(inverse, values)).to(values.dtype)
        ctx.save_for_backward(unit, weight, inverse, count)
        ctx.dims = dims
        ctx.mark_non_differentiable(mean, variance, count)
        normalised = unit * _along(weight, values).to(values.dtype) + _along(bias, values).to(values.dtype)
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        unit, weight, inverse, count = ctx.saved_tensors
        gradient, dims = gradients[0], ctx.dims
        wide = gradient.double()
        own = torch.stack([wide.sum(dims), (wide * unit).sum(dims)])
        total = own.clone()  # the parameters' gradients are added up over the ranks by whoever does so for all
        dist.all_reduce(total)
        mean, along = (total / count).unbind(0)
        centred = wide - _along(mean, unit) - unit * _along(along, unit)
        of_values = (centred * _along(inverse * weight, unit)).to(gradient.dtype)
        return of_values, own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _along(channels: Tensor, values: Tensor) -> Tensor:
    return channels.view(1, -1, *[1] * (values.ndim - 2))


def _on_cpu(network: nn.Module) -> nn.Module:
    if isinstance(network, _BatchNorm):
        return JoinedBatchNorm(network)
    for name, child in network.named_children():
        setattr(network, name, _on_cpu(child))
    return network
