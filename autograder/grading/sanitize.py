"""Make of any notebook that came back one that nbgrader can mark: the student's answers in the released notebook's frame.

nbgrader records the released cells in its gradebook. Whatever happened to them on the way (deleted, copied, moved,
retyped, their metadata or ids lost or edited) they are put right, and each repair is noted for the report.
"""

import copy
import re
import unicodedata
from collections.abc import Collection
from functools import cache

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.api import Notebook as SourceNotebook
from nbgrader.preprocessors import ClearHiddenTests, NbGraderPreprocessor

from autograder.checking.masters import cells_of, experiments, grade_ids, units
from autograder.grading.intake import UnusableError, plain_cell

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
        cells = [plain_cell(cell) for cell in nb.cells]
        nb.cells, repairs = repaired(cells, released, _experiments(unit), _prompts(unit), _given(unit))
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
    from autograder.building.build import instructor_notebook

    return instructor_notebook(unit).cells


def _experiments(unit: str) -> frozenset[str]:
    """Return the ids and the sources of the unit's experiments."""
    tagged = [cell for cell in _master(unit) if "experiment" in cell.metadata.get("tags", [])]
    return experiments(unit) | {cell["id"] for cell in tagged}


@cache
def _given(unit: str) -> frozenset[str]:
    """Return the words of each cell that a unit gives and that nbgrader does not record: its prose, its demonstrations.

    Of all units: a later one may give what an earlier one asks for, and who hands in the wrong notebook has not written it.
    """
    every = [*_master(unit), *(cell for other in units() if other != unit for cell in cells_of(other))]
    return frozenset(_words(cell.source) for cell in every if _grade_id(cell) is None)


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
    given: Collection[str] = (),
) -> tuple[list[NotebookNode], list[str]]:
    """Return the submitted cells with every released cell among them once, in its place and form; and what was done.

    Args:
        submitted: cells in the form that they should have (`intake.plain_cell`).
        experiments: ids and sources of cells that are tagged as experiments again, should they have lost their tags.
        prompts: the words above and below the answer of a written question, by the answer's id.
        given: the words of each cell that a unit gives, in addition to the released ones.

    Raises:
        UnusableError: if no exercise of the unit is among the cells: then there is nothing to judge.
    """
    frame = {cell.metadata.nbgrader.grade_id: cell for cell in released}
    repairs: list[str] = []
    submitted = [part for cell in submitted for part in _taken_apart(cell, frame, repairs)]
    names = recognized(submitted, frame, prompts or {}, given)
    if not any(name is not None and _is_exercise(frame[name]) for name in names):
        raise UnusableError("no cell of this unit's exercises is in the notebook: is it another unit's?")
    submitted, names = _without_copies(submitted, names, frame, repairs)
    cells = [
        _own(cell) if name is None else _known(cell, name, frame, repairs) for cell, name in zip(submitted, names, strict=True)
    ]
    answers = _names_of_answers(frame)
    for before, cell in zip(submitted, cells, strict=True):
        called_so = set(_ids(before)) & set(experiments) and not answers & defined(cell.source)
        if _grade_id(cell) is None and (cell.source.strip() in experiments or called_so):
            cell.metadata["tags"] = ["experiment"]
    cells = _completed(cells, released, repairs)
    answered_in = _answered_elsewhere(cells, frame, given, repairs)
    cells = _in_order(cells, list(frame), answered_in, repairs)
    _wait_for_a_person(cells, frame, given, repairs)
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
    submitted: list[NotebookNode],
    frame: dict[str, NotebookNode],
    prompts: dict[str, tuple[str, str]],
    given: Collection[str] = (),
) -> list[str | None]:
    """Return, of each submitted cell, the id of the released cell that it is; None if it is the student's own.

    Metadata say so, or the cell's id. Where both are lost, a locked cell is known by its text, an answer by the names that it
    defines, and a written answer by the question above it.
    """
    names = [_claimed(cell, frame) for cell in submitted]
    for name, known in frame.items():
        if name in names:
            continue
        strangers = [place for place, taken in enumerate(names) if taken is None]
        if known.metadata.nbgrader.locked:
            found = [place for place in strangers if _text(submitted[place]) == _text(known)]
        elif known.cell_type == "code":
            wanted = defined(known.source)
            shared = {
                place: (len(wanted & defined(submitted[place].source)), submitted[place].cell_type != "markdown")
                for place in strangers
                if _words(submitted[place].source) not in given and wanted & defined(submitted[place].source)
            }
            found = [place for place, worth in shared.items() if worth == max(shared.values())]
        else:
            question, following = prompts.get(name, ("", ""))
            below = [place for place in strangers if place and question and _words(submitted[place - 1].source) == question]
            text = [place for place in below if submitted[place].cell_type != "code"]
            found = [place for place in text if _words(submitted[place].source) != following]
        for place in found if known.metadata.nbgrader.locked else found[-1:]:
            names[place] = name
    return names


