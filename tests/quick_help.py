"""That `--help` of a command answers within a second, and what it must not import for that."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def answers_quickly(module: str, without: set[str]) -> None:
    """Fail unless `--help` takes less than a second of processor time: the wall clock of a busy machine says little.

    Args:
        module: of the command, with a `main`.
        without: packages that must not be imported.
    """
    lines = [
        "import sys",
        f"from {module} import main",
        "sys.argv[1:] = ['--help']",
        "try:",
        "    main()",
        "except SystemExit as left:",
        "    assert not left.code, left.code",
        f"assert not set({sorted(without)!r}) & set(sys.modules)",
    ]
    assert min(_processor_s("\n".join(lines)) for _ in range(3)) < 1.0


def _processor_s(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
