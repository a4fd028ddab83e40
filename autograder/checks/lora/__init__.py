"""Checks of unit 08_lora (Hu et al. 2022, arXiv 2106.09685)."""

from autograder.checks.lora.adapter_files import adapter_case, check_adapter_files
from autograder.checks.lora.forward import check_lora_forward, forward_case
from autograder.checks.lora.inject import check_inject, inject_case
from autograder.checks.lora.memory import check_lora_memory
from autograder.checks.lora.merge import check_merge, merge_case
from autograder.checks.lora.merge_into_head import check_merge_into_head, tied_case
from autograder.checks.lora.start import check_lora_start, start_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
