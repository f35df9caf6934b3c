"""The training loop: the step of a student (`learner`), and an epoch of one or several students (`epoch`)."""

from train.loop.epoch import EpochOutcome, EpochState, train_epoch
from train.loop.learner import Learner, model_inputs
from train.loop.repeat import explain_failure, repeatable
from train.loop.sums import Sums

__all__ = [
    "EpochOutcome",
    "EpochState",
    "Learner",
    "Sums",
    "explain_failure",
    "model_inputs",
    "repeatable",
    "train_epoch",
]
