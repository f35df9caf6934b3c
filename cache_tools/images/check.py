"""Check the images of folders before anything is built from them: all damaged ones are listed at once.

Every image is decoded once. The cache home remembers the outcome by content, so a second check of the same images only
looks them up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_tools.console import Progress
from cache_tools.errors import DataError, UnsafeFileError, printable
from cache_tools.files import SafeFolder, cache_home
from cache_tools.images.decode import SET_RANGE, Finding, PixelRules, examine_image, whole_images_only
from cache_tools.images.encoded import EncodedImages
from cache_tools.images.image_set import KEY_BYTES, ImageSet, sample_key
from cache_tools.images.index import num_workers
from cache_tools.images.recipe import IMAGES_VERSION
from cache_tools.images.result_folders import RESULT_FOLDERS
from cache_tools.images.summary import HIDDEN, common_root, some_names
from cache_tools.units import counted

MEMORY = "checked-images"  # folder in the cache home
SKIP_SETTING = "--set dataset.on_bad_image=skip"
NAMES_LISTED = 20
MIN_FULL_RANGE = 1 << 14  # if no 16-bit image of a data set reaches it, the data have 14 bits or fewer
_MAX_LISTED_CHARACTERS = 1000
_ORDINARY_REASONS = RESULT_FOLDERS | {HIDDEN}  # to leave out a file, which say nothing about images


def check_images(*splits: ImageSet | None, skip_setting: str | None = SKIP_SETTING) -> None:
    """Decode every image of these splits once; None and images in memory pass.

    Args:
        skip_setting: the option of the command that leaves out damaged images; None if it has none.

    Raises:
        DataError: lists the images that cannot be decoded, of all splits together, or names their undeclared range.
    """
    folders = [images for images in splits if isinstance(images, EncodedImages)]
    found = [(images, row, finding) for images in folders for row, finding in findings(images).items()]
    damaged = {images.place_of(row): finding.problem for images, row, finding in found if finding.problem}
    if damaged:
        raise _damaged(common_root(images.summary.root for images in folders), damaged, skip_setting)
    unknown = [(finding.kind, finding.unknown_range) for _, _, finding in found if finding.unknown_range]
    if unknown:
        raise _unknown_range(folders, unknown, "whose range is not declared")


def check_new_images(images: ImageSet, *tests: ImageSet | None) -> None:
    """`check_images`, and whether a new cache or a run on labels should use these splits as they are.

    Raises:
        DataError: also for class folders whose sub-folders look like classes, for a single class, and for 16-bit images
            of which none is brighter than 14 bits allow.
    """
    if isinstance(images, EncodedImages):
        check_classes(images)
    check_images(images, *tests)
    folders = [split for split in (images, *tests) if isinstance(split, EncodedImages)]
    deep = [(finding.kind, finding.deep) for split in folders for finding in findings(split).values() if finding.deep]
    if deep and max(high for _, (_, high) in deep) < MIN_FULL_RANGE:
        raise _unknown_range(folders, deep, "which would be nearly black")


class SplitsCheck(NamedTuple):
    """Everything that a check of whole splits found.

    Attributes:
        images: number of image files.
        damaged: whole path → why the image cannot be decoded.
        left_out: whole path → why the file is no sample, hidden files and our own results aside.
    """

    images: int
    damaged: dict[str, str]
    left_out: dict[str, str]


class PictureSizes(NamedTuple):
    """The sizes of pictures, as their headers say.

    Attributes:
        images: whose sizes an index knows.
        shorter_sides: the smallest, the median and the largest.
        enlarged: number of images that are smaller than a view in height or width.
        decoded_bytes: of all these pictures, decoded.
    """

    images: int
    shorter_sides: tuple[int, int, int]
    enlarged: int
    decoded_bytes: int


def picture_sizes(splits: Iterable[ImageSet], view: tuple[int, int]) -> PictureSizes | None:
    """The sizes of the pictures of these splits, without reading any; None if no index knows a size.

    Args:
        view: (height, width) that is made of the pictures.
    """
    tables = [images.header_sizes() for images in splits if isinstance(images, EncodedImages)]
    known = [table[(table > 0).all(axis=1)].astype(np.int64) for table in tables if table is not None]
    if not any(map(len, known)):
        return None
    sizes = np.concatenate(known)
    shorter = sizes.min(axis=1)
    smallest, median, largest = (int(side) for side in np.quantile(shorter, (0.0, 0.5, 1.0)))
    enlarged = int((sizes < view).any(axis=1).sum())
    decoded = int(3 * sizes.astype(np.float64).prod(axis=1).sum())
    return PictureSizes(len(sizes), (smallest, median, largest), enlarged, decoded)


def check_splits(*splits: ImageSet) -> SplitsCheck:
    """Decode every image of these splits, and tell what is wrong with which file; images in memory are not counted."""
    folders = [images for images in splits if isinstance(images, EncodedImages)]
    damaged, left_out = {}, {}
    for images in folders:
        for row, finding in findings(images).items():
            if (problem := finding.problem or finding.range_problem) is not None:
                damaged[images.place_of(row)] = problem
        for name, reason in images.summary.left_out.items():
            if reason not in _ORDINARY_REASONS:
                left_out[f"{images.summary.root}/{name}"] = reason
    return SplitsCheck(sum(map(len, folders)), damaged, left_out)


def check_classes(images: EncodedImages) -> None:
    """Raise DataError for class folders whose sub-folders look like classes, and for a single class."""
    summary = images.summary
    if sub := summary.sub_classes:
        shown = "; ".join(
            f"{name} ({', '.join(subs[:4])}{', …' if len(subs) > 4 else ''})" for name, subs in sub.items()
        )
        raise DataError(
            "the class folders hold no images but sub-folders, which look like classes of their own",
            where=summary.root,
            found=shown,
            next_step=f"choose --set dataset.sub_folders=classes ({sum(map(len, sub.values()))} classes) or "
            f"--set dataset.sub_folders=merge ({len(sub)} classes)",
        )
    if len(images.class_names) == 1 and not images.multi_label:
        raise DataError(
            "there is only one class",
            where=summary.root,
            expected="images of several classes",
            found=images.class_names[0],
            next_step="give the folder that holds the class folders (as the argument or --data-dir), or dataset.split",
        )


def frame_notes(*splits: ImageSet | None) -> list[str]:
    """A line for each checked folder that has images of several frames or pages."""
    notes = []
    for images in splits:
        if isinstance(images, EncodedImages):
            rows = [row for row, finding in findings(images).items() if finding.frames]
            names = some_names([images.name_of(row) for row in rows])
            line = f"{counted(len(rows), 'image')} with several frames or pages: the first is used ({names})"
            notes += [printable(f"{images.summary.root}: {line}")] if rows else []
    return notes


def without_damaged(
    images: ImageSet, sound: np.ndarray | None = None, skipped: Mapping[str, str] | None = None
) -> ImageSet:
    """The images that can be decoded, as `on_bad_image: skip` wants them; images in memory are returned as they are.

    Args:
        sound: keys, uint8 [N, 16], of images that are known to be sound.
        skipped: printable name → reason of images that an earlier check left out. They are left out again unless their
            contents are known to be sound, even if they can be decoded by now: rows keep their numbers.

    Raises:
        DataError: a class without any.
    """
    if not isinstance(images, EncodedImages):
        return images
    damaged = {row: finding.problem for row, finding in findings(images, sound).items() if finding.problem}
    if skipped:
        known = np.isin(_as_items(images.keys), _as_items(images.keys[:0] if sound is None else sound))
        for row in np.flatnonzero(~known).tolist():
            if row not in damaged and (reason := skipped.get(printable(images.name_of(row)))) is not None:
                damaged[row] = reason
    if not damaged:
        return images
    rest = images.subset(np.setdiff1d(np.arange(len(images)), list(damaged)))
    gone = np.empty(0, np.int64) if images.multi_label else np.setdiff1d(images.labels, rest.labels)
    if len(gone):
        name = images.class_names[gone[0]]
        where = f"{images.summary.root}, class {name}"
        raise DataError("every image of a class is damaged", where=where, next_step="replace them")
    listed = {images.name_of(row): problem for row, problem in damaged.items()}
    return replace(rest, summary=replace(images.summary, damaged=listed))


def findings(images: EncodedImages, sound: np.ndarray | None = None) -> dict[int, Finding]:
    """Row → what the check found, for every image that is not an ordinary one; those with a key in `sound` are."""
    memory = _memory(cache_home() / MEMORY, images.rules)
    found = {}
    rows = []
    ordinary = np.isin(_as_items(images.keys), memory.ordinary)
    if sound is not None:
        ordinary |= np.isin(_as_items(images.keys), _as_items(sound))
    for row in np.flatnonzero(~ordinary).tolist():
        key = images.keys[row].tobytes().hex()
        if key in memory.notable:
            found[row] = memory.notable[key]
        else:
            rows.append(row)
    if rows:
        found |= _examine(images, rows, memory)
    return dict(sorted(found.items()))


def _examine(images: EncodedImages, rows: Sequence[int], memory: _Memory) -> dict[int, Finding]:
    def examine(row: int) -> tuple[Finding, bool]:
        try:
            data = images.read(row)
        except DataError as error:
            return Finding(problem=str(error.found)), False
        if sample_key(data) != images.keys[row].tobytes():
            return Finding(problem="changed since the folder was opened"), False
        return examine_image(data, images.rules), True

    found = {}
    progress = Progress("check images", len(rows), "images")
    with whole_images_only(), ThreadPoolExecutor(num_workers()) as pool, progress:
        for row, (finding, is_of_content) in zip(rows, pool.map(examine, rows), strict=True):
            if finding != Finding():
                found[row] = finding
            if is_of_content:
                memory.add(images.keys[row].tobytes(), finding)
            progress.advance(1)
    memory.save()
    return found


@dataclass(eq=False)
class _Memory:
    """What earlier checks found, by content key: the keys of ordinary images, and the findings of all others."""

    path: Path
    ordinary: np.ndarray
    notable: dict[str, Finding]
    added: list[bytes] = field(default_factory=list)

    def add(self, key: bytes, finding: Finding) -> None:
        if finding == Finding():
            self.added.append(key)
        else:
            self.notable[key.hex()] = finding

    def save(self) -> None:
        """Write the memory together with what other processes have written since.

        Without a writable home, or with a link in its place, do not.
        """
        stored = _read_memory(self.path)
        new = np.frombuffer(b"".join(self.added), np.uint8).reshape(-1, KEY_BYTES)
        self.ordinary = np.unique(np.concatenate([self.ordinary, stored.ordinary, _as_items(new)]))
        self.notable = stored.notable | self.notable
        self.added = []
        data = {key: {name: value for name, value in asdict(f).items() if value} for key, f in self.notable.items()}
        with suppress(OSError, UnsafeFileError):
            folder = _home_folder(self.path.parent)
            folder.make_folder()
            folder.put(f"{self.path.name}.keys", self.ordinary.tobytes())
            folder.put(f"{self.path.name}.json", json.dumps(data).encode())


@cache
def _memory(folder: Path, rules: PixelRules) -> _Memory:
    """The memory of checks with these rules and this version of PIL; kept open, also where it cannot be written."""
    import PIL

    with suppress(OSError, UnsafeFileError):
        SafeFolder(folder).remove_partials()
    text = f"{IMAGES_VERSION} {PIL.__version__} {rules}"
    return _read_memory(folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest())


def _read_memory(path: Path) -> _Memory:
    """A memory from its files; an empty one if they are missing or damaged, or links."""
    folder = _home_folder(path.parent)
    try:
        keys = np.frombuffer(folder.read_bytes(f"{path.name}.keys"), np.uint8).reshape(-1, KEY_BYTES)
        stored = json.loads(folder.read_bytes(f"{path.name}.json"))
        notable = {key: _finding(fields) for key, fields in stored.items()}
    except (OSError, UnsafeFileError, ValueError, TypeError, AttributeError):
        keys, notable = np.empty((0, KEY_BYTES), np.uint8), {}
    return _Memory(path, _as_items(keys), notable)


def _home_folder(path: Path) -> SafeFolder:
    """A folder of the cache home, where other users may also write; links in it are not followed."""
    return SafeFolder(path.parent).below(path.name)


def _finding(fields: dict[str, Any]) -> Finding:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return Finding(**values)


def _as_items(keys: np.ndarray) -> np.ndarray:
    """Keys, uint8 [N, 16], as one value each that numpy can sort and compare."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()


