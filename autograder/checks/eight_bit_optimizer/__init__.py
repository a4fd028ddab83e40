"""Checks of unit 15_eight_bit_optimizer (Dettmers et al. 2022, arXiv 2110.02861).

Codes jump where a number lies halfway between two values. Cases keep clear of such boundaries, so that right answers, however
they round, have the same codes.
"""

from autograder.checking.exercise import Exercise
from autograder.checks.eight_bit_optimizer.adamw_8bit import check_adamw_8bit
from autograder.checks.eight_bit_optimizer.cases import adamw_case, codes_case
from autograder.checks.eight_bit_optimizer.dead_zone import check_dead_zone, zone_case
from autograder.checks.eight_bit_optimizer.load_as_saved import check_load_as_saved, saved_case
from autograder.checks.eight_bit_optimizer.random_code import check_random_code, random_code_case
from autograder.checks.eight_bit_optimizer.to_8bit import check_to_8bit

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
