"""Make of any notebook that came back one that nbgrader can mark: the student's answers in the released notebook's frame.

nbgrader records the released cells in its gradebook. Whatever happened to them on the way (deleted, copied, moved,
retyped, their metadata lost or edited) they are put right, and each repair is noted for the report.
"""

import copy
from collections.abc import Collection

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.api import Notebook as SourceNotebook
from nbgrader.preprocessors import ClearHiddenTests, NbGraderPreprocessor

from autograder.reference import experiments, grade_ids

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
RETYPED = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell, "raw": nbformat.v4.new_raw_cell}


class Repair(NbGraderPreprocessor):
    """The first step of sanitizing; nbgrader's own steps then find nothing that would stop them.

    What was repaired is in the notebook's metadata, under `repairs`.
    """

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """Repair a submitted notebook against the gradebook's record of what was released."""
        names = resources["nbgrader"]
        with Gradebook(names["db_url"]) as gradebook:
            released = released_cells(gradebook.find_notebook(names["notebook"], names["assignment"]))
        order = {name: rank for rank, name in enumerate(grade_ids(names["assignment"]))}
        released.sort(key=lambda cell: order.get(_grade_id(cell), len(order)))  # a database promises no order
        nb.cells, repairs = repaired(nb.cells, released, experiments(names["assignment"]))
        nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}, "repairs": repairs})
        nb.nbformat, nb.nbformat_minor = 4, 5
        return nb, resources


def released_cells(source: SourceNotebook) -> list[NotebookNode]:
    """Return the cells that nbgrader knows of a released notebook, in order, as they stood in the student's notebook."""
    points = {cell.name: cell.max_score for cell in [*source.grade_cells, *source.task_cells]}
    solutions = {cell.name for cell in source.solution_cells}
    tasks = {cell.name for cell in source.task_cells}
    cells = []
    for recorded in source.source_cells:
        known = {
            "grade_id": recorded.name,
            "grade": recorded.name in points and recorded.name not in tasks,
            "solution": recorded.name in solutions,
            "task": recorded.name in tasks,
            "locked": recorded.locked,
            "cell_type": recorded.cell_type,
            "checksum": recorded.checksum,
            "schema_version": 3,
        }
        if recorded.name in points:
            known["points"] = points[recorded.name]
        cell = RETYPED[recorded.cell_type](recorded.source, id=recorded.name, metadata={"nbgrader": known})
        cells.append(cell)
    released = nbformat.v4.new_notebook(cells=cells)
    ClearHiddenTests().preprocess(released, {})
    return released.cells


def repaired(
    submitted: list[NotebookNode], released: list[NotebookNode], experiments: Collection[str] = ()
) -> tuple[list[NotebookNode], list[str]]:
    """Return the submitted cells with every released cell among them once, in its place and form; and what was done.

    Args:
        experiments: sources of cells that are tagged as experiments again, should they have lost their tags.
    """
    frame = {cell.metadata.nbgrader.grade_id: cell for cell in released}
    repairs: list[str] = []
    cells = [_known(cell, frame, repairs) for cell in submitted]
    for cell in cells:
        if _grade_id(cell) is None and cell.source.strip() in experiments:
            cell.metadata["tags"] = ["experiment"]
    cells = _without_copies(cells, repairs)
    cells = _in_order(cells, list(frame), repairs)
    cells = _completed(cells, released, repairs)
    return _with_unique_ids(cells), repairs