def _damaged(root: str, problems: dict[str, str], skip_setting: str | None) -> DataError:
    """The error that lists damaged images: up to 20 in the message, all of them in a file.

    Names are whole paths if these are short enough, else paths below `root`.
    """
    count = len(problems)
    kinds: dict[str, list[str]] = {}
    shown, characters = 0, 0
    first = list(problems)[:NAMES_LISTED]
    in_full = sum(len(place) + 2 for place in first) <= _MAX_LISTED_CHARACTERS // 2
    for place, problem in problems.items():
        name = printable(place if in_full else os.path.relpath(place, root))
        characters += len(name) + 2 + (0 if problem in kinds else len(problem) + 2)
        if shown == NAMES_LISTED or (shown and characters > _MAX_LISTED_CHARACTERS):
            break
        kinds.setdefault(problem, []).append(name)
        shown += 1
    found = "; ".join(f"{problem}: {', '.join(names)}" for problem, names in kinds.items())
    if shown < count:
        found += f"; and {count - shown:,} more{_list_file(problems)}"
    them = "it" if count == 1 else "them"
    skip = "" if skip_setting is None else f", or leave {them} out with {skip_setting}"
    return DataError(
        counted(count, "damaged image"),
        where=root,
        found=found,
        next_step=f"replace or remove {them}{skip}",
    )


