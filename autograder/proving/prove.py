"""How far the marks can be trusted: for every exercise, what is caught of what is wrong, and what passes of what is right.

    python -m autograder.proving.prove              every unit
    python -m autograder.proving.prove 08_lora      one

The known mistakes must be rejected, each with its own sentence, the variants accepted; and of the automatic mutants of the
master's solutions (`autograder.proving.mutants`), at least 95 in 100 must be rejected. Each that survives has its reason in the
unit's `hidden_cases.py`, under `SURVIVORS`. The exit status says whether all of this holds.
"""

import argparse
import contextlib
import io
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType

from tqdm import tqdm

from autograder.checking import hidden
from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from autograder.checking.masters import code_cells, exercises_of, load_hidden_cases, load_reference, solution_cells, units
from autograder.proving.mutants import Mutant, mutants

SECONDS = 20
"""After so long a mutant counts as rejected: it loops."""
WANTED = 0.95


@dataclass
class Proof:
    """The outcome for one unit.

    Attributes:
        missed: mistakes that were accepted, or rejected without being named.
        refused: right variants that were rejected.
        killed: how many mutants were rejected.
        survivors: the others, by what was changed, with the reason why they may live, or None.
    """

    unit: str
    mistakes: int = 0
    variants: int = 0
    missed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    killed: int = 0
    survivors: dict[str, str | None] = field(default_factory=dict)

    @property
    def share_killed(self) -> float:
        """Of all mutants."""
        return self.killed / max(self.killed + len(self.survivors), 1)

    @property
    def holds(self) -> bool:
        """Whether the unit's marks can be trusted as far as this goes."""
        return not self.missed and not self.refused and self.share_killed >= WANTED and all(self.survivors.values())

    def __str__(self) -> str:
        total = self.killed + len(self.survivors)
        lines = [
            self.unit,
            f"  known mistakes rejected and named: {self.mistakes - len(self.missed)} of {self.mistakes}",
            f"  right variants accepted:           {self.variants - len(self.refused)} of {self.variants}",
            f"  automatic mutants rejected:        {self.killed} of {total} ({self.share_killed:.1%})",
        ]
        lines += [f"    missed: {sentence}" for sentence in self.missed]
        lines += [f"    refused: {name}" for name in self.refused]
        lines += [f"    survives: {change}\n      {reason or 'NOT EXPLAINED'}" for change, reason in self.survivors.items()]
        return "\n".join(lines)


def prove(unit: str) -> Proof:
    """Try every mistake, variant and mutant of a unit's exercises."""
    proof = Proof(unit)
    try_known_answers(proof)
    try_mutants(proof)
    return proof


def try_known_answers(proof: Proof) -> None:
    """Note in the proof which mistakes of the unit are missed, and which variants are refused."""
    for exercise in tqdm(exercises_of(proof.unit), desc=f"{proof.unit}, known answers", disable=None):
        proof.mistakes += len(exercise.mistakes)
        proof.variants += len(exercise.variants)
        for sentence, edits in exercise.mistakes.items():
            if sentence not in said(exercise, exercise.build(edits)):
                proof.missed.append(f"{exercise.name}: {sentence}")
        for name, edits in exercise.variants.items():
            heard = said(exercise, exercise.build(edits))
            if heard:
                proof.refused.append(f"{exercise.name}: {name}: {heard.splitlines()[0]}")


def try_mutants(proof: Proof) -> None:
    """Note in the proof how many mutants of the unit's solutions are rejected, and which survive."""
    exercises = exercises_of(proof.unit)
    explained = getattr(load_hidden_cases(proof.unit), "SURVIVORS", {})
    for mutant, module in tqdm(list(_mutated(proof.unit)), desc=f"{proof.unit}, mutants", disable=None):
        if any(_rejects(proof.unit, exercise, module) for exercise in exercises):
            proof.killed += 1
        else:
            proof.survivors[mutant.change] = explained.get(mutant.change)


def said(exercise: Exercise, answers: Sequence[object]) -> str:
    """Return the check's message, or nothing if it accepts."""
    return _message_of(lambda: exercise(*answers, seed=0))


def said_of_hidden_cases(unit: str, exercise: Exercise, answers: Sequence[object]) -> str:
    """Return the message of the hidden tests behind a check, or nothing if they accept."""
    return _message_of(lambda: hidden.check(unit, exercise, *answers, seed=0))


def _message_of(check: Callable[[], None]) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check()
    except CheckFailedError as failed:
        return str(failed)
    return ""


def _mutated(unit: str) -> Iterator[tuple[Mutant, ModuleType | None]]:
    """Yield each mutant of the master's solutions and the module that it makes, or None if it does not even load."""
    reference = load_reference(unit)
    for cell in solution_cells(code_cells(unit)):
        for mutant in mutants(cell.source):
            module = ModuleType("mutant")
            vars(module).update({name: value for name, value in vars(reference).items() if not name.startswith("__")})
            try:
                exec(compile(mutant.source, "<mutant>", "exec"), vars(module))
            except Exception:
                module = None
            yield mutant, module


class _TooLongError(BaseException):
    """Raised in the midst of a mutant; not an Exception, or a check would take it for the mutant's own."""


def _rejects(unit: str, exercise: Exercise, module: ModuleType | None) -> bool:
    """Whether the check, or the hidden tests behind it, reject what the module defines."""
    if module is None:
        return True
    reference = load_reference(unit)
    answers = [getattr(module, part.__name__) for part in exercise.spec]
    if all(answer is getattr(reference, part.__name__) for answer, part in zip(answers, exercise.spec, strict=True)):
        return False  # the mutant is elsewhere

    def stop(*_: object) -> None:
        raise _TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        if not exercise.accepts(answers, seed=0):
            return True
        hidden.check(unit, exercise, *answers, seed=0)
    except (CheckFailedError, _TooLongError):
        return True
    finally:
        signal.alarm(0)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line described in this module's docstring; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m autograder.proving.prove", description="Prove the grader.")
    parser.add_argument("units", nargs="*", metavar="UNIT", help="such as 08_lora; default: all with graded exercises")
    options = parser.parse_args(arguments)
    graded = [unit for unit in units() if exercises_of(unit)]
    for name in options.units:
        if name not in graded:
            parser.error(f"{name!r} has no graded exercises; these have: {', '.join(graded)}")
    holds = True
    for unit in options.units or graded:
        start = time.monotonic()
        proof = prove(unit)
        print(f"{proof}\n  ({time.monotonic() - start:.0f} s)")
        holds = holds and proof.holds
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
