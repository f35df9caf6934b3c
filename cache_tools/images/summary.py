"""What a split folder holds besides its samples, in words and as plain data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_tools.errors import printable
from cache_tools.images.formats import DECODERS, no_decoder
from cache_tools.images.result_folders import RESULT_FOLDERS, count_result_folders
from cache_tools.storage import remote_url
from cache_tools.units import counted

HIDDEN = "hidden or made by a system"  # why a file is left out
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

    @property
    def place(self) -> str:
        """The folder or the URL of the images, for messages."""
        return remote_url(self.root) or str(self.root)

    def lines(self) -> list[str]:
        """What a user should know, one line each; none for an ordinary folder."""
        found = []
        kinds = by_reason(self.left_out)
        if files := [(reason, names) for reason, names in kinds if reason not in RESULT_FOLDERS]:
            count = sum(len(names) for _, names in files)
            reasons = "; ".join(f"{len(names):,} {reason} ({some_names(names)})" for reason, names in files)
            found.append(f"{self.place}: {counted(count, 'file')} of {self.images + count:,} left out: {reasons}")
            helpful = [
                (name, package) for name, package in DECODERS.items() if no_decoder(name) in self.left_out.values()
            ]
            found += [f"{self.place}: to read {name} images, install {package}" for name, package in helpful]
        if results := [(kind, names) for kind, names in kinds if kind in RESULT_FOLDERS]:
            counts = "; ".join(
                f"{count_result_folders(len(names), kind)} ({some_names(names)})" for kind, names in results
            )
            found.append(f"{self.place}: left out: {counts}")
        if self.damaged:
            names = "; ".join(f"{reason}: {some_names(names)}" for reason, names in by_reason(self.damaged))
            found.append(f"{self.place}: {counted(len(self.damaged), 'damaged image')} skipped: {names}")
        if self.nested:
            found.append(f"{self.place}: {counted(self.nested, 'image')} in sub-folders of the class folders")
        return [printable(line) for line in found]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with every name."""
        return {
            "folder": printable(self.place),
            "images": self.images,
            "nested": self.nested,
            "left_out": {printable(name): reason for name, reason in self.left_out.items()},
            "damaged": {printable(name): reason for name, reason in self.damaged.items()},
        }


def common_root(paths: Iterable[Path | str]) -> str:
    """The folder that all of some paths are in; the first if they have none in common, such as a folder and a URL."""
    some = [str(path) for path in paths]
    try:
        return os.path.commonpath(some)
    except ValueError:
        return some[0]


def some_names(names: Sequence[str]) -> str:
    """The first of some names, and the number of the others."""
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def by_reason(files: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(reason, names) of files, the most frequent reason first."""
    kinds: dict[str, list[str]] = {}
    for name, reason in files.items():
        kinds.setdefault(reason, []).append(name)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))