def _claimed(cell: NotebookNode, frame: dict[str, NotebookNode]) -> str | None:
    """Return the id of the released cell that a submitted cell says it is, in its metadata or by its own id."""
    claims = [cell.metadata.get("nbgrader", {}).get("grade_id"), *_ids(cell)]
    return next((claim for claim in claims if isinstance(claim, str) and claim in frame), None)


def defined(source: str) -> set[str]:
    """Return the names that code gives to functions, classes and variables at its top level; it need not be valid."""
    found = re.findall(r"^(?:async\s+)?(?:def|class)\s+(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", source, re.MULTILINE)
    return {function or variable for function, variable in found}


def _ids(cell: NotebookNode) -> list[object]:
    """Return the ids that a cell has: in our notebooks the `grade_id`, where there is one; Colab keeps it in the metadata."""
    return [name for name in (cell.get("id"), cell.metadata.get("id")) if isinstance(name, str)]


def _is_untouched(cell: NotebookNode, known: NotebookNode) -> bool:
    """Whether an answer stands as it was released, alone or merged with what defines nothing of it."""
    text, stub = _text(cell), _text(known)
    return text == stub or (stub in text and not defined(text.replace(stub, "")) & defined(stub) and known.cell_type == "code")


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _text(cell: NotebookNode) -> str:
    """Return a cell's text without what does not matter: blanks at the ends, other spellings of an accent, comments below."""
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", cell.source).strip().splitlines()]
    while cell.cell_type == "code" and lines and re.match(r"\s*(#|$)", lines[-1]):
        lines.pop()
    return "\n".join(lines)


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


def _taken_apart(cell: NotebookNode, frame: dict[str, NotebookNode], repairs: list[str]) -> list[NotebookNode]:
    """Return a locked cell that was merged with others as it was released, and the rest as cells of the student's own."""
    name = _claimed(cell, frame)
    if name is None or not frame[name].metadata.nbgrader.locked:
        return [cell]
    known, text = _text(frame[name]), _text(cell)
    before, found, after = f"\n{text}\n".partition(f"\n{known}\n")
    if not found:
        before, after = (text, "") if _names_of_answers(frame) & defined(text) else ("", "")
    if not before.strip() and not after.strip():
        return [cell]
    repairs.append(f"{name} had been merged with other cells")
    locked = copy.deepcopy(cell)
    locked.source = frame[name].source
    own = [RETYPED[cell.cell_type](part.strip("\n"), id="own") if part.strip() else None for part in (before, after)]
    return [part for part in (own[0], locked, own[1]) if part is not None]


def _names_of_answers(frame: dict[str, NotebookNode]) -> set[str]:
    return set().union(*(defined(cell.source) for cell in frame.values() if _is_code_answer(cell)))


