"""The hidden cases of unit 10_qlora: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks import qlora
from autograder.checks.qlora.cases import random_bytes
from autograder.checking.judging import PEAK_ALLOWANCE

MIB = 2**20


def _many_weights(generator: torch.Generator) -> dict:
    """24 Mi weights, for each of which right answers take 10 bytes at most, where PyTorch turns an int32 index into int64.

    The reference takes less than five. An index of int64 for every weight takes 12 bytes and more.
    """
    case = qlora.fast_case(generator)
    return case | {"copies": 24 * MIB // (case["shape"][0] * case["shape"][1]), PEAK_ALLOWANCE: 155 * MIB}


def _many_nf4_layers(generator: torch.Generator) -> dict:
    """Fourteen layers, one after the other, each with a weight of 4 MiB."""
    out_features, in_features = 1024, 1088
    absmax = 0.2 + 3 * torch.rand(out_features * in_features // 64, generator=generator)
    packed, x = random_bytes(generator, out_features * in_features // 2, 1), torch.randn(2, 5, in_features, generator=generator)
    large = {"packed": packed, "absmax": absmax, "shape": [out_features, in_features], "copies": 14}
    large |= {"x": x[0], "output_gradient": x[1]}
    return qlora.nf4_memory_case(generator, double=False) | large | {PEAK_ALLOWANCE: 24 * MIB}


CASES = {
    qlora.check_fast_dequantize: {
        "in float16": lambda generator: qlora.fast_case(generator, "float16"),
        "in blocks of 128": lambda generator: qlora.fast_case(generator, "bfloat16", 128),
        "by the memory of the whole process": _many_weights,
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
        "by the memory of the whole process, in many layers": _many_nf4_layers,
    },
    qlora.check_qlora_layer: {
        "in float16": lambda generator: qlora.qlora_layer_case(generator, torch.float16),
        "in float16, with factors stored in it": lambda generator: qlora.qlora_layer_case(generator, torch.float16, "float16"),
        # B A would take 64 MiB and more.
        "by the memory of the whole process, on a large base": lambda generator: (
            qlora.qlora_layer_case(generator) | {"copies": 64, PEAK_ALLOWANCE: 24 * MIB}
        ),
    },
    qlora.check_qlora: {
        "with a tied head": lambda generator: qlora.qlora_case(generator, tied=True),
        "with factors stored in float16": lambda generator: qlora.qlora_case(generator, stored="float16"),
        # Nine layers of 9 MiB: 81 MiB in fp32, 20 in eight bits.
        "by the memory of the whole process, on a large model": lambda generator: (
            qlora.qlora_case(generator) | {"layers": 9, "filler_bytes": 96 * MIB, PEAK_ALLOWANCE: 32 * MIB}
        ),
    },
    qlora.check_merged_weight: {
        "in float16": lambda generator: qlora.merged_case(generator, "float16", torch.float16),
        "with factors in bfloat16": lambda generator: qlora.merged_case(generator, "bfloat16", torch.bfloat16, "bfloat16"),
        "in float16, with a base and factors in float32": lambda generator: qlora.merged_case(generator, "float16"),
    },
    qlora.check_prepare: {
        "in float16": lambda generator: qlora.prepare_case(generator, dtype="float16"),
        "in float16, with a tied head": lambda generator: qlora.prepare_case(generator, tied=True, dtype="float16"),
        # 96 MiB in bfloat16, twice as much in fp32.
        "by the memory of the whole process, on a large model": lambda generator: (
            qlora.prepare_case(generator) | {"large": True, PEAK_ALLOWANCE: 32 * MIB}
        ),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "8  ->  9": "in how many parts a weight is dequantized changes no value, and memory by next to nothing",
    "5  ->  6": "the spread of lora_A's start, 1/sqrt(in) or 0.93/sqrt(in), is a convention: any random start is right",
    "True  ->  False": "`recurse` of `_apply`: the layer has no children to go into",
}
