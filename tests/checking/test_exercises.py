"""Every grader is tested: each known mistake is rejected by name, each right variant passes, always."""

import builtins
import os
import symtable
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from autograder.checking import hidden
from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from autograder.checking.judging import RAISED, _compare
from autograder.checking.masters import exercises_of, load_reference, units
from every_exercise import EXERCISES, UNIT_OF
from symbols import global_names


def each(values: Callable[[Exercise], Iterable] = lambda exercise: ()) -> list:
    """Return every exercise's name with each of its values, to parametrize by; `pytest -n` keeps an exercise in one process."""
    return [
        pytest.param(name, *parts, marks=pytest.mark.xdist_group(name))
        for name, exercise in EXERCISES.items()
        for parts in [(value,) for value in values(exercise)] or [()]
    ]


NONSENSE = [None, 42, lambda *a, **k: None, lambda *a, **k: float("nan"), torch.nn.Identity]
MISTAKES = each(lambda exercise: exercise.mistakes)
VARIANTS = each(lambda exercise: exercise.variants)


def seeds(wanted: int, at_least: int = 1) -> Iterator[int]:
    """Yield so many seeds, but none after a fifth of a second of work, except the first; with `EVERY_ANSWER=1`, all."""
    start = sum(os.times()[:4])  # of this process and of those that it has started and that have ended
    for seed in range(wanted):
        if seed >= at_least and sum(os.times()[:4]) - start > 0.2 and not os.environ.get("EVERY_ANSWER"):
            return
        yield seed


class Remembered:
    """What an exercise's cases are, and what its spec and its mistakes give, for as long as that exercise is tested.

    A check that looks for a mistake tries one after the other. Tests of all of them would run the first ones again each time.
    """

    def __init__(self):
        self.exercise, self.known = None, {}

    def once(self, exercise: Exercise, key: tuple, compute):
        if exercise is not self.exercise:
            self.exercise, self.known = exercise, {}
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]


REMEMBERED = Remembered()


@pytest.fixture
def once(monkeypatch):
    """Let a check with a seed run its spec and each of its mistakes once a case, and not again in the next test."""
    fresh_cases, expected, would_be = Exercise.fresh_cases, Exercise.expected, Exercise.would_be

    def cases_of(self, seed=None):
        return (
            REMEMBERED.once(self, ("cases", seed), lambda: fresh_cases(self, seed)) if seed is not None else fresh_cases(self)
        )

    def of_spec(self, case):
        return REMEMBERED.once(self, ("spec", id(case)), lambda: (case, expected(self, case)))[1]

    def of_mistake(self, mistake, cases):
        def at(number):
            case = cases[number]
            return REMEMBERED.once(self, (mistake, id(case)), lambda: (case, would_be(self, mistake, cases)(number)))[1]

        return at

    for name, replacement in {"fresh_cases": cases_of, "expected": of_spec, "would_be": of_mistake}.items():
        monkeypatch.setattr(Exercise, name, replacement)


@pytest.mark.parametrize("name", each())
def test_enough_mistakes_and_variants(name):
    assert len(EXERCISES[name].mistakes) >= 8
    assert len(EXERCISES[name].variants) >= 3


@pytest.mark.parametrize("name", each())
def test_the_spec_passes(name, capsys):
    exercise = EXERCISES[name]
    for seed in seeds(200, at_least=2):
        exercise(*exercise.spec, seed=seed)
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_right_variant_passes(name, variant):
    exercise = EXERCISES[name]
    answers = exercise.build(exercise.variants[variant])
    for seed in seeds(200, at_least=2):
        exercise(*answers, seed=seed)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_right_variant_passes_the_hidden_cases(name, variant):
    """On which marks depend, and which have dtypes that the visible ones do not."""
    exercise = EXERCISES[name]
    answers = exercise.build(exercise.variants[variant])
    for seed in seeds(200):
        hidden.check(UNIT_OF[name], exercise, *answers, seed=seed)


@pytest.mark.parametrize(("name", "sentence"), MISTAKES)
def test_every_mistake_is_rejected_by_name(name, sentence, once):
    exercise = EXERCISES[name]
    wrong = exercise.build(exercise.mistakes[sentence])
    for seed in seeds(10):
        with pytest.raises(CheckFailedError) as caught:
            exercise(*wrong, seed=seed)
        assert sentence in str(caught.value)


@pytest.mark.parametrize("unit", units())
def test_answers_use_only_names_that_the_notebook_has(unit):
    """Mistakes and variants are handed in as a student would, below the imports of the unit's own notebook."""
    available = {*vars(load_reference(unit)), *dir(builtins)}
    for exercise in exercises_of(unit):
        for name, edits in (exercise.mistakes | exercise.variants).items():
            source = exercise.source(edits)
            table = symtable.symtable(source, "<an answer>", "exec")
            unknown = global_names(table) - available - {symbol.get_name() for symbol in table.get_symbols()}
            assert not unknown, name


