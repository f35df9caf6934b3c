"""Distillation losses as plain functions. A loss is a batch mean unless it says otherwise.

`student_NC`, `target_NC` are raw logits [B, C]; `student_ND`, `target_ND` features [B, D] (for `rkd` and `pkt` the
two widths may differ); `labels` int64 [B]. Each returns a scalar tensor, differentiable with respect to the student,
computed in float32 or float64 even under autocast, and never waits for the device. Extreme finite logits give
finite losses and gradients. p = softmax(target / T) and q = softmax(student / T) below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.losses.numerics import full_precision, unit_rows

_STANDARDISE_EPS = 1e-7
_PKT_EPS = 1e-7
_SHORT = 1e-12


@full_precision
def cross_entropy(
    student_NC: Tensor,
    labels: Tensor,
    labelled: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    mean_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy with the ground-truth labels, as `torch.nn.functional.cross_entropy` computes it.

    Args:
        labelled: bool [B]. The other samples count as 0, and the mean is still over the whole batch: a labelled sample
            has the same weight as if all were labelled, and a batch without labels gives 0.
        label_smoothing: ε; the labelled class has probability 1 − ε + ε/C and each other ε/C.
        class_weights: [C], ≥ 0. The mean is over the weights of the labels: Σ_b w_b CE_b / Σ_b w_b. It is 0 where
            all of them are 0.
        mean_weight: the mean weight to divide by instead of the batch's, for a batch that is a part of an update.
    """
    if labelled is None and class_weights is None:
        return F.cross_entropy(student_NC, labels, label_smoothing=label_smoothing)
    weight = None if class_weights is None else class_weights.to(student_NC.dtype)
    rows = F.cross_entropy(student_NC, labels, weight, reduction="none", label_smoothing=label_smoothing)
    mean = (rows if labelled is None else rows * labelled).mean()
    if weight is None:
        return mean
    divisor = weight[labels].mean() if mean_weight is None else mean_weight
    return mean / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


