"""Hugging Face data sets for tests, in the layouts that the package `datasets` and the hub write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def class_label(*names: str) -> dict[str, Any]:
    """The feature of a column of class numbers."""
    return {"names": list(names), "_type": "ClassLabel"}


def image_table(
    images: Sequence[bytes | None], labels: Sequence[Any], names: Sequence[str] | None = None, **columns: Any
) -> pa.Table:
    """A table of images and labels with the features that `datasets` stores in its schema."""
    values = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)]
    table = pa.table({"image": pa.array(values, IMAGE_TYPE), "label": pa.array(labels), **columns})
    label = class_label(*names) if names is not None else {"dtype": "int64", "_type": "Value"}
    return with_features(table, {"image": {"_type": "Image"}, "label": label})


def with_features(table: pa.Table, features: Mapping[str, Any]) -> pa.Table:
    """The table with other features in its schema."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def folder_tables(root: Path) -> dict[str, pa.Table]:
    """The images of a folder of class folders, by split, in the order in which `folder` opens them."""
    tables = {}
    for split in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(path.name for path in split.iterdir())
        files = [(label, file) for label, name in enumerate(names) for file in sorted((split / name).iterdir())]
        tables[split.name] = image_table([file.read_bytes() for _, file in files], [label for label, _ in files], names)
    return tables


def save_to_disk(tables: Mapping[str, pa.Table], root: Path, *, shards: int = 2, batch_rows: int = 3) -> Path:
    """What `DatasetDict.save_to_disk` writes."""
    for split, table in tables.items():
        save_one(table, root / split, split, shards=shards, batch_rows=batch_rows)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(tables)}))
    return root


def save_one(table: pa.Table, folder: Path, split: str | None, *, shards: int = 2, batch_rows: int = 3) -> Path:
    """What `Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in range(shards)]
    for name, part in zip(names, _parts(table, shards), strict=True):
        write_arrow(part, folder / name, batch_rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    (folder / "dataset_info.json").write_text(json.dumps({**features, "splits": None}))
    return folder


def write_arrow(table: pa.Table, file: Path, batch_rows: int = 3) -> None:
    """One file of record batches in the stream format."""
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)


def hub_files(tables: Mapping[str, pa.Table], root: Path, *, shards: int = 2, folder: str = "data") -> Path:
    """The Parquet files of a data set on the hub."""
    (root / folder).mkdir(parents=True)
    for split, table in tables.items():
        for number, part in enumerate(_parts(table, shards)):
            file = root / folder / f"{split}-{number:05}-of-{shards:05}.parquet"
            parquet.write_table(part, file, row_group_size=2)
    return root


def hub_cache(tables: Mapping[str, pa.Table], root: Path) -> Path:
    """A data set in the cache of the hub: files are links from a revision to blobs."""
    snapshot = root / "snapshots" / "0123abc"
    hub_files(tables, snapshot)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(snapshot.rglob("*.parquet"))):
        blob = root / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    (root / "snapshots" / "older").mkdir()
    return root


def prepared(tables: Mapping[str, pa.Table], root: Path) -> Path:
    """What `load_dataset` leaves in its own cache."""
    folder = root / "default" / "0.0.0" / "fedcba98"
    folder.mkdir(parents=True)
    for split, table in tables.items():
        write_arrow(table, folder / f"pictures-{split}.arrow")
    first = next(iter(tables.values()))
    info = json.loads(first.schema.metadata[b"huggingface"])["info"]
    splits = {split: {"name": split, "num_examples": len(table)} for split, table in tables.items()}
    (folder / "dataset_info.json").write_text(json.dumps({**info, "splits": splits}))
    return root


def _parts(table: pa.Table, count: int) -> list[pa.Table]:
    bounds = [len(table) * number // count for number in range(count + 1)]
    return [table.slice(start, stop - start) for start, stop in pairwise(bounds)]
