"""Checks of unit 14_many_gpus (Rajbhandari et al. 2020, arXiv 1910.02054; Zhao et al. 2023, arXiv 2304.11277)."""

from autograder.checking.exercise import Exercise
from autograder.checks.many_gpus.held_by_rank import check_held_by_rank, held_case
from autograder.checks.many_gpus.rows_of_rank import check_rows_of_rank, rows_case
from autograder.checks.many_gpus.save_trained import check_save_trained, save_case
from autograder.checks.many_gpus.sent_in_step import check_sent_in_step, step_case
from autograder.checks.many_gpus.shard import check_shard, shard_case
from autograder.checks.many_gpus.sharded_linear import check_sharded_linear, sharded_case
from autograder.checks.many_gpus.train_step import check_train_step, train_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
