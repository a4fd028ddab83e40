"""The hidden cases of unit 14_many_gpus: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import many_gpus as many

CASES = {
    many.check_sent_in_step: {
        "with nothing frozen": lambda generator: many.step_case(generator, frozen=0),
        "with two ranks": lambda generator: many.step_case(generator, world_size=2),
        "with a thousand ranks": lambda generator: many.step_case(generator, world_size=1_000),
    },
    many.check_held_by_rank: {
        "with nothing frozen": lambda generator: many.held_case(generator, frozen=0),
        "with two ranks": lambda generator: many.held_case(generator, world_size=2),
        "with a thousand ranks": lambda generator: many.held_case(generator, world_size=1_000),
    },
    many.check_sharded_linear: {
        "with three ranks": lambda generator: many.sharded_case(generator, 3),
        "in double precision, with a batch of one dimension": lambda generator: many.sharded_case(
            generator, 2, (5,), torch.float64
        ),
    },
    many.check_shard: {
        "with three ranks": lambda generator: many.shard_case(generator, world_size=3),
        "in fp32": lambda generator: many.shard_case(generator, compute_dtype="float32"),
    },
    many.check_train_step: {
        "with three ranks": lambda generator: many.train_case(generator, world_size=3),
        "with one micro-batch": lambda generator: many.train_case(generator, micro_batches=1),
    },
    many.check_save_trained: {
        "with three ranks": lambda generator: many.save_case(generator, world_size=3),
        "in bfloat16": lambda generator: many.save_case(generator, dtype=torch.bfloat16),
    },
    many.check_rows_of_rank: {
        "with two ranks": lambda generator: many.rows_case(generator, world_size=2, remainder=1),
        "with one rank": lambda generator: many.rows_case(generator, world_size=1, remainder=0),
        "without a remainder": lambda generator: many.rows_case(generator, world_size=6, remainder=0),
        "with larger seeds": lambda generator: many.rows_case(generator, seeds=50_000),
    },
}

SURVIVORS = {
    "seed + epoch  ->  seed - epoch": "any seed made of both is as right",
    "torch.zeros((), device=count.device)  ->  torch.zeros(())": "the count is on the CPU, where zeros are made by default",
    "'.unfinished'  ->  '.unfinishedx'": "any other name in the folder is as right",
}
