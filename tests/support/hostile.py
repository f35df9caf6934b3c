"""Hypothesis strategies that tamper with a cache's JSON, and limits on the time and memory of reading it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

TIME_S, MEMORY_BYTES, ADDRESS_BYTES = 60.0, 600 << 20, 8 << 30
DEEP = "@@DEEP@@"  # stands for lists nested in lists

JUNK: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 3.5, 255, 1 << 31, 1 << 32, 1 << 63, -(1 << 63), 10**12, 10**30, 10**400,
    1e308, -0.0, 1e-320, float("nan"), float("inf"), -float("inf"),
    "", "x", "0", "3", "\0", "\ud800", "\x1b[2J", "../../../etc", "/", "a/b", "é" * 300, "x" * 20_000, "nan", "pickle",
    [], [[]], [None], [1, 2, 3], [-1], [1 << 40], {}, {"a": 1}, {"op": "x"}, {"codec": "float32"}, {"codec": "pickle"},
    {"codec": "companded", "step": 1e-300}, {"codec": "top-k", "num_classes": 1 << 40}, {"name": "numcodecs.pickle"},
    {"codec": "sampled", "draws": 8, "seed": 1 << 70},
    {"codec": "product", "parts": 256, "width": 16},
    {"codec": "product", "parts": 1 << 40},
    DEEP,
)  # fmt: skip
CODECS: Sequence[Any] = (
    [], [{"name": "bytes"}], [{"name": "numcodecs.pickle", "configuration": {}}], [{"name": "pickle"}],
    [{"name": "bytes"}, {"name": "nosuch"}], [{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 5}}],
    [{"name": "vlen-bytes"}], [{"name": "vlen-utf8"}], [{"name": "numcodecs.zfpy"}], [{"name": "numcodecs.json2"}],
    [{"name": "sharding_indexed", "configuration": {"chunk_shape": [1], "codecs": [{"name": "bytes"}],
      "index_codecs": [{"name": "bytes"}], "index_location": "end"}}],
    [{"name": "transpose", "configuration": {"order": [0]}}, {"name": "bytes"}],
    [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "zstd"}, {"name": "crc32c"}], "bytes", 5,
)  # fmt: skip
TYPES: Sequence[Any] = (
    "object", "string", "float64", "float16", "int8", "uint64", "complex64", "bool", "r16", "variable_length_bytes",
    {"name": "struct"}, {"name": "null_terminated_bytes", "configuration": {"length_bytes": 1 << 40}}, "|O", "<f4",
    {"name": "numpy.datetime64", "configuration": {"unit": "s", "scale_factor": 1}},
)  # fmt: skip


@st.composite
def changed_json(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one to three random changes."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            return draw(st.sampled_from(JUNK))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "wrap", "scale", "swap"]))
        _change(draw, kind, holder, key, places)
    return changed


def _change(draw: st.DrawFn, kind: str, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    value = holder[key]
    if kind == "remove":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[draw(st.text(max_size=5))] = draw(st.sampled_from(JUNK))
    elif kind == "wrap":
        holder[key] = [value]
    elif kind == "scale" and isinstance(value, int | float) and abs(value) < 1 << 64:
        holder[key] = value * draw(st.sampled_from([-1, 0, 0.5, 2, 10, 10**6, 10**12]))
    elif kind == "swap":
        other, other_key = places[draw(st.integers(0, len(places) - 1))]
        holder[key] = copy.deepcopy(other[other_key])
    elif key == "codecs":
        holder[key] = copy.deepcopy(draw(st.sampled_from(CODECS)))
    elif key == "data_type":
        holder[key] = copy.deepcopy(draw(st.sampled_from(TYPES)))
    else:
        holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value inside a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def to_json(document: Any, *, deep: int = 200) -> bytes:
    """JSON with `deep` nested lists for DEEP; NaN and lone surrogates are written as Python writes them."""
    return json.dumps(document).replace(json.dumps(DEEP), "[" * deep + "]" * deep).encode("utf-8", "surrogatepass")


def with_right_digests(manifest: Any) -> Any:
    """A changed manifest with the digest and fingerprint of its content, computed as docs/format.md says."""
    if not isinstance(manifest, dict):
        return manifest
    deep: list[Any] = []
    for _ in range(30):
        deep = [deep]
    content = {key: value for key, value in _with_deep(manifest, deep).items() if key != "digest"}
    with_recipe = {"format_version": content.get("format_version"), "recipe": content.get("recipe")}
    if "fingerprint" in content:
        content["fingerprint"] = hashlib.sha256(_canonical(with_recipe)).hexdigest()
    return {"digest": hashlib.blake2b(_canonical(content), digest_size=16).hexdigest(), **content}


def _with_deep(value: Any, deep: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_deep(inner, deep) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_deep(inner, deep) for inner in value]
    return deep if value == DEEP else value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def with_doubled_key(text: str, key: str, value: Any) -> str:
    """JSON text in which one key occurs twice in its object."""
    return re.sub(rf'("{re.escape(key)}":)', lambda found: f'"{key}": {json.dumps(value)}, {found[1]}', text, count=1)


class Victim:
    """A cache folder that is restored after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sound = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    @contextmanager
    def changed(self, change: Callable[[Path], None]) -> Iterator[Path]:
        """Change the folder for the time of a `with` block."""
        try:
            change(self.path)
            yield self.path
        finally:
            self._restore()

    def names(self) -> list[str]:
        """Paths of the cache's files, relative to it."""
        return sorted(map(str, self._sound))

    def _restore(self) -> None:
        for folder, folders, files in os.walk(self.path, topdown=False):
            for name in files + folders:
                path = Path(folder, name)
                sound = self._sound.get(path.relative_to(self.path))
                if sound is None and (path.is_symlink() or not path.is_dir()):
                    path.unlink()
                elif sound is None and not any(path.relative_to(self.path) in file.parents for file in self._sound):
                    shutil.rmtree(path)
                elif sound is not None and (path.is_symlink() or not path.is_file()):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for relative, data in self._sound.items():
            path = self.path / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
                path.write_bytes(data)


@contextmanager
def limited_resources() -> Iterator[None]:
    """Raise in code that takes too much time or memory; the process itself survives."""
    handler = signal.signal(signal.SIGALRM, _raise_timeout)
    timer, start = signal.setitimer(signal.ITIMER_REAL, TIME_S), time.monotonic()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ADDRESS_BYTES, limits[1]))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident = _status("VmRSS")
    try:
        yield
        assert _status("VmHWM") - resident < MEMORY_BYTES, "this took far more memory than the cache has bytes"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, timer[0] - (time.monotonic() - start)) if timer[0] else 0.0)
        signal.signal(signal.SIGALRM, handler)


def _raise_timeout(*_: object) -> None:
    raise TimeoutError(f"this takes more than {TIME_S} s")


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) << 10
