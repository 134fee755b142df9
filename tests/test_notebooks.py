"""The notebooks run from top to bottom, and the picture they end with shows falling losses."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own; the kernel is another process
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path: Path, smollm2: Path) -> None:
    del smollm2  # asked for, so that a machine without the model skips instead of downloading
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=500, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "the server holds no key share" in text and "epsilon" in text
