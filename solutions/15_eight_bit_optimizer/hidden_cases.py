"""The hidden cases of unit 15_eight_bit_optimizer: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import eight_bit_optimizer as optimizer

MIB = 2**20

CASES = {
    optimizer.check_to_8bit: {
        "on numbers in bfloat16": lambda generator: optimizer.codes_case(generator, torch.bfloat16, 1.0),
        "on numbers near one": lambda generator: optimizer.codes_case(generator, scale=1.0),
        "where whole blocks are filled": lambda generator: optimizer.codes_case(generator, shape=(4, 256)),
        "on fewer numbers than a block, in three dimensions": lambda generator: optimizer.codes_case(
            generator, shape=(5, 4, 15)
        ),
    },
    optimizer.check_adamw_8bit: {
        "with parameters in bfloat16": lambda generator: optimizer.adamw_case(generator, torch.bfloat16, steps=1),
        "with small gradients": lambda generator: optimizer.adamw_case(generator, scale=1e-4),
        "over more steps, with a larger parameter": lambda generator: optimizer.adamw_case(generator, steps=5, large=150),
        # State of 10 MiB, or 40 in fp32.
        "by the memory of the whole process, with large parameters": lambda generator: (
            optimizer.adamw_case(generator, steps=1) | {"large": 5, "filler_bytes": 80 * MIB, PEAK_ALLOWANCE: 26 * MIB}
        ),
    },
    optimizer.check_dead_zone: {
        "with the dynamic type and beta2 = 0.95": lambda generator: optimizer.zone_case(generator, 0.95, dynamic=True),
        "with beta2 = 0.5": lambda generator: optimizer.zone_case(generator, 0.5),
        "in double precision": lambda generator: (case := optimizer.zone_case(generator)) | {"code": case["code"].double()},
    },
    optimizer.check_random_code: {
        "with a table of 256 values": lambda generator: optimizer.random_code_case(generator, 255),
        "with values beyond one": lambda generator: optimizer.random_code_case(generator, scale=4.0),
        "on a flat tensor": lambda generator: optimizer.random_code_case(generator, shape=(90,)),
    },
    optimizer.check_load_as_saved: {
        "with parameters in float16": lambda generator: optimizer.saved_case(generator, "float16"),
        "with parameters in float32": lambda generator: optimizer.saved_case(generator, "float32", "bfloat16"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "len(code) - 1  ->  len(code) + 1": "no number lies beyond the last value, so no index does: this end of the clamp is never used",
    "noise < (x - low) / (high - low)  ->  noise <= (x - low) / (high - low)": (
        "they differ where noise equals the share, which has no probability; cases keep noise clear of it"
    ),
}
