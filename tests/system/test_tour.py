"""The notebook `examples/tour.ipynb`: it runs from the first cell to the last, and is stored without results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cache_tools.home.registry import HOME_VARIABLE
from cache_tools.reader import TeacherCache
from tests.support.preloaded import Preloaded

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
def test_the_cells_run(tmp_path: Path) -> None:
    """In a process that has imported torch, without Jupyter's kernel."""
    pytest.importorskip("IPython")
    variables = {HOME_VARIABLE: str(tmp_path / "caches"), "IPYTHONDIR": str(tmp_path), "MPLBACKEND": "agg"}
    process = Preloaded(run_cells, cwd=tmp_path, variables=variables)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    results = json.loads(out.splitlines()[-1])
    assert any("<caption>TeacherCache</caption>" in html for html in results["html"])
    assert (results["images"], results["figures"]) == (1, 1)
    check_top1(results["text"])


def run_cells() -> None:
    """Prints what the cells give, as JSON."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import Image
    from matplotlib import pyplot

    shell, results = InteractiveShell.instance(), []
    for cell in json.loads(TOUR.read_text())["cells"]:
        if cell["cell_type"] == "code":
            done = shell.run_cell("".join(cell["source"]).replace("%matplotlib inline\n", ""))
            done.raise_error()
            results.append(done.result)
    html = [result._repr_html_() for result in results if isinstance(result, TeacherCache)]
    images = sum(isinstance(result, Image) for result in results)
    figures = len(pyplot.get_fignums())
    print("\n" + json.dumps({"html": html, "images": images, "figures": figures, "text": str(results[-1])}))


def check_top1(text: str) -> None:
    match = re.search(r"test top-1 ([\d.]+)% of 359 images", text)
    assert match is not None
    assert float(match[1]) > 60


@pytest.mark.slow
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
    check_top1(json.dumps(data))
