"""Every notebook runs: the master from top to bottom, and the release until the first thing that the student has to write."""

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

from autograder.building.build import COURSE, instructor_notebook
from autograder.building.run_masters import run
from autograder.checking.masters import solution_cells, units
from peftlab import results


@pytest.mark.slow
@pytest.mark.parametrize("unit", units())
def test_the_master_runs_from_top_to_bottom(unit, tmp_path):
    """On a smaller SmolLM2; `make experiments` takes the real one."""
    notebook = instructor_notebook(unit)
    folder = str(Path(__file__).parent)
    make_smaller = f"import sys\n\nsys.path.append({folder!r})\nimport smaller\n\nsmaller.make_smaller({unit!r})"
    notebook.cells.insert(0, new_code_cell(make_smaller))
    notebook = run(notebook, tmp_path, short=True)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    stderr = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert not stderr, "a notebook that warns leaves its reader wondering"
    if unit == "08_lora":
        rows = results.load(unit, tmp_path / "results")
        assert {row.method for row in rows} == {"lora", "full"} and all(row.short for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("unit", units())
def test_the_release_stops_at_the_first_exercise_with_a_helpful_message(unit, tmp_path):
    notebook = nbformat.read(COURSE / unit / f"{unit}.ipynb", as_version=4)
    if not solution_cells(instructor_notebook(unit).cells):
        run(notebook, tmp_path, short=True)
        return
    with pytest.raises(CellExecutionError, match="not written yet") as caught:
        run(notebook, tmp_path, short=True)
    assert len(str(caught.value).splitlines()) < 25
