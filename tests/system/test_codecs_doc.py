"""docs/codecs.md: its figures are those of the recorded run, its code reads a cache, its codecs and defaults exist."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_tools.codecs import CODECS
from cache_tools.codecs.presets import PRESETS
from cache_tools.derive.codec_spec import codecs_for
from cache_tools.reader import TeacherCache
from tests.support.cache_factory import build, tiny_images, tiny_manifest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/codecs.md").read_text()
LINES = [json.loads(line) for line in (ROOT / "benchmarks/results/codec-table.jsonl").read_text().splitlines()]
KEYS = ("bias", "noise", "g_weights")
TARGETS = {"1000 classes": "imagenet-1000", "100 classes": "imagenet-100-every-tenth", "10 classes": "fashion-mnist-10"}


def tables() -> dict[str, list[list[str]]]:
    """The rows of every table by the line before it."""
    found: dict[str, list[list[str]]] = {}
    for title, body in re.findall(r"^(.+)\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in body.splitlines()]
        found[title] = [rows[0], *rows[2:]]
    return found


COSTS = [
    (TARGETS[title.partition(" (")[0]], *row)
    for title, rows in tables().items()
    if rows[0][0] == "stored"
    for row in rows[1:]
]


def worst(errors: dict[str, float], temperature: int) -> float | None:
    return max((error for key, error in errors.items() if key.endswith(f"@{temperature}")), default=None)


def shown(value: float | None, like: str) -> str:
    """A percentage with as many digits behind the point as `like` has."""
    digits = len(like.removesuffix(" %").partition(".")[2])
    return "–" if value is None else f"{value:.{digits}f} %"


def belongs(line: dict[str, Any], stored: str) -> bool:
    codec, rival = line.get("codec", {}).get("codec"), line.get("rival", "")
    if stored.startswith("top-"):
        return rival.startswith(stored.partition(" ")[0].removesuffix(","))
    return not rival and stored.startswith(f"`{codec}`") and bool(line.get("features")) == ("→ head" in stored)


def test_there_are_tables_for_all_three() -> None:
    assert {cost[0] for cost in COSTS} == set(TARGETS.values())
    assert len(COSTS) == 21


@pytest.mark.parametrize(("targets", "stored", "packed", "size", "at_1", "at_4"), COSTS)
def test_every_figure_is_of_the_recorded_run(
    targets: str, stored: str, packed: str, size: str, at_1: str, at_4: str
) -> None:
    matching = []
    for line in LINES:
        if line["targets"] != targets or not belongs(line, stored):
            continue
        errors = line["g_even_tail"] if "even tail" in stored and "g_even_tail" in line else line["g"]
        digits = len(size.partition(".")[2])
        figures = (
            f"{line['bytes']:.{digits}f}",
            *(shown(worst(errors, t), like) for t, like in ((1, at_1), (4, at_4))),
        )
        pack = line.get("codec", {}).get("pack", "zstd")
        if figures == (size, at_1, at_4) and (pack in packed or line["codec"].get("reference") == "max"):
            matching.append(line)
    assert len(matching) == 1


def test_every_figure_of_sampled_targets_is_of_the_recorded_run() -> None:
    (line,) = (ROOT / "benchmarks/results/sampled-targets.jsonl").read_text().splitlines()
    run = json.loads(line)
    (table,) = (rows for rows in tables().values() if rows[0][0] == "at T")
    assert len(table) == 15
    for at, kept, size, *errors in table[1:]:
        number = re.findall(r"[0-9.]+", kept)[0]
        matching = [
            [
                f"{row['bytes']:g}",
                *(shown(row[key], like) for key, like in zip(KEYS, errors, strict=True) if like != "0"),
            ]
            for row in run["rows"]
            if f"{row['codec']['temperature']:g}" == at
            and ("rival" in row) == ("independent" in kept)
            and ("top-k" in kept) == (row["codec"]["codec"] == "top-k")
            and float(number) in {row["codec"].get(key) for key in ("draws", "max_classes", "min_probability")}
        ]
        assert [size, *(error for error in errors if error != "0")] in matching, kept
    chance = {test["temperature"]: (test["bias_to_chance"], test["gradient_z"]) for test in run["tests"]}
    assert all(f"{bias:.2f}" == "1.00" for bias, _ in chance.values())
    assert f"it is −{-chance[1][1]:.1f} of its standard errors at T = 1 and −{-chance[4][1]:.1f} at T = 4" in TEXT


def test_every_figure_of_the_students_is_of_the_recorded_run() -> None:
    lines = (ROOT / "benchmarks/results/sampled-students.jsonl").read_text().splitlines()
    (table,) = (rows for rows in tables().values() if rows[0][0] == "T of the students")
    assert len(lines) == len(table) - 1 == 2
    for line, (at, *cells) in zip(map(json.loads, lines), table[1:], strict=True):
        assert (f"{line['temperature']:g}", line["seeds"]) == (at, 5)
        assert [name.strip("`") for name in table[0][1:]] == list(line["kl_mean_std"])
        assert cells == [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in line["kl_mean_std"].values()]


def test_every_figure_of_the_digits_is_of_the_recorded_run() -> None:
    lines = (ROOT / "benchmarks/results/sampled-digits.jsonl").read_text().splitlines()
    (table,) = (rows for rows in tables().values() if rows[0][0] == "logits of ten classes")
    for line, (kept, *cells) in zip(map(json.loads, lines), table[1:], strict=True):
        name, _, settings = line["codec"].partition(":")
        assert re.findall(r"\d+", kept.rpartition("`")[2]) == re.findall(r"(?:draws|max_classes)=(\d+)", settings)
        assert kept.startswith(f"`{name}`")
        assert line["seeds"] == list(range(5))
        top1 = [100 * each for each in line["top1"]]
        assert cells == [
            f"{line['stored_bytes'] / line['rows']:.1f}",
            f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}",
            f"{statistics.mean(line['nll']):.3f} ± {statistics.stdev(line['nll']):.3f}",
        ]


def test_presets_and_codecs_are_all_there_with_their_defaults() -> None:
    (presets,) = (rows for rows in tables().values() if rows[0][0] == "preset")
    assert [row[0].strip("`") for row in presets[1:]] == list(PRESETS)
    recipe = tiny_manifest(tiny_images(), canaries=False).recipe
    for name, logits, features, opens, _ in presets[1:]:
        codecs = codecs_for(name.strip("`"), recipe)
        for described, codec in ((logits, codecs.logits), (features, codecs.features)):
            words = {"half precision": "float16", "as computed": "float32"}
            assert words.get(described, described.partition(",")[0].strip("`")) == codec.codec
        assert ("pcodec" in opens) == ("pcodec" in {getattr(codecs.features, "pack", None)})
    (codecs_table,) = (rows for rows in tables().values() if rows[0][0] == "codec")
    assert {name.strip("`") for row in codecs_table[1:] for name in row[0].split(", ")} == set(CODECS)
    for row in codecs_table[1:]:
        for parameter, default in re.findall(r"`([a-z_]+)` \(([0-9./]+)[) ]", row[2]):
            number = eval(default, {}, {})
            assert getattr(CODECS[row[0].strip("`")](), parameter) == pytest.approx(number)


def test_the_reader_in_the_text_reads_a_compact_cache(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^import (\w+)", code, re.MULTILINE)) == {"numpy", "zarr"}
    assert "from " not in code.replace('"""', "")
    names: dict[str, Any] = {}
    exec(compile(code, "codecs.md", "exec"), names)
    build(tmp_path / "c", tiny_manifest(tiny_images(), codec="compact"), tiny_images())
    cache = TeacherCache.open(tmp_path / "c")
    for view in range(3):
        logits, features = names["read_compact"](tmp_path / "c", view)
        np.testing.assert_allclose(logits, cache.read_array("fused_logits", view), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(features, cache.read_array("fused_features", view))


def test_every_figure_of_product_targets_is_of_the_recorded_run() -> None:
    (line,) = (ROOT / "benchmarks/results/product-targets.jsonl").read_text().splitlines()
    run = json.loads(line)
    (table,) = (rows for rows in tables().values() if rows[0][0] == "kept")
    recorded = [
        [
            f"{row['bytes']:g}",
            *(f"{row['g'][t]:.1f} %" if t in row["g"] else "–" for t in ("1", "4")),
            f"{row['kl']['4']:.2g}" if "kl" in row else "–",
        ]
        for row in run["rows"]
    ]
    assert [row[1:] for row in table[1:]] == recorded
    for (kept, *_), row in zip(table[1:], run["rows"], strict=True):
        assert ("other photos" in kept) == (row["fitted_to"] == "other photos" if "fitted_to" in row else False)
        codec = row.get("codec", {"codec": row.get("rival"), "step": row.get("step")})
        name, number = codec["codec"], re.findall(r"[0-9.]+", kept)
        assert name in kept
        assert not number or float(number[-1] if "photos" not in kept else number[0]) in codec.values(), kept


def test_figures_of_the_students_of_product_targets_are_of_the_recorded_run() -> None:
    lines = (ROOT / "benchmarks/results/product-students.jsonl").read_text().splitlines()
    (at_1, at_4) = map(json.loads, lines)
    assert (at_1["temperature"], at_4["temperature"], at_1["seeds"], at_4["seeds"]) == (1, 4, 5, 5)
    (mean_1, deviation_1), (mean_4, deviation_4) = (line["kl_mean_std"]["product, 32 B"] for line in (at_1, at_4))
    assert f"reaches a KL of {mean_1:.3f} ± {deviation_1:.3f}" in TEXT
    assert f"{mean_4:.4f} ± {deviation_4:.4f} at T = 4" in TEXT
