"""Every notebook as a reader finds it: stored without outputs, and run from top to bottom by a kernel of this Python.

What the runs write goes to a temporary folder, which the notebooks' `tempfile` takes from TMPDIR.
"""

import json
import sys
from importlib.util import find_spec
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
        pytest.param({"WATCHED = 200": "WATCHED = 60", "PRUNED_AFTER + 75": "PRUNED_AFTER + 10"}, id="short"),
        pytest.param({}, id="long", marks=pytest.mark.slow),
    ],
)
def test_the_walkthrough_prunes_and_draws(steps, kernel, tmp_path):
    notebook = run("laep_walkthrough", steps, kernel)
    [exported] = [cell for cell in notebook.cells if cell.id == "export"]
    printed = "".join(output.get("text", "") for output in exported.outputs)
    assert ("the same as above: True" in printed) == bool(find_spec("transformers")), printed
    (summary_file,) = (tmp_path / "tmpdir").glob("*/run/summary.json")
    summary = json.loads(summary_file.read_text())
    assert summary["prune_steps"]
    assert sum(summary["experts_after"]) < sum(summary["experts_before"])
    assert summary["steps"] > summary["prune_steps"][-1]


@pytest.mark.parametrize("counts", ["made up", "real"])
def test_a_plan_from_counts_needs_no_jax(counts, kernel):
    file = FOLDER.parents[1] / "shared" / "data" / "esft_counts.npz"
    if counts == "real" and not file.exists():
        pytest.skip("the counts of a 16B model are not here")
    notebook = run("plan_from_counts", {'COUNTS = ""': f"COUNTS = {str(file)!r}"} if counts == "real" else {}, kernel)
    printed = {cell.id: "".join(o.get("text", "") for o in cell.get("outputs", ())) for cell in notebook.cells}
    assert "26 layers of 64 experts, top 6" in printed["counts"]
    assert ("law, intent" if counts == "real" else "law, code") in printed["counts"]
    assert "48 everywhere: 48 to 48 experts a layer, 1,248 in all, 1,248 filled up" in printed["cap"]
    assert "JAX was not needed" in printed["apply"]


def run(stem: str, changes: dict[str, str], kernel: str) -> nbformat.NotebookNode:
    """The notebook with its outputs. changes: of its text. Nothing is left beside it, and every figure is there."""
    before = sorted(FOLDER.rglob("*"))
    notebook = read(FOLDER / f"{stem}.ipynb")
    for whole, other in changes.items():
        [cell] = [cell for cell in notebook.cells if whole in cell.source]
        cell.source = cell.source.replace(whole, other)
    client = NotebookClient(
        notebook, kernel_name=kernel, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    for cell in notebook.cells:
        if "plt.show(" in cell.source or "display(" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.id
    assert sorted(FOLDER.rglob("*")) == before
    return notebook
