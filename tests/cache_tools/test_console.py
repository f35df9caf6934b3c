"""cache_tools.console: names of devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache_tools.console import cpu_model, describe_device, device_name, resolve_device
from cache_tools.errors import DeviceError

CPU = torch.device("cpu")


def test_the_cpu_has_a_name_and_a_description() -> None:
    assert device_name(CPU) == "cpu"  # stored in caches, and compared by a replay
    assert describe_device(CPU) == f"{cpu_model()}, {torch.get_num_threads()} threads"


def test_the_cpu_model_is_the_architecture_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert cpu_model() == "arm64"


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99"])
def test_devices_that_this_machine_lacks_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=name):
        resolve_device(name)
