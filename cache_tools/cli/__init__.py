"""`cache-tools`: list, inspect, copy, check, prune, convert and analyse caches. Runs no model.

Commands that read targets import torch and zarr when they run; the others import neither.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer

# pydantic looks for plugins in every installed package before it builds its first model; these commands use none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from cache_tools.console import command, run_app

if TYPE_CHECKING:
    app: typer.Typer

# Command → its module in this package, and its function there.
_COMMANDS = {
    "ls": ("home", "list_command"),
    "info": ("home", "info_command"),
    "path": ("home", "path_command"),
    "rm": ("home", "rm_command"),
    "prune": ("home", "prune_command"),
    "push": ("copies", "push_command"),
    "pull": ("copies", "pull_command"),
    "copy": ("copies", "copy_command"),
    "verify": ("integrity", "verify_command"),
    "repair": ("integrity", "repair_command"),
    "stats": ("analysis", "stats_command"),
    "show": ("show", "show_command"),
    "tune-fusion": ("analysis", "tune_command"),
    "fidelity": ("codecs", "fidelity_command"),
    "recode": ("codecs", "recode_command"),
    "fuse": ("fuse", "fuse_command"),
    "import": ("exchange", "import_command"),
    "export-hf": ("exchange", "export_hf_command"),
    "pack-images": ("pack", "pack_command"),
}


@command
def cache_tools() -> None:
    """List, inspect, copy, check, prune, convert and fuse caches; analyse the targets in them; pack images."""


def make_app(name: str | None = None) -> typer.Typer:
    """The app with one command, or with all if there is none of this name. Imports the modules of its commands only."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(cache_tools)
    for each in [name] if name in _COMMANDS else _COMMANDS:
        module, function = _COMMANDS[each]
        app.command(each)(command(getattr(import_module(f"cache_tools.cli.{module}"), function)))
    return app


def main() -> None:
    """Entry point of `cache-tools`."""
    run_app(make_app(*sys.argv[1:2]))


def __getattr__(name: str) -> Any:
    """`app`: with all commands."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()["app"] = made = make_app()
    return made


if __name__ == "__main__":
    main()
