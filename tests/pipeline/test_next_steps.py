"""What `build-cache` prints at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cache_tools.format.manifest import build_command
from pipeline.build.preflight import Preflight
from pipeline.cli import _about_fusion
from tests.support.next_commands import commands_in


def manifest(store: str, command: str = "build-cache 'my photos.yaml' --store=fused") -> Any:
    return SimpleNamespace(recipe=SimpleNamespace(store=store), provenance={"command": command})


def preflight(teacher: float | None, clip: float | None, fusion: float | None) -> Preflight:
    return Preflight(teacher_top1=teacher, clip_top1=clip, fusion_top1=fusion, split="test", n=60)


def lines(store: str, *figures: float | None) -> list[str]:
    return list(_about_fusion(preflight(*figures), manifest(store), Path("/caches/my photos.zarr")))


def test_a_fusion_below_the_teacher_is_tuned() -> None:
    first, *others = lines("components", 0.725, 0.4, 0.6667)
    assert first == "The fusion is 5.83 points below the teacher alone on these images."
    assert commands_in("\n".join(others)) == [["cache-tools", "tune-fusion", "/caches/my photos.zarr"]]


def test_a_cache_of_the_fusion_is_built_again_with_the_two_apart() -> None:
    first, *others = lines("fused", 0.5, 0.9, 0.8)
    assert first == "The fusion is 10.00 points below CLIP alone on these images."
    assert commands_in("\n".join(others)) == [["build-cache", "my photos.yaml", "--store", "components"]]


@pytest.mark.parametrize("printed", ["--json", "--plan", "--show-recipe"])
def test_a_command_that_builds_again_prints_as_usual(printed: str) -> None:
    for command in (f"build-cache photos/ {printed} --views 4", f"/usr/bin/build-cache photos/ --views 4 {printed}"):
        again = build_command(manifest("fused", command), "--store", "components")
        assert again == "build-cache photos/ --views 4 --store components"
    assert build_command(manifest("fused", f"cache-tools recode x {printed}"), "--store", "components") is None


@pytest.mark.parametrize("figures", [(0.7, 0.6, 0.75), (0.7, 0.6, 0.7), (0.9, None, None), (None, 0.9, None)])
def test_otherwise_nothing_is_said(figures: tuple[float | None, ...]) -> None:
    assert lines("components", *figures) == []
    assert list(_about_fusion(None, manifest("components"), "s3://bucket/c.zarr")) == []
