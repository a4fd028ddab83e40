"""Checks of unit 01_why_peft."""

from autograder.checks.why_peft.activation_bytes import activations_case, check_activation_bytes
from autograder.checks.why_peft.adam_step import adam_case, check_adam_step
from autograder.checks.why_peft.classify import check_classify, evidence_case
from autograder.checks.why_peft.count_parameters import check_count_parameters, random_config
from autograder.checks.why_peft.count_trainable import check_count_trainable, trainable_case
from autograder.checks.why_peft.training_bytes import bytes_case, check_training_bytes
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
