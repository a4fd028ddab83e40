"""The hidden cases of unit 10_qlora: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks.qlora import (
    adamw_case,
    check_adamw_8bit,
    check_fast_dequantize,
    check_merged_weight,
    check_nf4_linear,
    check_nf4_memory,
    check_prepare,
    check_qlora,
    check_qlora_layer,
    fast_case,
    merged_case,
    nf4_case,
    nf4_memory_case,
    prepare_case,
    qlora_case,
    qlora_layer_case,
)

CASES = {
    check_fast_dequantize: {
        "in float16": lambda generator: fast_case(generator, "float16"),
        "in blocks of 128": lambda generator: fast_case(generator, "bfloat16", 128),
    },
    check_nf4_linear: {
        "when computing in float16 on an input in bfloat16": lambda generator: nf4_case(
            generator, "float16", torch.bfloat16, double=False
        ),
        "when computing in float32 on an input in bfloat16": lambda generator: nf4_case(
            generator, "float32", torch.bfloat16, double=False
        ),
        "on one sequence without a batch dimension": lambda generator: nf4_case(generator, batch=False),
        "when computing in float16 on an input in float32, with a bias": lambda generator: nf4_case(
            generator, "float16", double=False, bias=True
        ),
        "in bfloat16, with double quantization and a bias": lambda generator: nf4_case(
            generator, "bfloat16", torch.bfloat16, bias=True
        ),
    },
    check_nf4_memory: {
        "in float16": lambda generator: nf4_memory_case(generator, "float16"),
        "in float32 without double quantization": lambda generator: nf4_memory_case(generator, double=False),
    },
    check_qlora_layer: {
        "in float16": lambda generator: qlora_layer_case(generator, torch.float16),
        "in float16, with factors stored in it": lambda generator: qlora_layer_case(generator, torch.float16, "float16"),
    },
    check_qlora: {
        "with a tied head": lambda generator: qlora_case(generator, tied=True),
        "with factors stored in float16": lambda generator: qlora_case(generator, stored="float16"),
    },
    check_adamw_8bit: {
        "with parameters in bfloat16": lambda generator: adamw_case(generator, torch.bfloat16, steps=1),
        "with small gradients": lambda generator: adamw_case(generator, scale=1e-4),
        "over more steps, with a larger parameter": lambda generator: adamw_case(generator, steps=5, large=150),
    },
    check_merged_weight: {
        "in float16": lambda generator: merged_case(generator, "float16", torch.float16),
        "with factors in bfloat16": lambda generator: merged_case(generator, "bfloat16", torch.bfloat16, "bfloat16"),
        "in float16, with a base and factors in float32": lambda generator: merged_case(generator, "float16"),
    },
    check_prepare: {
        "in float16": lambda generator: prepare_case(generator, dtype="float16"),
        "in float16, with a tied head": lambda generator: prepare_case(generator, tied=True, dtype="float16"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.prove`), and why they may live.
SURVIVORS = {
    "8  ->  9": "in how many parts a weight is dequantized changes no value, and memory by next to nothing",
    "5  ->  6": "the spread of lora_A's start, 1/sqrt(in) or 0.93/sqrt(in), is a convention: any random start is right",
    "True  ->  False": "`recurse` of `_apply`: the layer has no children to go into",
}
