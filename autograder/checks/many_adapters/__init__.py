"""Checks of unit 13_many_adapters (Sheng et al. 2023, arXiv 2311.03285; Chen et al. 2023, arXiv 2310.18547)."""

from autograder.checking.exercise import Exercise
from autograder.checks.many_adapters.adapter_cache import cache_case, check_adapter_cache
from autograder.checks.many_adapters.batched_lora import check_batched_lora, swap_case
from autograder.checks.many_adapters.combine import check_combine, combine_case
from autograder.checks.many_adapters.gathered import check_gathered, gathered_case
from autograder.checks.many_adapters.prefix_cache import check_prefix_cache, prefix_case
from autograder.checks.many_adapters.segmented import check_segmented, segmented_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
