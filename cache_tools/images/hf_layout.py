"""The files of a Hugging Face data set on the disk: which splits it has, and what its columns are said to hold.

These layouts are known:

- a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` of the package `datasets` wrote (Arrow);
- the files of a data set of the hub (Parquet), with or without its card, and a data set in the hub's cache;
- a data set that `load_dataset` prepared in the cache of the package `datasets` (Arrow).

Nothing here needs more than the standard library and YAML; `hf.py` reads the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.config import parse_yaml
from cache_tools.errors import CacheError, DataError
from cache_tools.images.class_names import listed
from cache_tools.images.result_folders import has_result_folder

DICT_FILE, INFO_FILE, STATE_FILE, CARD = "dataset_dict.json", "dataset_info.json", "state.json", "README.md"
_MAX_DEPTH = 4  # of the files of a data set below its folder
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?:-[0-9a-f]+)?")
# The words by which files without a number are known, as the package `datasets` knows them.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class HfFiles(NamedTuple):
    """The files of a data set.

    Attributes:
        root: the folder that holds them.
        splits: split → its Arrow or Parquet files, in order.
        features: column → the feature that the folder's own description gives it; the files may describe theirs too.
    """

    root: Path
    splits: dict[str, tuple[Path, ...]]
    features: dict[str, Any]


def hf_marker(folder: Path) -> str | None:
    """The file by which a folder is known for a Hugging Face data set; None for any other folder."""
    for name in (DICT_FILE, INFO_FILE, "dataset_infos.json"):
        if (folder / name).is_file():
            return name
    if _snapshots(folder):
        return "snapshots"
    for pattern in ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow", "default/*/*.parquet"):
        for file in sorted(folder.glob(pattern)):
            if file.name.startswith(".") or _is_list_of_files(file):
                continue
            if file.parent == folder or not has_result_folder(file.parent):
                return file.relative_to(folder).as_posix()
    found = _prepared_folders(folder)
    return (found[0] / INFO_FILE).relative_to(folder).as_posix() if found else None


def _is_list_of_files(file: Path) -> bool:
    """Whether a Parquet file has paths and no images: a list of the images beside it (`cache_tools.images.listed`)."""
    import polars as pl

    if file.suffix != ".parquet":
        return False
    try:
        columns = pl.read_parquet_schema(file)
    except (OSError, pl.exceptions.PolarsError):
        return False
    return "path" in columns and not any(kind == pl.Binary or kind.is_nested() for kind in columns.values())


def find_hf_files(folder: Path) -> HfFiles:
    """Find the splits of a data set and their files.

    Raises:
        DataError: no such folder or files, files that are missing, or several data sets in one folder.
    """
    if not folder.is_dir():
        raise DataError("no such folder", where=folder, expected="the folder of a Hugging Face data set")
    if _snapshots(folder):
        folder = _snapshot(folder)
    if (folder / DICT_FILE).is_file():
        names = _read_json(folder / DICT_FILE).get("splits")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
            raise _damaged(folder / DICT_FILE, "no list of splits")
        saved = {name: _saved_files(folder / name) for name in names}
        return HfFiles(folder, saved, _info_features(folder / names[0] / INFO_FILE))
    if (folder / STATE_FILE).is_file():
        split = _read_json(folder / STATE_FILE).get("_split")
        name = split if isinstance(split, str) and split else "train"
        return HfFiles(folder, {name: _saved_files(folder)}, _info_features(folder / INFO_FILE))
    if parquet := list(_files_below(folder, ".parquet")):
        return _parquet_files(folder, parquet)
    arrow = list(_files_below(folder, ".arrow"))
    prepared = [folder] if arrow and (folder / INFO_FILE).is_file() else _prepared_folders(folder)
    if len(prepared) > 1:
        raise _several(folder, prepared)
    if prepared:
        return _prepared_files(prepared[0])
    if arrow:
        return HfFiles(folder, _by_split(folder, arrow), {})
    raise DataError(
        "no files of a Hugging Face data set",
        where=folder,
        expected="Arrow files of save_to_disk, or Parquet files as on the hub",
        next_step="datasets.load_dataset(NAME).save_to_disk(FOLDER) writes such a folder",
    )


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The files of one `Dataset.save_to_disk`, which its state lists."""
    state = _read_json(folder / STATE_FILE)
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
        raise _damaged(folder / STATE_FILE, "no list of data files")
    if state.get("_indices_data_files"):
        raise DataError(
            "the data set was saved with a selection of its rows beside them",
            where=folder,
            next_step="save it again with a newer version of datasets, or after flatten_indices()",
        )
    files = tuple(folder / str(entry["filename"]) for entry in entries)
    _require(files, folder)
    return files


