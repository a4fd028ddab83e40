"""Right notebooks, damaged at random (`damage.py`): full marks, or a line that says why not; never a silent 0.

`make fuzz` tries thousands: `FUZZ` in the environment says how many.
"""

import ast
import os
import tempfile
import unicodedata
from functools import cache
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from autograder.checking.masters import exercises_of, units
from autograder.grading import intake, sanitize
from autograder.grading.intake import UnusableError
from damage import Damaged, Unit, damaged, unit_of

EXAMPLES = int(os.environ.get("FUZZ", "250"))
GRADED = max(6, EXAMPLES // 100)
"""Of them go through the whole of grading, in `test_damaged.py`."""
UNITS = [unit for unit in units() if exercises_of(unit)]


class Judged:
    """What grading sees of a notebook.

    Attributes:
        checks: by a check's id, its text, its points, and what the answers that it names were defined as by then.
        written: the written answer.
        repairs: what was done to the notebook.
    """

    def __init__(self, unit: Unit, cells: list[NotebookNode]):
        name = unit.name
        self.cells, self.repairs = sanitize.repaired(
            cells, unit.frame, sanitize._experiments(name), sanitize._prompts(name), sanitize._given(name)
        )
        self.checks, self.written = {}, ""
        self._answers = set().union(*unit.names.values())
        self._scope, self._defined = {"__name__": "student"}, {}
        for cell in self.cells:
            marks = cell.metadata.get("nbgrader", {})
            if cell.cell_type == "markdown" and marks:
                self.written = cell.source
            elif cell.cell_type == "code" and marks.get("grade"):
                names = {node.id for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Name)} & self._answers
                self.checks[marks.grade_id] = cell.source, marks.points, {name: self._defined.get(name) for name in names}
            elif cell.cell_type == "code" and "experiment" not in cell.metadata.get("tags", []):
                self._run(cell.source, is_set_up=marks.get("locked", False))

    def _run(self, source: str, is_set_up: bool) -> None:
        """Run a set-up, or the definitions of answers, until something fails."""
        try:
            statements = ast.parse(TransformerManager().transform_cell(source)).body
        except (SyntaxError, ValueError):
            return
        for statement in statements:
            names = sanitize.defined(ast.unparse(statement)) & self._answers
            if not (is_set_up or names):
                continue
            try:
                exec(compile(ast.Module([statement], []), "<cell>", "exec"), self._scope)
            except Exception:
                return
            self._defined |= dict.fromkeys(names, _meaning(statement))


def _meaning(statement: ast.stmt) -> str:
    """Return the code without its docstrings, in which an encoding may have replaced letters."""
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return unicodedata.normalize("NFC", ast.dump(statement))


@cache
def right(unit: str) -> Judged:
    return Judged(unit_of(unit), nbformat.reads(unit_of(unit).answered, as_version=4).cells)


def what_counts(cells: list[NotebookNode]) -> list[tuple]:
    """Return what of each cell an execution depends on (`execute.execution_key`)."""
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", []), cell.metadata.get("nbgrader", {})) for cell in cells]


def take_in(made: Damaged, folder: Path) -> intake.Submission:
    place = folder / "student" / made.unit.name
    for path, content in made.files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(content)
    return intake.read(place, made.unit.name, lambda notebook: sanitize.answered(notebook.cells, made.unit.frame))


def lost_checks(unit: Unit, judged: Judged) -> set[str]:
    """Return the checks that do not see what they see in the right notebook."""
    expected = right(unit.name).checks
    assert judged.checks.keys() == expected.keys()
    return {check for check in expected if judged.checks[check] != expected[check]}


def may_lose(made: Damaged) -> set[str]:
    """Return the checks whose answers the damage took out."""
    gone = set().union(*(made.unit.names.get(cell, set()) for cell in made.lost))
    return {check for check, (_, _, names) in right(made.unit.name).checks.items() if names.keys() & gone}


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(chance=st.randoms(use_true_random=False), unit=st.sampled_from(UNITS))
def test_full_marks_or_a_line_that_says_why_not(chance, unit):
    made = damaged(unit, chance)
    with tempfile.TemporaryDirectory() as folder:
        try:
            submission = take_in(made, Path(folder))
            judged = Judged(made.unit, submission.notebook.cells)
        except UnusableError as error:
            assert made.may_be_refused, (made.done, str(error))
            assert str(error) and str(error) == intake.printable(str(error), 1000)
            return
        submission.write(Path(folder), "written")
        written = Judged(made.unit, nbformat.read(Path(folder) / "written.ipynb", as_version=4).cells)
    assert what_counts(written.cells) == what_counts(judged.cells), "nbgrader would mark another notebook than was executed"
    nbformat.validate(nbformat.v4.new_notebook(cells=judged.cells))
    lost = lost_checks(made.unit, judged)
    assert lost <= may_lose(made), (made.done, lost, judged.repairs)
    if lost:
        assert any("was missing" in note for note in judged.repairs)
    is_there = all(word in unicodedata.normalize("NFC", judged.written) for word in ("activations stay", "measured"))
    waits = any(note.startswith(f"{made.unit.question} waits for a person") for note in judged.repairs)
    assert is_there or waits, (made.done, judged.written, judged.repairs)
