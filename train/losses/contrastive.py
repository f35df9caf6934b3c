"""Contrastive representation distillation (CRD, Tian et al. 2020): embeddings, memories, negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache_tools.errors import RecipeError
from train.losses.numerics import full_precision, unit_rows
from train.recipe.loss import LossRecipe

# One matrix product with the whole memory beats gathering [B, K + 1, dim] rows up to about this many samples per
# negative; with the reference's setting (50 000 samples, 16 384 negatives) it is about fifteen times faster on a CPU.
DENSE_RATIO = 64


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
    and 1 − α. With a single target v_F is its embedding, as in CRD. Negatives are a function of (seed, step).
    """

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
        self.sampler = NegativeSampler(labels, negatives)
        self.seed, self.step = seed, 0

    def forward(self, student_features: Tensor, target_features: Sequence[Tensor], index: Tensor) -> Tensor:
        """The loss of one step; in training mode it also updates the memories and the step count.

        Args:
            student_features: [B, student_dim].
            target_features: [B, width] of each network, in the order of `targets`.
            index: int64 [B], distinct samples.
        """
        seed = int(np.random.SeedSequence(self.seed, spawn_key=(self.step,)).generate_state(1)[0])
        contrast_index = self.sampler(index, torch.Generator(index.device).manual_seed(seed))
        student_unit = unit_rows(self.embed_student(student_features))
        self.step += self.training
        return self.memory(student_unit, self._target_unit(target_features), index, contrast_index)

    def get_extra_state(self) -> Tensor:
        """The step count. It is used, and so kept, on the host."""
        return torch.tensor(self.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def _target_unit(self, features: Sequence[Tensor]) -> Tensor:
        units = [
            unit_rows(embed(features[number])) for embed, number in zip(self.embed_targets, self.mixed, strict=True)
        ]
        if len(units) == 1:
            return units[0]
        mix = torch.stack([weight * unit for weight, unit in zip(self.weights, units, strict=True)]).sum(dim=0)
        return unit_rows(mix)


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
        sides = [
            _similarities(self.memory_target, student_unit, contrast_index) / self.temperature,
            _similarities(self.memory_student, target_unit, contrast_index) / self.temperature,
        ]
        log_normaliser = self._log_normaliser(sides)
        loss = sum(
            (self._side(scores - log_z) for scores, log_z in zip(sides, log_normaliser, strict=True)), torch.zeros(())
        )
        if self.training:
            self.log_normaliser.copy_(log_normaliser)
            self._update(self.memory_student, student_unit, index)
            self._update(self.memory_target, target_unit, index)
        return loss

    @torch.no_grad()
    def _log_normaliser(self, sides: list[Tensor]) -> Tensor:
        """log Z of each side: the stored one or, if there is none yet (NaN), this batch's. No branch, no sync."""
        first = torch.stack([torch.logsumexp(scores, dim=(0, 1)) for scores in sides])
        first = first + math.log(self.num_samples / sides[0].numel())
        return torch.where(self.log_normaliser.isnan(), first.to(self.log_normaliser), self.log_normaliser)

    def _side(self, log_p: Tensor) -> Tensor:
        """One side's loss from log P [B, K + 1]: log(1 + c/P) = softplus(log c − log P), and likewise for negatives."""
        chance = self.negatives / self.num_samples
        log_c = math.log(chance + 1e-7)
        positive = F.softplus(log_c - log_p[:, 0]).sum()
        negative = F.softplus(log_p[:, 1:] - log_c).sum() + log_p[:, 1:].numel() * (log_c - math.log(chance))
        return (positive + negative) / len(log_p)

    @torch.no_grad()
    def _update(self, memory: Tensor, unit: Tensor, index: Tensor) -> None:
        mixed = self.momentum * memory[index] + (1.0 - self.momentum) * unit
        memory.index_copy_(0, index, unit_rows(mixed).to(memory.dtype))


class NegativeSampler(nn.Module):
    """Draws K negatives of other classes for every sample of a batch, on the device and without waiting for it.

    The samples of other classes, in class order, are divided into K strata of equal size (± 1). One sample is drawn
    from each, and a random rotation per row evens out the ± 1. So negatives are distinct, and every sample of another
    class is drawn with the same probability: the loss, a sum over negatives, has the same expectation as with the
    reference's uniform choice without replacement. The difference is that negatives are spread evenly over the classes,
    which lowers the variance. If there are fewer than K samples of other classes, they repeat evenly.

    Args:
        labels: int [N], the labels of all training samples.
        negatives: K.

    Raises:
        RecipeError: all samples have the same class, so there are no negatives.
    """

    labels: Tensor
    by_class: Tensor
    first: Tensor
    count: Tensor

    def __init__(self, labels: Tensor | np.ndarray, negatives: int) -> None:
        super().__init__()
        labels = torch.as_tensor(labels).to("cpu", torch.int64)
        count = torch.bincount(labels)
        if int(count.max()) == len(labels):
            raise RecipeError(
                "contrastive distillation needs samples of at least two classes",
                found="one class",
                next_step="choose another loss.feature",
            )
        self.negatives, self.num_samples = negatives, len(labels)
        # Not stored in checkpoints, because they are functions of the labels, which the cache has.
        self.register_buffer("labels", labels, persistent=False)
        self.register_buffer("by_class", labels.argsort(stable=True), persistent=False)
        self.register_buffer("first", count.cumsum(0) - count, persistent=False)
        self.register_buffer("count", count, persistent=False)

    def forward(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """contrast_index int64 [B, K + 1]: `index`, then the negatives. `generator` is on the device of `index`."""
        label = self.labels[index][:, None]
        count = self.count[label]
        others = self.num_samples - count
        stratum = torch.arange(self.negatives, device=index.device)[None]
        start = stratum * others // self.negatives
        width = ((stratum + 1) * others // self.negatives - start).clamp_min(1)
        place = start + _random_below(width, start.shape, generator)
        place = (place + _random_below(others, others.shape, generator)) % others
        place = place + count * (place >= self.first[label])  # skip the sample's own class
        return torch.cat([index[:, None], self.by_class[place]], dim=1)


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


def _random_below(bound: Tensor, shape: torch.Size, generator: torch.Generator | None) -> Tensor:
    """int64 uniform in [0, bound) by multiply-high of 31 random bits; bound < 2**31."""
    bits = torch.randint(0, 1 << 31, shape, generator=generator, device=bound.device)
    return (bits * bound) >> 31
