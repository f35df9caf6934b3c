"""Fuse teachers and CLIPs into one target: prompt ensembles, CLIP scale, fused logits, fused features.

Notation of the RichKD paper: z_F = α z_T + (1−α) z_C for logits, f_F = λ f_T + (1−λ) f_C for features; α is
`teacher_weight`, λ is `feature_weight`. With several networks, z_T, z_C, f_T and f_C are weighted means of a group.
Without CLIPs the targets are z_T and f_T, without teachers z_C and f_C.
Building a cache, reading components and online training all call `fused_logits` and `fused_features`, so they get the
same numbers. Everything is float32, even under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from cache_tools import philox
from cache_tools.errors import PreflightError
from cache_tools.system.devices import in_float64

if TYPE_CHECKING:
    from cache_tools.format.manifest import Fusion
    from cache_tools.format.recipe import PromptEnsemble

# Counter word of projection draws. No view operation uses this slot, so views and projections never share a number.
_PROJECTION_SLOT = 0xFFFFFFFF


def class_embeddings(text_features_PCD: torch.Tensor) -> torch.Tensor:
    """One unit vector per class from P prompt embeddings: normalise(mean_p normalise(t_pc)).

    Args:
        text_features_PCD: text embeddings [P, C, D], not necessarily normalised.

    Returns:
        [C, D] float32, rows of unit length.
    """
    return _unit(_unit(text_features_PCD.float()).mean(dim=0))


def prompt_embeddings(text_features_PCD: torch.Tensor, ensemble: PromptEnsemble) -> torch.Tensor:
    """The embeddings that `clip_logits` compares image features with, float32.

    Returns:
        `embedding`: [C, D], the class embeddings. `logits`: [C, D], the mean of the unit prompt embeddings, not
        renormalised: the mean of the logits over prompts is the logit of that mean. `probabilities`: [P, C, D], unit
        rows.
    """
    if ensemble == "embedding":
        return class_embeddings(text_features_PCD)
    unit_PCD = _unit(text_features_PCD.float())
    return unit_PCD.mean(dim=0) if ensemble == "logits" else unit_PCD


def clip_logits(image_features_ND: torch.Tensor, prompts: torch.Tensor, scale: float) -> torch.Tensor:
    """One CLIP's scaled logits, [N, C] float32.

    With prompts [C, D] (`embedding`, `logits`): scale · cosine, for `logits` z_C = 1/P Σ_p scale · cos(f, t_pc).
    With prompts [P, C, D] (`probabilities`): z_C = log 1/P Σ_p softmax_c(scale · cos(f, t_pc)), which is not
    proportional to the scale. Prompts are added one at a time, so temporaries stay [N, C]. The sum is in float64: the
    last bit of a float32 exponential depends on the row's place in the batch.

    Args:
        image_features_ND: not necessarily normalised.
        prompts: from `prompt_embeddings`.
        scale: from `resolve_clip_scale`.
    """
    if prompts.ndim == 2:
        return scale * cosine(image_features_ND, prompts)
    with _full_precision(image_features_ND):
        unit_ND = _unit(image_features_ND.float())
        total = F.log_softmax(scale * in_float64(unit_ND @ prompts[0].T), dim=1)
        for prompt_CD in prompts[1:]:
            total = torch.logaddexp(total, F.log_softmax(scale * in_float64(unit_ND @ prompt_CD.T), dim=1))
    return (total - math.log(len(prompts))).float().to(unit_ND.device)


def cosine(image_features_ND: torch.Tensor, class_embeddings_CD: torch.Tensor) -> torch.Tensor:
    """Raw cosines [N, C] float32 of image features, normalised here, with unit class embeddings."""
    with _full_precision(image_features_ND):
        return _unit(image_features_ND.float()) @ class_embeddings_CD.float().T


def linear_logits(features_ND: torch.Tensor, weight_CD: torch.Tensor, bias_C: torch.Tensor) -> torch.Tensor:
    """Logits of a linear head: z_T = f_T · Wᵀ + b, [N, C] float32."""
    with _full_precision(features_ND):
        return F.linear(features_ND.float(), weight_CD.float(), bias_C.float())


def fuse_logits(
    teacher_NC: torch.Tensor, cosine_NC: torch.Tensor, teacher_weight: float, clip_scale: float
) -> torch.Tensor:
    """z_F = α z_T + (1−α) z_C with z_C = clip_scale · cosine; [N, C] float32, not centred.

    A `clip_scale` of 1.0 reproduces the paper's official code (raw cosines); CLIP's own is about 100.
    """
    return teacher_weight * teacher_NC.float() + (1.0 - teacher_weight) * (clip_scale * cosine_NC.float())


def project(features_NE: torch.Tensor, projection_ED: torch.Tensor) -> torch.Tensor:
    """normalise(f · P): features projected to the common width, rows of unit length, [N, D] float32."""
    with _full_precision(features_NE):
        return _unit(features_NE.float() @ projection_ED)


def fuse_features(teacher_ND: torch.Tensor, clip_ND: torch.Tensor, feature_weight: float) -> torch.Tensor:
    """f_F = λ f_T + (1−λ) f_C for projected features; [N, D] float32, not renormalised."""
    return feature_weight * teacher_ND.float() + (1.0 - feature_weight) * clip_ND.float()


def centre_rows(logits_NC: torch.Tensor) -> torch.Tensor:
    """Subtract each row's mean. Softmax ignores the shift, and smaller numbers keep more bits in float16."""
    logits_NC = logits_NC.float()
    return logits_NC - logits_NC.mean(dim=1, keepdim=True)


