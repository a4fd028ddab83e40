"""What an answer needs of the notebook that it stands in: its own definition, and what that uses of the student's own.

Only this is run again when a check calls the answer, in a process that knows nothing of the rest: what other cells did to
torch, to its defaults or to a name like `list` plays no part in it. The choice need not be perfect: if an answer cannot be
run with what is found here, the whole notebook is run again (see `autograder.grading.execute`).
"""

import ast
import symtable
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from IPython.core.inputtransformer2 import TransformerManager

from autograder.checking.symbols import names_read

WRAPPERS = ("%%time", "%%timeit", "%%capture", "%%prun")
"""Magics that run a cell as it is."""


@dataclass
class Statement:
    """What a statement at the top of a cell does with global names.

    Attributes:
        binds: gives them a value: defines, imports, assigns or deletes them.
        uses: reads them, at once or when what it defines is called.
        stores: sets an attribute or an item of theirs.
        hands: calls a method of theirs, or hands them to a function, by that function's name ("" for a method).
        kind: "definition" of functions and classes, "import", "import *" or "".
    """

    binds: set[str]
    uses: set[str]
    stores: set[str] = field(default_factory=set)
    hands: set[tuple[str, str]] = field(default_factory=set)
    kind: str = ""


def as_python(source: str) -> str:
    """Return a cell's source with IPython's own syntax turned into Python's."""
    first, _, rest = source.lstrip().partition("\n")
    if first.startswith(WRAPPERS):
        source = rest
    return TransformerManager().transform_cell(source)


def needed(cells: Sequence[str], names: Iterable[str], given: Iterable[str] = ()) -> list[dict]:
    """Return which statements of these cells have to run for the names to be what they are in the notebook.

    Args:
        cells: the sources of the cells that have run, in order.
        names: of the answers.
        given: names that are there before all cells, whose objects no cell is to change.

    Returns:
        A dict for each cell of which something is needed: "source", as Python, and "needed", indices into its statements.
    """
    read: list[tuple[str, list[Statement]]] = []
    for cell in cells:
        try:
            source = as_python(cell)
            read.append((source, [_read(statement) for statement in ast.parse(source).body]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # it did not run in the notebook either
            continue
    statements = [statement for _, statements in read for statement in statements]
    own = {name for statement in statements if statement.kind != "import" for name in statement.binds}
    functions = {name for statement in statements if statement.kind == "definition" for name in statement.binds}
    unchanged = {name for statement in statements if statement.kind == "import" for name in statement.binds} | set(given) - own
    wanted, kept = set(names), [set() for _ in read]

    def is_needed(statement: Statement) -> bool:
        changed = wanted - unchanged
        handed = {name for name, to in statement.hands if to == "" or to in functions} - functions
        return bool(statement.kind == "import *" or statement.binds & wanted or (statement.stores | handed) & changed)

    grown = True
    while grown:
        grown = False
        for places, (_, statements) in zip(kept, read, strict=True):
            for place, statement in enumerate(statements):
                if place not in places and is_needed(statement):
                    places.add(place)
                    wanted |= statement.uses
                    grown = True
    return [{"source": source, "needed": sorted(places)} for places, (source, _) in zip(kept, read, strict=True) if places]


def _read(node: ast.stmt) -> Statement:
    table = symtable.symtable(ast.unparse(node), "<statement>", "exec")
    binds = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    statement = Statement(binds, set(names_read(table)))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        statement.kind = "definition"
    elif isinstance(node, ast.Import | ast.ImportFrom):
        statement.kind = "import *" if node.names[0].name == "*" else "import"
    else:
        for part in _at_once(node):
            if isinstance(part, ast.Attribute | ast.Subscript) and not isinstance(part.ctx, ast.Load):
                statement.stores |= _root(part)
            elif isinstance(part, ast.Call):
                function = part.func.id if isinstance(part.func, ast.Name) else ""
                arguments = [*part.args, *(keyword.value for keyword in part.keywords)]
                if function in ("setattr", "delattr") and arguments:
                    statement.stores |= _root(arguments[0])
                elif function:
                    statement.hands |= {(name, function) for argument in arguments for name in _root(argument)}
                else:
                    statement.hands |= {(name, "") for name in _root(part.func)}
    return statement


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the parts of a statement that run when it does: not what stands in functions that it defines."""
    for part in ast.iter_child_nodes(node):
        if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield part
            yield from _at_once(part)


def _root(node: ast.expr) -> set[str]:
    """Return the name that an expression like `a.b[0].c` begins with, if it begins with one."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()