def _prepared_folders(folder: Path) -> list[Path]:
    """Folders below that `load_dataset` prepared: NAME/CONFIG/VERSION/HASH in the cache of the package `datasets`."""
    patterns = ("*", "*.*.*/*", "*/*.*.*/*")  # listing every folder would take long where images are files
    found = sorted(file.parent for pattern in patterns for file in folder.glob(f"{pattern}/{INFO_FILE}"))
    return [path for path in found if any(path.glob("*.arrow"))]


def _prepared_files(folder: Path) -> HfFiles:
    names = _read_json(folder / INFO_FILE).get("splits")
    files = sorted(folder.glob("*.arrow"))
    if not isinstance(names, Mapping) or not names:
        return HfFiles(folder, _by_split(folder, files), _info_features(folder / INFO_FILE))
    splits = {}
    for name in names:
        pattern = re.compile(rf"(?:.+-)?{re.escape(str(name))}(?:-[0-9]{{5}}-of-[0-9]{{5}})?")
        splits[str(name)] = tuple(file for file in files if pattern.fullmatch(file.stem))
        if not splits[str(name)]:
            raise DataError("a split without files", where=folder, expected=f"files of {name}", found=_names(files))
        _require_all_shards(folder, splits[str(name)])
    return HfFiles(folder, splits, _info_features(folder / INFO_FILE))


def _parquet_files(folder: Path, files: list[Path]) -> HfFiles:
    """The splits of Parquet files: as the card says, or else by their names."""
    card = _read_card(folder / CARD)
    chosen = _only_config(folder, card.get("configs"), "data_files")
    name = None if chosen is None else chosen.get("config_name")
    info = _only_config(folder, card.get("dataset_info"), "features", name)
    features = _card_features(info.get("features")) if info else {}
    if not features and (folder / INFO_FILE).is_file():
        features = _info_features(folder / INFO_FILE)
    patterns = _patterns(chosen["data_files"]) if chosen and "data_files" in chosen else {}
    if not patterns:
        return HfFiles(folder, _by_split(folder, files), features)
    splits = {}
    for split, globs in patterns.items():
        names = [(file, file.relative_to(folder).as_posix()) for file in files]
        splits[split] = tuple(file for file, name in names if any(fnmatch(name, glob) for glob in globs))
        if not splits[split]:
            raise DataError(
                f"the data set's card names files of the split {split} that are not there",
                where=folder / CARD,
                expected=", ".join(globs),
                found=_names(files),
                next_step="download the data set again",
            )
        _require_all_shards(folder, splits[split])
    return HfFiles(folder, splits, features)


def _by_split(folder: Path, files: list[Path]) -> dict[str, tuple[Path, ...]]:
    """Split → files, by the names of the files and of their folders; `train` for those that name none."""
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    for split, some in found.items():
        numbered = {file.parent for file in some if _SHARD.fullmatch(file.stem)}
        if len(numbered) > 1:
            raise _several(folder, sorted(numbered), f"files of the split {split}")
        _require_all_shards(folder, some)
    return {split: tuple(some) for split, some in found.items()}


def _split_of(path: Path) -> str:
    if (shard := _SHARD.fullmatch(path.stem)) is not None:
        return shard["split"]
    for part in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z0-9]+", part.lower())
        for split, names in _SPLIT_WORDS.items():
            if names.intersection(words):
                return split
    return "train"


def _require_all_shards(folder: Path, files: tuple[Path, ...] | list[Path]) -> None:
    """Raise DataError if files are numbered `00000-of-00003` and some of them are missing."""
    shards = [shard for file in files if (shard := _SHARD.fullmatch(file.stem)) is not None]
    if not shards:
        return
    count = int(shards[0]["count"])
    missing = sorted(set(range(count)) - {int(shard["number"]) for shard in shards})
    if missing:
        raise DataError(
            "files of a data set are missing",
            where=folder,
            expected=f"{count} files of the split {shards[0]['split']}",
            found=f"no number {listed([f'{number:05}' for number in missing])}",
            next_step="download the data set again",
        )


def _require(files: tuple[Path, ...], folder: Path) -> None:
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            "files of a data set are missing",
            where=folder,
            expected=f"{len(files)} files, as {STATE_FILE} lists them",
            found=f"no {listed(missing)}",
            next_step="copy or save the data set again",
        )


