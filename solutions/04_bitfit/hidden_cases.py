"""The hidden cases of unit 04_bitfit: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import bitfit

MIB = 2**20


def _large_model(generator: torch.Generator) -> dict:
    """A model of 57 MiB: its gradients and AdamW's state take three times as much."""
    case = bitfit.train_case(generator) | {"sizes": [4096, 1024, 1024, 1, 4, 2], "weights": None, PEAK_ALLOWANCE: 32 * MIB}
    return case | {"input_ids": torch.randint(0, 4096, (2, 9), generator=generator)}


def _many_layers(generator: torch.Generator) -> dict:
    """Sixteen layers, one after the other, each with an input of 4 MiB; right answers have up to ten of these at a time."""
    weight = 0.2 * torch.randn(32, 32, generator=generator)
    bias, x = (torch.randn(*shape, 32, generator=generator) for shape in ((), (2048,)))
    return {"x": x, "weight": weight, "bias": bias, "copies": 16, PEAK_ALLOWANCE: 40 * MIB}


def _many_gains(generator: torch.Generator) -> dict:
    """Sixteen gains, one after the other, each with an input of 4 MiB, which a right answer keeps."""
    gain, normed = (1 + 0.1 * torch.randn(*shape, 32, generator=generator) for shape in ((), (2048,)))
    return {"normed": normed, "gain": gain, "output_gradient": None, "copies": 16, PEAK_ALLOWANCE: 40 * MIB}


CASES = {
    bitfit.check_add_biases: {
        "in single precision": lambda generator: bitfit.add_biases_case(generator, "float32"),
        "in float16": lambda generator: bitfit.add_biases_case(generator, "float16"),
        "in double precision": lambda generator: bitfit.add_biases_case(generator, "float64"),
    },
    bitfit.check_train: {
        "on a LLaMA with two layers": lambda generator: bitfit.train_case(generator, layers=2),
        "on a LLaMA with three layers": lambda generator: bitfit.train_case(generator, layers=3),
        "by the memory of the whole process, on a large model": _large_model,
    },
    bitfit.check_bias_backward: {
        "in double precision": lambda generator: bitfit.backward_case(generator, 4, 5, dtype=torch.float64),
        "in bfloat16": lambda generator: bitfit.backward_case(generator, 3, 7, dtype=torch.bfloat16),
        "in float16, on a single sequence": lambda generator: bitfit.backward_case(generator, 6, dtype=torch.float16),
        "on an input with four axes": lambda generator: bitfit.backward_case(generator, 2, 3, 4),
    },
    bitfit.check_bias_memory: {
        "in bfloat16": lambda generator: bitfit.bias_memory_case(generator, 2, 33, dtype=torch.bfloat16),
        "on a single sequence": lambda generator: bitfit.bias_memory_case(generator, 37),
        "by the memory of the whole process, on many layers": _many_layers,
    },
    bitfit.check_gain: {
        "in double precision": lambda generator: bitfit.gain_case(generator, 4, 5, dtype=torch.float64),
        "in float16, on a single sequence": lambda generator: bitfit.gain_case(generator, 6, dtype=torch.float16),
        "on an input with four axes": lambda generator: bitfit.gain_case(generator, 2, 3, 4),
        "by the memory of the whole process, on many layers": _many_gains,
    },
    bitfit.check_bias_files: {
        "with other sizes": bitfit.bias_file_case,
        "with larger layers": lambda generator: bitfit.bias_file_case(generator, larger=7),
        "with a model in bfloat16, whose file is loaded into others": lambda generator: bitfit.bias_file_case(
            generator, dtype=torch.bfloat16
        ),
    },
    bitfit.check_fold_value_bias: {
        "with one value head": lambda generator: bitfit.fold_case(generator, 4, 1),
        "with as many value heads as query heads": lambda generator: bitfit.fold_case(generator, 3, 3, head_dim=6),
        "in bfloat16": lambda generator: bitfit.fold_case(generator, 6, 3, dtype="bfloat16"),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {}