def _list_file(problems: dict[str, str]) -> str:
    """Write all names and problems to a file of the cache home; return the words that point to it."""
    text = "".join(f"{place}\t{problem}\n" for place, problem in problems.items()).encode(errors="surrogateescape")
    path = cache_home() / MEMORY / f"damaged-{hashlib.blake2b(text, digest_size=4).hexdigest()}.txt"
    try:
        folder = _home_folder(path.parent)
        folder.make_folder()
        folder.put(path.name, text)
    except (OSError, UnsafeFileError):
        return ""
    return f" (all of them are in {path})"


def _unknown_range(
    folders: Sequence[EncodedImages], found: Sequence[tuple[str, tuple[float, float]]], why: str
) -> DataError:
    low, high = min(low for _, (low, _) in found), max(high for _, (_, high) in found)
    kind = found[0][0]
    step = SET_RANGE
    if kind == "16-bit colour":
        step = "only the high byte of 16-bit colour can be read: convert the images to 8 bits per channel"
    elif why.startswith("which"):
        step += ", or [0, 65535] to take them as they are"
    return DataError(
        f"{len(found):,} images with {kind} {why}",
        where=common_root(images.summary.root for images in folders),
        expected="values that fill the 16 bits" if why.startswith("which") else "a declared range",
        found=f"values from {low:g} to {high:g}",
        next_step=step,
    )
