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
        if self.training:
            self.step.add_(1)
        features = [student_features, *(target_features[number] for number in self.mixed)]
        embeds: list[Any] = [self.embed_student, *self.embed_targets]
        weights, biases = [embed.weight for embed in embeds], [embed.bias for embed in embeds]
        with torch.no_grad():
            # Of the same width, so all of them become unit vectors together.
            units, lengths = _normalised(torch.stack(list(map(F.linear, features, weights, biases))))
            student, *targets = units.unbind(0)
            target, target_length = self._mix(targets)
        loss, gradient = self.memory.loss_and_gradient(
            student, target, index, contrast_index, gather, torch.is_grad_enabled()
        )
        if gradient is None:
            return loss
        with torch.no_grad():
            of_student, of_target = gradient
            if target_length is None:
                of_units = torch.stack([of_student, of_target])
            else:
                of_mix = _gradient_of_normalised(of_target, target, target_length)
                of_units = torch.stack([of_student, *(weight * of_mix for weight in self.weights)])
            of_embeddings = _gradient_of_normalised(of_units, units, lengths)
        embedded_loss: Tensor = _LossOfEmbeddings.apply(loss, of_embeddings, *features, *weights, *biases)
        return embedded_loss

    def get_extra_state(self) -> Tensor:
        """The step count."""
        return self.step.clone()

    def set_extra_state(self, state: Tensor) -> None:
        self.step.copy_(state)

    def _mix(self, units: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The target's unit vectors, and the lengths of the weighted sums they were made of; None for one network."""
        if len(units) == 1:
            return units[0], None
        mix = self.weights[0] * units[0]
        for weight, unit in zip(self.weights[1:], units[1:], strict=True):
            mix = torch.add(mix, unit, alpha=weight)
        return _normalised(mix)


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
    signs: Tensor
    slopes: Tensor

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
        self.temperature, self.momentum, self.weight = temperature, momentum, weight
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3.0 / dim)
        for name in ("memory_student", "memory_target"):
            self.register_buffer(name, (torch.rand(num_samples, dim, generator=generator) * 2.0 - 1.0) * bound)
        self.register_buffer("log_normaliser", torch.full((2,), torch.nan))
        # Of log c − log P in the argument of softplus, for the positive and the negatives; of the similarity in it.
        signs = torch.ones(negatives + 1).index_fill_(0, torch.arange(1, negatives + 1), -1.0)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("slopes", -signs / temperature, persistent=False)
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
        has_gradient = torch.is_grad_enabled() and (student_unit.requires_grad or target_unit.requires_grad)
        loss, gradient = self.loss_and_gradient(student_unit, target_unit, index, contrast_index, gather, has_gradient)
        if gradient is not None:
            loss = _Differentiated.apply(loss, *gradient, student_unit, target_unit)
        return loss

    @torch.no_grad()
    def loss_and_gradient(
        self,
        student_unit: Tensor,
        target_unit: Tensor,
        index: Tensor,
        contrast_index: Tensor,
        gather: Gather | None,
        has_gradient: bool,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The loss as in `forward`, outside autograd and, if asked for, its gradients with respect to both units."""
        assert contrast_index.shape == (len(index), self.negatives + 1), "contrast_index must be [B, negatives + 1]"
        memories, units = (self.memory_target, self.memory_student), (student_unit, target_unit)
        similarities, rows = _similarities(memories, units, contrast_index)
        log_normaliser = self.log_normaliser
        if not self._is_normalised:
            log_normaliser = self._first_normaliser(similarities / self.temperature, gather)
            if self.training:
                self.log_normaliser.copy_(log_normaliser)
                self._is_normalised = True
        loss, slopes = self._loss(similarities, log_normaliser, has_gradient)
        gradient = None if slopes is None else _gradients(memories, rows, contrast_index, slopes)
        if self.training:
            if gather is not None:
                student_unit, target_unit, index = map(gather, (student_unit, target_unit, index))
            self._update(student_unit, target_unit, index)
        return loss, gradient

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

    def _loss(self, similarities: Tensor, log_normaliser: Tensor, has_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The loss from similarities s [2, B, K + 1], and its gradient with respect to them.

        With log P = s / temperature − log Z, log(1 + c/P) = softplus(x) of x = log c − log P for the positive, and
        likewise with x = log P − log c for negatives. The slope of softplus is the sigmoid.
        """
        chance, batch = self.negatives / self.num_samples, similarities.shape[1]
        log_c = math.log(chance + 1e-7)
        x = torch.addcmul((log_normaliser + log_c).view(2, 1, 1) * self.signs, similarities, self.slopes)
        rest = 2 * self.negatives * (log_c - math.log(chance))
        loss = F.softplus(x).sum() * (self.weight / batch) + self.weight * rest
        if not has_gradient:
            return loss, None
        slopes: Tensor = torch.ops.aten.softplus_backward(self.slopes * (self.weight / batch), x, 1.0, 20.0)
        return loss, slopes

    @torch.no_grad()
    def _update(self, student_unit: Tensor, target_unit: Tensor, index: Tensor) -> None:
        before = self.memory_student.new_empty(2, *student_unit.shape)
        for memory, rows in zip((self.memory_student, self.memory_target), before.unbind(0), strict=True):
            torch.index_select(memory, 0, index, out=rows)
        units = torch.stack([student_unit, target_unit]).to(before.dtype)
        mixed, _ = _normalised(torch.lerp(units, before, self.momentum))
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
            # In columns, of each sample: where its hash starts, the number of others, the place after its class and
            # that less the number of others, the group of its class.
            "samples": torch.stack(
                [hashed[negatives:], others[labels], after[labels], (after - others)[labels], group[labels]]
            )[..., None],
            # In columns, of each stratum: where its hash starts, and its places in the first group.
            "strata": torch.stack([hashed[:negatives], places[0]])[..., None],
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
        samples = self.samples.index_select(1, index)
        starts, widths = torch.cat([self.strata, samples[:2]], dim=1).unbind(0)
        bits = _hash(torch.add(starts, step, alpha=_GOLDEN))
        _, others, after, again, group = samples.unbind(0)
        if len(self.places) == 1:
            drawn, turn = (bits.mul_(widths) >> 31).split([self.negatives, len(index)])
            place = drawn.T + self.first_place + turn
        else:
            drawn = self.first_place + (bits[: self.negatives].T * self.places >> 31)
            turn = bits[self.negatives :] * others >> 31
            place = drawn.index_select(0, group[:, 0]) + turn
        # Past the last of the others they go on with the first.
        place += torch.where(place >= others, again, after)
        return torch.cat([index[:, None], self.by_class[place]], dim=1)


def _normalised(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`unit_rows`, and the lengths of the vectors; 1 for those without a direction."""
    lengths = F.threshold(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True), SHORT, 1.0)
    return vectors / lengths, lengths


def _gradient_of_normalised(gradient: Tensor, units: Tensor, lengths: Tensor) -> Tensor:
    """The gradient of the vectors of `_normalised`, from that of the units u: (g − u (u · g)) / length.

    A vector without a direction is returned unchanged, and so is its gradient, but for a term below 1e-24.
    """
    along = (units * gradient).sum(dim=-1, keepdim=True)
    return torch.addcmul(gradient, units, along, value=-1.0) / lengths


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
) -> tuple[Tensor, Tensor]:
    """The gradients of the unit vectors of both sides, from that of `_similarities`."""
    if rows is not None:
        first, second = (torch.einsum("bkd,bk->bd", *pair) for pair in zip(rows, gradient.unbind(0), strict=True))
        return first, second
    dense = gradient.new_zeros(*gradient.shape[:2], len(memories[0]))
    dense.scatter_add_(2, contrast_index.expand_as(gradient), gradient)
    return dense[0] @ memories[0], dense[1] @ memories[1]


class _LossOfEmbeddings(torch.autograd.Function):
    """A loss whose gradients G_k with respect to the embeddings f_k W_kᵀ + b_k are known.

    For a gradient g of the loss those of W_k, b_k and f_k are (g G_k)ᵀ f_k, Σ_b g G_k and g G_k W_k.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(gradients, *inputs)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, *inputs = ctx.saved_tensors
        gradients = gradients * of_loss[0]
        count, rows = len(gradients), gradients.unbind(0)
        of_features = [
            rows[number] @ inputs[count + number] if ctx.needs_input_grad[2 + number] else None
            for number in range(count)
        ]
        of_weights = [row.T @ features for row, features in zip(rows, inputs, strict=False)]
        return None, None, *of_features, *of_weights, *gradients.sum(1).unbind(0)


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
    """31 random bits for each of these int64 numbers from 0, in place: a hash of 32 bits, in products below 2⁶³."""
    x = numbers.bitwise_and_(_BITS_32)
    x = x.bitwise_xor_(x >> 16).mul_(0x21F0AAAD).bitwise_and_(_BITS_32)
    x = x.bitwise_xor_(x >> 15).mul_(0x735A2D97).bitwise_and_(_BITS_32)
    return x.bitwise_right_shift_(1)
