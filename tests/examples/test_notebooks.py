"""Every notebook runs from top to bottom, in a kernel as a user's does, and shows its pictures."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

EXAMPLES = Path(__file__).parents[2] / "examples"


def executed(notebook, folder):
    """The notebook's cells with what they put out."""
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources=resources
    )
    return client.execute().cells


def pictures(cell):
    return [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    (tmp_path / "tests").symlink_to(EXAMPLES.parent / "tests")
    cells = executed(nbformat.read(path, as_version=4), tmp_path)
    plotted = [cell for cell in cells if ".plot(" in cell.source]
    assert plotted
    assert all(pictures(cell) for cell in plotted)


def test_a_heat_map_is_a_picture_in_a_notebook(tmp_path):
    """Of a kernel that has not loaded pyplot."""
    source = "import numpy as np\nfrom alaya_jax.show import heat_map\n"
    source += "heat_map(np.ones((2, 3)), 'recovery', 'share')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    assert len(pictures(executed(notebook, tmp_path)[0])) == 1
