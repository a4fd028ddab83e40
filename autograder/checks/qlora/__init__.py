"""Checks of unit 10_qlora (Dettmers et al. 2023, arXiv 2305.14314).

No check needs a quantizer: packed bytes, statistics and levels are random numbers, and the levels are uneven, so that no data
type can be known beforehand. Where a case rounds to 16 bits, its numbers are such that right answers agree to the bit.
"""

from autograder.checking.exercise import Exercise
from autograder.checks.qlora.cases import nf4_case
from autograder.checks.qlora.fast_dequantize import check_fast_dequantize, fast_case
from autograder.checks.qlora.forward import check_nf4_linear
from autograder.checks.qlora.memory import check_nf4_memory, nf4_memory_case
from autograder.checks.qlora.merged_weight import check_merged_weight, merged_case
from autograder.checks.qlora.model import check_qlora, qlora_case
from autograder.checks.qlora.prepare import check_prepare, prepare_case
from autograder.checks.qlora.qlora_layer import check_qlora_layer, qlora_layer_case

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
