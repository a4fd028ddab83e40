"""Checks of unit 02_rank_decomposition: what is judged of a factorization is what does not depend on the signs of an SVD."""

from autograder.checks.rank_decomposition.add_products import check_add_products, sum_case
from autograder.checks.rank_decomposition.break_even import check_break_even, shapes_case
from autograder.checks.rank_decomposition.energy_rank import check_energy_rank, energy_case
from autograder.checks.rank_decomposition.factor_gradients import check_factor_gradients, gradient_case
from autograder.checks.rank_decomposition.soft_ranks import check_soft_ranks, spectrum_case
from autograder.checks.rank_decomposition.subspace_overlap import check_subspace_overlap, overlap_case
from autograder.checks.rank_decomposition.truncated_svd import check_truncated_svd, matrix_case, thin_case
from autograder.checks.rank_decomposition.truncation_error import check_truncation_error, error_case
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
