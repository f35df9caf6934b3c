"""docs/planning.md: its figures are those of recorded runs, and its tables follow from them by its formulas."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.recipe import MAX_VIEWS_AT_ONCE

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/planning.md").read_text()
ROWS, FEATURES = 4096, 128
GPU_RATES = (1000, 4000)
JOBS = {
    "100 M × 10 views, 64 GPUs": (100_000_000, 10, 64),
    "ImageNet-1k × 300 views, 8 GPUs": (1_281_167, 300, 8),
}


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def figures() -> dict[str, float]:
    """The measured figures of the page, in seconds and bytes."""
    (decode,) = recorded("decode-2-cores")
    lines = [line for line in recorded("codec-table") if line.get("targets") == "imagenet-1000" and "codec" in line]
    sizes = {
        line["codec"]["codec"]: line["bytes"]
        for line in lines
        if not line.get("features") and line["codec"].get("pack") != "pcodec" and line["codec"].get("spread") != 8.0
    }
    seconds = decode["median_processor_s"]
    return {
        "d": seconds["decode"] / decode["n"],
        "c": seconds["crop"] / decode["n"],
        "p": decode["kilobytes"] * 1e3,
        "float16": sizes["float16"],
        "compact": sizes["companded"],
    }


def examples() -> str:
    """The table of both jobs."""
    known = figures()
    rows = [["", *(f"{job}, G = {rate}" for job in JOBS for rate in GPU_RATES)]]
    columns = []
    for samples, views, gpus in JOBS.values():
        for rate in GPU_RATES:
            per_s = gpus * rate
            times = samples * views / per_s
            stored = {codec: known[codec] + 2 * FEATURES for codec in ("float16", "compact")}
            columns.append(
                [
                    f"{times / 3600:.1f} h",
                    f"{rate * (known['d'] / min(views, MAX_VIEWS_AT_ONCE) + known['c']):.1f}",
                    *(f"{samples * views * each / 1e12:.2f} TB" for each in stored.values()),
                    f"{per_s * stored['float16'] / 1e6:,.0f} MB/s",
                    f"{samples * math.ceil(views / MAX_VIEWS_AT_ONCE) * known['p'] / 1e12:.1f} TB",
                    f"{per_s / ROWS:.1f}",
                ]
            )
    titles = ["time", "cores per GPU", "size, `float16`", "size, `compact`", "uploads, `float16`", "reads", "blocks/s"]
    rows += [[title, *(column[number] for column in columns)] for number, title in enumerate(titles)]
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def test_the_examples_follow_from_the_figures() -> None:
    assert examples() in TEXT


@pytest.mark.parametrize(
    ("symbol", "value"),
    [
        ("d: ", lambda known: f"{known['d'] * 1e3:.2f} ms"),
        ("c: ", lambda known: f"{known['c'] * 1e3:.2f} ms"),
        ("p: ", lambda known: f"{known['p'] / 1e3:.1f} kB"),
        ("b: ", lambda known: f"{known['float16']:.0f} bytes in `float16`, {known['compact']:.0f} in `compact`"),
        ("f: ", lambda known: f"{2 * FEATURES} bytes in `float16`"),
        ("v: ", lambda known: f"{MAX_VIEWS_AT_ONCE}, or V if that is less"),
    ],
)
def test_a_figure_is_that_of_its_run(symbol: str, value: Any) -> None:
    (row,) = re.findall(rf"^\| {symbol}.*$", TEXT, re.MULTILINE)
    assert row.split("|")[2].strip() == value(figures())


def test_a_block_has_so_many_rows() -> None:
    assert 1 << int(math.log2((8 << 20) / 2000)) == ROWS
    assert f"{100e6 * (figures()['float16'] + 2 * FEATURES) / 1e9:.0f} GB" in TEXT
