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


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "gpu", "cuda:-1", "cpu:1", "mps:1", "CUDA", "cuda0"])
def test_devices_that_this_machine_lacks_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match=name):
        resolve_device(name)


def test_mps_is_a_device_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.backends.mps
    monkeypatch.setattr(mps, "is_available", lambda: False)
    monkeypatch.setattr(mps, "is_built", lambda: False)
    with pytest.raises(DeviceError, match=r"no MPS device \(mps\); found a torch that was built without MPS"):
        resolve_device("mps")
    monkeypatch.setattr(mps, "is_built", lambda: True)
    with pytest.raises(DeviceError, match=r"no Apple GPU.* Use --device cpu or auto"):
        resolve_device("mps")
    monkeypatch.setattr(mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
    assert device_name(torch.device("mps")) == "mps"
    assert describe_device(torch.device("mps")) == f"{cpu_model()}, MPS"
    with pytest.raises(DeviceError, match="computes in float64, which MPS does not have"):
        resolve_device("mps", needs_float64=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == CPU, "MPS is never chosen, only named"
