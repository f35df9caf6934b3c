"""numpy, imported on first use: commands that only list caches or print help start without it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["np"]


class _Numpy:
    """Attributes of numpy. Other modules still import the real one, and Python's import lock makes threads wait."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module("numpy"), name)
        setattr(self, name, value)  # found without this function from now on
        return value


if not TYPE_CHECKING:
    np = _Numpy()
