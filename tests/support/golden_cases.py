"""Names of the golden arrays in tests/golden/*.npz, and the function that each of them checks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from train import losses

BATCHES = ("b16_c20", "b8_c100")
FUSED_WEIGHTS, FUSED_SCALES = (0, 0.3, 0.7, 1), (1, 100)
# Logits [0, :3] and [1, -3:] of the reference implementation for the golden input and rule-filled weights: the
# networks that models.npz leaves out.
REFERENCE_LOGITS = {
    "resnet32x4": [60.602394, -54.188591, -24.100077, -123.41932, 80.625092, 119.9209],
    "ResNet50": [156.36108, 180.07579, -1.7617612, -45.514931, 122.30332, -155.27585],
    "wrn_40_1": [104.68266, 85.235397, -82.654716, 84.528954, 213.69447, 47.076477],
    "vgg13": [1.0763783, -0.23295091, -1.1708648, 1.1413172, -0.42885798, -0.7702173],
    "ShuffleV2": [-4.873446, 3.6049855, -6.8608189, -11.88026, 3.1732936, -1.4701443],
}

Data = dict[str, Tensor]


def richkd_logit(scale: float) -> Callable[[Data, Tensor], Tensor]:
    return lambda d, s: 3 * losses.kd(s, 0.7 * d["teacher_logits"] + 0.3 * scale * d["clip_cosine"], 3.0)


LOGIT_CASES: dict[str, Callable[[Data, Tensor], Tensor]] = {
    "ce": lambda d, s: losses.cross_entropy(s, d["labels"]),
    "kd_T4": lambda d, s: losses.kd(s, d["teacher_logits"], 4.0),
    "kd_total_T4_ce0.1_kd0.9": lambda d, s: (
        0.1 * losses.cross_entropy(s, d["labels"]) + 0.9 * losses.kd(s, d["teacher_logits"], 4.0)
    ),
    "richkd_logit_a0.7_T3_w3_scale1": richkd_logit(1.0),
    "richkd_logit_a0.7_T3_w3_scale100": richkd_logit(100.0),
    "dkd_a1_b8_T4": lambda d, s: losses.dkd(s, d["teacher_logits"], d["labels"], 1.0, 8.0, 4.0),
    "lskd_T2_w9": lambda d, s: 9 * losses.standardised_kd(s, d["teacher_logits"], 2.0),
}
FEATURE_CASES: dict[str, Callable[[Data, Tensor], Tensor]] = {
    "feature_mse": lambda d, s: losses.feature_mse(s, d["teacher_features"]),
    "feature_cosine": lambda d, s: losses.feature_cosine(s, d["teacher_features"]),
    "rkd_d25_a50": lambda d, s: losses.rkd(s, d["teacher_features"], 25.0, 50.0),
    "pkt": lambda d, s: losses.pkt(s, d["teacher_features"]),
}
TOTAL_CASES: dict[str, Callable[[Data, Tensor], Tensor]] = {
    "lskd_total_T2_ce0.1_kd9": lambda d, s: (
        0.1 * losses.cross_entropy(s, d["labels"]) + 9 * losses.standardised_kd(s, d["teacher_logits"], 2.0)
    ),
    "lsdkd_total_a9_b72_T2_ce1_epoch30_warmup20": lambda d, s: (
        losses.cross_entropy(s, d["labels"])
        + losses.dkd(losses.standardise(s), losses.standardise(d["teacher_logits"]), d["labels"], 9.0, 72.0, 2.0)
    ),
}
