"""How an answer is judged: by what a driver observes of it, beside what it observes of a right answer and of known mistakes.

The right answer and the mistakes are at hand, and are run (`autograder.checking.exercise`); or what they give has been
recorded (`autograder.checking.recorded`).
"""

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from autograder.checking.drive import Observation, as_torch_starts, describe_error, drive, drive_and_measure
from autograder.checking.failure import CheckFailedError
from peftlab import progress

RAISED = "raised"
PEAK_BYTES = "peak bytes"
PEAK_ALLOWANCE = "peak allowance"
"""A case that has this key is large, and of measured memory: by so many bytes may the peak of a sparing answer differ.

The driver sends back a sample only, by which it can be seen that the answer did what was asked of it.
"""
SAMPLE, SAMPLE_TOLERANCE = "a sample of the outcome", 1e-3
NOT_WRITTEN = r"NotImplementedError(?!:)"
"""How the description of the error begins that a cell without an answer raises; PyTorch raises it, too, with a message."""
UNWRITTEN = "not written yet. Replace the `raise NotImplementedError()` by your code, and run that cell again."
MANY_TRIES = 3
"""After so many failed checks in a row a reader is told where the answer is."""
COMPARED = 600
"""Characters by which two errors are compared: what comes from another process may have been cut behind them."""


