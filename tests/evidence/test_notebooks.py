"""Every notebook as a reader finds it: stored without outputs, and run from top to bottom by a kernel of this Python.

What the runs write goes to a temporary folder, which the notebooks' `tempfile` takes from TMPDIR.
"""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SECONDS_PER_CELL = 900


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """Name of a kernel that is this interpreter, whichever others are installed; it writes into tmp_path only."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "under test",
        "language": "python",
    }
    folder = tmp_path / "jupyter" / "kernels" / "under-test"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # of the tests
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        (tmp_path / name.lower()).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    return folder.name


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path):
    for cell in read(path).cells:
        assert cell.id
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param({"WATCHED = 200": "WATCHED = 100", "PRUNED_AFTER + 75": "PRUNED_AFTER + 25"}, id="short"),
        pytest.param({}, id="long", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_prunes_and_draws(path, steps, kernel, tmp_path):
    before = sorted(FOLDER.rglob("*"))
    notebook = read(path)
    for whole, fewer in steps.items():
        [cell] = [cell for cell in notebook.cells if whole in cell.source]
        cell.source = cell.source.replace(whole, fewer)
    client = NotebookClient(
        notebook, kernel_name=kernel, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    (summary_file,) = (tmp_path / "tmpdir").glob("*/run/summary.json")
    summary = json.loads(summary_file.read_text())
    assert summary["prune_steps"]
    assert sum(summary["experts_after"]) < sum(summary["experts_before"])
    assert summary["steps"] > summary["prune_steps"][-1]
    for cell in notebook.cells:
        if "plt.show(" in cell.source or "display(" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id
    assert sorted(FOLDER.rglob("*")) == before
