"""The hidden cases of unit 03_layer_freezing: for every check, what kind of case it is and how to make one."""

from autograder.checks import layer_freezing

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
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {}
