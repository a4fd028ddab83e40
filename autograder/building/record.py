"""Records an exercise: what its spec and its mistakes give on cases of several seeds, and the code that looks at an answer.

Neither the recording nor the code holds an answer: `standalone` refuses code that needs a part of one.
"""

import ast
import inspect
import io
import symtable
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from autograder.checking.exercise import Exercise
from autograder.checking.judging import RAISED
from autograder.checking.symbols import names_read

LIBRARY = (
    "autograder.checking.cases",
    "autograder.checking.drive",
    "autograder.checking.helpers",
    "autograder.checking.judging",
)
"""Modules that a class receives as they are."""
ENOUGH_BYTES = 6 * 2**20
"""Of so many numbers there are no more seeds: the cases of measured memory are large."""


class LeakError(ValueError):
    """What a class would receive needs a part of an answer; the message names it."""


def record(exercise: Exercise, seeds: int) -> dict:
    """Return what a `RecordedCheck` needs, apart from its code: of so many seeds, or fewer if they are large.

    Raises:
        RuntimeError: if the exercise's own answer raises here.
    """
    shared = _Shared()
    wrong = [exercise.build(edits) for edits in exercise.mistakes.values()]
    recorded = []
    for seed in range(seeds):
        if shared.size > ENOUGH_BYTES:
            break
        cases = []
        for case in exercise.fresh_cases(seed):
            expected = exercise.expected(case)
            if RAISED in expected:
                raise RuntimeError(f"{exercise.name}: the check's own answer raised {expected[RAISED]}")
            cases.append(
                {
                    "case": dict(case),
                    "exact": dict(exercise.exact(case)),
                    "tolerance": dict(exercise.tolerance(case)),
                    "measured": bool(exercise.measures_peak(case)),
                    "expected": expected,
                    "mistakes": [exercise.observe(answers, case) for answers in wrong],
                }
            )
        recorded.append(shared.once(cases))
    return {"torch": torch.__version__.split("+")[0], "mistakes": list(exercise.mistakes), "seeds": recorded}


@dataclass
class _Shared:
    """Makes equal tensors one: most of what a mistake gives is what a right answer gives."""

    known: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Of all of them, in bytes."""
        return sum(tensor.nbytes for tensor in self.known.values())

    def once(self, value: object) -> object:
        """Return a value in which every tensor stands alone in memory, or for all its equals."""
        if isinstance(value, dict):
            return {key: self.once(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.once(part) for part in value)
        if not isinstance(value, Tensor):
            return value
        plain = value.detach().contiguous().clone()
        content = plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
        return self.known.setdefault((plain.dtype, tuple(plain.shape), content), plain)


def saved(recording: dict) -> bytes:
    """Return a recording as a file's bytes."""
    content = io.BytesIO()
    torch.save(recording, content)
    return content.getvalue()


def standalone(functions: Iterable[Callable], answers: set[int]) -> str:
    """Return source that defines these functions and what they need, but for `LIBRARY` and installed packages.

    Args:
        answers: the ids of the functions and classes that are parts of answers.

    Raises:
        LeakError: if one of them is needed.
    """
    slices = _Slices(answers)
    for function in functions:
        slices.want(sys.modules[function.__module__], function.__name__)
    return slices.source()


class _Slices:
    """Statements of modules, each once, those that others need before them."""

    def __init__(self, answers: set[int]):
        self._answers, self._seen = answers, set()
        self._imports: dict[str, None] = {}
        self._statements: list[str] = []

    def want(self, module: ModuleType, name: str) -> None:
        """Take the statement that gives a name its value, and what it needs."""
        if (module.__name__, name) in self._seen or not hasattr(module, name):
            return
        self._seen.add((module.__name__, name))
        if id(getattr(module, name)) in self._answers:
            raise LeakError(f"{module.__name__}: {name} is a part of an answer")
        text = inspect.getsource(module)
        for statement in ast.parse(text).body:
            if name not in _bound(statement):
                continue
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self._import(statement, name)
            else:
                for used in sorted(_needed(statement)):
                    self.want(module, used)
                first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
                self._statements.append("\n".join(text.splitlines()[first - 1 : statement.end_lineno]))

    def _import(self, statement: ast.Import | ast.ImportFrom, name: str) -> None:
        own = getattr(statement, "module", None) or ""
        if own.startswith("autograder.") and own not in LIBRARY:
            (alias,) = [alias for alias in statement.names if (alias.asname or alias.name) == name]
            if alias.asname:
                raise ValueError(f"{own}: import {alias.name} under its own name")
            self.want(sys.modules[own], alias.name)
            return
        kept = [alias for alias in statement.names if (alias.asname or alias.name).split(".")[0] == name]
        alone = ast.Import(kept) if isinstance(statement, ast.Import) else ast.ImportFrom(own, kept, statement.level)
        self._imports[ast.unparse(alone)] = None

    def source(self) -> str:
        """Return the imports, then the rest."""
        return "\n\n\n".join(["\n".join(sorted(self._imports)), *self._statements]).strip("\n")


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module gives a value."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return {part.id for target in targets if target is not None for part in ast.walk(target) if isinstance(part, ast.Name)}


def _needed(statement: ast.stmt) -> set[str]:
    """Return the names of the module that a statement reads, at once or when what it defines is called."""
    return set(names_read(symtable.symtable(ast.unparse(statement), "<statement>", "exec")))
