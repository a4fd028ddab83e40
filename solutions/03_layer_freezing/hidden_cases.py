"""The hidden cases of unit 03_layer_freezing: for every check, what kind of case it is and how to make one."""

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
    },
}

# Automatic mutants that no check rejects (`python -m autograder.prove`), and why they may live.
SURVIVORS = {}
