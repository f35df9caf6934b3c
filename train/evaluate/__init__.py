"""The quality of a classifier: accuracy, likelihood, calibration, confusions, robustness."""

from train.evaluate.metrics import Evaluation, Meter, evaluate, evaluate_logits, predict

__all__ = ["Evaluation", "Meter", "evaluate", "evaluate_logits", "predict"]
