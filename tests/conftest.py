"""Settings for every test process: temporary files in memory, one torch thread, one S3 server, skips without CUDA."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

# Builds flush every block to the disk, and a disk may take several milliseconds for each file. Memory takes none.
MEMORY = "/dev/shm"
if "TMPDIR" not in os.environ and os.path.isdir(MEMORY):
    room = os.statvfs(MEMORY)
    if room.f_bavail * room.f_frsize >= 8 << 30 and not room.f_flag & os.ST_NOEXEC:
        os.environ["TMPDIR"] = tempfile.tempdir = MEMORY

# Before torch is imported: the suite runs a process per core, and OpenMP threads that wait for a busy core spin.
# Subprocesses inherit it.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Builds remember in the cache home which images they have checked.
if "TEACHER_CACHE_HOME" not in os.environ:
    os.environ["TEACHER_CACHE_HOME"] = tempfile.mkdtemp(prefix="teacher-cache-home-")
    atexit.register(shutil.rmtree, os.environ["TEACHER_CACHE_HOME"], ignore_errors=True)

# What a user has named is recorded in the user's state folder.
if "XDG_STATE_HOME" not in os.environ:
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="teacher-cache-state-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

# Millions of objects of imported modules live to the end: the garbage collector need not look at them again and again.
gc.disable()

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.support.preloaded import Preloaded, run_tests  # noqa: E402
from tests.support.rewriting import rewrite_share  # noqa: E402
from tests.support.s3_server import environment, s3_server  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # how long an example takes depends on the machine
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    rewrite_share(session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on garbage is collected as usual, except what the imports have left."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def shared_tokenizer() -> Iterator[None]:
    """CLIP's vocabulary is read once, if anything that these tests import may read it."""
    with pytest.MonkeyPatch.context() as patch:
        if "open_clip" in sys.modules:
            from tests.support.shortcuts import share_tokenizer

            share_tokenizer(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_commands() -> Iterator[None]:
    """`CliRunner` makes the command of an app once, not for each invocation, which takes longer than most commands."""
    with pytest.MonkeyPatch.context() as patch:
        if (testing := sys.modules.get("typer.testing")) is not None:
            patch.setattr(testing, "_get_command", functools.cache(testing._get_command))
        yield


@pytest.fixture(scope="session")
def s3_variables() -> Iterator[dict[str, str]]:
    """An S3 server, one for each test process; gives the environment variables that point to it."""
    with s3_server() as variables:
        yield variables


@pytest.fixture(scope="module")
def server(s3_variables: dict[str, str]) -> Iterator[str]:
    """The endpoint of an S3 server on 127.0.0.1; the environment points to it."""
    with environment(s3_variables):
        yield s3_variables["AWS_ENDPOINT_URL"]


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a missing CUDA device, and mark as `medium` what needs a server, a cluster or a browser."""
    no_cuda = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_cuda)
        if {"server", "nodes", "browser"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.medium)


_ALONE = "TEACHER_CACHE_TEST_ALONE"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `alone` in a pytest process of its own (`preloaded`).

    Such tests fork processes that train, and polars, whose threads do not survive a fork, hangs in these if an earlier
    test has used it.
    """
    if "alone" not in pyfuncitem.keywords or _ALONE in os.environ:
        return None
    config = pyfuncitem.config
    warnings = [f"-W{action}" for action in config.getoption("pythonwarnings") or ()]
    options = ("-q", "-p", "no:cacheprovider", *warnings, pyfuncitem.nodeid)
    process = Preloaded(run_tests, *options, cwd=config.rootpath, variables={_ALONE: "1"})
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out[-6000:] + err[-2000:]
    return True
