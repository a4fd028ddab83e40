"""Checks judge answers that live in another process, from nothing but the tensors that come back."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from autograder.checking.drive import drive_and_measure
from autograder.checking.exercise import Exercise
from autograder.checking.failure import CheckFailedError
from every_exercise import EXERCISES
from two_processes import OtherProcess


def notebook(exercise: Exercise) -> str:
    """Return what a student's notebook has besides this answer: imports, given classes, the answers to its other exercises."""
    package = sys.modules[exercise.spec[0].__module__.rpartition(".")[0]]
    own = {part.__name__ for part in exercise.spec}
    names = {part.__name__ for other in package.EXERCISES.values() for part in other.spec} - own
    imports, definitions = [], []
    for path in sorted(Path(package.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            ours = isinstance(node, ast.ImportFrom) and node.module.startswith("autograder")
            given = isinstance(node, ast.ClassDef) and node.name not in own
            if isinstance(node, ast.Import | ast.ImportFrom) and not ours:
                imports.append(ast.unparse(node))
            elif given or getattr(node, "name", None) in names:
                definitions.append(ast.unparse(node))
    return "\n\n".join([*imports, *definitions]) + "\n\n"


@pytest.fixture(scope="module")
def other():
    process = OtherProcess()
    yield process
    process.close()


@pytest.fixture
def elsewhere(other):
    def define(exercise, edits=""):
        other.define(notebook(exercise) + exercise.source(edits))
        return [other.answer(part.__name__) for part in exercise.spec]

    return define


@pytest.mark.parametrize("name", EXERCISES)
def test_a_right_answer_passes(name, elsewhere):
    exercise = EXERCISES[name]
    answers = elsewhere(exercise, next(iter(exercise.variants.values())))
    for seed in range(2):
        exercise(*answers, seed=seed)


@pytest.mark.parametrize("name", EXERCISES)
def test_mistakes_are_named(name, elsewhere):
    exercise = EXERCISES[name]
    for sentence, edits in list(exercise.mistakes.items())[:2]:
        with pytest.raises(CheckFailedError) as caught:
            exercise(*elsewhere(exercise, edits), seed=0)
        assert sentence in str(caught.value)


def test_memory_is_measured_from_outside(elsewhere):
    """A base copied in the other process is seen in that process's size, whatever the process says of itself."""
    exercise = EXERCISES["check_lora_memory"]
    sentence = next(sentence for sentence in exercise.mistakes if "process grows" in sentence)
    with pytest.raises(CheckFailedError, match="process grows"):
        exercise(*elsewhere(exercise, exercise.mistakes[sentence]))


def test_memory_that_was_freed_before_does_not_hide_an_allocation():
    """A heap full of freed blocks serves 64 MiB without growing, unless it goes back to the system first."""
    exercise = EXERCISES["check_lora_memory"]
    large = next(case for case in exercise.cases(torch.Generator()) if exercise.measures_peak(case))
    blocks = [torch.ones(1000 * i % 300_000 + 10) for i in range(4000)]
    del blocks
    _, peak = drive_and_measure(exercise.driver, exercise.spec, large)
    base = 4 * large["in_features"] * large["out_features"]
    assert base <= peak < 1.5 * base
