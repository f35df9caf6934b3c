"""Which file a path means for a teacher: a checkpoint, a run of train-student, or a tree of published CIFAR teachers.

mdistiller publishes its CIFAR-100 teachers as `cifar_teachers.tar`: `ARCHITECTURE_vanilla/ckpt_epoch_240.pth` for each.
The folder that it unpacks to, the folder of one architecture, and the archive as it is all name the right file.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from cache_tools.errors import WeightsError
from pipeline.weights import WeightsFile, first_line, read_weights
from train.checkpoints import LAST

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IN_TREE = re.compile(r"(?:^|/)(?P<architecture>[^/]+)_vanilla/ckpt_epoch_(?P<epoch>\d+)\.pth$")


def read_teacher(path: Path, architecture: str) -> WeightsFile:
    """The weights that `path` has for an architecture.

    Args:
        path: a file that `read_weights` reads, a run folder of train-student (its last epoch), an archive or folder as
            mdistiller publishes them.
        architecture: name of a network; capitals do not matter.

    Raises:
        WeightsError: nothing there, nothing for this architecture, or a damaged file.
    """
    if path.is_file() and path.name.endswith(ARCHIVE_SUFFIXES):
        return _from_archive(path, architecture)
    if path.is_dir() and not (path / LAST).exists():
        names = (file.relative_to(path.parent).as_posix() for file in path.rglob("ckpt_epoch_*.pth"))
        return read_weights(path.parent / _chosen(names, architecture, path))
    return read_weights(path / LAST if path.is_dir() else path)


def _from_archive(path: Path, architecture: str) -> WeightsFile:
    """Read one file of an archive, without unpacking it and whatever else is in there."""
    try:
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            name = _chosen(members, architecture, path)
            stream = archive.extractfile(members[name])
            assert stream is not None, "a plain file"
            content = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise WeightsError(
            "cannot read the archive", where=path, expected="a tar file", found=first_line(error)
        ) from error
    return read_weights(path / name, io.BytesIO(content))


def _chosen(names: Iterable[str], architecture: str, where: Path) -> str:
    """The last epoch of an architecture among the names of a tree."""
    found = [(match["architecture"], int(match["epoch"]), name) for name in names if (match := _IN_TREE.search(name))]
    fitting = [(epoch, name) for known, epoch, name in found if known.lower() == architecture.lower()]
    if not fitting:
        known = ", ".join(sorted({known for known, _, _ in found}))
        raise WeightsError(
            f"no checkpoint of {architecture} here",
            where=where,
            expected=f"{architecture}_vanilla/ckpt_epoch_240.pth as in cifar_teachers.tar, or a run of train-student",
            found=f"checkpoints of {known}" if known else "none",
            next_step="name the file itself, or the teacher that is there",
        )
    return max(fitting)[1]
