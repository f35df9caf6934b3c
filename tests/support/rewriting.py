"""Workers of pytest-xdist share the work of rewriting the assertions of test files. pytest keeps the results."""

from __future__ import annotations

import sys

import pytest
from _pytest.assertion.rewrite import (
    PYC_TAIL,
    _read_pyc,
    _rewrite_test,
    _write_pyc,
    assertstate_key,
    get_cache_dir,
    try_makedirs,
)


def rewrite_share(config: pytest.Config) -> None:
    """Rewrite every n-th test file, as one of n workers. Otherwise each of them would rewrite all of them at once."""
    worker = getattr(config, "workerinput", None)
    if worker is None or sys.dont_write_bytecode:
        return
    first, step = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    for file in sorted((config.rootpath / "tests").rglob("test_*.py"))[first::step]:
        kept = get_cache_dir(file) / f"{file.stem}{PYC_TAIL}"
        if _read_pyc(file, kept) is None and try_makedirs(kept.parent):
            source, code = _rewrite_test(file, config)
            _write_pyc(config.stash[assertstate_key], code, source, kept)
