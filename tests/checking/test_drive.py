"""A driver runs where the answer lives, on any system."""

import builtins
import ctypes
import symtable

import pytest
import torch

from autograder.checking import drive
from autograder.checking.masters import exercises_of, units
from symbols import global_names


@pytest.fixture
def windows(monkeypatch):
    """Windows, as far as freeing memory sees it: its `ctypes.CDLL` takes no None."""

    def refuse(name):
        raise TypeError(f"argument of type {type(name).__name__!r} is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", refuse)


def test_a_check_that_measures_runs_on_windows(windows):
    observation, _ = drive.drive_and_measure(lambda answer: {"y": answer(torch.ones(3))}, [torch.neg], {})
    assert torch.equal(observation["y"], -torch.ones(3))


@pytest.mark.parametrize("unit", [unit for unit in units() if exercises_of(unit)])
def test_a_driver_stands_alone_with_its_helpers(unit):
    """Together they travel to the student's kernel as source, without the rest of their files."""
    for exercise in exercises_of(unit):
        table = symtable.symtable(drive.travelling(exercise.driver, exercise.helpers), "<a driver>", "exec")
        defined = {symbol.get_name() for symbol in table.get_symbols()}
        assert global_names(table) <= defined | set(dir(builtins)), exercise.name
        called = set().union(*(global_names(function) for function in table.get_children()))
        assert {helper.__name__ for helper in exercise.helpers} <= called, f"{exercise.name} has helpers that it does not call"


def test_a_notebooks_own_defaults_do_not_hold_in_a_check():
    exercise = exercises_of("08_lora")[0]
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    try:
        exercise(*exercise.spec, seed=0)
        assert torch.get_default_dtype() == torch.float64 and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
