"""The notebook `examples/tour.ipynb`: it runs from the first cell to the last, and is stored without results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cache_tools.home.registry import HOME_VARIABLE

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "examples/tour.ipynb"


def test_the_notebook_is_stored_without_results() -> None:
    """Results would change with every machine, and make reviews unreadable."""
    notebook = json.loads(TOUR.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "caches"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    results = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    data = [output["data"] for output in results if "data" in output]
    assert any("<caption>TeacherCache</caption>" in each.get("text/html", "") for each in data)
    assert sum("image/png" in each for each in data) == 2
    match = re.search(r"test top-1 ([\d.]+)% of 359 images", json.dumps(data))
    assert match is not None
    assert float(match[1]) > 60