def _grade_id(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _known(cell: NotebookNode, frame: dict[str, NotebookNode], repairs: list[str]) -> NotebookNode:
    """Give a cell that was released its released form, with the student's source if the answer stands in it."""
    marks = cell.metadata.get("nbgrader")
    claims = [
        marks.get("grade_id") if isinstance(marks, dict) else None,
        cell.get("id"),  # is the grade_id in our notebooks, and survives where metadata is lost
        cell.metadata.get("id"),  # where Colab keeps it
    ]
    name = next((claim for claim in claims if isinstance(claim, str) and claim in frame), None)
    source = cell.source if isinstance(cell.source, str) else "".join(map(str, cell.source))
    if name is None:
        make = RETYPED.get(cell.cell_type, nbformat.v4.new_raw_cell)
        own = make(source, id=str(cell.get("id") or "own"))
        own.metadata = nbformat.from_dict({"tags": [tag for tag in cell.metadata.get("tags", []) if isinstance(tag, str)]})
        if cell.get("attachments") and cell.cell_type == "markdown":
            own.attachments = cell.attachments
        return own
    known = copy.deepcopy(frame[name])
    if not known.metadata.nbgrader.locked:
        known.source = source
    elif source.strip() != known.source.strip():
        repairs.append(f"{name} had been edited; it stands as it was released")
    if cell.cell_type != known.cell_type:
        repairs.append(f"{name} had become a {cell.cell_type} cell")
    if not isinstance(marks, dict) or marks.get("grade_id") != name:
        repairs.append(f"{name} had lost its nbgrader metadata")
    elif any(marks.get(key, False) != known.metadata.nbgrader[key] for key in ("grade", "solution", "locked")) or (
        known.metadata.nbgrader.grade and marks.get("points") != known.metadata.nbgrader.points
    ):
        repairs.append(f"the nbgrader metadata of {name} had been changed")
    return known


def _without_copies(cells: list[NotebookNode], repairs: list[str]) -> list[NotebookNode]:
    """Keep one of each released cell: the last that differs from the others, as the student's last word."""
    last = {_grade_id(cell): index for index, cell in enumerate(cells)}
    kept = []
    for index, cell in enumerate(cells):
        name = _grade_id(cell)
        if name is not None and last[name] != index:
            repairs.append(f"{name} stood there more than once")
            if cell.metadata.nbgrader.locked:
                continue
            cell = copy.deepcopy(cell)  # an answer that was copied still runs, as a cell of the student's own
            del cell.metadata["nbgrader"]
        kept.append(cell)
    return kept


def _in_order(cells: list[NotebookNode], names: list[str], repairs: list[str]) -> list[NotebookNode]:
    """Move each locked cell that stands before a cell that it should follow to right behind that one."""
    cells = list(cells)
    for rank, name in enumerate(names):
        index = next((i for i, cell in enumerate(cells) if _grade_id(cell) == name), None)
        if index is None or not cells[index].metadata.nbgrader.locked:
            continue
        before = set(names[:rank])
        latest = max((i for i, cell in enumerate(cells) if _grade_id(cell) in before), default=-1)
        if latest > index:
            cells.insert(latest, cells.pop(index))
            repairs.append(f"{name} had been moved")
    return cells


def _completed(cells: list[NotebookNode], released: list[NotebookNode], repairs: list[str]) -> list[NotebookNode]:
    """Put the released cells in that are missing, each behind the one that it followed."""
    cells = list(cells)
    previous = None
    for missing in released:
        name = missing.metadata.nbgrader.grade_id
        if not any(_grade_id(cell) == name for cell in cells):
            place = next((i + 1 for i, cell in enumerate(cells) if previous is not None and _grade_id(cell) == previous), 0)
            cells.insert(place, copy.deepcopy(missing))
            repairs.append(f"{name} was missing")
        previous = name
    return cells


def _with_unique_ids(cells: list[NotebookNode]) -> list[NotebookNode]:
    taken = {name for cell in cells if (name := _grade_id(cell))}
    for cell in cells:
        wanted = _grade_id(cell)
        if wanted is None:
            own = "".join(letter for letter in cell["id"] if letter.isalnum() or letter in "-_")[:50] or "own"
            wanted, number = own, 2
            while wanted in taken:
                wanted, number = f"{own}-{number}", number + 1
            taken.add(wanted)
        cell["id"] = wanted
    return cells