@pytest.mark.parametrize("name", each())
def test_an_unwritten_answer_is_told_so(name):
    exercise = EXERCISES[name]

    class Unwritten(torch.nn.Module):
        def __init__(self, *arguments, **named):
            raise NotImplementedError()

    def unwritten(*arguments, **named):
        raise NotImplementedError()

    answers = [Unwritten if isinstance(part, type) else unwritten for part in exercise.spec]
    with pytest.raises(CheckFailedError, match="not written yet"):
        exercise(*answers)


@pytest.mark.parametrize(("name", "nonsense"), each(lambda exercise: NONSENSE))
def test_nonsense_fails_with_a_message(name, nonsense, once):
    exercise = EXERCISES[name]
    with pytest.raises(CheckFailedError) as caught:
        exercise(*[nonsense] * len(exercise.spec), seed=0)
    assert len(str(caught.value)) < 1000


def test_a_check_that_is_called_otherwise_says_how():
    exercise = EXERCISES["check_merge"]
    for answers in (exercise.spec[:1], [*exercise.spec, exercise.spec[0]], [exercise.spec[0], None]):
        with pytest.raises(CheckFailedError, match="with merge and unmerge, in this order"):
            exercise(*answers)


def test_what_the_check_cannot_use_is_not_blamed_on_a_line_of_the_answer():
    with pytest.raises(CheckFailedError, match=r"what came back cannot be used.*Is a `return` missing"):
        EXERCISES["check_absmax_int8"](lambda blocks: None, lambda codes, absmax: None)


def test_an_error_of_pytorch_is_not_taken_for_an_unwritten_answer():
    def reads(*arguments, **named):
        return torch.empty(1, device="meta").item()

    exercise = EXERCISES["check_merge"]
    with pytest.raises(CheckFailedError, match="your code raised"):
        exercise(reads, reads)


def test_a_failure_is_printed_without_frames():
    assert CheckFailedError("merge: wrong.\n  expected 1")._render_traceback_() == ["Not yet.", "merge: wrong.", "  expected 1"]


def test_a_long_failure_is_broken_between_words_on_the_screen_and_whole_in_the_report():
    failure = CheckFailedError("merge: " + "the scale is missing, " * 9 + "\n  expected 1")
    *screen, last = failure._render_traceback_()
    assert len(screen) > 3 and max(map(len, screen)) <= 88 and last == "  expected 1"
    assert " ".join(" ".join(screen).split()) == "Not yet. merge: " + ("the scale is missing, " * 9).strip()
    assert len(failure.lines()) == 3


def test_an_edit_that_does_not_apply_is_an_error():
    exercise = EXERCISES["check_merge"]
    with pytest.raises(ValueError, match="occurs 0 times"):
        exercise.source({"no such text": ""})


def test_an_unknown_mistake_gets_expected_and_got():
    exercise = EXERCISES["check_merge"]
    merge, unmerge = exercise.build({"layer.base.weight += layer.scaling": "layer.base.weight += 1.01 * layer.scaling"})
    with pytest.raises(CheckFailedError, match=r"off by up to .*right answers differ by at most.*\n +expected \[.*\n +got +\["):
        exercise(merge, unmerge)


def test_numbers_are_printed_with_the_digits_in_which_they_differ():
    assert _compare(19_100.0, 18_950.0, 1.0, at_most=False) == " should be 19,100, give or take 1; it is 18,950."
    expected = torch.full((3, 5), 1 / 3, dtype=torch.float64)
    got = expected.clone()
    got[2, 1] += 1e-9
    message = _compare(expected, got, 1e-15, at_most=False)
    assert "at [2, 1]" in message and "0.33333333333\n" in message and "0.33333333433" in message


def test_nan_beside_nan_is_no_difference():
    """So that a mistake which gives NaN can be known by it."""
    expected = torch.tensor([1.0, float("nan"), float("inf")])
    assert _compare(expected, expected.clone(), 0.0, at_most=False) is None
    for other in ([1.0, 2.0, float("inf")], [1.0, float("nan"), -float("inf")], [float("nan")] * 3):
        assert _compare(expected, torch.tensor(other), 1e9, at_most=False)


def test_a_cell_run_twice_in_between_does_not_matter():
    """Checks take fresh inputs on every call, and leave no state behind."""
    exercise = EXERCISES["check_lora_forward"]
    for _ in range(3):
        exercise(*exercise.spec)


def test_a_check_whose_own_answer_raises_passes_nothing(monkeypatch):
    exercise = EXERCISES["check_merge"]
    monkeypatch.setattr(Exercise, "observe", lambda *_: {RAISED: "OSError: not on this system"})
    with pytest.raises(RuntimeError, match=r"cannot be checked here: .* OSError: not on this system"):
        exercise(*exercise.spec)
