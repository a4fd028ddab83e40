"""The rubric and the sample answers, shown to the person who marks a written question in formgrader, and to nobody else."""

from functools import cache

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade, is_solution

from autograder.building.build import instructor_notebook
from autograder.checking.masters import units, without_markers

TAG = "rubric"


class ShowRubric(NbGraderPreprocessor):
    """The last step of autograding: what the master has as the solution of a written question stands above the answer."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Put the rubric above each cell that a person marks."""
        unit = resources["nbgrader"]["assignment"]
        rubrics = rubrics_of(unit) if unit in units() else {}
        cells = []
        for cell in nb.cells:
            if is_grade(cell) and is_solution(cell) and cell.metadata.nbgrader.grade_id in rubrics:
                name = cell.metadata.nbgrader.grade_id
                cells.append(new_markdown_cell(rubrics[name], id=f"{TAG}-{name}"[:64], metadata={"tags": [TAG]}))
            cells.append(cell)
        nb.cells = cells
        return nb, resources


class HideRubric(NbGraderPreprocessor):
    """The first step of feedback: next year's students have friends in this year's class."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Take the rubrics out again."""
        nb.cells = [cell for cell in nb.cells if TAG not in cell.metadata.get("tags", [])]
        return nb, resources


@cache
def rubrics_of(unit: str) -> dict[str, str]:
    """Return the solution of each of a unit's written questions, by its grade id, as Markdown."""
    return {
        cell.metadata.nbgrader.grade_id: without_markers(cell.source).strip()
        for cell in instructor_notebook(unit).cells
        if is_grade(cell) and is_solution(cell)
    }
