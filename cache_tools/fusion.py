"""Teacher and CLIP become one target: class embeddings, scale alignment, fused logits, fused features.

Notation of the RichKD paper: z_F = α z_T + (1−α) z_C for logits, f_F = λ f_T + (1−λ) f_C for features; α is
`teacher_weight`, λ is `feature_weight`. Building, reading components back and online training all call
`fuse_targets`, so that they give the same numbers. Everything is float32, also under autocast.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from cache_tools import philox
from cache_tools.errors import PreflightError

# Counter word of every projection draw: no view has an operation in that slot, so the two never share a number.
_PROJECTION_SLOT = 0xFFFFFFFF


def class_embeddings(text_features_PCD: torch.Tensor) -> torch.Tensor:
    """One unit vector per class from P prompt embeddings: normalise(mean_p normalise(t_pc)).

    Args:
        text_features_PCD: text embeddings [P, C, D], of any length.

    Returns:
        [C, D] float32, rows of unit length.
    """
    return _unit(_unit(text_features_PCD.float()).mean(dim=0))


def cosine(image_features_ND: torch.Tensor, class_embeddings_CD: torch.Tensor) -> torch.Tensor:
    """Raw cosines [N, C] float32 of image features (of any length) with unit class embeddings."""
    with _full_precision(image_features_ND):
        return _unit(image_features_ND.float()) @ class_embeddings_CD.float().T


def linear_logits(features_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """What a linear head says: z_T = f_T · Wᵀ + b, [N, C] float32."""
    with _full_precision(features_ND):
        return F.linear(features_ND.float(), weight_CD.float(), bias_C.float())


def fuse_logits(
    teacher_NC: torch.Tensor, cosine_NC: torch.Tensor, teacher_weight: float, clip_scale: float
) -> torch.Tensor:
    """z_F = α z_T + (1−α) z_C with z_C = clip_scale · cosine; [N, C] float32, not centred.

    `clip_scale` 1.0 is the paper's official code (raw cosines), 100 is about CLIP's own logits.
    """
    return teacher_weight * teacher_NC.float() + (1.0 - teacher_weight) * (clip_scale * cosine_NC.float())


def project(features_NE: torch.Tensor, projection_ED: torch.Tensor) -> torch.Tensor:
    """normalise(f · P): features brought to the common width, rows of unit length, [N, D] float32."""
    with _full_precision(features_NE):
        return _unit(features_NE.float() @ projection_ED)


def fuse_features(teacher_ND: torch.Tensor, clip_ND: torch.Tensor, feature_weight: float) -> torch.Tensor:
    """f_F = λ f_T + (1−λ) f_C for features projected to one width; [N, D] float32, not renormalised."""
    return feature_weight * teacher_ND.float() + (1.0 - feature_weight) * clip_ND.float()


def centre_rows(logits_NC: torch.Tensor) -> torch.Tensor:
    """Subtract each row's mean. Softmax does not see the shift; small numbers keep more bits in float16."""
    logits_NC = logits_NC.float()
    return logits_NC - logits_NC.mean(dim=1, keepdim=True)


def fuse_targets(
    teacher_logits_NC: torch.Tensor,
    teacher_features_NE: torch.Tensor,
    cosine_NC: torch.Tensor,
    clip_features_NF: torch.Tensor,
    *,
    teacher_weight: float,
    feature_weight: float,
    clip_scale: float,
    teacher_projection: torch.Tensor,
    clip_projection: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two targets of a batch, exactly as they are cached.

    Args:
        teacher_logits_NC, teacher_features_NE: what the teacher said.
        cosine_NC, clip_features_NF: CLIP's raw cosines and its image features, of any length.
        teacher_weight, feature_weight: α and λ.
        clip_scale: a number, see `resolve_clip_scale`.
        teacher_projection, clip_projection: [E, D] and [F, D] float32, see `projection_matrix`.

    Returns:
        fused logits [N, C], rows mean-centred, and fused features [N, D]; float32 on the inputs' device.
    """
    logits_NC = centre_rows(fuse_logits(teacher_logits_NC, cosine_NC, teacher_weight, clip_scale))
    features_ND = fuse_features(
        project(teacher_features_NE, teacher_projection),
        project(clip_features_NF, clip_projection),
        feature_weight,
    )
    return logits_NC, features_ND


def resolve_clip_scale(
    choice: Literal["model", "match"] | float,
    model_scale: float,
    teacher_NC: torch.Tensor | None = None,
    cosine_NC: torch.Tensor | None = None,
) -> float:
    """The number that CLIP's cosines are multiplied with.

    Args:
        choice: `model`: CLIP's own logit scale; `match`: mean over rows of the teacher logits' standard deviation
            over that of the cosines, so that both spread alike; a number: itself.
        model_scale: CLIP's exp(log-scale).
        teacher_NC, cosine_NC: logits and cosines of the same sample of images; only `match` needs them.

    Raises:
        PreflightError: `match`, and CLIP (or the teacher) says the same for every class.
    """
    if choice == "model":
        return float(model_scale)
    if choice != "match":
        return float(choice)
    assert teacher_NC is not None, "match needs a sample"
    assert cosine_NC is not None, "match needs a sample"
    teacher_spread = teacher_NC.double().std(dim=1, correction=0).mean().item()
    cosine_spread = cosine_NC.double().std(dim=1, correction=0).mean().item()
    if not (cosine_spread > 0.0 and 0.0 < teacher_spread < float("inf")):
        raise PreflightError(
            "cannot match the spread of CLIP to the teacher's",
            where="fusion.clip_scale: match",
            expected="teacher logits and cosines that differ between classes",
            found=f"mean standard deviations {teacher_spread:.3g} and {cosine_spread:.3g}",
            next_step="set fusion.clip_scale to model or to a number, and check the class names and prompt templates",
        )
    return teacher_spread / cosine_spread


def projection_matrix(rows: int, cols: int, seed: int) -> np.ndarray:
    """A fixed random projection, the same everywhere for one (rows, cols, seed).

    Gaussian numbers (Box–Muller over Philox words, float64), then QR with the diagonal of R made positive:
    uniformly distributed. Orthonormal columns when cols ≤ rows, else orthonormal rows.

    Args:
        rows: width of the features that come in.
        cols: common width.
        seed: the Philox key; different seeds give independent matrices.

    Returns:
        float32 [rows, cols].
    """
    tall, narrow = max(rows, cols), min(rows, cols)
    gaussian = _gaussian(tall * narrow, seed).reshape(tall, narrow)
    q, r = np.linalg.qr(gaussian)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return np.ascontiguousarray(q if rows >= cols else q.T, dtype=np.float32)


def _gaussian(count: int, seed: int) -> np.ndarray:
    """`count` standard normal numbers in float64 (Box–Muller); each Philox block of four words makes four."""
    words = philox.sample_words(seed, np.arange(-(-count // 4), dtype=np.uint64), 0, _PROJECTION_SLOT)
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32  # never 0, so the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).T.reshape(-1)[:count]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows (last axis) divided by their Euclidean length; a zero row stays zero."""
    return F.normalize(vectors, dim=-1)


def _full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Matrix products in float32 even when the caller runs under autocast: a target must not depend on that."""
    return torch.autocast(tensor.device.type, enabled=False)
