"""Compare runs, and write the HTML page that shows them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.report.html import render, write_report

__all__ = ["render", "write_report"]
_MODULES = {"render": "html", "write_report": "html"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: the commands of this package must start fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
