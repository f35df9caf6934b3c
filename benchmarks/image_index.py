"""Opening many images: a folder, a list of them and their pack, for the first time and from the stored index.

The images are hard links of a few PNG files, and some files of their own. Each opening is a process of its own, of
which only `open_images` is timed; `memory_mb` is what it adds to the largest size of the process after its imports.

- `folder`: first, second, and after one file was written again, one added and one removed; `read` counts the files that
  were opened;
- `list`: the same folder as a csv file;
- `pack`: its shards, by the index of the pack, by that of the cache home, and with neither;
- `shards`: an index of as many rows as `--rows` says, of shards without content.

    python benchmarks/image_index.py
    python benchmarks/image_index.py --files 20000 --rows 100000
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from side_by_side import environment

from cache_tools.console import command
from cache_tools.files import HOME_VARIABLE
from cache_tools.images.index import YOUNG_NS
from cache_tools.images.pack import pack_images

CLASSES, ORIGINALS = 100, 50
CPU = torch.device("cpu")
OPEN = """
import json, resource, sys, time
from pathlib import Path
from cache_tools.images import index, open_images
from cache_tools.images.recipe import DatasetRecipe
import cache_tools.images.folder, cache_tools.images.listed, cache_tools.images.webdataset, polars
read = []
examine = index._examine_file
index._examine_file = lambda path: read.append(path) or examine(path)
recipe = DatasetRecipe(name=sys.argv[1], data_dir=Path(sys.argv[2]), test_split=None)
before, start, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
images = open_images(recipe)
print(json.dumps({
    "s": round(time.perf_counter() - start, 3), "processor_s": round(time.process_time() - used, 3),
    "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024), "images": len(images),
    "read": len(read),
}))
"""


@command
def main(
    files: Annotated[int, typer.Option("--files", min=1000, help="Files of the folder and the pack.")] = 100_000,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the index of shards.")] = 1_281_167,
) -> None:
    """Print one JSON line of seconds and megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ[HOME_VARIABLE] = str(root / "home")
        _write_files(root / "photos" / "train", files)
        _write_list(root / "photos", root / "list.csv")
        figures: dict[str, Any] = {"benchmark": "image_index", "files": files, "rows": rows}
        _settle()
        for name, source, place in (("folder", "folder", root / "photos"), ("list", "csv", root / "list.csv")):
            figures[name] = {"first": _open(source, place), "second": _open(source, place)}
        changes: dict[str, Callable[[Path], None]] = {
            "touched": lambda photos: os.utime(photos / "000/own-0.png"),
            "added": lambda photos: _shutil_copy(photos / "000/own-0.png", photos / "001/new.png"),
            "removed": lambda photos: (photos / "000/own-1.png").unlink(),
        }
        for name, change in changes.items():
            change(root / "photos" / "train")
            _settle()
            figures["folder"][name] = _open("folder", root / "photos")
        start = time.perf_counter()
        pack_images(root / "photos", root / "pack")
        figures["pack"] = {"pack_s": round(time.perf_counter() - start, 3)}
        _settle()
        figures["pack"] |= {"first": _open("webdataset", root / "pack"), "second": _open("webdataset", root / "pack")}
        shutil.rmtree(root / "home" / "indexes")
        (root / "pack" / "index.parquet").unlink()
        figures["pack"]["without_index"] = _open("webdataset", root / "pack")
        _write_index(root / "shards", rows)
        figures["shards"] = {
            "first": _open("webdataset", root / "shards"),
            "second": _open("webdataset", root / "shards"),
        }
        print(json.dumps(figures | environment(CPU)))


def _open(source: str, place: Path) -> dict[str, Any]:
    print(f"open {place.name} as {source}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-c", OPEN, source, str(place)], stdout=subprocess.PIPE, check=True)
    opened: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return opened


def _write_files(train: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    train.parent.mkdir()
    originals = [train.parent.parent / f"original-{number}.png" for number in range(ORIGINALS)]
    for path in originals:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    for label in range(CLASSES):
        (train / f"{label:03}").mkdir(parents=True)
    for number in range(count - CLASSES):
        os.link(originals[number % ORIGINALS], train / f"{number % CLASSES:03}" / f"{number:08}.png")
    for number in range(CLASSES):
        _shutil_copy(originals[number % ORIGINALS], train / "000" / f"own-{number}.png")


def _shutil_copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def _write_list(photos: Path, path: Path) -> None:
    files = sorted((photos / "train").glob("*/*"))
    rows = [f"{file.relative_to(path.parent)},{file.parent.name}\n" for file in files]
    path.write_text("".join(["path,label\n", *rows]))


def _write_index(folder: Path, rows: int) -> None:
    """A pack whose shards are holes of the right size: opening it reads the index alone."""
    import polars as pl

    from cache_tools.images.webdataset import schema

    folder.mkdir()
    per_shard, size = 10_000, 1 << 30
    number = np.arange(rows)
    columns = {
        "shard": [f"train-{each:06}.tar" for each in (number // per_shard).tolist()],
        "state": [str(size)] * rows,
        "name": [f"n{each % 1000:08}/{each:08}.jpg" for each in number.tolist()],
        "offset": number % per_shard * 110_000,
        "size": np.full(rows, 109_000),
        "key_high": np.random.default_rng(0).integers(0, 1 << 63, rows, dtype=np.uint64),
        "key_low": number.astype(np.uint64),
        "label": [str(each % 1000) for each in number.tolist()],
        "height": np.full(rows, 375),
        "width": np.full(rows, 500),
        "reason": [None] * rows,
    }
    pl.DataFrame(columns, schema=schema()).write_parquet(folder / "index.parquet")
    for shard in sorted(set(columns["shard"])):
        with (folder / shard).open("wb") as file:
            file.truncate(size)


def _settle() -> None:
    """Wait until the files are old enough to be stored in an index."""
    time.sleep(YOUNG_NS / 1e9 + 0.1)


if __name__ == "__main__":
    typer.run(main)
