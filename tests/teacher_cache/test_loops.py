"""The examples of other people's loops train a student, and every epoch shows the next view."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from cache_tools.targets import ViewTargets
from teacher_cache import CachedDataset
from tests.support import tiny_run

EXAMPLES = Path(__file__).parents[2] / "examples/loops"
EPOCHS = 4  # of a cache with three views


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cache")
    return str(tiny_run.write_cache(folder / "tiny.zarr", tiny_run.write_pictures(folder / "pictures")))


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The views whose targets were loaded, in order. The working folder is an empty one."""
    seen: list[int] = []
    load = CachedDataset._load_targets

    def recorded(self: CachedDataset, view: int) -> ViewTargets:
        seen.append(view)
        return load(self, view)

    monkeypatch.setattr(CachedDataset, "_load_targets", recorded)
    monkeypatch.chdir(tmp_path)
    return seen


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.medium
def test_plain_loop_with_and_without_workers(cache: str, views: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    module = example("plain")
    printed = []
    for workers in (0, 1):
        top1 = module.train(cache, epochs=EPOCHS, batch_size=16, workers=workers)
        assert 0.0 <= top1 <= 1.0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1], "the same batches give the same losses"
    assert printed[0].count("loss") == EPOCHS
    assert views == [0, 1, 2, 0], "a worker loads for itself"


@pytest.mark.medium
def test_timm_task(cache: str, views: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    top1 = example("timm_task").train(cache, epochs=EPOCHS, batch_size=16)
    assert 0.0 <= top1 <= 100.0
    assert capsys.readouterr().out.count("loss") == EPOCHS
    assert views == [0, 1, 2, 0]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # of the Trainer and its libraries
def test_hugging_face_trainer(cache: str, views: list[int], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    module = example("hf_trainer")
    metrics = module.train(cache, epochs=EPOCHS, batch_size=16, output_dir=str(tmp_path))
    assert 0.0 <= metrics["eval_accuracy"] <= 1.0
    assert metrics["eval_loss"] > 0.0
    assert views == [0, 1, 2, 0]


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore")  # of Lightning and its libraries
def test_lightning(cache: str, views: list[int]) -> None:
    pytest.importorskip("lightning")
    module = example("lightning_module")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    top1 = module.train(cache, epochs=EPOCHS, batch_size=16, num_sanity_val_steps=0, **quiet)
    assert 0.0 <= top1 <= 1.0
    assert views == [0, 1, 2, 0]
