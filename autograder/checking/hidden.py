"""The hidden tests: the same drivers on other shapes, seeds and dtypes, compared with the master's own solution.

Their cases are beside the masters, apart from the checks, because feedback shows the source of a graded cell to the student.
A failure says what kind of case it was and no more.
"""

import re

import torch
from nbformat import NotebookNode

from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from autograder.checking.judging import RAISED
from autograder.checking.masters import load_hidden_cases, load_reference

HIDDEN_TESTS = """
### BEGIN HIDDEN TESTS
from autograder.checking import hidden

hidden.check("{unit}", {check}, {answers})
### END HIDDEN TESTS"""


def check(unit: str, exercise: Exercise, *answers: object, seed: int | None = None) -> None:
    """Compare a student's answers with the reference on every hidden case of the exercise.

    Raises:
        CheckFailedError: if an observation differs by more than rounding.
        FileNotFoundError: where there are no masters.
    """
    reference = [getattr(load_reference(unit), part.__name__) for part in exercise.spec]
    generator = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
    for label, make_case in load_hidden_cases(unit).CASES[exercise].items():
        case = make_case(generator)
        expected, observed = exercise.observe(reference, case), exercise.observe(answers, case)
        if RAISED in expected:
            raise RuntimeError(f"the reference of {exercise.name} raised {expected[RAISED]} on the hidden case {label!r}")
        difference = exercise.difference(expected, observed, case)
        if difference:
            # The first line only: numbers of a hidden case would help no one who cannot see the case.
            first = difference.splitlines()[0]
            raise CheckFailedError(f"{exercise.name}: right on the cases that you see, wrong {label}: {first}")


def add_to(notebook: NotebookNode, unit: str) -> None:
    """Put the hidden tests behind the check in every graded cell; nbgrader removes them from what students receive.

    Raises:
        ValueError: if a graded code cell does anything but call one check with the answers.
    """
    for cell in notebook.cells:
        mark = cell.metadata.get("nbgrader", {})
        if cell.cell_type == "code" and mark.get("grade") and not mark.get("solution"):
            call = re.fullmatch(r"(check_\w+)\((.+)\)", cell.source)
            if call is None:
                raise ValueError(f"{unit}: the cell {mark['grade_id']} should call one check, and do nothing else")
            cell.source += HIDDEN_TESTS.format(unit=unit, check=call[1], answers=call[2])