class Judge(ABC):
    """Judges answers to one exercise. Calling it checks an answer: `check_merge(merge, unmerge)`.

    Attributes:
        driver: `driver(*answers, **case)` uses the answers and returns what can be observed (see `autograder.checking.drive`).
        helpers: functions that the driver calls, which travel with it.
        mistakes: sentences, each of which names a mistake.
        reading: turns a driver's observation into what is compared, given the case and what is `exact` of it; runs on the
            trusted side.
        at_most: fields (bytes, say) of which less than expected is right too.
    """

    driver: Callable[..., Observation]
    helpers: Sequence[Callable]
    mistakes: Iterable[str]
    reading: Callable[[Observation, dict], Observation]
    at_most: frozenset[str]

    @property
    @abstractmethod
    def answer_names(self) -> list[str]:
        """The names of the functions or classes that an answer consists of, in order."""

    @abstractmethod
    def fresh_cases(self, seed: int | None = None) -> list[dict]:
        """Return random inputs: others at each call, or those that belong to a seed."""

    @abstractmethod
    def exact(self, case: dict) -> dict:
        """Return what the reading compares with, which is computed by a right answer."""

    @abstractmethod
    def expected(self, case: dict) -> Observation:
        """Return what is observed of a right answer."""

    @abstractmethod
    def would_be(self, mistake: str, cases: Sequence[dict]) -> Callable[[int], Observation]:
        """Return a function from a case's number to what is observed of an answer with this mistake."""

    @abstractmethod
    def tolerance(self, case: dict) -> Mapping[str, float]:
        """Return the largest difference between two right answers, by field; fields not named must be equal."""

    @abstractmethod
    def measures_peak(self, case: dict) -> bool:
        """Whether to compare, too, by how many bytes the process grows at its peak."""

    @property
    def name(self) -> str:
        """The names of what the student writes, as in a sentence."""
        *others, last = self.answer_names
        return f"{', '.join(others)} and {last}" if others else last

    @property
    def package(self) -> str:
        """The name of the unit's package of checks: `lora` for 08_lora."""
        return self.driver.__module__.removeprefix("autograder.checks.").partition(".")[0]

    @property
    def check_name(self) -> str:
        """The name under which notebooks import the check, such as `check_merge`; empty if it is in no package of checks."""
        package = sys.modules.get(f"autograder.checks.{self.package}")
        return next((name for name, value in vars(package).items() if value is self), "") if package else ""

    def way_out(self) -> str | None:
        """Return where someone who is stuck finds the answer, or None where it is not at hand."""
        return None

    def __call__(self, *answers: object, seed: int | None = None) -> None:
        """Check a student's answers on fresh random inputs, and say so if they pass.

        What the notebook has set for all of torch does not hold meanwhile. `peftlab.progress` keeps the outcome.

        Raises:
            CheckFailedError: naming the mistake if it is a known one, else what was expected and what came.
            RuntimeError: if the check cannot be made on this machine.
        """
        if len(answers) != len(self.answer_names) or None in answers:
            raise CheckFailedError(f"{self.name}: call the check as the notebook does, with {self.name}, in this order.")
        try:
            with as_torch_starts():
                self._check(answers, seed)
        except CheckFailedError as failed:
            tries = 0 if UNWRITTEN in str(failed) else progress.note_check(self.package, self.check_name, passed=False)
            if tries < MANY_TRIES or not (way_out := self.way_out()):
                raise
            raise CheckFailedError(f"{failed}\n{way_out}") from None
        progress.note_check(self.package, self.check_name, passed=True)

    def _check(self, answers: Sequence[object], seed: int | None) -> None:
        cases = self.fresh_cases(seed)
        expected = [self.expected(case) for case in cases]
        for seen in expected:
            if RAISED in seen:  # an answer that raises the same would pass
                raise RuntimeError(f"{self.name} cannot be checked here: the check's own answer raised {seen[RAISED]}")
        observed = [self.observe(answers, case) for case in cases]
        differences = [self.difference(*pair) for pair in zip(expected, observed, cases, strict=True)]
        if not any(differences):
            print(f"{self.name}: passed, on {len(cases)} fresh random {'case' if len(cases) == 1 else 'cases'}.")
            return
        try:
            unwritten = any(re.match(NOT_WRITTEN, seen.get(RAISED, "")) for seen in observed)
            named = None if unwritten else self.diagnose(observed, expected, cases)
        except Exception:  # likewise; the answer is wrong in any case
            named = None
        raise CheckFailedError(f"{self.name}: {named or next(filter(None, differences))}")

    def observe(self, answers: Sequence[object], case: dict) -> Observation:
        """Return what the driver and the reading see of these answers; if they raise, what they raise."""
        copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in case.items()}
        try:
            of_memory = copied.pop(PEAK_ALLOWANCE, None) is not None
            if of_memory or self.measures_peak(case):
                observation, peak = drive_and_measure(self.driver, answers, copied, self.helpers)
            else:
                observation, peak = drive(self.driver, answers, copied, self.helpers), None
            read = observation if of_memory else self.reading(observation, {**case, **self.exact(case)})
        except Exception as error:
            return {RAISED: describe_error(error)}
        return read if peak is None else {**read, PEAK_BYTES: peak}

    def difference(self, expected: Observation, observed: Observation, case: dict) -> str | None:
        """Return a sentence on the first field in which `observed` is not right, or None."""
        try:
            return self._difference(expected, observed, case)
        except Exception as error:  # what comes back from another process may be anything
            return f"what your code gives cannot be compared with what is expected ({type(error).__name__})."

    def _difference(self, expected: Observation, observed: Observation, case: dict) -> str | None:
        if RAISED in observed and RAISED not in expected:
            if re.match(NOT_WRITTEN, observed[RAISED]):
                return UNWRITTEN
            raised = " ".join(observed[RAISED].split()).rstrip(".")
            if raised.startswith("what came back"):
                return f"{raised}. Is a `return` missing, or one of the values that it should return?"
            return f"your code raised {raised}."
        tolerance, at_most = self._bounds(case)
        for name, wanted in expected.items():
            if name not in observed:
                return f"{name} is missing: expected {_short(wanted)}."
            problem = _compare(wanted, observed[name], tolerance.get(name, 0.0), name in at_most)
            if problem:
                return f"{name}{problem}"
        return None

    def diagnose(self, observed: list[Observation], expected: list[Observation], cases: list[dict]) -> str | None:
        """Return the sentence of the mistake that explains the observations, or None.

        Best is a mistake that gives these very observations. An answer with two mistakes gives those of no single one; then it
        is a mistake whose first wrong field, in every case, is the same and has the same value. A process's peak is noisy and
        tells nothing there.
        """
        wrong_fields = {
            number: name
            for number, triple in enumerate(zip(expected, observed, cases, strict=True))
            if (name := self._first_wrong_field(*triple)) not in (None, PEAK_BYTES)
        }
        can_be_partial = wrong_fields and RAISED not in wrong_fields.values()
        partial = None
        for sentence in self.mistakes:
            would_be = self.would_be(sentence, cases)
            if all(self._looks_like(would_be(number), observed[number], case) for number, case in enumerate(cases)):
                return f"{sentence}."
            if can_be_partial and all(
                self._first_wrong_field(expected[number], would_be(number), cases[number]) == name
                and self._explains(would_be(number), name, observed[number], cases[number])
                for number, name in wrong_fields.items()
            ):
                can_be_partial, partial = False, f"{sentence}."
        return partial

    def _first_wrong_field(self, expected: Observation, observed: Observation, case: dict) -> str | None:
        if RAISED in observed:
            return RAISED
        tolerance, at_most = self._bounds(case)
        for name, wanted in expected.items():
            if name not in observed or _compare(wanted, observed[name], tolerance.get(name, 0.0), name in at_most):
                return name
        return None

    def _explains(self, would_be: Observation, name: str, seen: Observation, case: dict) -> bool:
        """Whether a wrong answer's observation has the same value in this one field."""
        if name not in seen or name not in would_be:
            return False
        return not _compare(would_be[name], seen[name], self._noise(name, case), False)

    def _looks_like(self, would_be: Observation, seen: Observation, case: dict) -> bool:
        if RAISED in seen or RAISED in would_be:
            return _without_line(seen.get(RAISED)) == _without_line(would_be.get(RAISED))
        return seen.keys() == would_be.keys() and not any(
            _compare(would_be[name], seen[name], self._noise(name, case), False) for name in seen
        )

    def _noise(self, name: str, case: dict) -> float:
        """By how much a field differs from run to run: a count of bytes not at all, whatever a right answer is allowed."""
        exact = name in self.at_most and name != PEAK_BYTES
        return 0.0 if exact else self._bounds(case)[0].get(name, 0.0)

    def _bounds(self, case: dict) -> tuple[Mapping[str, float], frozenset[str]]:
        """Return the tolerance of a case, and the fields of which less is right too."""
        if PEAK_ALLOWANCE in case:
            return {PEAK_BYTES: case[PEAK_ALLOWANCE], SAMPLE: SAMPLE_TOLERANCE}, frozenset({PEAK_BYTES})
        return self.tolerance(case), self.at_most


