"""Checks of unit 09_quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3).

A code says which of two neighbouring levels is nearer, so the rounding of a right answer matters where a number lies on the
boundary between them, and nowhere else. The cases keep clear of the boundaries by some fifty times the rounding, and then codes
are compared exactly. (Where a tie is the point, everything is a multiple of a power of two, and nothing is rounded.)
"""

from autograder.checks.quantization.absmax_int8 import check_absmax_int8, int8_case
from autograder.checks.quantization.bits import bits_case, check_bits
from autograder.checks.quantization.dequantize import check_dequantize, dequantize_case
from autograder.checks.quantization.double_quantize import check_double_quantize, double_case
from autograder.checks.quantization.levels import check_levels, levels_case
from autograder.checks.quantization.nearest_level import check_nearest_level, nearest_case
from autograder.checks.quantization.pack import check_pack, pack_case
from autograder.checks.quantization.quantize import check_quantize, quantize_case
from autograder.checks.quantization.to_blocks import blocks_case, check_to_blocks
from autograder.exercise import Exercise

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
