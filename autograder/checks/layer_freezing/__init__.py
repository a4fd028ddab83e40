"""Checks of unit 03_layer_freezing: what a frozen parameter saves is counted, in tensors that came back from a real step."""

from autograder.checks.layer_freezing.memory import check_freezing_memory, freezing_memory_case
from autograder.checks.layer_freezing.numbers_kept import check_numbers_kept, kept_case
from autograder.checks.layer_freezing.run_checkpointed import check_run_checkpointed, checkpointed_case
from autograder.checks.layer_freezing.train_last import check_train_last, freezing_case
from autograder.checks.layer_freezing.train_only import check_train_only, train_only_case
from autograder.checks.layer_freezing.trained_files import check_trained_files, files_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
