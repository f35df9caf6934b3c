"""Distillation losses as plain functions, and CRD's contrastive memory.

A loss is a batch mean unless it says otherwise.
"""

from train.losses.contrastive import ContrastiveMemory, NegativeSampler
from train.losses.functions import (
    binary_cross_entropy,
    cross_entropy,
    dkd,
    feature_cosine,
    feature_mse,
    kd,
    mixed_cross_entropy,
    pkt,
    rkd,
    sigmoid_kd,
    standardise,
    standardised_kd,
)
from train.losses.numerics import unit_rows
from train.losses.tail import kd_tail

__all__ = [
    "ContrastiveMemory",
    "NegativeSampler",
    "binary_cross_entropy",
    "cross_entropy",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "kd",
    "kd_tail",
    "mixed_cross_entropy",
    "pkt",
    "rkd",
    "sigmoid_kd",
    "standardise",
    "standardised_kd",
    "unit_rows",
]
