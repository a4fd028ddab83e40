"""Checks of unit 07_adapters (Houlsby et al. 2019, arXiv 1902.00751)."""

from autograder.checks.adapters.adapted_memory import adapted_memory_case, check_adapted_memory
from autograder.checks.adapters.add_adapters import add_case, check_add_adapters
from autograder.checks.adapters.bank import bank_case, check_adapter_bank
from autograder.checks.adapters.forward import adapter_case, check_adapter
from autograder.checks.adapters.join import check_join, join_case
from autograder.checks.adapters.memory import adapter_memory_case, check_adapter_memory
from autograder.checks.adapters.parameters import check_adapter_parameters, parameters_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
