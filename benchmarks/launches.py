"""The kernels that a training step launches on CUDA, by phase, counted on a pretended GPU: it needs no GPU.

What a single operation of torch launches counts once; views and allocations count nothing.

    python benchmarks/launches.py
"""

from __future__ import annotations

import json

import torch
import typer

from cache_tools.console import command
from tests.support.fake_learner import PHASES, table


@command
def main() -> None:
    """Print the kernels of a step for several runs: a table on stderr, one JSON line on stdout."""
    rows = table()
    columns = (*PHASES, "total")
    typer.echo(f"{'':18s}" + "".join(f"{column:>11s}" for column in columns), err=True)
    for name, counts in rows.items():
        typer.echo(f"{name:18s}" + "".join(f"{counts[column]:11.0f}" for column in columns), err=True)
    print(json.dumps({"benchmark": "launches", "kernels": rows, "torch": torch.__version__}))


if __name__ == "__main__":
    typer.run(main)
