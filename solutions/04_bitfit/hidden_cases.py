"""The hidden cases of unit 04_bitfit: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checks.bitfit import (
    add_biases_case,
    backward_case,
    bias_file_case,
    bias_memory_case,
    check_add_biases,
    check_bias_backward,
    check_bias_files,
    check_bias_memory,
    check_fold_value_bias,
    check_train,
    fold_case,
    train_case,
)
from autograder.exercise import PEAK_ALLOWANCE

MIB = 2**20


def _large_model(generator: torch.Generator) -> dict:
    """A model of 57 MiB: its gradients and AdamW's state take three times as much."""
    case = train_case(generator) | {"sizes": [4096, 1024, 1024, 1, 4, 2], "weights": None, PEAK_ALLOWANCE: 32 * MIB}
    return case | {"input_ids": torch.randint(0, 4096, (2, 9), generator=generator)}


def _many_layers(generator: torch.Generator) -> dict:
    """Sixteen layers, one after the other, each with an input of 4 MiB; right answers have up to ten of these at a time."""
    weight = 0.2 * torch.randn(32, 32, generator=generator)
    bias, x = (torch.randn(*shape, 32, generator=generator) for shape in ((), (2048,)))
    return {"x": x, "weight": weight, "bias": bias, "copies": 16, PEAK_ALLOWANCE: 40 * MIB}


CASES = {
    check_add_biases: {
        "in single precision": lambda generator: add_biases_case(generator, "float32"),
        "in float16": lambda generator: add_biases_case(generator, "float16"),
        "in double precision": lambda generator: add_biases_case(generator, "float64"),
    },
    check_train: {
        "on a LLaMA with two layers": lambda generator: train_case(generator, layers=2),
        "on a LLaMA with three layers": lambda generator: train_case(generator, layers=3),
        "by the memory of the whole process, on a large model": _large_model,
    },
    check_bias_backward: {
        "in double precision": lambda generator: backward_case(generator, 4, 5, dtype=torch.float64),
        "in bfloat16": lambda generator: backward_case(generator, 3, 7, dtype=torch.bfloat16),
        "in float16, on a single sequence": lambda generator: backward_case(generator, 6, dtype=torch.float16),
        "on an input with four axes": lambda generator: backward_case(generator, 2, 3, 4),
    },
    check_bias_memory: {
        "in bfloat16": lambda generator: bias_memory_case(generator, 2, 33, dtype=torch.bfloat16),
        "on a single sequence": lambda generator: bias_memory_case(generator, 37),
        "by the memory of the whole process, on many layers": _many_layers,
    },
    check_bias_files: {
        "with other sizes": bias_file_case,
        "with larger layers": lambda generator: bias_file_case(generator, larger=7),
        "with a model in bfloat16, whose file is loaded into others": lambda generator: bias_file_case(
            generator, dtype=torch.bfloat16
        ),
    },
    check_fold_value_bias: {
        "with one value head": lambda generator: fold_case(generator, 4, 1),
        "with as many value heads as query heads": lambda generator: fold_case(generator, 3, 3, head_dim=6),
        "in bfloat16": lambda generator: fold_case(generator, 6, 3, dtype="bfloat16"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.prove`), and why they may live.
SURVIVORS = {}
