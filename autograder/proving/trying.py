"""What one check says: of the master's solution, of every known mistake and variant, and of an answer of yours.

    python -m autograder.proving.trying 08_lora                  name the unit's exercises
    python -m autograder.proving.trying 08_lora merge            try one
    python -m autograder.proving.trying 08_lora merge mine.py    the same, and what mine.py defines

A file is run below the imports of the unit's notebook, as a cell would be. The exit status says whether every mistake was named
and every variant accepted. `autograder.proving.prove` does the same for whole units, and adds mutants, which takes minutes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from autograder.checking.exercise import Exercise
from autograder.checking.masters import SOLUTIONS, exercises_of, load_reference, units
from autograder.proving.prove import said, said_of_hidden_cases


def file_of(exercise: Exercise) -> Path:
    """Return the file that has the exercise's check, below the project's root."""
    return Path(sys.modules[exercise.driver.__module__].__file__).relative_to(SOLUTIONS.parent)


def by_name(unit: str) -> dict[str, Exercise]:
    """Return the unit's exercises by the names of their files, without the ending."""
    return {file_of(exercise).stem: exercise for exercise in exercises_of(unit)}


def verdict(unit: str, exercise: Exercise, answers: Sequence[object]) -> str:
    """Return "passes" for a right answer, and otherwise the message of the check or of the hidden cases."""
    return said(exercise, answers) or said_of_hidden_cases(unit, exercise, answers) or "passes"


def answers_in(path: Path, unit: str, exercise: Exercise) -> list[object]:
    """Return the answers that a file defines, run below the notebook's imports and the solutions of its other exercises.

    Raises:
        NameError: if the file does not define all of them.
    """
    names = [part.__name__ for part in exercise.spec]
    scope = {name: value for name, value in vars(load_reference(unit)).items() if name not in names}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    missing = [name for name in names if name not in scope]
    if missing:
        raise NameError(f"{path} does not define {' and '.join(missing)}")
    return [scope[name] for name in names]


def try_all(unit: str, exercise: Exercise) -> bool:
    """Print what the check says of solution, mistakes and variants; return whether it says what it should."""
    names = [part.__name__ for part in exercise.spec]
    solution = verdict(unit, exercise, [getattr(load_reference(unit), name) for name in names])
    print(f"{exercise.name}, in {file_of(exercise)}\n\nthe master's solution: {solution}")
    as_it_should = solution == "passes"
    print(f"\n{len(exercise.mistakes)} mistakes, each of which should be named:")
    for sentence, edits in exercise.mistakes.items():
        heard = said(exercise, exercise.build(edits))
        as_it_should &= sentence in heard
        print(f"  named   {sentence}" if sentence in heard else f"  MISSED  {sentence}\n          heard: {heard or 'passes'}")
    print(f"\n{len(exercise.variants)} variants, each of which should pass:")
    for name, edits in exercise.variants.items():
        heard = verdict(unit, exercise, exercise.build(edits))
        as_it_should &= heard == "passes"
        print(f"  passes  {name}" if heard == "passes" else f"  REFUSED {name}\n          heard: {heard}")
    return as_it_should


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.proving.trying", description="Try one exercise's check.")
    parser.add_argument("unit", choices=units(), metavar="UNIT", help="such as 08_lora")
    parser.add_argument("exercise", nargs="?", metavar="EXERCISE", help="such as merge; default: name them")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="Python that defines an answer of yours")
    options = parser.parse_args(arguments)
    exercises = by_name(options.unit)
    if options.exercise is None:
        print("\n".join(exercises))
        return 0
    if options.exercise not in exercises:
        parser.error(f"{options.unit} has no exercise {options.exercise!r}; it has {', '.join(exercises)}")
    exercise = exercises[options.exercise]
    as_it_should = try_all(options.unit, exercise)
    if options.file is not None:
        print(f"\n{options.file}: {verdict(options.unit, exercise, answers_in(options.file, options.unit, exercise))}")
    return 0 if as_it_should else 1


if __name__ == "__main__":
    sys.exit(main())
