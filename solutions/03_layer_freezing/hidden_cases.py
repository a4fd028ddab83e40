"""The hidden cases of unit 03_layer_freezing: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import layer_freezing

MIB = 2**20


def _large_model(generator: torch.Generator) -> dict:
    """Eight layers of 10 MiB, of which one is trained: gradients and AdamW's state of all take 240 MiB."""
    large = {"sizes": [64, 512, 1024, 8, 4, 2], "large": True, PEAK_ALLOWANCE: 32 * MIB}
    return (
        layer_freezing.freezing_memory_case(generator)
        | large
        | {"input_ids": torch.randint(0, 64, (2, 8), generator=generator)}
    )


def _large_batch(generator: torch.Generator) -> dict:
    """Six layers that keep 15 MiB each for 2,048 tokens if they are not run again in backward."""
    case = layer_freezing.checkpointed_case(generator, "first") | {
        "sizes": [31, 64, 256, 6, 4, 2],
        "large": True,
        PEAK_ALLOWANCE: 32 * MIB,
    }
    return case | {"input_ids": torch.randint(0, 31, (16, 128), generator=generator)}


CASES = {
    layer_freezing.check_train_last: {
        "with a tied embedding": lambda generator: layer_freezing.freezing_case(generator, tied=True),
        "on another model": lambda generator: layer_freezing.freezing_case(generator, tied=False),
    },
    layer_freezing.check_freezing_memory: {
        "with a tied embedding": lambda generator: layer_freezing.freezing_memory_case(generator, tied=True),
        "with two of many layers, in bfloat16": lambda generator: layer_freezing.freezing_memory_case(
            generator, layers=(6, 7), count=2, dtype="bfloat16"
        ),
        "with the final norm alone": lambda generator: layer_freezing.freezing_memory_case(generator, count=0),
        "by the memory of the whole process, on a large model": _large_model,
    },
    layer_freezing.check_numbers_kept: {
        "on another model": layer_freezing.kept_case,
        "against a measurement": lambda generator: layer_freezing.kept_case(generator, measure=True),
    },
    layer_freezing.check_train_only: {
        "with a tie made by hand": lambda generator: layer_freezing.train_only_case(generator, (False, True)),
        "with a tie cut by hand": lambda generator: layer_freezing.train_only_case(generator, (True, False)),
    },
    layer_freezing.check_trained_files: {
        "without a tie": lambda generator: layer_freezing.files_case(generator, tied=False),
        "in bfloat16": lambda generator: layer_freezing.files_case(generator, tied=True, dtype="bfloat16"),
    },
    layer_freezing.check_run_checkpointed: {
        "with the last layers trained": lambda generator: layer_freezing.checkpointed_case(generator, "last"),
        "with the first layer trained, in bfloat16": lambda generator: layer_freezing.checkpointed_case(
            generator, "first", "bfloat16"
        ),
        "with the embedding trained": lambda generator: layer_freezing.checkpointed_case(generator, "embedding", layers=(5, 6)),
        "by the memory of the whole process, on a large batch": _large_batch,
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {}
