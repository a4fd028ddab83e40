"""The hidden cases of unit 13_many_adapters: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks.many_adapters import (
    cache_case,
    check_adapter_cache,
    check_batched_lora,
    check_combine,
    check_gathered,
    check_prefix_cache,
    check_segmented,
    combine_case,
    gathered_case,
    prefix_case,
    segmented_case,
    swap_case,
)

CASES = {
    check_gathered: {
        "in double precision": lambda generator: gathered_case(generator, torch.float64),
        "in bfloat16": lambda generator: gathered_case(generator, torch.bfloat16),
        "with more slots": lambda generator: gathered_case(generator, slots=9),
    },
    check_segmented: {
        "in double precision": lambda generator: segmented_case(generator, torch.float64),
        "in bfloat16": lambda generator: segmented_case(generator, torch.bfloat16),
    },
    check_batched_lora: {
        "in bfloat16": lambda generator: swap_case(generator, torch.bfloat16),
        "in single precision": swap_case,
    },
    check_adapter_cache: {
        "with five slots": lambda generator: cache_case(generator, slots=5, batches=40, names=8),
        "with one slot": lambda generator: cache_case(generator, slots=1, batches=12),
    },
    check_combine: {
        "in double precision": lambda generator: combine_case(generator, dtype=torch.float64),
        "of two adapters with rank one": lambda generator: combine_case(generator, (1, 1), 1),
        "at the full rank": lambda generator: combine_case(generator, (2, 3), 5),
    },
    check_prefix_cache: {
        "with other prompts": prefix_case,
        "with other weights": prefix_case,
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "self.A[slot] = 0  ->  pass": "B is set to zero as well, and one zero of the two is enough",
    "self.B[slot] = 0  ->  pass": "A is set to zero as well, and one zero of the two is enough",
    "0  ->  1": "one of the two factors of an empty slot is filled with ones, and the other with zeros: their product is zero",
}