def mix(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Σ_i w_i x_i in float32. Parts of weight 0 are left out; if one part remains, it is returned unchanged."""
    chosen = [(part.float(), weight) for part, weight in zip(parts, weights, strict=True) if weight > 0.0]
    (total, first_weight), *others = chosen
    if others:
        total = first_weight * total
    for part, weight in others:
        total = total + weight * part
    return total


def mix_features(projected_ND: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """normalise(Σ_i w_i f_i) for unit rows of one width.

    Projected features of different networks are nearly orthogonal, so their mean is short. Without renormalisation a
    group of more networks would count less in the λ-mix.
    """
    mixed = mix(projected_ND, weights)
    return mixed if sum(weight > 0.0 for weight in weights) == 1 else _unit(mixed)


def fused_logits(teachers_NC: Sequence[torch.Tensor], clips_NC: Sequence[torch.Tensor], fusion: Fusion) -> torch.Tensor:
    """z_F = α Σ_i w_i z_Ti + (1−α) Σ_j u_j z_Cj, exactly as cached: [N, C] float32, rows mean-centred if `centred`.

    Args:
        teachers_NC: logits of each teacher; may be empty if there are CLIPs.
        clips_NC: scaled logits of each CLIP, from `clip_logits`; may be empty if there are teachers.
    """
    if not clips_NC:
        fused_NC = mix(teachers_NC, fusion.teacher_weights)
    elif not teachers_NC:
        fused_NC = mix(clips_NC, fusion.clip_weights)
    else:
        teacher_NC, clip_NC = mix(teachers_NC, fusion.teacher_weights), mix(clips_NC, fusion.clip_weights)
        fused_NC = fuse_logits(teacher_NC, clip_NC, fusion.teacher_weight, 1.0)
    return centre_rows(fused_NC) if fusion.centred else fused_NC


def fused_features(
    teachers_NE: Sequence[torch.Tensor],
    teacher_projections_ED: Sequence[torch.Tensor],
    clips_NE: Sequence[torch.Tensor],
    clip_projections_ED: Sequence[torch.Tensor],
    fusion: Fusion,
) -> torch.Tensor:
    """f_F = λ f_T + (1−λ) f_C with f = normalise(Σ_i w_i normalise(f_i P_i)) for both groups: exactly as cached.

    Args:
        teachers_NE, clips_NE: features of each network, of its own width and not necessarily normalised; one of the
            groups may be empty.
        teacher_projections_ED, clip_projections_ED: projections to the common width, from `projection_matrix`.

    Returns:
        [N, D] float32.
    """
    groups = []
    for features, projections, weights in (
        (teachers_NE, teacher_projections_ED, fusion.teacher_weights),
        (clips_NE, clip_projections_ED, fusion.clip_weights),
    ):
        projected = [project(each, projection) for each, projection in zip(features, projections, strict=True)]
        if projected:
            groups.append(mix_features(projected, weights))
    return groups[0] if len(groups) == 1 else fuse_features(groups[0], groups[1], fusion.feature_weight)


def resolve_clip_scale(
    choice: Literal["model", "match"] | float,
    model_scale: float,
    teacher_NC: torch.Tensor | None = None,
    cosine_NC: torch.Tensor | None = None,
) -> float:
    """The number that CLIP's cosines are multiplied by.

    Args:
        choice: `model` for CLIP's own logit scale; `match` for the ratio of the standard deviations of the teacher
            logits and of the cosines, each averaged over rows, so that both have the same spread; or the number itself.
        model_scale: CLIP's exp(log-scale).
        teacher_NC, cosine_NC: the teachers' mixed logits and the cosines with the class embeddings, for the same
            images; only `match` needs them.

    Raises:
        PreflightError: the choice is `match`, and the cosines or the teacher logits are equal for all classes.
    """
    if choice == "model":
        return float(model_scale)
    if choice != "match":
        return float(choice)
    assert teacher_NC is not None, "match needs a sample"
    assert cosine_NC is not None, "match needs a sample"
    teacher_spread = in_float64(teacher_NC).std(dim=1, correction=0).mean().item()
    cosine_spread = in_float64(cosine_NC).std(dim=1, correction=0).mean().item()
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
    """A fixed random projection: the same (rows, cols, seed) gives the same matrix on every machine.

    Gaussian numbers (Box–Muller over Philox words, float64), then QR with the diagonal of R made positive, which gives
    a uniform distribution. Columns are orthonormal if cols ≤ rows, otherwise rows are.

    Args:
        rows: width of the features.
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
    """`count` standard normal numbers in float64 (Box–Muller), four from each Philox block of four words."""
    words = philox.sample_words(seed, np.arange(-(-count // 4), dtype=np.uint64), 0, _PROJECTION_SLOT)
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32  # never 0, so the logarithm is finite
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = 2.0 * np.pi * uniform[1::2]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).T.reshape(-1)[:count]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Rows (last axis) divided by their Euclidean length; a zero row stays zero."""
    return F.normalize(vectors, dim=-1)


def _full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Matrix products in float32 even under the caller's autocast, which must not change a target."""
    return torch.autocast(tensor.device.type, enabled=False)
