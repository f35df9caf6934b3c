"""The files of a split folder: which are images, of which class, and which are left out and why."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cache_tools.errors import DataError
from cache_tools.images.class_names import (
    Names,
    arrange,
    describe,
    has_control_character,
    names_that_look_the_same,
)
from cache_tools.images.index import UNKNOWN, Contents, FileColumn, FileState, FoundFiles, examine, reason_to_leave_out
from cache_tools.images.result_folders import RESULT_FOLDERS, result_folder_kind
from cache_tools.images.summary import HIDDEN, FolderSummary, by_reason, some_names

UNLISTED = "not in the table of labels"
# What a folder may hold besides result folders and still be no class.
_BESIDE_RESULTS = RESULT_FOLDERS | {HIDDEN, "text", "HTML page"}
# Folders and files of network drives, macOS and Windows; names that begin with a dot are left out too.
_SYSTEM_NAMES = frozenset(
    {"@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "lost+found", "__macosx"}
    | {"thumbs.db", "ehthumbs.db", "thumbnails.db", "desktop.ini", "icon\r"}
)


@dataclass(frozen=True)
class Scan:
    """The samples of a split folder, sorted by class and path.

    Attributes:
        labels: int64 [N].
        keys: uint8 [N, 16].
        sizes: int32 [N, 2], as `Contents` has them.
    """

    class_names: Names
    files: FileColumn
    labels: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int32]
    summary: FolderSummary


def scan_folder(
    root: Path,
    *,
    class_order: str | Names = "sorted",
    sub_folders: Literal["merge", "classes"] | None = None,
    is_training: bool = True,
) -> Scan:
    """Find the images of `root/CLASS/**` by their contents, and hash those that the index does not know.

    No image is decoded. A file that cannot be read, or whose ending promises an image that it does not hold, stays in
    the list, so that a check names it with the damaged images.

    Args:
        class_order, sub_folders: see `DatasetRecipe`.
        is_training: every class folder needs an image, and `class_order` lists just these classes.

    Raises:
        DataError: no class folders, a class folder without an image, a class name that cannot be used, a loop of links.
    """
    folders, left_out = _class_folders(root)
    found = FoundFiles(root)
    for name in folders:
        inside: list[tuple[str, FileState]] = []
        for path, reason, state in _walk(root / name, f"{name}/", ()):
            if reason is None:
                inside.append((path, state))
            else:
                left_out[path] = reason
        inside.sort(key=lambda file: _sort_key(file[0]))
        found.add([path for path, _ in inside], [state for _, state in inside])
    contents = examine(found, kind="classes")
    left_out |= {found.paths[row]: reason for row, reason in contents.reasons.items()}
    rows = np.setdiff1d(np.arange(len(found.paths)), np.fromiter(contents.reasons, np.int64, len(contents.reasons)))
    paths = [found.paths[row] for row in rows.tolist()]
    names = [path.partition("/")[0] for path in paths]
    used = set(names)
    folders = _without_result_folders(root, folders, used, left_out)
    summary = FolderSummary(
        root=root,
        images=len(paths),
        nested=sum(path.count("/") > 1 for path in paths) if sub_folders != "classes" else 0,
        left_out=dict(sorted(left_out.items(), key=lambda one: _sort_key(one[0]))),
        sub_classes=_sub_classes(folders, paths) if sub_folders is None else {},
    )
    empty = sorted(set(folders) - used)
    if not paths and not is_training:
        raise DataError("no image in any class folder", where=root, found=describe(folders))
    if empty and is_training:
        raise _empty_class(root / empty[0], summary)
    if sub_folders == "classes":
        parents = [path.rpartition("/")[0] for path in paths]
        leaves = _leaf_names(root, sorted(set(parents)))
        names = [leaves[parent] for parent in parents]
    class_names = arrange(tuple(sorted(set(names))), class_order, complete=is_training)
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.fromiter((numbers[name] for name in names), np.int64, len(names))
    if sub_folders == "classes":
        order = np.array(sorted(range(len(paths)), key=lambda row: (labels[row], _sort_key(paths[row]))), np.int64)
    else:
        order = np.argsort(labels, kind="stable")  # within a class they are sorted
    files = FileColumn.of(root, (paths[row] for row in order.tolist()))
    chosen = rows[order]
    return Scan(class_names, files, labels[order], contents.keys[chosen], contents.sizes[chosen], summary)


def scan_listed(root: Path, paths: Sequence[str], table: Path) -> tuple[FileColumn, Contents, FolderSummary]:
    """Hash the images that a table of labels lists. All other files below the root are left out.

    Args:
        paths: of the images, relative to the root.
        table: the file that lists them, which is not one of the others.

    Raises:
        DataError: listed files that are no images, or a loop of links.
    """
    found = FoundFiles(root)
    found.add(paths, [FileState.of(os.stat(root / path)) for path in paths])
    contents = examine(found, kind="listed")
    if bad := [f"{Path(paths[row]).name}: {reason}" for row, reason in contents.reasons.items()]:
        raise DataError("files in a table of labels that are no images", where=root, found=some_names(bad))
    chosen = {str(root / path) for path in paths} | {str(table)}
    others = {path: reason for path, reason, _ in _walk(root, "", (), is_root=True) if str(root / path) not in chosen}
    left_out = {
        path: reason or reason_to_leave_out(root / path) or UNLISTED
        for path, reason in sorted(others.items(), key=lambda one: _sort_key(one[0]))
    }
    return FileColumn.of(root, paths), contents, FolderSummary(root=root, images=len(paths), left_out=left_out)


def _sort_key(path: str) -> str:
    """Sorts paths as their parts would be sorted: a slash comes before every other character."""
    return path.replace("/", "\0")


def _class_folders(root: Path) -> tuple[list[str], dict[str, str]]:
    """The sorted names of the class folders, and why each file beside them is left out."""
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise DataError("cannot read an image folder", where=root, found=error.strerror) from error
    beside = {name: HIDDEN for name in names if _is_hidden(name) and not (root / name).is_dir()}
    visible = [name for name in names if not _is_hidden(name)]
    classes = [name for name in visible if (root / name).is_dir()]
    strays = [name for name in visible if name not in classes]
    broken = next((name for name in strays if not (root / name).exists()), None)
    kinds = {name: reason_to_leave_out(root / name) for name in strays if broken is None}
    images = [name for name, reason in kinds.items() if reason is None]
    if not classes or images or broken:
        raise _not_class_folders(root, classes, images, broken)
    _check_class_names(root, classes)
    return classes, beside | {name: str(reason) for name, reason in kinds.items()}


def _without_result_folders(root: Path, folders: list[str], used: set[str], left_out: dict[str, str]) -> list[str]:
    """The class folders without result folders and folders that hold nothing else, such as `runs/`.

    Args:
        used: the class folders that have images.
    """
    inside: dict[str, set[str]] = {}
    for path, reason in left_out.items():
        inside.setdefault(path.partition("/")[0], set()).add(reason)
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
        found = "no sub-folder"
        step = "make a folder for each class, or give another folder (as the argument or --data-dir) or dataset.split"
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
        if has_control_character(name):
            raise DataError(
                "the name of a class folder has a control character",
                where=root,
                found=ascii(name),
                next_step="rename it",
            )
    if (same := names_that_look_the_same(names)) is not None:
        raise DataError(
            "two class folders have names that look the same",
            where=root,
            expected="names that differ in more than spaces and Unicode forms",
            found=f"{same[0]!a} and {same[1]!a}",
            next_step="move the images of one into the other",
        )


def _walk(
    folder: Path, prefix: str, parents: tuple[tuple[int, int], ...], *, is_root: bool = False
) -> Iterator[tuple[str, str | None, FileState]]:
    """Files below a folder, links followed, each with the reason to leave it out (None if its content decides).

    A result folder (`result_folders.py`) is left out as a whole, unless it is the root.

    Args:
        prefix: the beginning of the paths, which names this folder.
        parents: the (device, inode) of the folders above.
    """
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise DataError("folder contains itself through a link", where=folder, next_step="remove the link")
    try:
        with os.scandir(folder) as found:
            entries = list(found)
        if not is_root and (kind := result_folder_kind({entry.name for entry in entries})) is not None:
            yield prefix.rstrip("/"), kind, UNKNOWN
            return
        for entry in entries:
            path = prefix + entry.name
            if _is_hidden(entry.name):
                hidden = Path(entry.path).rglob("*") if entry.is_dir(follow_symlinks=False) else [Path(entry.path)]
                for file in hidden:
                    if not file.is_dir():
                        yield prefix + file.relative_to(folder).as_posix(), HIDDEN, UNKNOWN
            elif entry.is_dir():
                yield from _walk(Path(entry.path), f"{path}/", (*parents, identity))
            else:
                yield path, None, _state(entry)
    except OSError as error:
        raise DataError("cannot read a class folder", where=error.filename or folder, found=error.strerror) from error


def _state(entry: os.DirEntry[str]) -> FileState:
    try:
        return FileState.of(entry.stat())
    except OSError:
        return UNKNOWN  # a broken link: reading it says so


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _sub_classes(folders: Sequence[str], paths: Sequence[str]) -> dict[str, list[str]]:
    """Class folder → sub-folders with images, if these look like classes of their own.

    They do if no image lies directly in a class folder, some class has several sub-folders, and none of their names is
    there twice.
    """
    found: dict[str, set[str]] = {name: set() for name in folders}
    for path in paths:
        name, first, *rest = path.split("/", 2)
        if not rest:
            return {}
        found[name].add(first)
    times = Counter(sub for subs in found.values() for sub in subs)
    if max(times.values(), default=0) != 1 or max(map(len, found.values())) < 2:
        return {}
    return {name: sorted(subs) for name, subs in found.items()}


def _leaf_names(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """The class name of each folder that holds images: its own name; its path below the root if that is not unique."""
    own = {folder: folder.rpartition("/")[2] for folder in folders}
    times = Counter(own.values())
    names = {folder: name if times[name] == 1 else folder for folder, name in own.items()}
    _check_class_names(root, sorted(names.values()))
    return names


def _empty_class(folder: Path, summary: FolderSummary) -> DataError:
    inside = {name: reason for name, reason in summary.left_out.items() if Path(name).parts[0] == folder.name}
    found = "; ".join(f"{len(names):,} {reason} ({some_names(names)})" for reason, names in by_reason(inside))
    return DataError(
        "class folder without an image",
        where=folder,
        expected="files that hold images",
        found=found or "no file",
        next_step="fill it, or remove it",
    )
