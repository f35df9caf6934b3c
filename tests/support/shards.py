"""Tar shards of a folder of class folders, written with the standard library."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Literal


def write(
    pictures: Path, folder: Path, split: str, *, count: int = 1, label: Literal["cls", "number", "json"] = "cls"
) -> list[Path]:
    """Write `folder/SPLIT-000000.tar` …: the pictures of `pictures/CLASS/` in the order of a folder, in equal parts."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(pictures.glob("*/*"))
    classes = sorted({file.parent.name for file in files})
    shards = []
    for number in range(count):
        part = files[number * len(files) // count : (number + 1) * len(files) // count]
        shards.append(folder / f"{split}-{number:06}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for file in part:
                key, name = f"{file.parent.name}/{file.stem}", file.parent.name
                add(tar, f"{key}{file.suffix}", file.read_bytes())
                if label == "json":
                    add(tar, f"{key}.json", json.dumps({"label": name, "note": "ü"}).encode())
                else:
                    add(tar, f"{key}.cls", (name if label == "cls" else str(classes.index(name))).encode())
    return shards


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
