"""One torch thread per test process: the suite runs on as many processes as there are cores, and OpenMP threads that
wait for a busy core spin. Subprocesses inherit it. CUDA tests skip where there is no device."""

from __future__ import annotations

import os
from collections.abc import Iterator

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import pytest  # noqa: E402  (the variables must be set before torch is imported)
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The endpoint of a real S3 server on 127.0.0.1; the environment points to it."""
    from tests.support.s3_server import s3_server

    with s3_server() as endpoint:
        yield endpoint


LONGEST = (
    "sweep/ray/test_engine",
    "system/test_faults",
    "system/test_sweep_faults",
    "system/test_benchmarks",
    "export/test_export",
    "system/test_fuzz",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that nobody waits for it in the end; what needs CUDA is skipped without it."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: next(
            (place for name, place in places.items() if item.nodeid.split("::")[0].endswith(f"{name}.py")), len(places)
        )
    )  # others stay as they were
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
