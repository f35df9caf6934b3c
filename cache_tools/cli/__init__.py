"""`cache-tools`: list, inspect, copy, check, prune, convert and analyse caches. Runs no model.

Commands that read targets import torch and zarr when they run; the others import neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import typer

# pydantic looks for plugins in every installed package before it builds its first model; these commands use none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from cache_tools.cli.analysis import stats_command, tune_command
from cache_tools.cli.codecs import fidelity_command, recode_command
from cache_tools.cli.copies import copy_command, pull_command, push_command
from cache_tools.cli.exchange import export_hf_command, import_command
from cache_tools.cli.fuse import fuse_command
from cache_tools.cli.home import info_command, list_command, path_command, prune_command, rm_command
from cache_tools.cli.integrity import repair_command, verify_command
from cache_tools.cli.pack import pack_command
from cache_tools.cli.show import show_command
from cache_tools.console import command, run_app

COMMANDS: dict[str, Callable[..., None]] = {
    "ls": list_command,
    "info": info_command,
    "path": path_command,
    "rm": rm_command,
    "prune": prune_command,
    "push": push_command,
    "pull": pull_command,
    "copy": copy_command,
    "verify": verify_command,
    "repair": repair_command,
    "stats": stats_command,
    "show": show_command,
    "tune-fusion": tune_command,
    "fidelity": fidelity_command,
    "recode": recode_command,
    "fuse": fuse_command,
    "import": import_command,
    "export-hf": export_hf_command,
    "pack-images": pack_command,
}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
@command
def cache_tools() -> None:
    """List, inspect, copy, check, prune, convert and fuse caches; analyse the targets in them; pack images."""


for _name, _function in COMMANDS.items():
    app.command(_name)(command(_function))


def main() -> None:
    """Entry point of `cache-tools`."""
    run_app(app)


if __name__ == "__main__":
    main()
