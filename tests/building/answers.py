"""Finds answers in what a class is given, whatever they are called and however they are laid out."""

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from autograder.checking.masters import code_cells, exercises_of, master_path, solution_cells, units, without_markers

SMALLEST = 25
"""Functions of fewer nodes say nothing: `return x @ weight.T` is not an answer that was left lying about."""


def shape_of(function: ast.FunctionDef) -> str | None:
    """Return a function's code without its names, annotations, docstring and decorators; None if it is too small to tell."""
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"name{len(names)}")

    function = ast.parse(ast.unparse(function)).body[0]
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    function.body = body or [ast.Pass()]
    function.decorator_list, function.returns, function.name = [], None, ""
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = renamed(node.id)
        elif isinstance(node, ast.arg):
            node.arg, node.annotation = renamed(node.arg), None
        elif isinstance(node, ast.FunctionDef):
            node.name = renamed(node.name)
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    size = sum(1 for statement in function.body for _ in ast.walk(statement))
    return ast.dump(function) if size >= SMALLEST else None


def functions_in(source: str) -> Iterator[tuple[str, str]]:
    """Yield the shape and the name of every function and method in a source that is Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with a magic
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (shape := shape_of(node)):
            yield shape, node.name


def answers_of(unit: str) -> dict[str, str]:
    """Return, by their shape, what the functions of a unit's solutions, specs, variants and hidden cases are."""
    found: dict[str, str] = {}
    for exercise in exercises_of(unit):
        for name, edits in {"spec": "", **exercise.variants}.items():
            for shape, function in functions_in(exercise.source(edits)):
                found[shape] = f"{exercise.name}, {name}: {function}"
    for cell in solution_cells(code_cells(unit)):
        for shape, function in functions_in(without_markers(cell.source)):
            found[shape] = f"{unit}, the solution: {function}"
    hidden = master_path(unit).with_name("hidden_cases.py")
    if hidden.is_file():
        for shape, function in functions_in(hidden.read_text()):
            found[shape] = f"{unit}, hidden cases: {function}"
    return found


def sources_in(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every piece of Python in a folder: files, and cells of notebooks."""
    for path in sorted(folder.rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")
    for path in sorted(folder.rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield path, "".join(cell["source"])


def answers_left_in(folder: Path, of: Iterable[str] = ()) -> list[str]:
    """Return a line for each answer that stands in a folder, under whatever name."""
    wanted = {shape: said for unit in of or units() for shape, said in answers_of(unit).items()}
    return [
        f"{path.relative_to(folder)}: {name} is {wanted[shape]}"
        for path, source in sources_in(folder)
        for shape, name in functions_in(source)
        if shape in wanted
    ]


def solution_lines() -> dict[str, str]:
    """Return the lines between the solution markers of all masters that are long enough to tell, with their unit."""
    lines = {}
    for unit in units():
        inside = False
        for line in master_path(unit).read_text(encoding="utf-8").splitlines():
            if "### BEGIN SOLUTION" in line or "### END SOLUTION" in line:
                inside = "BEGIN" in line
            elif inside and len(line.strip()) >= 35:
                lines[line.strip()] = unit
    return lines
