"""The hidden cases of unit 02_rank_decomposition: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import rank_decomposition


def _full_rank(case: dict) -> dict:
    """The same case without anything cut off."""
    return case | {"rank": min(case["matrix"].shape)}


CASES = {
    rank_decomposition.check_truncated_svd: {
        "in double precision": lambda generator: rank_decomposition.matrix_case(generator, wide=True, dtype=torch.float64),
        "at rank 1": lambda generator: rank_decomposition.matrix_case(generator, wide=False, rank=1),
        "at full rank": lambda generator: _full_rank(rank_decomposition.matrix_case(generator, wide=True)),
        "on a matrix of lower rank than asked for": lambda generator: rank_decomposition.matrix_case(
            generator, wide=False, true_rank=2, rank=4
        ),
        "in memory, on a wide matrix": rank_decomposition.thin_case,
    },
    rank_decomposition.check_truncation_error: {
        "in double precision": lambda generator: rank_decomposition.error_case(generator, torch.float64),
        "at ranks 1 and 2": lambda generator: rank_decomposition.error_case(generator, ranks=[1, 2]),
    },
    rank_decomposition.check_soft_ranks: {
        "in double precision": lambda generator: rank_decomposition.spectrum_case(generator, dtype=torch.float64),
        "with many zeros": lambda generator: rank_decomposition.spectrum_case(generator, zeros=20),
        "on small singular values": lambda generator: rank_decomposition.spectrum_case(generator, scale=1e-3),
        "on a single singular value": lambda generator: {"singular_values": torch.tensor([2.5])},
    },
    rank_decomposition.check_energy_rank: {
        "in double precision": lambda generator: rank_decomposition.energy_case(generator, torch.float64),
        "where one rank is enough": lambda generator: {"singular_values": torch.tensor([9.0, 2.0, 1.0]), "shares": [0.5]},
        "where all ranks are needed": lambda generator: {"singular_values": torch.tensor([3.0, 2.0, 2.0]), "shares": [0.9]},
    },
    rank_decomposition.check_break_even: {
        "with other shapes": lambda generator: rank_decomposition.shapes_case(generator, low=100),
        "with very flat shapes": lambda generator: {"shapes": [(1, 30), (30, 1), (1, 1), (2, 2), (3, 6)], "rank": 1},
    },
    rank_decomposition.check_factor_gradients: {
        "in double precision": lambda generator: rank_decomposition.gradient_case(generator, torch.float64),
        "in bfloat16": lambda generator: rank_decomposition.gradient_case(generator, torch.bfloat16),
        "where B is zero": lambda generator: rank_decomposition.gradient_case(generator, zero_B=True),
    },
    rank_decomposition.check_subspace_overlap: {
        "in double precision": lambda generator: rank_decomposition.overlap_case(generator, torch.float64),
        "on a space inside the other": lambda generator: rank_decomposition.overlap_case(generator, inside=True),
    },
    rank_decomposition.check_add_products: {
        "in double precision": lambda generator: rank_decomposition.sum_case(generator, (3, 3), [-0.4, 1.7], torch.float64),
        "with a weight of zero": lambda generator: rank_decomposition.sum_case(generator, (3, 2), [1.0, 0.0]),
        "with two negative weights": lambda generator: rank_decomposition.sum_case(generator, (1, 5), [-2.0, -0.3]),
        "in bfloat16": lambda generator: rank_decomposition.sum_case(generator, (4, 2), [0.8, -0.9], torch.bfloat16),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "int((energy < share * energy[-1]).sum())  ->  (energy < share * energy[-1]).sum()": "the rank as a tensor of one whole "
    "number is as good: the check asks for its value",
    "torch.cat([A1, A2], dim=0)  ->  torch.cat([A1, A2])": "0 is the default of `dim`",
}
