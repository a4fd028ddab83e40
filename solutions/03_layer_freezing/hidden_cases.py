"""The hidden cases of unit 03_layer_freezing: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks.layer_freezing import (
    check_freezing_memory,
    check_numbers_kept,
    check_run_checkpointed,
    check_train_last,
    check_train_only,
    check_trained_files,
    checkpointed_case,
    files_case,
    freezing_case,
    freezing_memory_case,
    kept_case,
    train_only_case,
)
from autograder.exercise import PEAK_ALLOWANCE

MIB = 2**20


def _large_model(generator: torch.Generator) -> dict:
    """Eight layers of 10 MiB, of which one is trained: gradients and AdamW's state of all take 240 MiB."""
    large = {"sizes": [64, 512, 1024, 8, 4, 2], "large": True, PEAK_ALLOWANCE: 32 * MIB}
    return freezing_memory_case(generator) | large | {"input_ids": torch.randint(0, 64, (2, 8), generator=generator)}


def _large_batch(generator: torch.Generator) -> dict:
    """Six layers that keep 15 MiB each for 2,048 tokens if they are not run again in backward."""
    case = checkpointed_case(generator, "first") | {"sizes": [31, 64, 256, 6, 4, 2], "large": True, PEAK_ALLOWANCE: 32 * MIB}
    return case | {"input_ids": torch.randint(0, 31, (16, 128), generator=generator)}


CASES = {
    check_train_last: {
        "with a tied embedding": lambda generator: freezing_case(generator, tied=True),
        "on another model": lambda generator: freezing_case(generator, tied=False),
    },
    check_freezing_memory: {
        "with a tied embedding": lambda generator: freezing_memory_case(generator, tied=True),
        "with two of many layers, in bfloat16": lambda generator: freezing_memory_case(
            generator, layers=(6, 7), count=2, dtype="bfloat16"
        ),
        "with the final norm alone": lambda generator: freezing_memory_case(generator, count=0),
        "by the memory of the whole process, on a large model": _large_model,
    },
    check_numbers_kept: {
        "on another model": kept_case,
        "against a measurement": lambda generator: kept_case(generator, measure=True),
    },
    check_train_only: {
        "with a tie made by hand": lambda generator: train_only_case(generator, (False, True)),
        "with a tie cut by hand": lambda generator: train_only_case(generator, (True, False)),
    },
    check_trained_files: {
        "without a tie": lambda generator: files_case(generator, tied=False),
        "in bfloat16": lambda generator: files_case(generator, tied=True, dtype="bfloat16"),
    },
    check_run_checkpointed: {
        "with the last layers trained": lambda generator: checkpointed_case(generator, "last"),
        "with the first layer trained, in bfloat16": lambda generator: checkpointed_case(generator, "first", "bfloat16"),
        "with the embedding trained": lambda generator: checkpointed_case(generator, "embedding", layers=(5, 6)),
        "by the memory of the whole process, on a large batch": _large_batch,
    },
}

# Automatic mutants that no check rejects (`python -m autograder.prove`), and why they may live.
SURVIVORS = {}
