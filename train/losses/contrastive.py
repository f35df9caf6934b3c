"""Contrastive representation distillation (CRD, Tian et al. 2020): embeddings, memories, negatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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


Gather = Callable[[Tensor], Tensor]
"""A rank's rows of a batch → those of all ranks, in the order of the batch."""


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
            len(labels),
            recipe.crd_dim,
            negatives,
            recipe.crd_temperature,
            recipe.crd_momentum,
            weight=recipe.feature_weight,
            seed=seed,
        )
        self.sampler = NegativeSampler(labels, negatives, seed)
        # On the device, so that no step depends on the host; in the state as `get_extra_state` gives it.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(
        self,
        student_features: Tensor,
        target_features: Sequence[Tensor],
        index: Tensor,
        gather: Gather | None = None,
    ) -> Tensor:
        """The weighted loss of one step; in training mode it also updates the memories and the step count.

        Args:
            student_features: [B, student_dim].
            target_features: [B, width] of each network, in the order of `targets`.
            index: int64 [B], distinct samples.
            gather: of several ranks, whose memories stay equal.
        """
        contrast_index = self.sampler(index, self.step)
        # Of the same width, so all of them become unit vectors together.
        units = _unit(torch.stack([self.embed_student(student_features), *self._embedded(target_features)])).unbind(0)
        if self.training:
            self.step.add_(1)
        return self.memory(units[0], self._mix(units[1:]), index, contrast_index, gather)

    def get_extra_state(self) -> Tensor:
        """The step count."""
        return self.step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.step.copy_(state)

    def _embedded(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [embed(features[number]) for embed, number in zip(self.embed_targets, self.mixed, strict=True)]

    def _mix(self, units: Sequence[Tensor]) -> Tensor:
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

    The gradient is computed with the loss, from the memories before this update: a backward pass would need a copy of
    them, and several times as many operations.

    Args:
        num_samples: n, the training samples; `index` runs over them.
        dim: width of the embeddings.
        negatives: K, per sample.
        temperature, momentum: 0.07 and 0.5 in the reference.
        weight: of the loss.
        seed: of the memories' initial values, uniform with variance 1 / dim.
    """

    memory_student: Tensor
    memory_target: Tensor
    log_normaliser: Tensor
    weight: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        negatives: int = 16_384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        *,
        weight: float = 1.0,
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
        self.register_buffer("weight", torch.tensor(weight), persistent=False)
        self._is_normalised = False  # known without asking the device

    @full_precision
    def forward(
        self,
        student_unit: Tensor,
        target_unit: Tensor,
        index: Tensor,
        contrast_index: Tensor,
        gather: Gather | None = None,
    ) -> Tensor:
        """The weighted loss of one step, both sides; a training step also updates the memories.

        Args:
            student_unit, target_unit: [B, dim] rows of length 1; both receive gradients.
            index: int64 [B], distinct samples.
            contrast_index: int64 [B, K + 1], first column `index`, the rest negatives (see `NegativeSampler`).
            gather: of several ranks, each with a part of the batch: Z and the memories are those of the whole batch.
        """
        assert contrast_index.shape == (len(index), self.negatives + 1), "contrast_index must be [B, negatives + 1]"
        has_gradient = torch.is_grad_enabled() and (student_unit.requires_grad or target_unit.requires_grad)
        with torch.no_grad():
            memories, units = (self.memory_target, self.memory_student), (student_unit, target_unit)
            similarities, rows = _similarities(memories, units, contrast_index)
            log_p = similarities.div_(self.temperature)
            log_normaliser = self.log_normaliser
            if not self._is_normalised:
                log_normaliser = self._first_normaliser(log_p, gather)
                if self.training:
                    self.log_normaliser.copy_(log_normaliser)
                    self._is_normalised = True
            log_p = log_p.sub_(log_normaliser[:, None, None])
            loss, gradient = self._loss(log_p, has_gradient)
            if gradient is not None:
                gradients = _gradients(memories, rows, contrast_index, gradient.div_(self.temperature))
        if gradient is not None:
            loss = _Differentiated.apply(loss, *gradients, student_unit, target_unit)
        if self.training:
            if gather is not None:
                student_unit, target_unit, index = (
                    gather(rows.detach()) for rows in (student_unit, target_unit, index)
                )
            self._update(student_unit, target_unit, index)
        return loss

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_normalised = not bool(self.log_normaliser.isnan().any())

    def _first_normaliser(self, scores: Tensor, gather: Gather | None) -> Tensor:
        """log Z of each side [2]: the stored one or, if there is none yet (NaN), this batch's. No branch, no sync."""
        if gather is None:
            first = torch.logsumexp(scores, dim=(1, 2)) + math.log(self.num_samples / scores[0].numel())
        else:
            rows = gather(torch.logsumexp(scores, dim=2).T)  # [B, 2]
            first = torch.logsumexp(rows, dim=0) + math.log(self.num_samples / (len(rows) * scores.shape[2]))
        return torch.where(self.log_normaliser.isnan(), first.to(self.log_normaliser), self.log_normaliser)

    def _loss(self, log_p: Tensor, has_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss from log P [2, B, K + 1], and its gradient.

        log(1 + c/P) = softplus(log c − log P), and likewise for negatives.
        """
        chance, batch = self.negatives / self.num_samples, log_p.shape[1]
        log_c = math.log(chance + 1e-7)
        positive, negative = log_c - log_p[..., :1], log_p[..., 1:] - log_c
        rest = log_p.shape[0] * self.negatives * (log_c - math.log(chance))
        loss = self.weight * ((F.softplus(positive).sum() + F.softplus(negative).sum()) / batch + rest)
        if not has_gradient:
            return loss, None
        share = self.weight / batch
        slopes = [torch.ops.aten.softplus_backward(share, part, 1.0, 20.0) for part in (positive, negative)]
        return loss, torch.cat([slopes[0].neg_(), slopes[1]], dim=2)

    @torch.no_grad()
    def _update(self, student_unit: Tensor, target_unit: Tensor, index: Tensor) -> None:
        before = self.memory_student.new_empty(2, *student_unit.shape)
        for memory, rows in zip((self.memory_student, self.memory_target), before.unbind(0), strict=True):
            torch.index_select(memory, 0, index, out=rows)
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
        places = ((stratum + 1) * sizes[:, None] // negatives - first_place).clamp_min(1)
        after = count.cumsum(0)
        starts = np.random.SeedSequence(seed).generate_state(negatives + len(labels))
        hashed = torch.from_numpy(starts.astype(np.int64))
        # Not stored in checkpoints, because they are functions of the seed and of the labels, which the cache has.
        own = {
            # Twice in a row: the others of a class follow it, and go on at the beginning.
            "by_class": labels.argsort(stable=True).repeat(2),
            # Of each sample: where its hash starts, the number of others, the place after its class and that less the
            # number of others, the group of its class.
            "samples": torch.stack(
                [hashed[negatives:], others[labels], after[labels], (after - others)[labels], group[labels]], dim=1
            ),
            # Of each stratum: where its hash starts, and its places in the first group.
            "strata": torch.stack([hashed[:negatives], places[0]], dim=1),
            "first_place": first_place.to(torch.int32),
            "places": places.to(torch.int32),
        }
        for name, tensor in own.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, index: Tensor, step: Tensor) -> Tensor:
        """contrast_index int64 [B, K + 1]: `index`, then the negatives.

        Args:
            index: int64 [B].
            step: int64 scalar, at least 0 and less than 2³¹.
        """
        samples = self.samples.index_select(0, index)
        draws = torch.cat([self.strata, samples[:, :2]])
        bits, (others, after, again, group) = (
            _hash(torch.add(draws[:, 0], step, alpha=_GOLDEN)),
            samples[:, 1:].unbind(1),
        )
        if len(self.places) == 1:
            drawn, turn = (bits * draws[:, 1] >> 31).split([self.negatives, len(index)])
            place = drawn + self.first_place + turn[:, None]
        else:
            drawn = self.first_place + (bits[: self.negatives] * self.places >> 31)
            turn = bits[self.negatives :] * others >> 31
            place = drawn.index_select(0, group) + turn[:, None]
        # Past the last of the others they go on with the first.
        place = place + torch.where(place >= others[:, None], again[:, None], after[:, None])
        return torch.cat([index[:, None], self.by_class[place]], dim=1)


class _Unit(torch.autograd.Function):
    """`unit_rows` with a gradient of four kernels: (g − u (u · g)) / length.

    A vector without a direction is returned unchanged, and so is its gradient, but for a term below 1e-24.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        length = F.threshold(length, SHORT, 1.0)
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


def _similarities(
    memories: Sequence[Tensor], units: Sequence[Tensor], contrast_index: Tensor
) -> tuple[Tensor, list[Tensor] | None]:
    """memory[contrast_index] · unit of both sides, [2, B, K + 1], and these rows, if they had to be gathered."""
    if len(memories[0]) <= DENSE_RATIO * contrast_index.shape[1]:
        similarities = units[0].new_empty(2, *contrast_index.shape)
        for memory, unit, side in zip(memories, units, similarities.unbind(0), strict=True):
            torch.gather(unit @ memory.T, 1, contrast_index, out=side)
        return similarities, None
    rows = [memory[contrast_index] for memory in memories]
    sides = [torch.einsum("bkd,bd->bk", row, unit) for row, unit in zip(rows, units, strict=True)]
    return torch.stack(sides), rows


def _gradients(
    memories: Sequence[Tensor], rows: list[Tensor] | None, contrast_index: Tensor, gradient: Tensor
) -> list[Tensor]:
    """The gradients of the unit vectors, from that of `_similarities`."""
    if rows is not None:
        return [torch.einsum("bkd,bk->bd", row, side) for row, side in zip(rows, gradient.unbind(0), strict=True)]
    dense = gradient.new_zeros(*gradient.shape[:2], len(memories[0]))
    dense.scatter_add_(2, contrast_index.expand_as(gradient), gradient)
    return [side @ memory for side, memory in zip(dense.unbind(0), memories, strict=True)]


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients with respect to two tensors are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, first: Tensor, second: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *torch._foreach_mul(list(ctx.saved_tensors), gradients[0])


def _hash(numbers: Tensor) -> Tensor:
    """31 random bits for each of these int64 numbers from 0: a hash of 32 bits, in products below 2⁶³."""
    x = numbers & _BITS_32
    x = (x ^ x >> 16) * 0x21F0AAAD & _BITS_32
    x = (x ^ x >> 15) * 0x735A2D97 & _BITS_32
    return x >> 1
