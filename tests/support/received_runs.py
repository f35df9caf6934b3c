"""Run folders as somebody might send them: files that are dropped, swapped, damaged or replaced by links and pipes."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
import yaml
from safetensors.torch import load, save

from tests.support.hostile import DEEP, JUNK, to_json

Draw = random.Random


class Mutation(NamedTuple):
    """A change of a folder; `name` says which, for messages."""

    name: str
    change: Callable[[Path], None]


def mutation(draw: Draw, folder: Path, other: Path, outside: Path, names: Sequence[str] | None = None) -> Mutation:
    """A random change of a file or folder below `folder`.

    Args:
        other: a folder of the same kind, to swap files with.
        outside: a folder that links lead to.
        names: of the files to choose from; None for all files and folders.
    """
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    folders = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_dir())
    if names is None and folders and draw.random() < 0.15:
        name = draw.choice([*folders, "tb", "evaluation", "export"])
        kind = draw.choice(sorted(_FOLDERS))
        return Mutation(f"{name}/: {kind}", lambda root: _FOLDERS[kind](root / name, outside))
    name = draw.choice(names if names is not None else files)
    of_content = _OF_CONTENT.get(Path(name).suffix)
    if of_content is not None and (folder / name).exists() and draw.random() < 0.6:
        data = of_content(draw, (folder / name).read_bytes())
        return Mutation(f"{name}: content", lambda root: _write(root / name, data))
    kind = draw.choice(sorted(_FILES))
    seed, swapped = draw.random(), draw.choice(files)
    source = draw.choice([folder / swapped, other / swapped, other / name])
    content = source.read_bytes() if source.is_file() else b""
    return Mutation(f"{name}: {kind}", lambda root: _FILES[kind](root / name, outside, Draw(seed), content))


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder that a command could change: names, kinds, content, times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, status.st_nlink, content)
    return found


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)


def _write(path: Path, data: bytes) -> None:
    _clear(path)
    path.write_bytes(data)


def _link(path: Path, target: str | Path) -> None:
    _clear(path)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    _clear(path)
    os.mkfifo(path)


def _in_place(path: Path) -> None:
    _clear(path)
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text("a file")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def _flipped(data: bytes, draw: Draw) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 3, 30])):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


_FILES: dict[str, Callable[[Path, Path, Draw, bytes], None]] = {
    "dropped": lambda path, outside, draw, other: _clear(path),
    "swapped": lambda path, outside, draw, other: _write(path, other),
    "cut": lambda path, outside, draw, other: _write(path, path.read_bytes()[: int(draw.random() * 400)]),
    "shorter": lambda path, outside, draw, other: _write(path, path.read_bytes()[: -draw.randrange(1, 40)]),
    "longer": lambda path, outside, draw, other: _write(path, path.read_bytes() + draw.randbytes(40)),
    "flipped": lambda path, outside, draw, other: _write(path, _flipped(path.read_bytes(), draw)),
    "noise": lambda path, outside, draw, other: _write(path, draw.randbytes(draw.randrange(300))),
    "sparse": lambda path, outside, draw, other: _sparse(path),
    "pipe": lambda path, outside, draw, other: _pipe(path),
    "folder": lambda path, outside, draw, other: _in_place(path),
    "link to a file": lambda path, outside, draw, other: _link(path, outside / "secret"),
    "relative link": lambda path, outside, draw, other: _link(path, os.path.relpath(outside / "secret", path.parent)),
    "link to a copy": lambda path, outside, draw, other: _link(path, _copied(path, outside)),
    "dangling link": lambda path, outside, draw, other: _link(path, outside / "made"),
    "loop": lambda path, outside, draw, other: _link(path, path.name),
    "device": lambda path, outside, draw, other: _link(path, "/dev/zero"),
}
_FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, outside: _link(path, outside),
    "link to a folder like it": lambda path, outside: _link(path, outside / "like it"),
    "dangling link": lambda path, outside: _link(path, outside / "made"),
    "pipe": lambda path, outside: _pipe(path),
    "file": lambda path, outside: _write(path, b"a file"),
    "dropped": lambda path, outside: _clear(path),
}


def _copied(path: Path, outside: Path) -> Path:
    """A whole file of this kind outside, prepared by the test."""
    return outside / "copies" / path.name


def _json(draw: Draw, data: bytes) -> bytes:
    kind = draw.random()
    if kind < 0.1:
        return data.decode().encode(draw.choice(["utf-16", "utf-32", "utf-8-sig"]))
    return to_json(changed(draw, json.loads(data)), deep=draw.choice([50, 990, 5000, 100_000]))


def _yaml(draw: Draw, data: bytes) -> bytes:
    if draw.random() < 0.1:
        return draw.choice(
            [b"\xff\xfe\x00", b"a: &a [x]\n" + b"b: [" + b"*a," * 999 + b"]\n", b"[" * 3000, b"", b"- 1"]
        )
    return to_json(changed(draw, yaml.safe_load(data)), deep=50)


def changed(draw: Draw, document: Any) -> Any:
    """A document of plain values with one to three random changes."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return draw.choice(JUNK)
        holder, key = draw.choice(places)
        kind = draw.choice(["junk", "junk", "junk", "remove", "wrap", "scale", "swap"])
        value = holder[key]
        if kind == "remove":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [value]
        elif kind == "scale" and isinstance(value, int | float) and abs(value) < 1 << 64:
            holder[key] = value * draw.choice([-1, 0, 0.5, 2, 10, 10**6, 10**12])
        elif kind == "swap":
            other, other_key = draw.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        else:
            holder[key] = copy.deepcopy(draw.choice(JUNK))
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _parquet(draw: Draw, data: bytes) -> bytes:
    table = pl.read_parquet(io.BytesIO(data))
    name = draw.choice(table.columns)
    rows = len(table)
    kind = draw.choice(["drop", "struct", "null", "text", "list", "negative", "nan", "rows", "none", "name", "large"])
    if kind == "drop":
        table = table.drop(name)
    elif kind == "rows":
        table = pl.concat([table] * 3)
    elif kind == "none":
        table = table.clear()
    elif kind == "name":
        table = table.rename({name: draw.choice(["", "x" * 3000, "epoch2", "\x1b[31m"])})
    else:
        values: Any = {
            "struct": [{"a": 1}] * rows,
            "null": [None] * rows,
            "text": ["nan"] * rows,
            "list": [[1.0]] * rows,
            "negative": [-5] * rows,
            "nan": [float("nan")] * rows,
            "large": [4_000_000_000] * rows,
        }[kind]
        table = table.with_columns(pl.Series(name, values, strict=False))
    buffer = io.BytesIO()
    table.write_parquet(buffer)
    return buffer.getvalue()


