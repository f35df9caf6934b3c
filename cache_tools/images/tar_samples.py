"""The samples of a tar shard, as WebDataset has them: consecutive files whose names are equal up to the first dot."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from cache_tools.config.text import parse_json
from cache_tools.errors import DataError
from cache_tools.images.class_names import listed
from cache_tools.images.formats import EXTENSIONS
from cache_tools.images.headers import image_size
from cache_tools.images.image_set import sample_key
from cache_tools.images.labels import LABEL_COLUMNS

_MAX_LABEL_BYTES = 1 << 20
_MAX_IMAGE_BYTES = 1 << 30
_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_RARE = frozenset({"psd", "dds", "icns", "ico", "sgi"})  # formats that folders know by their contents only
LINK, NO_IMAGE = "a link or special file in a shard", "a sample without an image"


@dataclass
class Samples:
    """The samples of one shard, a list per column, and the files that are none.

    Attributes:
        names: of the image files in the shard.
        keys: content keys, 16 bytes each.
        labels: as text; None for a sample without one.
        heights, widths: as the headers of the images say; 0 where they cannot be read.
        left_out: name → reason.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class _Member:
    name: str
    ending: str
    start: int
    size: int


def read_samples(
    file: BinaryIO, size: int, where: str, *, image: str | None = None, label: str | None = None
) -> Samples:
    """Read a whole shard from the front.

    Args:
        size: of the shard in bytes.
        image: the ending of the image files, where a sample has several.
        label: the ending of the files of labels, or the field of the `.json` files; None for `.cls` or a field `label`.

    Raises:
        DataError: no tar file, a damaged or incomplete one, or a sample with several images or no label.
    """
    found = Samples()
    for members in _groups(file, size, where, found):
        _add(found, members, file, where, image, label)
    return found


def split_name(name: str) -> tuple[str, str]:
    """(key, ending) of a file in a shard: its path up to the first dot of its name, and the rest in lower case."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def _groups(file: BinaryIO, size: int, where: str, found: Samples) -> Iterator[list[_Member]]:
    """The files of each sample."""
    group: list[_Member] = []
    key = ""
    for member in _members(file, size, where, found):
        this, _ = split_name(member.name)
        if group and this != key:
            yield group
            group = []
        key = this
        if any(one.name == member.name for one in group):
            raise DataError("a shard has a file twice", where=where, found=member.name)
        group.append(member)
    if group:
        yield group


def _members(file: BinaryIO, size: int, where: str, found: Samples) -> Iterator[_Member]:
    """The regular files of a tar file, without hidden ones."""
    head = file.read(4)
    file.seek(0)
    if (packed := next((name for start, name in _COMPRESSED.items() if head.startswith(start)), None)) is not None:
        raise DataError(
            "a compressed shard, in which no image can be found without reading it all",
            where=where,
            found=packed,
            next_step="unpack it: JPEG and PNG files hardly get smaller",
        )
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or the memory of the process grows with every file
                if info.isdir() or os.path.basename(info.name).startswith("."):
                    continue
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    found.left_out[info.name] = LINK
                    continue
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                yield _Member(info.name, split_name(info.name)[1], info.offset_data, info.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(
            "a damaged shard, or no tar file", where=where, found=str(error), next_step="copy or write it again"
        ) from error
    if size - end < _BLOCK:
        raise DataError(
            "a shard without an end",
            where=where,
            expected="an empty block of 512 bytes after the last file",
            found="a file that may have been cut off",
            next_step="copy or write it again",
        )


def _add(
    found: Samples, members: list[_Member], file: BinaryIO, where: str, image: str | None, label: str | None
) -> None:
    """Add a sample, or note that it has no image."""
    images = [one for one in members if one.ending == image or (image is None and _is_image(one.ending, label))]
    if not images:
        found.left_out[members[0].name] = NO_IMAGE
        return
    if len(images) > 1:
        raise DataError(
            "a sample with several images",
            where=where,
            found=listed([one.name for one in images]),
            next_step=f"choose one: --set dataset.image_column={images[0].ending}",
        )
    [chosen] = images
    data = _read(file, chosen, where, _MAX_IMAGE_BYTES)
    height, width = image_size(data)
    found.names.append(chosen.name)
    found.offsets.append(chosen.start)
    found.sizes.append(chosen.size)
    found.keys.append(sample_key(data or f"an empty file {chosen.name}".encode(errors="surrogateescape")))
    found.labels.append(_label([one for one in members if one is not chosen], file, where, label))
    found.heights.append(height)
    found.widths.append(width)


def _is_image(ending: str, label: str | None) -> bool:
    last = ending.rpartition(".")[2]
    return ending != label and (f".{last}" in EXTENSIONS or last in _RARE)


def _label(members: list[_Member], file: BinaryIO, where: str, label: str | None) -> str | None:
    """The label of a sample as text, stripped of spaces; None if it has none."""
    endings = {one.ending: one for one in members}
    plain = endings.get("cls" if label is None else label.lower())
    if plain is not None:
        text = _text(_read(file, plain, where, _MAX_LABEL_BYTES), plain.name, where)
        return text or None
    if "json" not in endings:
        return None
    one = endings["json"]
    place = f"{where}, {one.name}"
    text = _text(_read(file, one, where, _MAX_LABEL_BYTES), one.name, where)
    values: Any = parse_json(text, "a damaged file of labels", where=place, error=DataError)
    if not isinstance(values, dict):
        raise DataError("a file of labels without fields", where=place, expected='such as {"label": "cat"}')
    names = (label,) if label is not None else ("cls", *LABEL_COLUMNS)
    value = next((values[name] for name in names if values.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError("a label that is no name and no number", where=place, found=str(value)[:80])
    return str(value).strip() or None


def _read(file: BinaryIO, member: _Member, where: str, limit: int) -> bytes:
    if member.size > limit:
        raise DataError(
            "a file in a shard is larger than it can be",
            where=f"{where}, {member.name}",
            found=f"{member.size:,} bytes",
        )
    file.seek(member.start)
    data = file.read(member.size)
    if len(data) < member.size:
        raise DataError("a damaged shard", where=where, found=f"the end of the file in {member.name}")
    return data


def _text(data: bytes, name: str, where: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError("a label that is not UTF-8", where=f"{where}, {name}", found=ascii(data[:40])) from error
