"""Checks of unit 04_bitfit (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from autograder.checking.exercise import Exercise
from autograder.checks.bitfit.add_biases import add_biases_case, check_add_biases
from autograder.checks.bitfit.backward import backward_case, check_bias_backward
from autograder.checks.bitfit.bias_files import bias_file_case, check_bias_files
from autograder.checks.bitfit.fold_value_bias import check_fold_value_bias, fold_case
from autograder.checks.bitfit.gain import check_gain, gain_case
from autograder.checks.bitfit.memory import bias_memory_case, check_bias_memory
from autograder.checks.bitfit.train import check_train, train_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
