"""How much of what a teacher said survives a codec: one number each, from logits [B, C] as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gradient_error(target_NC: Tensor, decoded_NC: Tensor, student_NC: Tensor, temperature: float) -> float:
    """g = ‖∇ − ∇₀‖ / ‖∇₀‖ of the KD loss with respect to the student's logits, over all rows at once.

    ∇ = T · (softmax(student/T) − softmax(decoded/T)) / B and ∇₀ the same with the float32 targets, so that
    g = ‖p − p₀‖ / ‖q − p₀‖. It grows as the student comes closer to its targets.
    """
    p, decoded_p, q = (_softmax(logits, temperature) for logits in (target_NC, decoded_NC, student_NC))
    return float((decoded_p - p).norm() / (q - p).norm())


def tail_gradient_error(target_NC: Tensor, known_NC: Tensor, student_NC: Tensor, temperature: float) -> float:
    """g of `train.tail.kd_tail`, whose gradient takes the student's own proportions within the tail.

    Args:
        known_NC: stored probabilities [B, C]; 0 for the classes of the tail.
    """
    p, q, known = _softmax(target_NC, temperature), _softmax(student_NC, temperature), known_NC.double()
    tail = known == 0
    rest = (1.0 - known.sum(dim=1, keepdim=True)).clamp_min(0.0)
    q_tail = (q * tail).sum(dim=1, keepdim=True).clamp_min(1e-300)
    return float((known + tail * q * rest / q_tail - p).norm() / (q - p).norm())


def divergence(target_NC: Tensor, decoded_NC: Tensor, temperature: float) -> float:
    """Mean KL(target ‖ decoded) of the softened distributions, in nats."""
    log_p, log_decoded = (_softmax(logits, temperature).log() for logits in (target_NC, decoded_NC))
    return float((log_p.exp() * (log_p - log_decoded)).nan_to_num(0.0).sum(dim=1).mean())


def agreement(target_NC: Tensor, decoded_NC: Tensor) -> float:
    """Share of rows whose largest logit is in the same place."""
    return float((target_NC.argmax(dim=1) == decoded_NC.argmax(dim=1)).double().mean())


def _softmax(logits_NC: Tensor, temperature: float) -> Tensor:
    return (logits_NC.double() / temperature).softmax(dim=1)
