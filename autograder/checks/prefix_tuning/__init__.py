"""Checks of unit 06_prefix_tuning (Li and Liang 2021, arXiv 2101.00190)."""

from autograder.checks.prefix_tuning.cache import cache_case, check_prefix_cache
from autograder.checks.prefix_tuning.forward import attention_case, check_prefix_attention
from autograder.checks.prefix_tuning.from_tokens import check_prefix_from_tokens, tokens_case
from autograder.checks.prefix_tuning.memory import check_prefix_memory, memory_case
from autograder.checks.prefix_tuning.model import check_prefix_model, model_case
from autograder.checks.prefix_tuning.reparameterized import check_reparameterized, reparameterized_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
