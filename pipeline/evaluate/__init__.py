"""Evaluate a trained student: accuracy, calibration, robustness, agreement with its teachers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluate.evaluator import evaluate_student

__all__ = ["evaluate_student"]
_MODULES = {"evaluate_student": "evaluator"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the commands of this package must start fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
