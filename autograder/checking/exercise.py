"""What an exercise is made of: a right answer, wrong ones, and what tells them apart."""

import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from autograder.checking.drive import Observation
from autograder.checking.judging import Judge

Edits = Mapping[str, str]
"""Pieces of the spec's source and what stands in their place."""


@dataclass(frozen=True, eq=False)  # two exercises are the same if they are one object
class Exercise(Judge):
    """One exercise: its spec, the mistakes we expect, other right answers, and the way to judge a student's.

    Calling it checks an answer: `check_merge(merge, unmerge)`.

    Attributes:
        spec: the functions or classes that a right answer consists of, under the names that the student uses.
        driver: `driver(*answers, **case)` uses the answers and returns what can be observed (see `autograder.checking.drive`).
        helpers: functions that the driver calls, which travel with it.
        cases: `cases(generator)` returns fresh random inputs, each a dict of the driver's keyword arguments.
        mistakes: each sentence names a mistake, and edits of the spec's source, or a source, make it. They are the diagnosis
            that a student reads and the wrong answers that the grader's tests must see rejected.
        variants: right answers written differently, as source or as edits; the grader's tests must see them accepted.
        reading: turns a driver's observation into what is compared; runs on the trusted side.
        exact: what the reading compares with, for a case, if it takes a right answer to compute that: the reading finds it
            among the case's own names.
        tolerance: the largest difference between two right answers, for a case, by field; fields not named must be equal.
        at_most: fields (bytes, say) of which less than expected is right too.
        measures_peak: for which cases to compare, too, by how many bytes the process grows at its peak.
    """

    spec: Sequence[Callable]
    driver: Callable[..., Observation]
    cases: Callable[[torch.Generator], Iterable[dict]]
    mistakes: Mapping[str, Edits | str]
    variants: Mapping[str, Edits | str]
    helpers: Sequence[Callable] = ()
    reading: Callable[[Observation, dict], Observation] = lambda observation, case: observation
    exact: Callable[[dict], dict] = lambda case: {}
    tolerance: Callable[[dict], Mapping[str, float]] = lambda case: {}
    at_most: frozenset[str] = frozenset()
    measures_peak: Callable[[dict], bool] = lambda case: False

    @property
    def answer_names(self) -> list[str]:
        return [part.__name__ for part in self.spec]

    def fresh_cases(self, seed: int | None = None) -> list[dict]:
        """Return random inputs: others at each call, or those that belong to a seed."""
        generator = torch.Generator().manual_seed(torch.seed() % 2**31 if seed is None else seed)
        return list(self.cases(generator))

    def expected(self, case: dict) -> Observation:
        return self.observe(self.spec, case)

    def would_be(self, mistake: str, cases: Sequence[dict]) -> Callable[[int], Observation]:
        wrong = self.build(self.mistakes[mistake])
        return cache(lambda number: self.observe(wrong, cases[number]))

    def accepts(self, answers: Sequence[object], seed: int | None = None) -> bool:
        """Whether answers are right, without saying why not."""
        for case in self.fresh_cases(seed):
            if self.difference(self.expected(case), self.observe(answers, case), case):
                return False
        return True

    def way_out(self) -> str:
        return f"(Stuck? Open the hints; or let `{self.check_name}.show_answer()`, in a cell of its own, show a right answer.)"

    def show_answer(self) -> None:
        """Print a right answer: the one that the check compares with."""
        print(self.source())

    def source(self, edits: Edits | str = "") -> str:
        """Return the source of the spec, with the edits made; a variant that is source already is returned as it is.

        Raises:
            ValueError: if a piece to be replaced does not occur exactly once.
        """
        if isinstance(edits, str) and edits:
            return textwrap.dedent(edits)
        source = "\n\n".join(_source_of(part) for part in self.spec)
        edits = dict(edits or {})
        for old in edits:
            if source.count(old) != 1:
                raise ValueError(f"{old!r} occurs {source.count(old)} times in the spec of {self.name}")
        # All at once, or one edit's outcome could be taken for another's target.
        return re.sub("|".join(map(re.escape, edits)), lambda found: edits[found[0]], source) if edits else source

    def build(self, edits: Edits | str) -> list[object]:
        """Return the spec's functions or classes as they are after the edits.

        Edits may use the names of the spec's file and of the driver's, and `math`, `torch`, `nn` and `F`.
        """
        namespace = {"math": math, "torch": torch, "nn": torch.nn, "F": torch.nn.functional}
        namespace |= vars(sys.modules[self.driver.__module__]) | vars(sys.modules[self.spec[0].__module__])
        exec(compile(self.source(edits), "<an edited spec>", "exec"), namespace)
        return [namespace[part.__name__] for part in self.spec]


@cache
def _source_of(part: Callable) -> str:
    return inspect.getsource(part)  # of a class, a tenth of a second: Python parses the whole file
