"""Checks of unit 05_prompt_tuning (Lester et al. 2021, arXiv 2104.08691)."""

from autograder.checks.prompt_tuning.cases import exact_case, prompted_case
from autograder.checks.prompt_tuning.diagnose import check_diagnose, diagnose_case
from autograder.checks.prompt_tuning.forward import check_prompted_forward
from autograder.checks.prompt_tuning.loss import check_prompted_loss, loss_case
from autograder.checks.prompt_tuning.memory import check_prompted_memory, memory_case
from autograder.checks.prompt_tuning.mixed_prompts import check_mixed_prompts, exact_mixed_case, mixed_case
from autograder.checks.prompt_tuning.prompt_files import check_prompt_files, files_case
from autograder.checks.prompt_tuning.starts import check_starts, starts_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
