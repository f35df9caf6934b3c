"""Measures of how well a codec preserves the teachers' predictions, from logits [B, C] as tensors.

`gradient_error` needs the logits of a student; `fit_student` trains one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_tools.codecs import SparseTargets
from cache_tools.system.devices import seeded_on_cpu

BATCH = 128
LEARNING_RATE = 1e-3


def gradient_error(target_NC: Tensor, decoded_NC: Tensor, student_NC: Tensor, temperature: float) -> float:
    """g = ‖∇ − ∇₀‖ / ‖∇₀‖ of the KD loss with respect to the student's logits, over all rows at once.

    ∇ = T · (softmax(student/T) − softmax(decoded/T)) / B and ∇₀ the same with the float32 targets, so that
    g = ‖p − p₀‖ / ‖q − p₀‖. It grows as the student gets closer to its targets.
    """
    p, decoded_p, q = (softmax(logits, temperature) for logits in (target_NC, decoded_NC, student_NC))
    return float((decoded_p - p).norm() / (q - p).norm())


def tail_gradient_error(target_NC: Tensor, known_NC: Tensor, student_NC: Tensor, temperature: float) -> float:
    """g of `train.losses.tail.kd_tail`, whose gradient uses the student's own proportions within the tail.

    Args:
        known_NC: stored probabilities [B, C]; 0 for the classes of the tail.
    """
    p, q, known = softmax(target_NC, temperature), softmax(student_NC, temperature), known_NC.double()
    tail = known == 0
    rest = (1.0 - known.sum(dim=1, keepdim=True)).clamp_min(0.0)
    q_tail = (q * tail).sum(dim=1, keepdim=True).clamp_min(1e-300)
    return float((known + tail * q * rest / q_tail - p).norm() / (q - p).norm())


class Spread(NamedTuple):
    """How far stored probabilities are from the true ones over several resamplings: norms over all rows at once.

    Attributes:
        bias: of the mean error of all resamplings.
        bias_error: the standard error of that mean: what the bias would be by chance if there were none.
        noise: the standard deviation of one resampling.
    """

    bias: float
    bias_error: float
    noise: float


def resampled_spread(resampled: Iterable[Tensor], p_NC: Tensor) -> Spread:
    """Bias and noise of stored probabilities [B, C] against `p_NC`, from two or more resamplings.

    Divide by `gradient_norm` for the bias and noise of the KD gradient, which is linear in the probabilities.
    """
    total, squares, count = torch.zeros_like(p_NC), 0.0, 0
    for probabilities in resampled:
        error = probabilities - p_NC
        total += error
        squares += float(error.square().sum())
        count += 1
    mean = total / count
    variance = max(0.0, squares - count * float(mean.square().sum())) / (count - 1)
    return Spread(float(mean.norm()), (variance / count) ** 0.5, variance**0.5)


def gradient_norm(target_NC: Tensor, student_NC: Tensor, temperature: float) -> float:
    """‖q − p₀‖: the KD gradient with exact targets is T / B of that."""
    return float((softmax(student_NC, temperature) - softmax(target_NC, temperature)).norm())


def softmax(logits_NC: Tensor, temperature: float) -> Tensor:
    """Probabilities [B, C] in float64."""
    return (logits_NC.double() / temperature).softmax(dim=1)


def sparse_probabilities(targets: SparseTargets, num_classes: int) -> Tensor:
    """Probabilities [B, C] in float64 of the stored classes, 0 for all others, renormalised as in `kd_tail`."""
    joint = torch.cat([targets.log_p, targets.log_tail[:, None]], dim=1).double().softmax(dim=1)[:, :-1]
    p_NC = torch.zeros(len(joint), num_classes + 1, dtype=torch.float64, device=joint.device)
    return p_NC.scatter_(1, targets.classes, joint)[:, :num_classes]


def divergence(target_NC: Tensor, decoded_NC: Tensor, temperature: float) -> float:
    """Mean KL(target ‖ decoded) of the softened distributions, in nats."""
    log_p, log_decoded = (softmax(logits, temperature).log() for logits in (target_NC, decoded_NC))
    return float((log_p.exp() * (log_p - log_decoded)).nan_to_num(0.0).sum(dim=1).mean())


def agreement(target_NC: Tensor, decoded_NC: Tensor) -> float:
    """The share of rows whose largest logit is at the same class."""
    return float((target_NC.argmax(dim=1) == decoded_NC.argmax(dim=1)).double().mean())


def fit_student(
    inputs_ND: Tensor,
    targets_NC: Tensor,
    stages: Sequence[int],
    *,
    hidden: int | None = None,
    temperatures: Sequence[float] = (1.0, 4.0),
    seed: int = 0,
) -> dict[int, Tensor]:
    """Fit a small student to the targets; return its logits [N, C] after each number of steps.

    Adam (1e-3, batches of 128 rows) minimises the sum of the KD losses at all temperatures, in float32 on the device of
    the inputs. The random generators of the process keep their state.

    Args:
        inputs_ND: the student's input for each sample, at any scale: columns are standardised.
        targets_NC: raw logits.
        stages: numbers of steps, ascending.
        hidden: width of a ReLU layer; None for a linear student.
    """
    inputs_ND = (inputs_ND - inputs_ND.mean(dim=0)) / (inputs_ND.std(dim=0) + 1e-6)
    with seeded_on_cpu(seed), torch.enable_grad():
        student = _network(inputs_ND.shape[1], hidden, targets_NC.shape[1]).to(inputs_ND.device)
        optimiser = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
        logits_at = {}
        for step in range(1, stages[-1] + 1):
            batch = torch.randint(len(inputs_ND), (BATCH,)).to(inputs_ND.device)
            logits = student(inputs_ND[batch])
            loss = torch.stack([_kd(logits, targets_NC[batch], temperature) for temperature in temperatures]).sum()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            if step in stages:
                with torch.no_grad():
                    logits_at[step] = student(inputs_ND)
    return logits_at


def _network(width: int, hidden: int | None, classes: int) -> torch.nn.Module:
    if hidden is None:
        return torch.nn.Linear(width, classes)
    return torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


def _kd(student_NC: Tensor, target_NC: Tensor, temperature: float) -> Tensor:
    """T² · mean_b Σ_c p (log p − log q), as in `train.losses.kd`, which this package must not import."""
    log_q, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (student_NC, target_NC))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