def _tensor(draw: Draw, value: torch.Tensor) -> Any:
    plain = value.detach().float()
    kinds: list[Callable[[], Any]] = [
        lambda: value.to(draw.choice([torch.float16, torch.float64, torch.int8, torch.bool, torch.complex64])),
        lambda: torch.zeros(3, 5),
        lambda: value.reshape(-1)[:-1].clone(),
        lambda: torch.full_like(plain, torch.nan),
        lambda: torch.zeros(value.shape or (2,)).to_sparse(),
        lambda: torch.empty((1 << 20, 1 << 20), device="meta"),
        lambda: torch.zeros(1).expand(1 << 30, 1 << 10),
        lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        lambda: torch.tensor(3.0),
        lambda: None,
        lambda: "text",
    ]
    return draw.choice(kinds)()


def _state(draw: Draw, data: bytes) -> bytes:
    state = torch.load(io.BytesIO(data), weights_only=True)
    if draw.random() < 0.15:
        return _odd_archive(draw, data)
    for _ in range(draw.randint(1, 2)):
        places = list(_places(state))
        shallow = [place for place in places if place[0] is state] * 5
        holder, key = draw.choice([*places, *shallow] or [(state, None)])
        value = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(value, torch.Tensor) and draw.random() < 0.8:
            holder[key] = _tensor(draw, value)
        elif draw.random() < 0.15:
            del holder[key]
        else:
            plain = [value for value in JUNK if value != DEEP and value != "\ud800"]
            holder[key] = draw.choice([*plain, torch.zeros(2), value * -1 if isinstance(value, int) else value])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _odd_archive(draw: Draw, data: bytes) -> bytes:
    """An archive with compressed parts, a zip bomb, an older format, or another pickled object."""
    buffer, kind = io.BytesIO(), draw.randrange(4)
    if kind < 2:
        source = zipfile.ZipFile(io.BytesIO(data))
        with source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
            for part in source.namelist():
                target.writestr(part, source.read(part) if kind == 0 else bytes(1 << 20))
    elif kind == 2:
        torch.save({"learner": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
    else:
        torch.save([1, 2, "no names"], buffer)
    return buffer.getvalue()


def _safetensors(draw: Draw, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = dict(load(data))
    kind = draw.randrange(4)
    if kind == 0:
        lies = json.loads(data[8 : 8 + length])
        header = to_json(changed(draw, lies), deep=draw.choice([50, 5000]))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if kind == 1:
        key = draw.choice(sorted(tensors))
        value = tensors.pop(key)
        if draw.random() < 0.8:
            shapes = [value.half(), value.double(), torch.zeros(3, 5), value.reshape(-1), torch.full_like(value, 0)]
            tensors[draw.choice([key, "other"])] = draw.choice(shapes).contiguous()
    if kind == 2:
        names = ["timm:vit_giant_patch14_dinov2", "torchvision:vit_h_14", "ResNet50", "no-such", "timm:x", "x" * 5000]
        metadata["architecture"] = draw.choice(names)
    if kind == 3:
        values: dict[str, Sequence[Any]] = {
            "num_classes": [10**9, 2**62, 0, -1, "x", 2],
            "image_size": [[10**5, 10**5], [4096, 4096], [0, 0], 5, [16, 16, 16]],
            "mean": ["[1e400, 0, 0]", "[NaN, 0, 0]", [1, 2], "x"],
            "std": ["[0, 0, 0]", "[-1, 1, 1]", "[Infinity, 1, 1]"],
            "class_names": [["a"] * 100_000, [], "abc", [1, 2, 3], ["a", "a", "a"]],
            "crop": [0, -1, 5, "NaN"],
            "epoch": [-1, 10**30],
        }
        key = draw.choice(sorted(values))
        value = draw.choice(values[key])
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
    return save(tensors, metadata)


_OF_CONTENT: dict[str, Callable[[Draw, bytes], bytes]] = {
    ".json": _json,
    ".yaml": _yaml,
    ".parquet": _parquet,
    ".pt": _state,
    ".safetensors": _safetensors,
}
