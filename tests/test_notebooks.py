"""The notebooks run from top to bottom, and hold no outputs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(path):
    for cell in code_cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None


def test_the_notebooks_are_those_of_the_site():
    index = (ROOT / "docs" / "index.md").read_text()
    for path in NOTEBOOKS:
        assert f"_notebooks/{path.stem}\n" in index


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebooks_run(tmp_path):
    """In one process of their own: the tests' process has eight devices."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, __file__, *map(str, NOTEBOOKS)]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)


def run(path):
    """Runs the cells as one program; a kernel would need more packages."""
    namespace = {"__name__": "__main__"}
    for cell in code_cells(path):
        source = "".join(cell["source"]).replace("%pip", "# %pip")
        exec(compile(source, path.name, "exec"), namespace)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(pathlib.Path(name))
