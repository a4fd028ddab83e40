"""The hidden cases of unit 10_qlora: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import qlora

CASES = {
    qlora.check_fast_dequantize: {
        "in float16": lambda generator: qlora.fast_case(generator, "float16"),
        "in blocks of 128": lambda generator: qlora.fast_case(generator, "bfloat16", 128),
    },
    qlora.check_nf4_linear: {
        "when computing in float16 on an input in bfloat16": lambda generator: qlora.nf4_case(
            generator, "float16", torch.bfloat16, double=False
        ),
        "when computing in float32 on an input in bfloat16": lambda generator: qlora.nf4_case(
            generator, "float32", torch.bfloat16, double=False
        ),
        "on one sequence without a batch dimension": lambda generator: qlora.nf4_case(generator, batch=False),
        "when computing in float16 on an input in float32, with a bias": lambda generator: qlora.nf4_case(
            generator, "float16", double=False, bias=True
        ),
        "in bfloat16, with double quantization and a bias": lambda generator: qlora.nf4_case(
            generator, "bfloat16", torch.bfloat16, bias=True
        ),
    },
    qlora.check_nf4_memory: {
        "in float16": lambda generator: qlora.nf4_memory_case(generator, "float16"),
        "in float32 without double quantization": lambda generator: qlora.nf4_memory_case(generator, double=False),
    },
    qlora.check_qlora_layer: {
        "in float16": lambda generator: qlora.qlora_layer_case(generator, torch.float16),
        "in float16, with factors stored in it": lambda generator: qlora.qlora_layer_case(generator, torch.float16, "float16"),
    },
    qlora.check_qlora: {
        "with a tied head": lambda generator: qlora.qlora_case(generator, tied=True),
        "with factors stored in float16": lambda generator: qlora.qlora_case(generator, stored="float16"),
    },
    qlora.check_adamw_8bit: {
        "with parameters in bfloat16": lambda generator: qlora.adamw_case(generator, torch.bfloat16, steps=1),
        "with small gradients": lambda generator: qlora.adamw_case(generator, scale=1e-4),
        "over more steps, with a larger parameter": lambda generator: qlora.adamw_case(generator, steps=5, large=150),
    },
    qlora.check_merged_weight: {
        "in float16": lambda generator: qlora.merged_case(generator, "float16", torch.float16),
        "with factors in bfloat16": lambda generator: qlora.merged_case(generator, "bfloat16", torch.bfloat16, "bfloat16"),
        "in float16, with a base and factors in float32": lambda generator: qlora.merged_case(generator, "float16"),
    },
    qlora.check_prepare: {
        "in float16": lambda generator: qlora.prepare_case(generator, dtype="float16"),
        "in float16, with a tied head": lambda generator: qlora.prepare_case(generator, tied=True, dtype="float16"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "8  ->  9": "in how many parts a weight is dequantized changes no value, and memory by next to nothing",
    "5  ->  6": "the spread of lora_A's start, 1/sqrt(in) or 0.93/sqrt(in), is a convention: any random start is right",
    "True  ->  False": "`recurse` of `_apply`: the layer has no children to go into",
}
