"""The notebook runs, from the data to the page of tokens."""

from pathlib import Path

import pytest

from support.training_runs import ROOT

NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"


@pytest.mark.slow
def test_the_first_hour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.data for output in shown if "data" in output]
    printed = "".join(output.text for output in shown if output.get("name") == "stdout")
    [auroc] = [one["text/plain"].strip("'") for one in data if "AUROC on held-out pairs" in one["text/plain"]]
    assert float(auroc.rpartition(" ")[2]) > 0.9
    assert any("image/png" in one for one in data)
    assert any("<iframe" in one.get("text/html", "") for one in data)
    assert "Q tells chosen from rejected before the end token too" in printed
    assert (tmp_path / "runs" / "first-hour" / "inspect.html").exists()
    before, after = (line.split("  ") for line in printed.splitlines() if line.startswith("'3' "))
    assert before[:4] == after[:4], "the two solutions begin alike"
    assert float(before[4].split()[-1]) > float(after[4].split()[-1]), "Q falls at the wrong digit"


def test_the_notebook_is_stored_with_its_results() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.outputs for cell in notebook.cells[4:] if cell.cell_type == "code")
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