def _files_below(folder: Path, suffix: str, depth: int = _MAX_DEPTH) -> Iterator[Path]:
    """Files with an ending, sorted by path; hidden ones and those of our own commands are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if depth > 1 and not has_result_folder(path):
                yield from _files_below(path, suffix, depth - 1)
        elif path.suffix.lower() == suffix:
            yield path


def _snapshots(folder: Path) -> list[Path]:
    """The revisions of a data set in the hub's cache."""
    inside = folder / "snapshots"
    if not inside.is_dir() or not ((folder / "refs").is_dir() or (folder / "blobs").is_dir()):
        return []
    return sorted(path for path in inside.iterdir() if path.is_dir())


def _snapshot(folder: Path) -> Path:
    """The revision that `main` is, or the only one."""
    found = _snapshots(folder)
    main = folder / "refs" / "main"
    if main.is_file():
        revision = main.read_text(encoding="utf-8", errors="replace").strip()
        if chosen := [path for path in found if path.name == revision]:
            return chosen[0]
    if len(found) > 1:
        raise _several(folder, found, "revisions of the data set")
    return found[0]


def _several(folder: Path, found: list[Path], what: str = "configurations of the data set") -> DataError:
    names = [path.relative_to(folder).as_posix() for path in found]
    return DataError(
        f"there are several {what}",
        where=folder,
        found=listed(names),
        next_step=f"give the folder of one, such as {found[0]}",
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            "a file of the data set is missing", where=file, next_step="copy or save the data set again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(data, dict):
        raise _damaged(file, type(data).__name__)
    return data


def _info_features(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    features = _read_json(file).get("features")
    return dict(features) if isinstance(features, Mapping) else {}


def _read_card(file: Path) -> dict[str, Any]:
    """The YAML at the head of a data set's card; empty without one."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if head is None:
        return {}
    try:
        data = parse_yaml(head[1], "damaged card of a data set", where=file)
    except CacheError as error:
        raise DataError(error.what, where=file, expected="YAML between two lines of ---", found=error.found) from error
    return data if isinstance(data, dict) else {}


def _only_config(folder: Path, entries: Any, key: str, name: str | None = None) -> dict[str, Any] | None:
    """The entry of a card for the default configuration, or for the one named; None if the card has none with `key`."""
    some = [entries] if isinstance(entries, Mapping) else entries if isinstance(entries, list) else []
    found = [dict(entry) for entry in some if isinstance(entry, Mapping) and key in entry]
    if name is not None:
        found = [entry for entry in found if entry.get("config_name", name) == name]
    chosen = [entry for entry in found if entry.get("default") is True or entry.get("config_name") == "default"]
    if len(found) > 1 and not chosen and key == "data_files":
        places = sorted({folder / glob.split("/")[0] for each in found for glob in _first_globs(each["data_files"])})
        raise _several(folder, places)
    return next(iter([*chosen, *found]), None)


def _first_globs(data_files: Any) -> list[str]:
    return [globs[0] for globs in _patterns(data_files).values() if globs]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split → patterns of file names, of a card's `data_files`: one pattern, a list of them, or a list by split."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": paths} for split, paths in data_files.items()]
    found: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else []:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
        paths = [path] if isinstance(path, str) else path if isinstance(path, list) else []
        found.setdefault(str(split), []).extend(str(each) for each in paths)
    return found


def _card_features(features: Any) -> dict[str, Any]:
    """The features of a card, which names them in another way than the files, in the words of the files."""
    found: dict[str, Any] = {}
    for entry in features if isinstance(features, list) else []:
        if not isinstance(entry, Mapping) or "name" not in entry:
            continue
        kind = entry.get("dtype")
        if kind == "image":
            found[str(entry["name"])] = {"_type": "Image"}
        elif isinstance(kind, Mapping) and isinstance(label := kind.get("class_label"), Mapping):
            names = label.get("names")
            if isinstance(names, Mapping):
                numbers = {str(number): name for number, name in names.items()}
                names = [numbers.get(str(number)) for number in range(len(numbers))]
            found[str(entry["name"])] = {"_type": "ClassLabel", "names": names}
    return found


def _names(files: list[Path]) -> str:
    return listed([file.name for file in files])


def _damaged(file: Path, found: str) -> DataError:
    return DataError(
        "a damaged file of a data set", where=file, found=found, next_step="copy or save the data set again"
    )
