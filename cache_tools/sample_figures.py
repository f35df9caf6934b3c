"""What one row of logits says about its label: the figures per sample that `cache-tools stats` and `tune-fusion` share.

Everything is computed in float64 from the logits: a confident teacher's softmax leaves too little of float32 for the
classes that are not the label.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

TOP_K = 5
# Numbers in one [rows, classes] temporary: small enough for a CPU cache, enough rows to keep a GPU busy.
CHUNK_NUMBERS = 1 << 19


def row_chunks(num_samples: int, num_classes: int, numbers: int = CHUNK_NUMBERS) -> Iterator[slice]:
    """Slices of rows, in order, of about `numbers` logits each."""
    rows = max(1, numbers // num_classes)
    for start in range(0, num_samples, rows):
        yield slice(start, min(start + rows, num_samples))


def sample_figures(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures of each row of p = softmax(logits), for label y; natural logarithms.

    Args:
        logits_NC: logits of any floating type, already divided by the temperature.
        labels_N: int64.

    Returns:
        [N] each: `top1` (class, int64), `right` and `in_top5` (bool; the latter only with more than five classes),
        `confidence` max p, `label_probability` p_y, `nll` −ln p_y, `brier` Σ_c (p_c − 1[c=y])² (0 to 2),
        `entropy` −Σ p ln p, `rival` (the most probable class other than y, int64) and `against`, its probability.
    """
    log_p = logits_NC.double().log_softmax(dim=1)
    p = log_p.exp()
    label = labels_N[:, None]
    best = log_p.topk(min(TOP_K, p.shape[1]), dim=1).indices
    label_probability = p.gather(1, label)[:, 0]
    against, rival = p.scatter(1, label, -1.0).max(dim=1)
    figures = {
        "top1": best[:, 0],
        "right": best[:, 0] == labels_N,
        "confidence": p.gather(1, best[:, :1])[:, 0],
        "label_probability": label_probability,
        "nll": -log_p.gather(1, label)[:, 0],
        "brier": (p * p).sum(dim=1) + 1.0 - 2.0 * label_probability,
        "entropy": entropy(p),
        "rival": rival,
        "against": against,
    }
    if p.shape[1] > TOP_K:
        figures["in_top5"] = (best == label).any(dim=1)
    return figures


def entropy(p_NC: torch.Tensor) -> torch.Tensor:
    """H(p) = −Σ_c p_c ln p_c per row, in nats; a class of probability 0 adds nothing."""
    return torch.special.entr(p_NC).sum(dim=1)


def js_divergence(p_NC: torch.Tensor, q_NC: torch.Tensor) -> torch.Tensor:
    """Jensen–Shannon divergence per row, H((p+q)/2) − (H(p) + H(q))/2, in nats: 0 for equal rows, at most ln 2."""
    return (entropy((p_NC + q_NC) / 2) - (entropy(p_NC) + entropy(q_NC)) / 2).clamp_min(0.0)
