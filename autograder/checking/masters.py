"""The reference that grading compares with: the solution cells of a unit's master, run without its experiments.

Nothing here needs Jupyter: what a GPU has to prove is proved on machines that have PyTorch and little else.
"""

import ast
import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

SOLUTIONS = Path(__file__).parents[2] / "solutions"


def master_path(unit: str) -> Path:
    """Return the path of a unit's master.

    Raises:
        FileNotFoundError: if it is not there. A class gets `course/` and `autograder/`, not `solutions/`.
    """
    path = SOLUTIONS / unit / f"{unit}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: hidden tests need the masters, which only instructors have")
    return path


def units() -> list[str]:
    """Return the names of all units that have a master, in order."""
    return sorted(path.stem for path in SOLUTIONS.glob("*/*.py") if path.stem == path.parent.name)


@dataclass(frozen=True)
class Cell:
    """A cell of a master.

    Attributes:
        metadata: with "nbgrader" and "tags" where the cell has them, as in a notebook.
        source: its code, or its prose without the comment signs.
        line: of the master on which the source begins, counted from 1.
        cell_type: "code" or "markdown".
    """

    metadata: dict
    source: str
    line: int
    cell_type: str = "code"


@cache
def cells_of(unit: str) -> tuple[Cell, ...]:
    """Return the cells of the unit's master, which is a script in jupytext's percent format.

    jupytext takes fifty times as long.
    """
    text = master_path(unit).read_text(encoding="utf-8")
    found = []
    for head in re.finditer(r"^# %%(?P<prose> \[markdown\])?(?P<marks>.*)\n", text, re.MULTILINE):
        following = re.compile(r"^# %%", re.MULTILINE).search(text, head.end())
        body = text[head.end() : following.start() if following else None]
        marks = re.findall(r"(nbgrader|tags)=(\{.*?\}|\[.*?\])", head["marks"])
        metadata = {key: json.loads(value) for key, value in marks}
        line = text[: head.end() + len(body) - len(body.lstrip("\n"))].count("\n") + 1
        source, kind = body.strip("\n"), "code"
        if head["prose"]:
            source, kind = re.sub(r"^# ?", "", source, flags=re.MULTILINE), "markdown"
        found.append(Cell(metadata, source, line, kind))
    return tuple(found)


def code_cells(unit: str) -> tuple[Cell, ...]:
    """Return the code cells of the unit's master."""
    return tuple(cell for cell in cells_of(unit) if cell.cell_type == "code")


def solution_cells(cells: "tuple[Cell, ...] | list[NotebookNode]") -> "list[Cell | NotebookNode]":
    """Return, of a master's or a notebook's cells, the code cells that a student writes and a check grades."""
    return [cell for cell in cells if cell.cell_type == "code" and _marked(cell, "solution") and not _marked(cell, "grade")]


def without_markers(source: str) -> str:
    """Return a master's cell without the lines between which its solution stands."""
    return re.sub(r" *### (?:BEGIN|END) SOLUTION\n?", "", source)


def grade_ids(unit: str) -> list[str]:
    """Return the ids of all cells of the unit's master that nbgrader knows, in order."""
    text = master_path(unit).read_text(encoding="utf-8")
    return re.findall(r'^# %%.* nbgrader=\{.*?"grade_id": "([^"]+)"', text, re.MULTILINE)


@cache
def experiments(unit: str) -> frozenset[str]:
    """Return the sources of the experiments in the unit's master: cells that take minutes, and that no mark depends on."""
    return frozenset(cell.source.strip() for cell in code_cells(unit) if "experiment" in cell.metadata.get("tags", []))


@cache
def answer_names(unit: str) -> list[str]:
    """Return the names that the solution cells of the unit's master define: functions, classes and variables."""
    names = []
    for cell in solution_cells(code_cells(unit)):
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                names.append(statement.name)
            elif isinstance(statement, ast.Assign):
                names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return names


def _marked(cell: "Cell | NotebookNode", mark: str) -> bool:
    return bool(cell.metadata.get("nbgrader", {}).get(mark))


@cache
def load_reference(unit: str) -> ModuleType:
    """Return a module with what the solution cells of the unit's master define, after its set-up cell has run."""
    module = ModuleType(f"reference_{unit}")
    module.__file__ = str(master_path(unit))
    sys.modules[module.__name__] = module  # so that classes defined here know their module
    setup = [cell for cell in code_cells(unit) if cell.metadata.get("nbgrader", {}).get("grade_id") == "setup"]
    for cell in [*setup, *solution_cells(code_cells(unit))]:
        # Blank lines before it: an error then names the line of the master.
        exec(compile("\n" * (cell.line - 1) + cell.source, module.__file__, "exec"), vars(module))
    return module


def exercises_of(unit: str) -> list:
    """Return the unit's exercises (`autograder.checking.exercise.Exercise`); none if nothing in it is graded by a check."""
    hidden_cases = master_path(unit).with_name("hidden_cases.py")
    return list(load_hidden_cases(unit).CASES) if hidden_cases.is_file() else []


@cache
def load_hidden_cases(unit: str) -> ModuleType:
    """Return the module `hidden_cases.py` that lies beside the unit's master."""
    path = master_path(unit).with_name("hidden_cases.py")
    spec = importlib.util.spec_from_file_location(f"hidden_cases_{unit}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
