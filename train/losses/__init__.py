"""Distillation losses as plain functions, and CRD's contrastive memory.

A loss is a batch mean unless it says otherwise.
"""

from train.losses.contrastive import ContrastiveMemory, NegativeSampler
from train.losses.functions import (
    cross_entropy,
    dkd,
    feature_cosine,
    feature_mse,
    kd,
    pkt,
    rkd,
    standardise,
    standardised_kd,
)
from train.losses.numerics import unit_rows
from train.losses.tail import kd_tail

__all__ = [
    "ContrastiveMemory",
    "NegativeSampler",
    "cross_entropy",
    "dkd",
    "feature_cosine",
    "feature_mse",
    "kd",
    "kd_tail",
    "pkt",
    "rkd",
    "standardise",
    "standardised_kd",
    "unit_rows",
]
