"""Checks of unit 11_choosing."""

from autograder.checking.exercise import Exercise
from autograder.checks.choosing.broken_rules import check_broken_rules, rules_case
from autograder.checks.choosing.choose_for import check_choose_for
from autograder.checks.choosing.compare import check_compare, compare_case
from autograder.checks.choosing.heaviest_batch import check_heaviest_batch, lengths_case
from autograder.checks.choosing.largest_batch import batch_case, check_largest_batch
from autograder.checks.choosing.merge_rows import check_merge_rows, merge_case
from autograder.checks.choosing.pareto_front import check_pareto_front, pareto_case
from autograder.checks.choosing.recommend import check_recommend, evidence_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
