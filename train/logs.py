"""What is recorded while a run goes on: a row per epoch in `metrics.parquet`, and TensorBoard events if installed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from cache_tools.durable import put_durably
from train.folder import BOARD, METRICS

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = Mapping[str, float | int | None]


class RunLog:
    """Writes rows of metrics into a run folder; `finished` epochs are recorded there already."""

    def __init__(self, folder: Path, finished: int) -> None:
        self._path = folder / METRICS
        self._board = _summary_writer(folder / BOARD, finished)

    def write(self, history: Sequence[Row]) -> None:
        """Record all finished epochs; the last row is new."""
        table = pl.DataFrame(list(history), infer_schema_length=None)
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        put_durably(self._path, buffer.getbuffer())
        if self._board is not None:
            row = history[-1]
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer(folder: Path, finished: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an optional dependency
        return None
    return SummaryWriter(str(folder), purge_step=finished)
