"""The files of a split folder: which are images, of which class, and which are left out and why."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cache_tools.console import Progress
from cache_tools.errors import DataError, printable
from cache_tools.images.class_names import Names, arrange, describe
from cache_tools.images.formats import CAMERA_RAW, DECODERS, EXTENSIONS, HEAD_BYTES, identify, is_decodable, no_decoder
from cache_tools.images.image_set import KEY_BYTES, sample_key
from cache_tools.images.result_folders import RESULT_FOLDERS, count_result_folders, result_folder_kind

PROGRESS_FROM_FILES = 5000
HIDDEN = "hidden or made by a system"
UNLISTED = "not in the table of labels"
# What a folder may hold besides result folders and still be no class.
_BESIDE_RESULTS = RESULT_FOLDERS | {HIDDEN, "text", "HTML page"}
# Folders and files of network drives, macOS and Windows; names that begin with a dot are left out too.
_SYSTEM_NAMES = frozenset(
    {"@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "lost+found", "__macosx"}
    | {"thumbs.db", "ehthumbs.db", "thumbnails.db", "desktop.ini", "icon\r"}
)
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class FolderSummary:
    """What a split folder holds besides its samples.

    Attributes:
        root: the folder.
        images: number of image files.
        nested: of them, those in sub-folders of their class folder.
        left_out: path below the root → why the file is no sample; for a whole result folder, its kind.
        damaged: the same for images that `on_bad_image: skip` leaves out.
        sub_classes: class folder → its sub-folders, where these look like classes of their own.
    """

    root: Path
    images: int
    nested: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    sub_classes: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What a user should know, one line each; none for an ordinary folder."""
        found = []
        kinds = _by_reason(self.left_out)
        if files := [(reason, names) for reason, names in kinds if reason not in RESULT_FOLDERS]:
            count = sum(len(names) for _, names in files)
            reasons = "; ".join(f"{len(names):,} {reason} ({some_names(names)})" for reason, names in files)
            found.append(f"{self.root}: {counted(count, 'file')} of {self.images + count:,} left out: {reasons}")
            helpful = [
                (name, package) for name, package in DECODERS.items() if no_decoder(name) in self.left_out.values()
            ]
            found += [f"{self.root}: to read {name} images, install {package}" for name, package in helpful]
        if results := [(kind, names) for kind, names in kinds if kind in RESULT_FOLDERS]:
            counts = "; ".join(
                f"{count_result_folders(len(names), kind)} ({some_names(names)})" for kind, names in results
            )
            found.append(f"{self.root}: left out: {counts}")
        if self.damaged:
            names = "; ".join(f"{reason}: {some_names(names)}" for reason, names in _by_reason(self.damaged))
            found.append(f"{self.root}: {counted(len(self.damaged), 'damaged image')} skipped: {names}")
        if self.nested:
            found.append(f"{self.root}: {counted(self.nested, 'image')} in sub-folders of the class folders")
        return [printable(line) for line in found]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with every name."""
        return {
            "folder": printable(str(self.root)),
            "images": self.images,
            "nested": self.nested,
            "left_out": {printable(name): reason for name, reason in self.left_out.items()},
            "damaged": {printable(name): reason for name, reason in self.damaged.items()},
        }


@dataclass(frozen=True)
class Scan:
    """The samples of a split folder, sorted by class and path."""

    class_names: Names
    files: list[Path]
    labels: list[int]
    keys: np.ndarray
    summary: FolderSummary


def scan_folder(
    root: Path,
    *,
    class_order: str | Names = "sorted",
    sub_folders: Literal["merge", "classes"] | None = None,
    is_training: bool = True,
) -> Scan:
    """Find the images of `root/CLASS/**` by their contents, and hash them. No image is decoded.

    A file that cannot be read, or whose ending promises an image that it does not hold, stays in the list, so that a
    check names it with the damaged images.

    Args:
        class_order, sub_folders: see `DatasetRecipe`.
        is_training: every class folder needs an image, and `class_order` lists just these classes.

    Raises:
        DataError: no class folders, a class folder without an image, a class name that cannot be used, a loop of links.
    """
    folders, beside = _class_folders(root)
    listed = [(name, path, reason) for name in folders for path, reason in _walk(root / name, ())]
    left_out = {path: reason for _, path, reason in listed if reason is not None} | beside
    candidates = [(name, path) for name, path, reason in listed if reason is None]
    candidates.sort(key=lambda one: (one[0], one[1].parts))
    results = _examine([path for _, path in candidates])
    left_out |= {path: found for (_, path), found in zip(candidates, results, strict=True) if isinstance(found, str)}
    samples = [
        (name, path, key) for (name, path), key in zip(candidates, results, strict=True) if isinstance(key, bytes)
    ]
    folders = _without_result_folders(root, folders, samples, left_out)
    summary = FolderSummary(
        root=root,
        images=len(samples),
        nested=sum(path.parent != root / name for name, path, _ in samples) if sub_folders != "classes" else 0,
        left_out={str(path.relative_to(root)): reason for path, reason in sorted(left_out.items())},
        sub_classes=_sub_classes(root, folders, samples) if sub_folders is None else {},
    )
    empty = sorted(set(folders) - {name for name, _, _ in samples})
    if not samples and not is_training:
        raise DataError("no image in any class folder", where=root, found=describe(folders))
    if empty and is_training:
        raise _empty_class(root / empty[0], summary)
    if sub_folders == "classes":
        names = _leaf_names(root, sorted({path.parent for _, path, _ in samples}))
        samples = [(names[path.parent], path, key) for _, path, key in samples]
    class_names = arrange(tuple(sorted({name for name, _, _ in samples})), class_order, complete=is_training)
    numbers = {name: number for number, name in enumerate(class_names)}
    samples.sort(key=lambda sample: (numbers[sample[0]], sample[1].parts))
    return Scan(
        class_names,
        [path for _, path, _ in samples],
        [numbers[name] for name, _, _ in samples],
        np.frombuffer(bytearray(b"".join(key for _, _, key in samples)), np.uint8).reshape(-1, KEY_BYTES),
        summary,
    )


def scan_listed(root: Path, files: Sequence[Path]) -> tuple[np.ndarray, FolderSummary]:
    """Hash the images that a table of labels lists. All other files below the root are left out.

    Raises:
        DataError: listed files that are no images, or a loop of links.
    """
    results = _examine(files)
    if bad := [f"{path.name}: {found}" for path, found in zip(files, results, strict=True) if isinstance(found, str)]:
        raise DataError("files in a table of labels that are no images", where=root, found=some_names(bad))
    chosen = {*files}
    others = {path: reason for path, reason in _walk(root, (), is_root=True) if path not in chosen}
    left_out = {path: reason or _reason_to_leave_out(path) or UNLISTED for path, reason in sorted(others.items())}
    summary = FolderSummary(
        root=root,
        images=len(files),
        left_out={str(path.relative_to(root)): reason for path, reason in left_out.items()},
    )
    keys = b"".join(key for key in results if isinstance(key, bytes))
    return np.frombuffer(bytearray(keys), np.uint8).reshape(-1, KEY_BYTES), summary


def read_image(path: Path) -> bytes:
    """Read a regular file; a pipe or device named like an image would block forever.

    Raises:
        DataError: the file is empty, unreadable or no regular file.
    """
    try:
        data = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError("cannot read an image", where=path, found=error.strerror) from error
    if not data:
        raise DataError(
            "not an image",
            where=path,
            found="an empty file" if data is not None else "a broken link, a loop of links or no regular file",
            next_step="replace the file, or remove it from the folder",
        )
    return data


def some_names(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 file` or `2 files`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def num_workers() -> int:
    """Threads for reading and decoding."""
    return min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _class_folders(root: Path) -> tuple[list[str], dict[Path, str]]:
    """The sorted names of the class folders, and the files beside them."""
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise DataError("cannot read an image folder", where=root, found=error.strerror) from error
    beside = {root / name: HIDDEN for name in names if _is_hidden(name) and not (root / name).is_dir()}
    visible = [name for name in names if not _is_hidden(name)]
    classes = [name for name in visible if (root / name).is_dir()]
    strays = [name for name in visible if name not in classes]
    broken = next((name for name in strays if not (root / name).exists()), None)
    kinds = {name: _reason_to_leave_out(root / name) for name in strays if broken is None}
    images = [name for name, reason in kinds.items() if reason is None]
    if not classes or images or broken:
        raise _not_class_folders(root, classes, images, broken)
    _check_class_names(root, classes)
    return classes, beside | {root / name: str(reason) for name, reason in kinds.items()}


def _without_result_folders(
    root: Path, folders: list[str], samples: Sequence[tuple[str, Path, bytes]], left_out: dict[Path, str]
) -> list[str]:
    """The class folders without result folders and folders that hold nothing else, such as `runs/`."""
    inside: dict[str, set[str]] = {}
    for path, reason in left_out.items():
        inside.setdefault(path.relative_to(root).parts[0], set()).add(reason)
    used = {name for name, _, _ in samples}
    results = {
        name for name, reasons in inside.items() if reasons & RESULT_FOLDERS and reasons <= _BESIDE_RESULTS
    } - used
    if results and not set(folders) - results:
        raise _not_class_folders(root, [], [], None)
    return [name for name in folders if name not in results]


def _not_class_folders(root: Path, classes: list[str], images: list[str], broken: str | None) -> DataError:
    if broken:
        found, step = f"the broken link {broken}", "remove the link, or make its target available"
    elif images:
        more = f" and {len(images) - 1:,} more" if len(images) > 1 else ""
        found = f"the image {images[0]}{more} beside {'the class folders' if classes else 'no sub-folder'}"
        step = "make a folder for each class and move its images there"
    else:
        found, step = "no sub-folder", "make a folder for each class, or set data_dir or the split to another folder"
    expected = "one sub-folder per class and every image in one of them"
    return DataError("not a folder of class folders", where=root, expected=expected, found=found, next_step=step)


def _check_class_names(root: Path, names: Sequence[str]) -> None:
    """Raise DataError for class names that cannot be stored or shown, or that cannot be told apart."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                "the name of a class folder is not UTF-8",
                where=root,
                expected="names in UTF-8",
                found=ascii(os.fsencode(name))[1:],
                next_step="rename it; `convmv -f latin1 -t utf-8 -r --notest FOLDER` converts names from old archives",
            ) from None
        if any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in name):
            raise DataError(
                "the name of a class folder has a control character",
                where=root,
                found=ascii(name),
                next_step="rename it",
            )
    plain: dict[str, str] = {}
    for name in names:
        same = plain.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)
        if same != name:
            raise DataError(
                "two class folders have names that look the same",
                where=root,
                expected="names that differ in more than spaces and Unicode forms",
                found=f"{same!a} and {name!a}",
                next_step="move the images of one into the other",
            )


