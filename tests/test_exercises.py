"""Every grader is tested: each known mistake is rejected by name, each right variant passes, always."""

import importlib
import pkgutil

import pytest
import torch

import autograder.checks
from autograder.exercise import Exercise
from autograder.failure import CheckFailedError

MODULES = [
    importlib.import_module(f"autograder.checks.{module.name}") for module in pkgutil.iter_modules(autograder.checks.__path__)
]
EXERCISES = {name: exercise for module in MODULES for name, exercise in module.EXERCISES.items()}
MISTAKES = [(name, sentence) for name, exercise in EXERCISES.items() for sentence in exercise.mistakes]
VARIANTS = [(name, variant) for name, exercise in EXERCISES.items() for variant in exercise.variants]


def seeds(exercise: Exercise, wanted: int) -> range:
    """A check that measures, on 64 MiB matrices or with fake tensors, gets fewer seeds."""
    measured = exercise.costly or any(exercise.measures_peak(case) for case in exercise.cases(torch.Generator()))
    return range(5 if measured else wanted)


@pytest.mark.parametrize("name", EXERCISES)
def test_enough_mistakes_and_variants(name):
    assert len(EXERCISES[name].mistakes) >= 8
    assert len(EXERCISES[name].variants) >= 3


@pytest.mark.parametrize("name", EXERCISES)
def test_the_spec_passes(name, capsys):
    exercise = EXERCISES[name]
    for seed in seeds(exercise, 200):
        exercise(*exercise.spec, seed=seed)
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_right_variant_passes(name, variant):
    exercise = EXERCISES[name]
    answers = exercise.build(exercise.variants[variant])
    for seed in seeds(exercise, 200):
        exercise(*answers, seed=seed)


@pytest.mark.parametrize(("name", "sentence"), MISTAKES)
def test_every_mistake_is_rejected_by_name(name, sentence):
    exercise = EXERCISES[name]
    wrong = exercise.build(exercise.mistakes[sentence])
    for seed in seeds(exercise, 10):
        with pytest.raises(CheckFailedError) as caught:
            exercise(*wrong, seed=seed)
        assert sentence in str(caught.value)


@pytest.mark.parametrize("name", EXERCISES)
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


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("nonsense", [None, 42, lambda *a, **k: None, lambda *a, **k: float("nan"), torch.nn.Identity])
def test_nonsense_fails_with_a_message(name, nonsense):
    exercise = EXERCISES[name]
    with pytest.raises(CheckFailedError) as caught:
        exercise(*[nonsense] * len(exercise.spec))
    assert len(str(caught.value)) < 1000


def test_a_failure_is_printed_without_frames():
    assert CheckFailedError("merge: wrong.\n  expected 1")._render_traceback_() == ["Not yet.", "merge: wrong.", "  expected 1"]


def test_an_edit_that_does_not_apply_is_an_error():
    exercise = EXERCISES["check_merge"]
    with pytest.raises(ValueError, match="occurs 0 times"):
        exercise.source({"no such text": ""})


def test_an_unknown_mistake_gets_expected_and_got():
    exercise = EXERCISES["check_merge"]
    merge, unmerge = exercise.build({"layer.base.weight += layer.scaling": "layer.base.weight += 1.01 * layer.scaling"})
    with pytest.raises(CheckFailedError, match=r"off by up to .*right answers differ by at most.*\n +expected \[.*\n +got +\["):
        exercise(merge, unmerge)


def test_a_cell_run_twice_in_between_does_not_matter():
    """Checks take fresh inputs on every call, and leave no state behind."""
    exercise = EXERCISES["check_lora_forward"]
    for _ in range(3):
        exercise(*exercise.spec)