def _without_copies(
    cells: list[NotebookNode], names: list[str | None], frame: dict[str, NotebookNode], repairs: list[str]
) -> tuple[list[NotebookNode], list[str | None]]:
    """Keep one of each released cell: of an answer the last that has been worked on, as the student's last word.

    Another version of an answer still runs, as a cell of the student's own. A stub does not: it would take the answer's place.
    A written answer that was split is put together.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if name is not None:
            places.setdefault(name, []).append(place)
    stubs = {_text(cell) for cell in frame.values() if not cell.metadata.nbgrader.locked}
    kept = {name: _best(found, cells, frame[name]) for name, found in places.items()}
    repairs += [f"{name} stood there more than once" for name, found in places.items() if len(found) > 1]
    chosen = []
    for place, (cell, name) in enumerate(zip(cells, names, strict=True)):
        if name is not None and kept[name] == place:
            if _is_written_answer(frame[name]):
                cell = copy.deepcopy(cell)
                parts = [cells[other].source.strip() for other in places[name] if _text(cells[other]) not in stubs]
                cell.source = "\n\n".join(filter(None, dict.fromkeys(parts))) or cell.source
            chosen.append((cell, name))
        elif name is not None and _is_written_answer(frame[name]):
            continue
        elif (name is None or not frame[name].metadata.nbgrader.locked) and _text(cell) not in stubs:
            chosen.append((cell, None))
    return [cell for cell, _ in chosen], [name for _, name in chosen]


def _best(places: list[int], cells: list[NotebookNode], known: NotebookNode) -> int:
    """Return which of several copies of a released cell is meant: the last of those that have the most of an answer."""

    def worth(place: int) -> int:
        cell = cells[place]
        if known.metadata.nbgrader.locked or _is_untouched(cell, known):
            return 0
        is_code = known.cell_type == "code" and cell.cell_type != "markdown"
        return 1 + (len(defined(known.source) & defined(cell.source)) if is_code else 0)

    best = max(places, key=lambda place: (worth(place), place))
    return next(place for place in places if _text(cells[place]) == _text(cells[best]))


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
            if _is_written_answer(missing):
                cells[place].source = "*The cell for this answer was missing.*"
                repairs.append(f"{name} waits for a person: its answer may stand in another cell")
        previous = name
    return cells


def _answered_elsewhere(
    cells: list[NotebookNode], frame: dict[str, NotebookNode], given: Collection[str], repairs: list[str]
) -> dict[str, list[NotebookNode]]:
    """Empty each stub whose answer stands in other cells (it would take the answer's place); return those cells by name."""
    elsewhere = {}
    code = [cell for cell in cells if cell.cell_type == "code" and not _is_tagged(cell) and _words(cell.source) not in given]
    answers = [cell for cell in code if _grade_id(cell) and _is_code_answer(cell)]
    stubs = [cell for cell in answers if _is_untouched(cell, frame[_grade_id(cell)])]
    others = [cell for cell in code if cell not in stubs and not cell.metadata.get("nbgrader", {}).get("locked")]
    for stub in stubs:
        name = _grade_id(stub)
        found = [cell for cell in others if defined(stub.source) & defined(cell.source)]
        if found:
            stub.source = _text(stub).replace(_text(frame[name]), "# Answered in another cell.")
            elsewhere[name] = found
            repairs.append(f"{name} is answered in another cell")
    return elsewhere


def _in_order(
    cells: list[NotebookNode], names: list[str], answered_in: dict[str, list[NotebookNode]], repairs: list[str]
) -> list[NotebookNode]:
    """Move the set-up to the top if it stands below what needs it, and each check and answer below what it should follow.

    Args:
        answered_in: the cells in which an answer stands, by its id, where that is not the released cell.
    """
    cells = list(cells)
    ranks = {name: rank for rank, name in enumerate(names)}

    def provided(cell: NotebookNode) -> list[int]:
        """Return the ranks of the set-up or the answers that a cell holds."""
        marks = cell.metadata.get("nbgrader", {})
        own = [ranks[marks.grade_id]] if marks and cell.cell_type == "code" and not marks.grade else []
        return own + [ranks[name] for name, found in answered_in.items() if any(cell is other for other in found)]

    for rank, name in enumerate(names):
        index = next(place for place, cell in enumerate(cells) if _grade_id(cell) == name)
        marks = cells[index].metadata.nbgrader
        if cells[index].cell_type != "code":
            continue
        if marks.locked and not marks.grade:
            target = 0 if any(provided(cell) for cell in cells[:index]) else index
        else:
            target = max((i for i, cell in enumerate(cells) if min(provided(cell), default=rank) < rank), default=-1)
        if target > index or (marks.locked and not marks.grade and target < index):
            cells.insert(target, cells.pop(index))
            if f"{name} was missing" not in repairs:
                repairs.append(f"{name} had been moved")
    return cells


def _wait_for_a_person(
    cells: list[NotebookNode], frame: dict[str, NotebookNode], given: Collection[str], repairs: list[str]
) -> None:
    """Let a written answer that is still empty wait for a person if text of the student's own stands beside it."""
    for place, cell in enumerate(cells):
        name = _grade_id(cell)
        if name is None or not _is_written_answer(cell) or _text(cell) not in ("", _text(frame[name])):
            continue
        beside = [*_own_text(cells[place + 1 :], given), *_own_text(cells[:place][::-1], given)]
        if beside:
            cell.source += "\n\n*The answer may stand in a cell of its own, beside this one.*"
            repairs.append(f"{name} waits for a person: it was left empty, and text of the student's own stands beside it")


def _own_text(cells: list[NotebookNode], given: Collection[str]) -> list[NotebookNode]:
    """Return the cells of text that the student added or edited, up to the first other cell."""
    found = []
    for cell in cells:
        if cell.cell_type == "code" or _grade_id(cell) is not None or (cell.source.strip() and _words(cell.source) in given):
            break
        if cell.source.strip():
            found.append(cell)
    return found


def _is_code_answer(released: NotebookNode) -> bool:
    return released.cell_type == "code" and not released.metadata.nbgrader.locked


def _is_written_answer(released: NotebookNode) -> bool:
    return released.cell_type == "markdown" and released.metadata.nbgrader.solution


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
