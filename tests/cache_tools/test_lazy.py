"""numpy on first use: nothing imports it early, and several threads may use it first."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, threading
from cache_tools.codecs import Float16
from cache_tools.lazy import np
assert "numpy" not in sys.modules
barrier, failed = threading.Barrier(8), []

def work():
    barrier.wait()
    try:
        import numpy
        assert np.arange(3).tolist() == [0, 1, 2] and isinstance(numpy.zeros(1), np.ndarray)
    except BaseException as error:
        failed.append(error)

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
"""


def test_threads_may_use_numpy_first() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
