"""Pack a folder of images into tar shards with an index: one open file instead of a million.

A shard is a plain tar file as WebDataset has it: an image and a `.cls` file with the number of its class. Beside the
shards lie `index.parquet` (a row per image), `classes.json` (names of the classes) and `pack.json` (how it was made).
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from cache_tools.console import Progress
from cache_tools.errors import DataError, RecipeError, StorageError
from cache_tools.files import PARTIAL, rename_unless_exists, sync_tree
from cache_tools.files.safe import find_leftovers, remove_leftover
from cache_tools.images import open_images
from cache_tools.images.check import check_classes, check_images, without_damaged
from cache_tools.images.classes import with_classes
from cache_tools.images.decode import PixelRules, decode_picture, whole_images_only
from cache_tools.images.encoded import EncodedImages, check_unchanged
from cache_tools.images.folder import FolderImages
from cache_tools.images.formats import EXTENSIONS, HEAD_BYTES, identify
from cache_tools.images.headers import image_size
from cache_tools.images.hf_layout import find_hf_files
from cache_tools.images.image_set import sample_key
from cache_tools.images.index import num_workers
from cache_tools.images.kinds import source_at
from cache_tools.images.own_folder import TEST_NAMES, TRAIN_NAMES, read_own_folder
from cache_tools.images.recipe import DatasetRecipe
from cache_tools.images.shard_files import CLASSES, PACK_INDEX, PACK_RECORD
from cache_tools.images.tar_samples import Samples
from cache_tools.images.webdataset import as_table
from cache_tools.system.arguments import expand_user

if TYPE_CHECKING:
    import polars as pl

SHARD_BYTES, MIN_SHARD_BYTES = 1 << 30, 1 << 20
_VERSION = 1
_MARK = 2 * tarfile.BLOCKSIZE  # zeros at the end of a tar file, at least
_AHEAD = 256  # images that are read before they are written
_ENDINGS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "JPEG XL": "jxl", "PNM": "pnm"}


@dataclass(frozen=True)
class PackedSplit:
    """A split of a pack.

    Attributes:
        content_digest: of the images that were packed: keys, labels and class names.
        shards: file name → size in bytes.
        reduced: images that were made smaller.
        unreadable: images whose size cannot be read; they are packed as they are.
    """

    samples: int
    content_digest: str
    shards: dict[str, int]
    reduced: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class Pack:
    """What a pack holds.

    Attributes:
        existed: it was there, and nothing was written.
        notes: what a user should know of the folder, such as files that are left out.
    """

    folder: Path
    splits: dict[str, PackedSplit]
    existed: bool = False
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        splits = {name: asdict(split) for name, split in self.splits.items()}
        return {"folder": str(self.folder), "existed": self.existed, "splits": splits, "notes": list(self.notes)}


def pack_images(
    folder: Path,
    out: Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    shard_bytes: int = SHARD_BYTES,
    sub_folders: Literal["merge", "classes"] | None = None,
    class_order: str | tuple[str, ...] = "sorted",
    skip_damaged: bool = False,
) -> Pack:
    """Pack the splits of a folder of class folders, or of a Hugging Face data set. `out` appears whole or not at all.

    Args:
        max_side: larger images are made so small that their longer side has as many pixels, and stored as JPEG. None
            for all images as they are.
        quality: of these JPEG files, 1 to 100.
        shard_bytes: a shard that is larger is followed by another.
        sub_folders, class_order: see `DatasetRecipe`.
        skip_damaged: leave out images that cannot be decoded, which takes as long as decoding all of them.

    Raises:
        DataError: not such a folder, or images that cannot be decoded, with `max_side` and without `skip_damaged`.
        StorageError: something else is at `out`.
    """
    folder, out = expand_user(folder), expand_user(out)
    splits = _open_splits(folder, sub_folders, class_order)
    if skip_damaged:
        splits = {name: _without_damaged(images) for name, images in splits.items()}
    reduced = None if max_side is None else (max_side, quality)
    notes = tuple(note for images in splits.values() for note in images.notes())
    if (found := _existing(out, splits, reduced)) is not None:
        return replace(found, notes=notes)
    if reduced is not None:
        check_images(*splits.values(), skip_setting="--on-bad-image skip")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    for leftover in find_leftovers(out.absolute().parent, f".{out.name}."):
        remove_leftover(leftover)
    partial = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex}{PARTIAL}"
    partial.mkdir()
    try:
        packed = _write(partial, splits, reduced, shard_bytes)
        sync_tree(partial)
        rename_unless_exists(partial, out.absolute())
        if partial.exists():
            raise _in_the_way(out)
    finally:
        remove_leftover(partial)
    return Pack(out, packed, notes=notes)


def _open_splits(
    folder: Path, sub_folders: Literal["merge", "classes"] | None, class_order: str | tuple[str, ...]
) -> dict[str, EncodedImages]:
    """The splits of a folder, the training split first, all with its classes."""
    read_own_folder(folder)  # refuses caches and runs
    kind = source_at(folder, "folder")
    if kind == "folder":
        names = [name for name in (*TRAIN_NAMES, *TEST_NAMES) if (folder / name).is_dir()]
    elif kind == "hf":
        splits = find_hf_files(folder).splits
        names = sorted(splits, key=lambda name: (name not in TRAIN_NAMES, list(splits).index(name)))
    else:
        raise DataError(
            "only folders of class folders and Hugging Face data sets can be packed",
            where=folder,
            found=f"{kind} files",
        )
    settings: dict[str, Any] = {"name": kind, "data_dir": folder, "class_order": class_order}
    settings |= {"sub_folders": sub_folders} if sub_folders is not None else {}
    first = names[0] if names else "train"
    recipe = DatasetRecipe(split=first, test_split=tuple(names[1:]) or None, **settings)
    opened: dict[str, EncodedImages] = {}
    for name in names or [first]:
        images = open_images(recipe, name)
        assert isinstance(images, EncodedImages)
        if images.multi_label:
            raise RecipeError("only images with one label each can be packed", where=folder)
        opened[name] = with_classes(images, opened[first].class_names) if opened else images
    check_classes(opened[first])
    return opened


def _without_damaged(images: EncodedImages) -> EncodedImages:
    rest = without_damaged(images)
    assert isinstance(rest, EncodedImages)
    return rest


def _existing(out: Path, splits: dict[str, EncodedImages], reduced: tuple[int, int] | None) -> Pack | None:
    """The pack of these images that is at `out` already; None if there is nothing.

    Raises:
        StorageError: something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / PACK_RECORD).read_text(encoding="utf-8"))
        found = {name: PackedSplit(**split) for name, split in record["splits"].items()}
        wanted = {name: images.content_digest for name, images in splits.items()}
        is_same = record["reduced"] == (None if reduced is None else list(reduced)) and record["version"] == _VERSION
        is_same = is_same and {name: split.content_digest for name, split in found.items()} == wanted
        sizes = {name: size for split in found.values() for name, size in split.shards.items()}
        if is_same and all((out / name).stat().st_size == size for name, size in sizes.items()):
            return Pack(out, found, existed=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _in_the_way(out)


def _in_the_way(out: Path) -> StorageError:
    return StorageError(
        "something else is where the pack should be",
        where=out,
        expected="a new folder, or a pack of the same images",
        next_step="choose another folder, or remove this one",
    )


def _write(
    folder: Path, splits: dict[str, EncodedImages], reduced: tuple[int, int] | None, shard_bytes: int
) -> dict[str, PackedSplit]:
    import polars as pl

    packed, tables = {}, []
    for name, images in splits.items():
        packed[name], some = _write_split(folder, name, images, reduced, shard_bytes)
        tables += some
    pl.concat(tables).write_parquet(folder / PACK_INDEX, compression="zstd")
    class_names = next(iter(splits.values())).class_names
    (folder / CLASSES).write_text(json.dumps(class_names, ensure_ascii=False, indent=0), encoding="utf-8")
    record = {
        "version": _VERSION,
        "reduced": reduced,
        "splits": {name: asdict(split) for name, split in packed.items()},
    }
    (folder / PACK_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return packed


def _write_split(
    folder: Path, split: str, images: EncodedImages, reduced: tuple[int, int] | None, shard_bytes: int
) -> tuple[PackedSplit, list[pl.DataFrame]]:
    """Write the shards of a split, in the order of its samples; returns the index of each too."""
    names = _member_names(images)
    sizes: dict[str, int] = {}
    tables: list[pl.DataFrame] = []
    count = {"reduced": 0, "unreadable": 0}
    rows = _read(images, reduced)
    row = 0
    with Progress(f"pack {split}", len(images), "images") as progress:
        while row < len(images):
            name = f"{split}-{len(sizes):06}.tar"
            samples = Samples()
            with (folder / name).open("xb") as file:
                end = 0
                while row < len(images) and (not samples.names or end < shard_bytes):
                    one, key = next(rows), next(names)
                    label = str(int(images.labels[row]))
                    samples.names.append(f"{key}.{one.ending}")
                    start, end = _add(file, end, samples.names[-1], one.data)
                    samples.offsets.append(start)
                    samples.sizes.append(len(one.data))
                    samples.keys.append(one.key)
                    samples.labels.append(label)
                    samples.heights.append(one.height)
                    samples.widths.append(one.width)
                    _, end = _add(file, end, f"{key}.cls", label.encode())
                    count["reduced"] += one.is_reduced
                    count["unreadable"] += not one.height
                    row += 1
                    progress.advance(1)
                end += file.write(bytes(_MARK + -(end + _MARK) % tarfile.RECORDSIZE))
                sizes[name] = end
            tables.append(as_table(name, str(sizes[name]), samples))
    return PackedSplit(len(images), images.content_digest, sizes, **count), tables


@dataclass(frozen=True)
class _Image:
    data: bytes
    key: bytes
    ending: str
    height: int
    width: int
    is_reduced: bool = False


def _read(images: EncodedImages, reduced: tuple[int, int] | None) -> Iterator[_Image]:
    """The images in order, read and made smaller in threads."""

    def read(row: int) -> _Image:
        data = images.read(row)
        key = images.keys[row].tobytes()
        check_unchanged(data, key, images.place_of(row))
        height, width = image_size(data)
        if reduced is not None and max(height, width) > reduced[0]:
            data = _smaller(data, images.place_of(row), images.rules, *reduced)
            return _Image(data, sample_key(data), "jpg", *image_size(data), is_reduced=True)
        return _Image(data, key, _ending(images, row, data), height, width)

    with whole_images_only(), ThreadPoolExecutor(num_workers()) as pool:
        for start in range(0, len(images), _AHEAD):
            yield from pool.map(read, range(start, min(start + _AHEAD, len(images))))


def _smaller(data: bytes, where: str, rules: PixelRules, max_side: int, quality: int) -> bytes:
    """An image as a JPEG file whose longer side has `max_side` pixels, by antialiased bicubic interpolation."""
    from PIL import Image

    picture = Image.fromarray(decode_picture(data, where, rules))
    longest = max(picture.size)
    width, height = (max(1, round(side * max_side / longest)) for side in picture.size)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _ending(images: EncodedImages, row: int, data: bytes) -> str:
    """The ending of a file in a shard, by which it is known for an image: its own, or that of its format."""
    own = os.path.splitext(str(images.files[row]))[1].lower() if isinstance(images, FolderImages) else ""
    if own in EXTENSIONS:
        return own.removeprefix(".")
    name = identify(data[:HEAD_BYTES]).name
    return _ENDINGS.get(name, name.lower())


def _member_names(images: EncodedImages) -> Iterator[str]:
    """The name of each image in the shards, without an ending: that of its file, with `_` for a dot, which ends names.

    A name that a class folder has already gets a number.
    """
    folder, used = "", set[str]()
    for row in range(len(images)):
        if isinstance(images, FolderImages):
            path = images.name_of(row)
        else:
            path = f"{images.class_names[int(images.labels[row])].replace('/', '_')}/{row:08}"
        try:
            path.encode()
        except UnicodeEncodeError:
            raise DataError(
                "the name of an image is not UTF-8", where=images.place_of(row), next_step="rename it"
            ) from None
        this, _, base = path.rpartition("/")
        if this != folder:
            folder, used = this, set()
        stem = plain = os.path.splitext(base)[0].replace(".", "_") if isinstance(images, FolderImages) else base
        number = 1
        while stem in used:
            number += 1
            stem = f"{plain}-{number}"
        used.add(stem)
        yield f"{this}/{stem}"


def _add(file: BinaryIO, end: int, name: str, data: bytes) -> tuple[int, int]:
    """Append a file to a tar file; returns where its bytes begin, and the new end.

    Equal images give equal shards: no times are stored.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    is_plain = name.isascii() and len(name) <= tarfile.LENGTH_NAME
    header = info.tobuf(tarfile.USTAR_FORMAT if is_plain else tarfile.PAX_FORMAT, "utf-8", "strict")
    padding = -len(data) % tarfile.BLOCKSIZE
    file.write(header + data + bytes(padding))
    return end + len(header), end + len(header) + len(data) + padding
