"""Make of any notebook that came back one that nbgrader can mark: the student's answers in the released notebook's frame.

nbgrader records the released cells in its gradebook. Whatever happened to them on the way (deleted, copied, moved,
retyped, their metadata or ids lost or edited) they are put right, and each repair is noted for the report.
"""

import copy
import re
from collections.abc import Collection
from functools import cache

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.api import Notebook as SourceNotebook
from nbgrader.preprocessors import ClearHiddenTests, NbGraderPreprocessor

from autograder.intake import UnusableError, plain_cell
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
        unit = names["assignment"]
        released = released_of(names["db_url"], unit, names["notebook"])
        nb.cells, repairs = repaired([plain_cell(cell) for cell in nb.cells], released, _experiments(unit), _prompts(unit))
        nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}, "repairs": repairs})
        nb.nbformat, nb.nbformat_minor = 4, 5
        return nb, resources


def released_of(db_url: str, unit: str, notebook: str) -> list[NotebookNode]:
    """Return the released cells that the gradebook knows of a unit's notebook, in order."""
    with Gradebook(db_url) as gradebook:
        released = released_cells(gradebook.find_notebook(notebook, unit))
    order = {name: rank for rank, name in enumerate(grade_ids(unit))}
    return sorted(released, key=lambda cell: order.get(_grade_id(cell), len(order)))  # a database promises no order


@cache
def _master(unit: str) -> list[NotebookNode]:
    from autograder.build import instructor_notebook

    return instructor_notebook(unit).cells


def _experiments(unit: str) -> frozenset[str]:
    """Return the ids and the sources of the unit's experiments."""
    tagged = [cell for cell in _master(unit) if "experiment" in cell.metadata.get("tags", [])]
    return experiments(unit) | {cell["id"] for cell in tagged}


def _prompts(unit: str) -> dict[str, tuple[str, str]]:
    """Return the words above and below each written question's answer, by the answer's id."""
    cells = _master(unit)
    texts = ["", *(_words(cell.source) for cell in cells), ""]
    return {
        _grade_id(cell): (texts[place], texts[place + 2])
        for place, cell in enumerate(cells)
        if cell.cell_type == "markdown" and cell.metadata.get("nbgrader", {}).get("solution")
    }


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
    submitted: list[NotebookNode],
    released: list[NotebookNode],
    experiments: Collection[str] = (),
    prompts: dict[str, tuple[str, str]] | None = None,
) -> tuple[list[NotebookNode], list[str]]:
    """Return the submitted cells with every released cell among them once, in its place and form; and what was done.

    Args:
        submitted: cells in the form that they should have (`intake.plain_cell`).
        experiments: ids and sources of cells that are tagged as experiments again, should they have lost their tags.
        prompts: the words above and below the answer of a written question, by the answer's id.

    Raises:
        UnusableError: if no exercise of the unit is among the cells: then there is nothing to judge.
    """
    frame = {cell.metadata.nbgrader.grade_id: cell for cell in released}
    repairs: list[str] = []
    names = recognized(submitted, frame, prompts or {})
    if not any(name is not None and _is_exercise(frame[name]) for name in names):
        raise UnusableError("no cell of this unit's exercises is in the notebook: is it another unit's?")
    cells = [
        _own(cell) if name is None else _known(cell, name, frame, repairs) for cell, name in zip(submitted, names, strict=True)
    ]
    for before, cell in zip(submitted, cells, strict=True):
        if _grade_id(cell) is None and (cell.source.strip() in experiments or set(_ids(before)) & set(experiments)):
            cell.metadata["tags"] = ["experiment"]
    cells = _without_copies(cells, repairs)
    cells = _in_order(cells, list(frame), repairs)
    cells = _completed(cells, released, repairs)
    return _with_unique_ids(cells), repairs


def answered(submitted: list[NotebookNode], released: list[NotebookNode]) -> int:
    """Return how many answers of the released notebook have been changed in a submitted one."""
    frame = {cell.metadata.nbgrader.grade_id: cell for cell in released}
    changed = set()
    for cell, name in zip(submitted, recognized(submitted, frame, {}), strict=True):
        if name is not None and not frame[name].metadata.nbgrader.locked and _text(cell) != _text(frame[name]):
            changed.add(name)
    return len(changed)


