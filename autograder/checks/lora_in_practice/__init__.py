"""Checks of unit 12_lora_in_practice (Kalajdzievski 2023; Hayou et al. 2024; Meng et al. 2024; Liu et al. 2024)."""

from autograder.checking.exercise import Exercise
from autograder.checks.lora_in_practice.answer_labels import chat_case, check_answer_labels
from autograder.checks.lora_in_practice.dora_forward import check_dora_forward, dora_forward_case
from autograder.checks.lora_in_practice.dora_linear import dora_case
from autograder.checks.lora_in_practice.dora_merge import check_dora_merge
from autograder.checks.lora_in_practice.loraplus_groups import check_loraplus_groups, groups_case
from autograder.checks.lora_in_practice.pissa import check_pissa, pissa_case
from autograder.checks.lora_in_practice.pissa_to_lora import check_pissa_to_lora, converted_case
from autograder.checks.lora_in_practice.rank_for import check_rank_for, rank_case
from autograder.checks.lora_in_practice.rslora_alpha import check_rslora_alpha, pairs_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