def _compare(expected: object, got: object, tolerance: float, at_most: bool) -> str | None:
    """Return what is wrong with `got`, to be put behind the field's name, or None."""
    if isinstance(expected, Tensor):
        return _compare_tensors(expected, got, tolerance)
    if isinstance(expected, bool):
        return None if got is expected else f": expected {expected}, got {_short(got)}."
    if isinstance(expected, int | float) and isinstance(got, int | float):
        right = got <= expected + tolerance if at_most else abs(got - expected) <= tolerance
        if right:
            return None
        margin = f", give or take {tolerance:,.3g}" if tolerance else ""
        wanted, found = _apart(expected, got)
        return f" should be {'at most ' if at_most else ''}{wanted}{margin}; it is {found}."
    return None if got == expected else f" should be {_short(expected)}; it is {_short(got)}."


def _apart(*pair: float) -> tuple[str, ...]:
    """Return two numbers with as many digits as it takes to see in what they differ."""
    if not all(map(math.isfinite, pair)) or pair[0] == pair[1]:
        digits = 4
    else:
        largest = max(map(abs, pair))
        digits = max(4, math.ceil(math.log10(largest)), math.ceil(math.log10(largest / abs(pair[0] - pair[1]))) + 2)
    return tuple(f"{value:,}" if isinstance(value, int) else f"{value:,.{min(digits, 17)}g}" for value in pair)


def _compare_tensors(expected: Tensor, got: object, tolerance: float) -> str | None:
    if not isinstance(got, Tensor):
        return f" should be a tensor; it is {_short(got)}."
    if got.shape != expected.shape:
        return f" should have shape {tuple(expected.shape)}; it has {tuple(got.shape)}."
    if got.dtype != expected.dtype:
        return f" should have dtype {expected.dtype}; it has {got.dtype}."
    if expected.numel() == 0:
        return None
    differences = (got.double() - expected.double()).abs()
    if not differences.isfinite().all():  # NaN beside NaN is no difference, nor is the same infinity
        differences = differences.masked_fill((got == expected) | (got.isnan() & expected.isnan()), 0.0)
    worst = differences.max().item()
    if worst <= tolerance:  # False for NaN
        return None
    allowed = f"at most {tolerance:.1g}, by rounding" if tolerance else "nothing"
    shown, where = (_short(expected), _short(got)), ""
    if shown[0] == shown[1]:  # what differs stands further behind, or in later digits
        place = tuple(int(index) for index in torch.unravel_index(differences.argmax(), differences.shape))
        shown, where = _apart(expected[place].item(), got[place].item()), f", at {list(place)}" if place else ""
    return (
        f": off by up to {worst:.3g}{where}, where right answers differ by {allowed}.\n"
        f"  expected {shown[0]}\n  got      {shown[1]}"
    )


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        numbers = value.flatten()[:4].tolist()
        return f"[{', '.join(f'{number:.4g}' for number in numbers)}{', ...' if value.numel() > 4 else ''}]"
    return repr(value) if len(repr(value)) < 300 else repr(value)[:300] + " ..."


def _without_line(raised: object) -> str | None:
    """The message of an error without the place where it was raised, which differs from answer to answer."""
    return None if raised is None else str(raised).split(" (line ")[0][:COMPARED]
