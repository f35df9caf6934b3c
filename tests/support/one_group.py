"""Build recipes and caches with teachers alone or with CLIPs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_tools.reader import TeacherCache
from pipeline.build.cache import build_cache
from pipeline.recipe import BuildRecipe
from tests.support import tiny_build
from tests.support.tiny_clip import make_folder

KINDS = ("teacher", "teachers", "clip", "clips")
SHARES = (0.3, 0.7)
WORDS = ("zero", "one", "two")


def prepare(root: Path, *, train: int = 96) -> Path:
    """Write pictures, two teachers and a second CLIP."""
    tiny_build.prepare(root, train=train)
    tiny_build.write_teacher(root / "wide.safetensors", architecture="wrn_16_2")
    make_folder(root / "tiny-clip")
    return root


def networks(root: Path, kind: str) -> dict[str, Any]:
    """The keys `teacher` and `clip` of a build recipe."""
    teachers: list[dict[str, Any]] = [{"name": str(root / f"{name}.safetensors")} for name in ("teacher", "wide")]
    clips: list[dict[str, Any]] = [
        {"name": "local-dir:package:digits-clip", "class_names": WORDS},
        {"name": f"local-dir:{root / 'tiny-clip'}", "templates": "siglip"},
    ]
    group, all_of_it = ("teacher", teachers) if kind.startswith("teacher") else ("clip", clips)
    if kind == group:
        return {"teacher": None, "clip": None} | {group: all_of_it[0]}
    weighted = [spec | {"weight": share} for spec, share in zip(all_of_it, SHARES, strict=True)]
    return {"teacher": None, "clip": None} | {group: weighted}


def recipe(root: Path, kind: str, **changes: Any) -> BuildRecipe:
    """A recipe of `tiny_build` with one group of networks: float32, three views."""
    return tiny_build.recipe(root, **(networks(root, kind) | {"out": root / f"{kind}.zarr"} | changes))


class Caches:
    """Caches by kind and store, each built when it is first used."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[tuple[str, str], Path] = {}

    def path(self, kind: str, store: str = "fused") -> Path:
        if (kind, store) not in self._paths:
            plan = recipe(self.root, kind, store=store, name=f"{kind}-{store}", out=self.root / f"{kind}-{store}.zarr")
            self._paths[kind, store] = build_cache(plan).path
        return self._paths[kind, store]

    def open(self, kind: str, store: str = "fused") -> TeacherCache:
        return TeacherCache.open(self.path(kind, store))
