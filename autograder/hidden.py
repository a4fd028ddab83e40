"""The hidden tests: the same drivers on other shapes, seeds and dtypes, held against the master's own solution.

They stand apart from the checks, beside the masters, because feedback shows the source of a graded cell to the student.
A failure says what kind of case it was and no more.
"""

import torch

from autograder.exercise import RAISED, Exercise
from autograder.failure import CheckFailedError
from autograder.reference import load_hidden_cases, load_reference


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
