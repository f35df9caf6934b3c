"""KD from top-k targets, which store the small probabilities only as their sum.

Teacher and student are compared over the stored classes and one bucket of all others, whose probability is an exact
log-sum-exp on both sides. So the loss is a divergence of two distributions: never negative, and equal to the full KL if
every class is stored. Renormalising the stored classes, or spreading the rest evenly, would change the targets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.losses.numerics import full_precision

_NOTHING = -1e30


@full_precision
def kd_tail(student_NC: Tensor, classes_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor, temperature: float) -> Tensor:
    """T² · mean_b [ Σ_{c stored} p (log p − log q) + p_tail (log p_tail − log q_tail) ].

    The gradient with respect to a student logit is T · (q − p) / B at a stored class and
    T · (q − q · p_tail / q_tail) / B at another: within the tail the student keeps its own proportions.

    Args:
        student_NC: raw logits [B, C].
        classes_NK: int64 [B, K], distinct in a row; C where a row has fewer than K.
        log_p_NK: log-probabilities of the teacher at `temperature`, [B, K]; −1e30 for probability 0.
        log_tail_N: log of the teacher's probability of all other classes, [B]; −1e30 for probability 0.
        temperature: of the stored probabilities.

    Returns:
        A scalar, ≥ 0. Probabilities that do not sum to 1 (they were rounded) are renormalised.
    """
    num_classes = student_NC.shape[1]
    log_q = F.log_softmax(student_NC / temperature, dim=1)
    stored = classes_NK < num_classes
    in_tail = torch.ones_like(log_q[:, :1], dtype=torch.bool).repeat(1, num_classes + 1)
    in_tail = in_tail.scatter_(1, classes_NK, torch.zeros_like(stored))[:, :num_classes]
    log_q_tail = log_q.masked_fill(~in_tail, _NOTHING).logsumexp(dim=1, keepdim=True)
    log_q_stored = log_q.gather(1, classes_NK.clamp_max(num_classes - 1)).masked_fill(~stored, 0.0)
    log_p = F.log_softmax(torch.cat([log_p_NK, log_tail_N[:, None]], dim=1), dim=1)
    # An entry without mass adds nothing: its logarithm −1e30 is finite, and 0 · −1e30 is 0.
    rows = (log_p.exp() * (log_p - torch.cat([log_q_stored, log_q_tail], dim=1))).sum(dim=1)
    # Rounding may give −1e-8 for a student that agrees: clamp the value, keep the gradient.
    return temperature**2 * (rows + (rows.clamp_min(0.0) - rows).detach()).mean()
