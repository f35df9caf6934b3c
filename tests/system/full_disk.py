"""Fill the disk just before chosen writes, check that the command reports it, free the disk, and run it again.

    python tests/system/full_disk.py --of build push

The disk is a small tmpfs, mounted in a mount namespace of this process: `unshare -rm` must be permitted. Before a
chosen file is written, the disk is filled until the kernel refuses more. The command must end with exit code 2 and one
line about the disk. Committed blocks must still be readable, and nothing else. After the space is freed, the same
command must make the cache of an undisturbed run. Prints one JSON line per moment, then a summary; exits with 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import fault_cases
from tests.support.child import Child, in_child
from tests.support.fault_cases import Case, Found

DISK = "16m"
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
# Case → (name of the moment, pattern of FOLDER/FILE, n): the disk is full when the n-th matching file is written.
MOMENTS: dict[str, list[tuple[str, str, int]]] = {
    "build": [
        ("making the cache", r"labels/c\.", 1),
        ("laying out the last array", r"commits/zarr\.", 1),
        ("the first block", r"fused_logits/c\.0\.0\.", 1),
        ("the middle of a block", r"fused_features/c\.1\.2\.", 1),
        ("the commit of a block", r"commits/c\.1\.2\.", 1),
    ],
    "grow": [
        ("making an array longer", r"fused_features/zarr\.json", 1),
        ("promising the new views", r"\.zarr/zarr\.json", 1),
        ("the first new block", r"fused_logits/c\.1\.0\.", 1),
    ],
    "push": [
        ("copying metadata", r"sample_keys/", 1),
        ("making it a cache", r"\.zarr/zarr\.json", 1),
        ("copying a block", r"fused_features/c\.", 4),
        ("the commit of a copied block", r"commits/c\.", 7),
    ],
    "sweep": [
        ("the state of an epoch of the second trial", r"kd-s1/state\.pt", 2),
        ("the weights of the third trial", r"wrn_16_1-kd-s0/last\.safetensors", 1),
        ("the table", r"/trials\.parquet", 1),
    ],
    "recode": [
        ("making the cache", r"fused_features_steps/c\.", 1),
        ("a block", r"fused_logits/c\.1\.", 2),
        ("the commit of a block", r"commits/c\.", 9),
    ],
}


def disturb(case: Case, moment: tuple[str, str, int], disk: Path) -> dict[str, Any]:
    """Run a case with a disk that is full at one moment; gives the line to print."""
    name, pattern, number = moment
    target = in_child(lambda: case.new_target(0))
    answer = Child(lambda: _with_full_disk(case, target, pattern, number, disk), case.log).wait()
    problems = _complaints(answer, case.log.read_text())
    problems += [f"left behind: {file}" for file in Path(target).rglob("*.partial")]
    half = Found(**in_child(lambda: case.look(target, [])))
    _ballast(disk).unlink(missing_ok=True)
    answer = Child(lambda: case.run(target), case.log).wait()
    if answer != {"result": None}:
        problems.append(f"the second run failed: {answer} {case.log.read_text()}")
    whole = Found(**in_child(lambda: case.look(target, [], finished=True)))
    in_child(lambda: case.remove(target))
    problems += [*half.problems, *whole.problems]
    return {"of": case.name, "full": name, "committed": half.committed, "blocks": half.blocks, "problems": problems}


def run(folder: Path, disk: Path, names: list[str]) -> int:
    """Every moment of some cases; gives the number of problems."""
    fault_cases.import_for(names)
    lines = []
    for name in names:
        with fault_cases.prepared(name, folder, in_child, places=disk) as case:
            clean = in_child(lambda case=case: case.new_target(None))
            in_child(lambda case=case, clean=clean: case.run(clean), case.log)
            in_child(lambda case=case, clean=clean: case.keep_clean(clean))
            for moment in MOMENTS[name]:
                lines.append(disturb(case, moment, disk))
                print(json.dumps(lines[-1]), flush=True)
            in_child(lambda case=case, clean=clean: case.remove(clean))
    problems = sum(len(line["problems"]) for line in lines)
    print(json.dumps({"full_disks": len(lines), "problems": problems}), flush=True)
    return problems


def permitted() -> bool:
    """Whether a disk in memory can be mounted here."""
    with tempfile.TemporaryDirectory() as folder, suppress(OSError):
        probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", folder], capture_output=True)
        return probe.returncode == 0
    return False


def _with_full_disk(case: Case, target: str, pattern: str, number: int, disk: Path) -> None:
    opened, opened_at, left = Path.open, os.open, number

    def look(file: Path) -> None:
        nonlocal left
        if re.search(pattern, f"{file.parent.name}/{file.name}"):
            left -= 1
            if left == 0:
                _fill(opened, _ballast(disk))

    def watched(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            look(self)
        return opened(self, mode, *args, **kwargs)

    def watched_at(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            look(Path(path) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}"), path))
        return opened_at(path, flags, *args, dir_fd=dir_fd, **kwargs)

    Path.open = watched  # type: ignore[method-assign]
    os.open = watched_at
    case.run(target)


def _fill(opened: Callable[..., Any], ballast: Path) -> None:
    with suppress(OSError), opened(ballast, "wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def _ballast(disk: Path) -> Path:
    return disk / "ballast"


def _complaints(answer: dict[str, Any] | None, log: str) -> list[str]:
    """What is wrong with how a command ended."""
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    complaints = []
    if answer != {"exit": 2}:
        complaints.append(f"not exit code 2: {answer}")
    if len(errors) != 1 or "No space left on device" not in errors[0]:
        complaints.append(f"not one line about the disk: {errors}")
    if "Traceback" in log:
        complaints.append(log)
    return complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", default=list(MOMENTS), choices=list(MOMENTS))
    parser.add_argument("--disk", type=Path, help="a small disk that is already mounted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.disk is not None:
            sys.exit(1 if run(Path(folder), options.disk, options.of) else 0)
        with mounted(Path(folder, "disk")) as disk:
            problems = run(Path(folder), disk, options.of)
    sys.exit(1 if problems else 0)


@contextmanager
def mounted(disk: Path) -> Iterator[Path]:
    """A small disk in memory, in namespaces of this process, as `unshare -rm` makes them."""
    disk.mkdir()
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main()