@full_precision
def mixed_cross_entropy(
    student_NC: Tensor, labels: Tensor, partner_labels: Tensor, share: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of mixed samples (MixUp, CutMix): share · CE(own label) + (1 − share) · CE(the partner's label).

    Args:
        share: [B], of the own label, 0 to 1.
        label_smoothing: as in `cross_entropy`, of both labels.
    """
    own, partner = (
        F.cross_entropy(student_NC, each, reduction="none", label_smoothing=label_smoothing)
        for each in (labels, partner_labels)
    )
    share = share.to(student_NC.dtype)
    return (share * own + (1.0 - share) * partner).mean()


@full_precision
def kd(student_NC: Tensor, target_NC: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): T² · mean_b Σ_c p (log p − log q)."""
    return temperature**2 * _divergence(student_NC / temperature, target_NC / temperature)


@full_precision
def dkd(student_NC: Tensor, target_NC: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022): T² · (alpha · TCKD + beta · NCKD).

    TCKD compares the binary distributions (labelled class, all others), NCKD the distributions over the other
    classes alone. The reference hides the labelled class by subtracting 1000 from its logit. Here it is left out, which
    gives the same number and is right for logits of any size.
    """
    student_NC, target_NC = student_NC / temperature, target_NC / temperature
    others = _other_classes(labels, student_NC.shape[1])
    student_others, target_others = student_NC.gather(1, others), target_NC.gather(1, others)
    tckd = _divergence(_binary(student_NC, student_others, labels), _binary(target_NC, target_others, labels))
    nckd = _divergence(student_others, target_others)
    return temperature**2 * (alpha * tckd + beta * nckd)


@full_precision
def standardised_kd(student_NC: Tensor, target_NC: Tensor, temperature: float) -> Tensor:
    """KD of standardised logits (Sun et al. 2024, logit standardization): `kd` of both after `standardise`."""
    return kd(standardise(student_NC), standardise(target_NC), temperature)


@full_precision
def standardise(logits_NC: Tensor) -> Tensor:
    """Each row to mean 0 and standard deviation 1: (z − mean) / (1e-7 + std), std with C − 1.

    A constant row (of a classifier that starts at zero) is only centred: it has no scale, and the formula's derivative
    would be infinite.
    """
    variance, mean = torch.var_mean(logits_NC, dim=1, keepdim=True)
    flat = variance <= _STANDARDISE_EPS**2
    std = torch.where(flat, torch.ones_like(variance), variance).sqrt()
    return (logits_NC - mean) / (_STANDARDISE_EPS + std)


@full_precision
def binary_cross_entropy(student_NC: Tensor, labels_NC: Tensor) -> Tensor:
    """Cross entropy of every class on its own, for images with any number of labels: the mean over batch and classes.

    Args:
        labels_NC: 0 or 1, of any type.
    """
    return F.binary_cross_entropy_with_logits(student_NC, labels_NC.to(student_NC.dtype))


@full_precision
def sigmoid_kd(student_NC: Tensor, target_NC: Tensor, temperature: float) -> Tensor:
    """KD of every class on its own: T² · mean_bc [ p (log p − log q) + (1 − p) (log(1 − p) − log(1 − q)) ].

    p = sigmoid(target / T) and q = sigmoid(student / T). It is the divergence of the logit term of multi-label
    distillation (Yang et al. 2023, L2D), as a mean instead of a sum over the classes, and has the gradient of the
    binary cross entropy with p as labels; less the entropy of p, it is 0 for a student that agrees.
    """
    student_NC, target_NC = student_NC / temperature, target_NC / temperature
    p = target_NC.sigmoid()
    positive = p * (F.logsigmoid(target_NC) - F.logsigmoid(student_NC))
    negative = (1.0 - p) * (F.logsigmoid(-target_NC) - F.logsigmoid(-student_NC))
    return temperature**2 * (positive + negative).mean()


@full_precision
def feature_mse(student_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Mean over batch and width of (student − target)²."""
    return F.mse_loss(student_ND, target_ND)


@full_precision
def feature_cosine(student_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Mean of 1 − cosine similarity; an all-zero feature is orthogonal to every other."""
    return 1.0 - (unit_rows(student_ND) * unit_rows(target_ND)).sum(dim=1).mean()


@full_precision
def rkd(student_ND: Tensor, target_ND: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational knowledge distillation (Park et al. 2019): weighted smooth L1 of distances and of angles.

    Distances are Euclidean, all pairs of the batch, over their mean; angles are the cosines at each sample of
    every pair of others. Memory grows with B² · max(B, D).
    """
    student_BBD = student_ND[None] - student_ND[:, None]
    target_BBD = target_ND[None] - target_ND[:, None]
    distance = F.smooth_l1_loss(_relative_distances(student_BBD), _relative_distances(target_BBD))
    angle = F.smooth_l1_loss(_angles(student_BBD), _angles(target_BBD))
    return distance_weight * distance + angle_weight * angle


@full_precision
def pkt(student_ND: Tensor, target_ND: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (Passalis & Tefas 2018).

    Cosine similarities within the batch, brought to [0, 1] and each row to sum 1, are compared by
    mean_ij t_ij · log((t_ij + 1e-7) / (s_ij + 1e-7)): the mean over all B² pairs, not the batch mean.
    """
    student_BB, target_BB = _affinities(student_ND), _affinities(target_ND)
    return (target_BB * torch.log((target_BB + _PKT_EPS) / (student_BB + _PKT_EPS))).mean()


def _divergence(student_NC: Tensor, target_NC: Tensor) -> Tensor:
    """mean_b Σ_c p (log p − log q) of logits at temperature 1."""
    log_q, log_p = F.log_softmax(student_NC, dim=1), F.log_softmax(target_NC, dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _other_classes(labels: Tensor, num_classes: int) -> Tensor:
    """[B, C − 1] int64: in each row all classes but the labelled one. A masked select would wait for the device."""
    classes = torch.arange(num_classes - 1, device=labels.device)[None]
    return classes + (classes >= labels[:, None])


def _binary(logits_NC: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """[B, 2] logits of (labelled class, any other), whose softmax is (p_label, 1 − p_label) without cancellation."""
    return torch.stack([logits_NC.gather(1, labels[:, None])[:, 0], others.logsumexp(dim=1)], dim=1)


def _relative_distances(difference_BBD: Tensor) -> Tensor:
    """[B, B] distances over the mean of those that are not zero."""
    distance = torch.linalg.vector_norm(difference_BBD, dim=2)
    mean = distance.sum() / (distance > 0).sum().clamp_min(1)
    return distance / mean.clamp_min(_SHORT)


def _angles(difference_BBD: Tensor) -> Tensor:
    """[B, B, B] cosines: at sample i, between the directions to j and k."""
    direction = unit_rows(difference_BBD)
    return direction @ direction.transpose(1, 2)


def _affinities(features_ND: Tensor) -> Tensor:
    unit = features_ND / (torch.linalg.vector_norm(features_ND, dim=1, keepdim=True) + _PKT_EPS)
    similarity = (unit @ unit.T + 1.0) / 2.0
    return similarity / similarity.sum(dim=1, keepdim=True)