def recognized(
    submitted: list[NotebookNode], frame: dict[str, NotebookNode], prompts: dict[str, tuple[str, str]]
) -> list[str | None]:
    """Return, of each submitted cell, the id of the released cell that it is; None if it is the student's own.

    Metadata say so, or the cell's id. Where both are lost, a locked cell is known by its text, an answer by the names that it
    defines, and a written answer by the question above it.
    """
    names: list[str | None] = []
    for cell in submitted:
        claims = [cell.metadata.get("nbgrader", {}).get("grade_id"), *_ids(cell)]
        names.append(next((claim for claim in claims if isinstance(claim, str) and claim in frame), None))
    for name, known in frame.items():
        if name in names:
            continue
        strangers = [place for place, taken in enumerate(names) if taken is None]
        if known.metadata.nbgrader.locked:
            found = [place for place in strangers if _text(submitted[place]) == _text(known)]
        elif known.cell_type == "code":
            wanted = defined(known.source)
            code = [place for place in strangers if submitted[place].cell_type != "markdown"]
            shared = {place: len(wanted & defined(submitted[place].source)) for place in code}
            most = max(shared.values(), default=0)
            found = [place for place, number in shared.items() if number == most > 0]
        else:
            question, following = prompts.get(name, ("", ""))
            below = [place for place in strangers if place and question and _words(submitted[place - 1].source) == question]
            found = [place for place in below if _words(submitted[place].source) != following]
        for place in found if known.metadata.nbgrader.locked else found[-1:]:
            names[place] = name
    return names


def defined(source: str) -> set[str]:
    """Return the names that code gives to functions, classes and variables at its top level; it need not be valid."""
    found = re.findall(r"^(?:async\s+)?(?:def|class)\s+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", source, re.MULTILINE)
    return {function or variable for function, variable in found}


def _ids(cell: NotebookNode) -> list[object]:
    """Return the ids that a cell has: in our notebooks the `grade_id`, where there is one; Colab keeps it in the metadata."""
    return [name for name in (cell.get("id"), cell.metadata.get("id")) if isinstance(name, str)]


def _words(text: str) -> str:
    return " ".join(text.split())


def _text(cell: NotebookNode) -> str:
    return "\n".join(line.rstrip() for line in cell.source.strip().splitlines())


def _is_exercise(released: NotebookNode) -> bool:
    """Whether a released cell is an answer or a check, of which no other unit has one with the same name."""
    marks = released.metadata.nbgrader
    return released.cell_type == "code" and (marks.grade or marks.solution)


def _grade_id(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _own(cell: NotebookNode) -> NotebookNode:
    """Return a cell of the student's own, with nothing that could be taken for a released one's."""
    own = RETYPED[cell.cell_type](cell.source, id=str(cell.get("id") or "own"))
    own.metadata = nbformat.from_dict({"tags": cell.metadata.get("tags", [])})
    if cell.get("attachments") and cell.cell_type == "markdown":
        own.attachments = cell.attachments
    return own


def _known(cell: NotebookNode, name: str, frame: dict[str, NotebookNode], repairs: list[str]) -> NotebookNode:
    """Give a cell that was released its released form, with the student's source if the answer stands in it."""
    marks = cell.metadata.get("nbgrader", {})
    known = copy.deepcopy(frame[name])
    if not known.metadata.nbgrader.locked:
        known.source = cell.source
    elif _text(cell) != _text(known):
        repairs.append(f"{name} had been edited; it stands as it was released")
    if cell.cell_type != known.cell_type:
        repairs.append(f"{name} had become a {cell.cell_type} cell")
    if marks.get("grade_id") != name:
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
            cells.insert(place, _put_back(missing, cells))
            repairs.append(f"{name} was missing")
        previous = name
    return cells


def _put_back(missing: NotebookNode, cells: list[NotebookNode]) -> NotebookNode:
    """Return a released cell to be put in, without its stub if the student's answer stands in other cells."""
    cell = copy.deepcopy(missing)
    wanted = defined(cell.source) if cell.cell_type == "code" and not cell.metadata.nbgrader.locked else set()
    elsewhere = set().union(*(defined(other.source) for other in cells if other.cell_type == "code" and not _is_tagged(other)))
    if wanted & elsewhere:  # below them, the stub would take their place
        cell.source = "# Answered in another cell."
    return cell


def _is_tagged(cell: NotebookNode) -> bool:
    return "experiment" in cell.metadata.get("tags", [])


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
