"""Contrastive representation distillation (CRD, Tian et al. 2020): embeddings, memories, negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_tools.errors import RecipeError
from train.losses.numerics import SHORT, full_precision
from train.recipe.loss import LossRecipe

# One matrix product with the whole memory beats gathering [B, K + 1, dim] rows up to about this many samples per
# negative; with the reference's setting (50 000 samples, 16 384 negatives) it is about fifteen times faster on a CPU.
DENSE_RATIO = 64
_BITS_32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1  # 2³² over the golden ratio, odd: its multiples visit all 32-bit numbers, evenly


class Components(NamedTuple):
    """The networks whose own features are the targets, teachers before CLIPs.

    Attributes:
        widths: of their features.
        weights: of the networks in the mix, with sum 1; a network of weight 0 is left out.
    """

    widths: tuple[int, ...]
    weights: tuple[float, ...]


class ContrastiveTerm(nn.Module):
    """CRD between student and targets, each with a learned linear embedding [RichKD's feature term].

    v_s = normalise(E_s f_s) and v_F = normalise(Σ_k w_k normalise(E_k f_k)); for a teacher and CLIP the weights are α
    and 1 − α. With a single target v_F is its embedding, as in CRD. Negatives are a function of (seed, step, sample),
    the same on every device.
    """

    step: Tensor

    def __init__(
        self, recipe: LossRecipe, student_dim: int, targets: Components, labels: Tensor | np.ndarray, seed: int
    ) -> None:
        super().__init__()
        negatives = min(recipe.crd_negatives, _fewest_negatives(labels))
        self.mixed = [number for number, weight in enumerate(targets.weights) if weight > 0.0]
        self.weights = [targets.weights[number] for number in self.mixed]
        self.embed_student = nn.Linear(student_dim, recipe.crd_dim)
        self.embed_targets = nn.ModuleList(nn.Linear(targets.widths[number], recipe.crd_dim) for number in self.mixed)
        self.memory = ContrastiveMemory(
            len(labels), recipe.crd_dim, negatives, recipe.crd_temperature, recipe.crd_momentum, seed=seed
        )
        self.sampler = NegativeSampler(labels, negatives, seed)
        # On the device, so that no step depends on the host; in the state as `get_extra_state` gives it.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, student_features: Tensor, target_features: Sequence[Tensor], index: Tensor) -> Tensor:
        """The loss of one step; in training mode it also updates the memories and the step count.

        Args:
            student_features: [B, student_dim].
            target_features: [B, width] of each network, in the order of `targets`.
            index: int64 [B], distinct samples.
        """
        contrast_index = self.sampler(index, self.step)
        student_unit = _unit(self.embed_student(student_features))
        if self.training:
            self.step.add_(1)
        return self.memory(student_unit, self._target_unit(target_features), index, contrast_index)

    def get_extra_state(self) -> Tensor:
        """The step count."""
        return self.step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.step.copy_(state)

    def _target_unit(self, features: Sequence[Tensor]) -> Tensor:
        units = [_unit(embed(features[number])) for embed, number in zip(self.embed_targets, self.mixed, strict=True)]
        if len(units) == 1:
            return units[0]
        mix = self.weights[0] * units[0]
        for weight, unit in zip(self.weights[1:], units[1:], strict=True):
            mix = torch.add(mix, unit, alpha=weight)
        return _unit(mix)


class ContrastiveMemory(nn.Module):
    """CRD's loss with its two momentum memories, in buffers, so that a checkpoint resumes exactly.

    Student v_s is contrasted with negatives in the target's memory, and target v_t with those in the student's:

        P = exp(memory[contrast] · v / temperature) / Z,   c = K / n
        side = −( Σ log(P₊ / (P₊ + c + 1e-7)) + Σ log(c / (P₋ + c + 1e-7)) ) / B,   loss = both sides

    Each side has a Z = n · mean(exp(…)) of the first training step, constant afterwards. Everything is computed from
    log P, so no temperature overflows. A training step ends with
    memory[index] = normalise(momentum · memory[index] + (1 − momentum) · v); in eval mode nothing changes.

    Args:
        num_samples: n, the training samples; `index` runs over them.
        dim: width of the embeddings.
        negatives: K, per sample.
        temperature, momentum: 0.07 and 0.5 in the reference.
        seed: of the memories' initial values, uniform with variance 1 / dim.
    """

    memory_student: Tensor
    memory_target: Tensor
    log_normaliser: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        negatives: int = 16_384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_samples, self.negatives = num_samples, negatives
        self.temperature, self.momentum = temperature, momentum
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3.0 / dim)
        for name in ("memory_student", "memory_target"):
            self.register_buffer(name, (torch.rand(num_samples, dim, generator=generator) * 2.0 - 1.0) * bound)
        self.register_buffer("log_normaliser", torch.full((2,), torch.nan))

    @full_precision
    def forward(self, student_unit: Tensor, target_unit: Tensor, index: Tensor, contrast_index: Tensor) -> Tensor:
        """The loss of one step, both sides; a training step also updates the memories.

        Args:
            student_unit, target_unit: [B, dim] rows of length 1; both receive gradients.
            index: int64 [B], distinct samples.
            contrast_index: int64 [B, K + 1], first column `index`, the rest negatives (see `NegativeSampler`).
        """
        assert contrast_index.shape == (len(index), self.negatives + 1), "contrast_index must be [B, negatives + 1]"
        by_side = (self.memory_target, student_unit), (self.memory_student, target_unit)
        scores = torch.stack([_similarities(memory, unit, contrast_index) for memory, unit in by_side])
        scores = scores / self.temperature
        log_normaliser = self._log_normaliser(scores)
        loss = self._loss(scores - log_normaliser[:, None, None])
        if self.training:
            self.log_normaliser.copy_(log_normaliser)
            self._update(student_unit, target_unit, index)
        return loss

    @torch.no_grad()
    def _log_normaliser(self, scores: Tensor) -> Tensor:
        """log Z of each side [2]: the stored one or, if there is none yet (NaN), this batch's. No branch, no sync."""
        first = torch.logsumexp(scores, dim=(1, 2)) + math.log(self.num_samples / scores[0].numel())
        return torch.where(self.log_normaliser.isnan(), first.to(self.log_normaliser), self.log_normaliser)

    def _loss(self, log_p: Tensor) -> Tensor:
        """The loss from log P [2, B, K + 1]: log(1 + c/P) = softplus(log c − log P), and likewise for negatives."""
        chance, batch = self.negatives / self.num_samples, log_p.shape[1]
        log_c = math.log(chance + 1e-7)
        positive = F.softplus(log_c - log_p[..., 0]).sum()
        negative = F.softplus(log_p[..., 1:] - log_c).sum()
        rest = log_p.shape[0] * self.negatives * (log_c - math.log(chance))
        return (positive + negative) / batch + rest

    @torch.no_grad()
    def _update(self, student_unit: Tensor, target_unit: Tensor, index: Tensor) -> None:
        before = torch.stack([memory.index_select(0, index) for memory in (self.memory_student, self.memory_target)])
        units = torch.stack([student_unit, target_unit]).to(before.dtype)
        mixed = _unit(torch.lerp(units, before, self.momentum))
        self.memory_student.index_copy_(0, index, mixed[0])
        self.memory_target.index_copy_(0, index, mixed[1])


class NegativeSampler(nn.Module):
    """Draws K negatives of other classes for every sample of a batch, on the device and without waiting for it.

    The samples of other classes, in class order, are divided into K strata of equal size (± 1). A step draws one place
    in each stratum, and every sample turns these places round by an amount of its own. So negatives are distinct, and
    every sample of another class is drawn with the same probability: the loss, a sum over negatives, has the same
    expectation as with the reference's uniform choice without replacement. The difference is that negatives are spread
    evenly over the classes, which lowers the variance. If there are fewer than K samples of other classes, they repeat
    evenly.

    All draws are integers from a hash of (seed, step, stratum) and (seed, step, sample): no generator, and the same
    numbers on every device.

    Args:
        labels: int [N], the labels of all training samples.
        negatives: K.
        seed: of the draws.

    Raises:
        RecipeError: all samples have the same class, so there are no negatives.
    """

    by_class: Tensor
    samples: Tensor
    strata: Tensor
    first_place: Tensor
    places: Tensor

    def __init__(self, labels: Tensor | np.ndarray, negatives: int, seed: int = 0) -> None:
        super().__init__()
        labels = torch.as_tensor(labels).to("cpu", torch.int64)
        count = torch.bincount(labels)
        if int(count.max()) == len(labels):
            raise RecipeError(
                "contrastive distillation needs samples of at least two classes",
                found="one class",
                next_step="choose another loss.feature",
            )
        self.negatives = negatives
        others = len(labels) - count
        # Classes of the same size have the same strata.
        sizes, group = torch.unique(others, return_inverse=True)
        stratum = torch.arange(negatives)[None]
        first_place = stratum * sizes[:, None] // negatives
        starts = np.random.SeedSequence(seed).generate_state(negatives + len(labels))
        hashed = torch.from_numpy(starts.astype(np.int64))
        # Not stored in checkpoints, because they are functions of the seed and of the labels, which the cache has.
        own = {
            # Twice in a row: the others of a class follow it, and go on at the beginning.
            "by_class": labels.argsort(stable=True).repeat(2),
            # Of each sample: the group of its class, the number of others, the place after its class, its hash.
            "samples": torch.stack([group[labels], others[labels], count.cumsum(0)[labels], hashed[negatives:]], dim=1),
            "strata": hashed[:negatives],
            "first_place": first_place.to(torch.int32),
            "places": ((stratum + 1) * sizes[:, None] // negatives - first_place).clamp_min(1).to(torch.int32),
        }
        for name, tensor in own.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, index: Tensor, step: Tensor) -> Tensor:
        """contrast_index int64 [B, K + 1]: `index`, then the negatives.

        Args:
            index: int64 [B].
            step: int64 scalar, at least 0 and less than 2³¹.
        """
        group, others, after, hashed = self.samples.index_select(0, index).unbind(1)
        bits = _hash(torch.cat([self.strata, hashed]) + step * _GOLDEN)
        drawn = self.first_place + (bits[: self.negatives] * self.places >> 31)
        turn = bits[self.negatives :] * others >> 31
        place = drawn.index_select(0, group) + turn[:, None]
        place = torch.where(place >= others[:, None], place - others[:, None], place) + after[:, None]
        return torch.cat([index[:, None], self.by_class[place]], dim=1)


class _Unit(torch.autograd.Function):
    """`unit_rows` with a gradient of four kernels: (g − u (u · g)) / length.

    A vector without a direction is returned unchanged, and so is its gradient, but for a term below 1e-24.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        length = torch.where(length > SHORT, length, 1.0)
        unit = vectors / length
        ctx.save_for_backward(unit, length)
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        unit, length = ctx.saved_tensors
        (gradient,) = gradients
        along = (unit * gradient).sum(dim=-1, keepdim=True)
        return torch.addcmul(gradient, unit, along, value=-1.0) / length


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = _Unit.apply(vectors)
    return unit


def _fewest_negatives(labels: Tensor | np.ndarray) -> int:
    """The smallest number of samples of other classes that any sample has, at least 1."""
    counts = np.bincount(np.asarray(labels))
    return max(len(labels) - int(counts.max()), 1)


def _similarities(memory: Tensor, unit: Tensor, contrast_index: Tensor) -> Tensor:
    """memory[contrast_index] · unit, [B, K + 1]."""
    if len(memory) <= DENSE_RATIO * contrast_index.shape[1]:
        # A copy, because the memory is updated in place before the backward pass needs these values.
        return (unit @ memory.clone().T).gather(1, contrast_index)
    return torch.einsum("bkd,bd->bk", memory[contrast_index], unit)


def _hash(numbers: Tensor) -> Tensor:
    """31 random bits for each of these int64 numbers from 0: a hash of 32 bits, in products below 2⁶³."""
    x = numbers & _BITS_32
    x = (x ^ x >> 16) * 0x21F0AAAD & _BITS_32
    x = (x ^ x >> 15) * 0x735A2D97 & _BITS_32
    return x >> 1
