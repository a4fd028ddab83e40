"""Checks that hold no answer: what a right answer and the known mistakes give has been recorded, for cases of several seeds.

A class is given these (`autograder.building.class_kit`). They say the same sentences as the checks that they were recorded
from, and are quicker: nothing is run but the student's code.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path

import torch

from autograder.checking.drive import Observation
from autograder.checking.failure import CheckFailedError
from autograder.checking.judging import PEAK_BYTES, RAISED, Judge


class RecordedCase(dict):
    """A case, with what was recorded of it.

    Attributes:
        exact, tolerance: as the exercise computes them for this case.
        measured: whether the process's peak is compared.
        expected: what is observed of a right answer.
        mistakes: what is observed of each mistake.
    """

    def __init__(self, recorded: dict):
        super().__init__(recorded["case"])
        self.exact: dict = recorded["exact"]
        self.tolerance: Mapping[str, float] = recorded["tolerance"]
        self.measured: bool = recorded["measured"]
        self.expected: Observation = recorded["expected"]
        self.mistakes: list[Observation] = recorded["mistakes"]


class RecordedCheck(Judge):
    """The check of one exercise, from a recording.

    Args:
        answer_names: the names of what a student writes, in order.
        recording: the file, as `torch.save` wrote what `autograder.building.record` gave.
    """

    def __init__(
        self,
        answer_names: Sequence[str],
        driver: Callable[..., Observation],
        recording: Path,
        helpers: Sequence[Callable] = (),
        reading: Callable[[Observation, dict], Observation] = lambda observation, case: observation,
        at_most: Sequence[str] = (),
    ):
        self._names, self._file = list(answer_names), recording
        self.driver, self.helpers, self.reading = driver, helpers, reading
        self.at_most = frozenset(at_most)

    @cached_property
    def _recorded(self) -> dict:
        return torch.load(self._file, weights_only=True)

    @property
    def answer_names(self) -> list[str]:
        return self._names

    @property
    def mistakes(self) -> list[str]:
        """The sentences that name mistakes."""
        return self._recorded["mistakes"]

    def fresh_cases(self, seed: int | None = None) -> list[dict]:
        seeds = self._recorded["seeds"]
        chosen = torch.seed() if seed is None else seed
        return [RecordedCase(recorded) for recorded in seeds[chosen % len(seeds)]]

    def exact(self, case: RecordedCase) -> dict:
        return case.exact

    def expected(self, case: RecordedCase) -> Observation:
        return case.expected

    def would_be(self, mistake: str, cases: Sequence[RecordedCase]) -> Callable[[int], Observation]:
        number = self.mistakes.index(mistake)
        return cache(lambda place: cases[place].mistakes[number])

    def tolerance(self, case: RecordedCase) -> Mapping[str, float]:
        return case.tolerance

    def measures_peak(self, case: RecordedCase) -> bool:
        return case.measured

    def difference(self, expected: Observation, observed: Observation, case: dict) -> str | None:
        if PEAK_BYTES in expected and PEAK_BYTES not in observed and RAISED not in observed:  # a system that does not say it
            expected = {name: value for name, value in expected.items() if name != PEAK_BYTES}
        return super().difference(expected, observed, case)

    def _check(self, answers: Sequence[object], seed: int | None) -> None:
        try:
            super()._check(answers, seed)
        except CheckFailedError as failed:
            recorded_with, here = self._recorded["torch"], torch.__version__.split("+")[0]
            if recorded_with == here:
                raise
            note = f"(The check was made with PyTorch {recorded_with}; here is {here}. If you are sure of your answer, say so.)"
            raise CheckFailedError(f"{failed}\n{note}") from None
