"""A small student that has learnt a little of its targets: what errors of the KD gradient are relative to.

A student far from its targets has large gradients, beside which any codec looks good; one that has reached them has
none. So it is looked at twice on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

BATCH = 128
LEARNING_RATE = 1e-3


def fit_student(
    inputs_ND: torch.Tensor,
    targets_NC: torch.Tensor,
    stages: Sequence[int],
    *,
    hidden: int | None = None,
    temperatures: Sequence[float] = (1.0, 4.0),
    seed: int = 0,
) -> dict[int, torch.Tensor]:
    """The student's logits [N, C] after each number of steps.

    It is fitted by Adam (1e-3, batches of 128 rows) on the sum of KD losses at all temperatures, in float32 and on the
    device of the inputs; the random generators of the process stay as they are.

    Args:
        inputs_ND: what it sees of each sample, any scale: columns are standardised.
        targets_NC: raw logits.
        stages: numbers of steps, ascending.
        hidden: width of a ReLU layer; None for a linear student.
    """
    inputs_ND = (inputs_ND - inputs_ND.mean(dim=0)) / (inputs_ND.std(dim=0) + 1e-6)
    devices = [inputs_ND.device] if inputs_ND.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        student = _network(inputs_ND.shape[1], hidden, targets_NC.shape[1]).to(inputs_ND.device)
        optimiser = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
        found = {}
        for step in range(1, stages[-1] + 1):
            batch = torch.randint(len(inputs_ND), (BATCH,)).to(inputs_ND.device)
            said = student(inputs_ND[batch])
            loss = torch.stack([_kd(said, targets_NC[batch], temperature) for temperature in temperatures]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step in stages:
                with torch.no_grad():
                    found[step] = student(inputs_ND)
    return found


def _network(width: int, hidden: int | None, classes: int) -> torch.nn.Module:
    if hidden is None:
        return torch.nn.Linear(width, classes)
    return torch.nn.Sequential(torch.nn.Linear(width, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, classes))


def _kd(student_NC: torch.Tensor, target_NC: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · mean_b Σ_c p (log p − log q), as in `train.losses.kd`: this package does not import that one."""
    log_q, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (student_NC, target_NC))
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