def _walk(
    folder: Path, parents: tuple[tuple[int, int], ...], *, is_root: bool = False
) -> Iterator[tuple[Path, str | None]]:
    """Files below a folder, links followed, each with the reason to leave it out, None if its content decides.

    A result folder (`result_folders.py`) is left out as a whole, unless it is the root.

    `parents` are the (device, inode) of the folders above.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise DataError("folder contains itself through a link", where=folder, next_step="remove the link")
    try:
        with os.scandir(folder) as found:
            entries = list(found)
        if not is_root and (kind := result_folder_kind({entry.name for entry in entries})) is not None:
            yield folder, kind
            return
        for entry in entries:
            path = Path(entry.path)
            if _is_hidden(entry.name):
                hidden = path.rglob("*") if entry.is_dir(follow_symlinks=False) else [path]
                yield from ((file, HIDDEN) for file in hidden if not file.is_dir())
            elif entry.is_dir():
                yield from _walk(path, (*parents, identity))
            else:
                yield path, None
    except OSError as error:
        raise DataError("cannot read a class folder", where=error.filename or folder, found=error.strerror) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _examine(paths: Sequence[Path]) -> list[bytes | str]:
    """The content key of each image, and the reason to leave out any other file."""
    shown = Progress("hash images", len(paths), "files") if len(paths) >= PROGRESS_FROM_FILES else nullcontext()
    found = []
    with ThreadPoolExecutor(num_workers()) as pool, shown as progress:
        for result in pool.map(_key_or_reason, paths):
            found.append(result)
            if progress is not None:
                progress.advance(1)
    return found


def _key_or_reason(path: Path) -> bytes | str:
    if not _is_image_name(path.name) and (reason := _reason_to_leave_out(path)) is not None:
        return reason
    try:
        data = read_image(path)
    except DataError as error:
        return sample_key(f"{error.found} {path.name}".encode(errors="surrogateescape"))  # a check names the file
    content = identify(data[:HEAD_BYTES])
    return no_decoder(content.name) if content.is_image and not is_decodable(content.name) else sample_key(data)


def _reason_to_leave_out(path: Path) -> str | None:
    """Why a file is no sample, from its first bytes; None for an image, or a link to a folder that is lost."""
    if path.suffix.lower() in CAMERA_RAW:
        return no_decoder("camera raw")
    if not path.exists():
        return None
    try:
        if not path.is_file():
            return "no regular file"
        with path.open("rb") as file:
            content = identify(file.read(HEAD_BYTES))
    except OSError as error:
        return f"unreadable: {error.strerror}"
    if not content.is_image:
        return None if _is_image_name(path.name) else content.name
    return None if is_decodable(content.name) else no_decoder(content.name)


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _sub_classes(
    root: Path, folders: Sequence[str], samples: Sequence[tuple[str, Path, bytes]]
) -> dict[str, list[str]]:
    """Class folder → sub-folders with images, if these look like classes of their own.

    They do if no image lies directly in a class folder, some class has several sub-folders, and none of their names is
    there twice.
    """
    found: dict[str, set[str]] = {name: set() for name in folders}
    for name, path, _ in samples:
        below = path.relative_to(root / name).parts
        if len(below) == 1:
            return {}
        found[name].add(below[0])
    times = Counter(sub for subs in found.values() for sub in subs)
    if max(times.values(), default=0) != 1 or max(map(len, found.values())) < 2:
        return {}
    return {name: sorted(subs) for name, subs in found.items()}


def _leaf_names(root: Path, folders: Sequence[Path]) -> dict[Path, str]:
    """The class name of each folder that holds images: its own name; its path below the root if that is not unique."""
    times = Counter(folder.name for folder in folders)
    names = {
        folder: folder.name if times[folder.name] == 1 else folder.relative_to(root).as_posix() for folder in folders
    }
    _check_class_names(root, sorted(names.values()))
    return names


def _empty_class(folder: Path, summary: FolderSummary) -> DataError:
    inside = {name: reason for name, reason in summary.left_out.items() if Path(name).parts[0] == folder.name}
    found = "; ".join(f"{len(names):,} {reason} ({some_names(names)})" for reason, names in _by_reason(inside))
    return DataError(
        "class folder without an image",
        where=folder,
        expected="files that hold images",
        found=found or "no file",
        next_step="fill it, or remove it",
    )


def _by_reason(files: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(reason, names) of files, the most frequent reason first."""
    kinds: dict[str, list[str]] = {}
    for name, reason in files.items():
        kinds.setdefault(reason, []).append(name)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))
