"""The hidden cases of unit 05_prompt_tuning: for every check, what kind of case it is and how to make one."""

import torch

from autograder.checking.judging import PEAK_ALLOWANCE
from autograder.checks import prompt_tuning

MIB = 2**20


def _large_base(generator: torch.Generator) -> dict:
    """A base of 48 MiB: its gradients and AdamW's state take three times as much."""
    large = {"sizes": [8192, 768, 1536, 1, 3, 1], "weights": None, "start": torch.randn(5, 768, generator=generator)}
    return prompt_tuning.memory_case(generator) | large | {PEAK_ALLOWANCE: 24 * MIB}


CASES = {
    prompt_tuning.check_prompted_forward: {
        "in two layers, padded on the left": lambda generator: prompt_tuning.prompted_case(generator, "left", layers=2),
        "in two layers, padded on the right": lambda generator: prompt_tuning.prompted_case(generator, "right", layers=2),
        "on a base in bfloat16, with a prompt in fp32": lambda generator: prompt_tuning.exact_case(
            generator, "each", torch.bfloat16
        ),
        "on a base in float16, with a prompt in fp32 and no mask": lambda generator: prompt_tuning.exact_case(
            generator, "none", torch.float16
        ),
        "on a base in fp32, with a prompt in bfloat16": lambda generator: prompt_tuning.exact_case(
            generator, "left", torch.float32, torch.bfloat16
        ),
    },
    prompt_tuning.check_prompted_memory: {
        "without a mask": lambda generator: prompt_tuning.memory_case(generator, "none"),
        "in two layers, padded on either side": lambda generator: prompt_tuning.memory_case(generator, "each", layers=2),
        "by the memory of the whole process, on a large base": _large_base,
    },
    prompt_tuning.check_starts: {
        "of an embedding in float16": lambda generator: prompt_tuning.starts_case(generator, torch.float16),
        "of an embedding in double precision": lambda generator: prompt_tuning.starts_case(generator, torch.float64),
    },
    prompt_tuning.check_prompted_loss: {
        "on logits in float16": lambda generator: prompt_tuning.loss_case(generator, torch.float16),
        "with few labels": lambda generator: prompt_tuning.loss_case(generator, ignored=0.9),
    },
    prompt_tuning.check_mixed_prompts: {
        "in two layers, padded on the left": lambda generator: prompt_tuning.mixed_case(generator, "left", layers=2),
        "in two layers, padded on the right": lambda generator: prompt_tuning.mixed_case(generator, "right", layers=2),
        "on a base in float16, with prompts in fp32": lambda generator: prompt_tuning.exact_mixed_case(
            generator, "none", torch.float16
        ),
        "on a base in fp32, with prompts in bfloat16": lambda generator: prompt_tuning.exact_mixed_case(
            generator, "left", torch.float32, torch.bfloat16
        ),
    },
    prompt_tuning.check_prompt_files: {
        "in bfloat16": lambda generator: prompt_tuning.files_case(generator, torch.bfloat16),
        "in double precision": lambda generator: prompt_tuning.files_case(generator, torch.float64),
    },
    prompt_tuning.check_diagnose: {
        "of a small prompt": lambda generator: prompt_tuning.diagnose_case(generator, scale=0.1),
        "of a large prompt": lambda generator: prompt_tuning.diagnose_case(generator, scale=7.0),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "mask.cumsum(dim=1) - 1  ->  mask.cumsum(dim=1) + 1": "positions from 0 or from 2: RoPE sees differences only",
    "1  ->  2": "positions from 0 or from -1: RoPE sees differences only",
    "nn.functional.cross_entropy(predicting, predicted, ignore_index=IGNORE)  ->  "
    "nn.functional.cross_entropy(predicting, predicted)": "the default of ignore_index is -100, which is IGNORE",
    "nn.Parameter(prompt.detach().clone())  ->  prompt.detach().clone()": "an nn.ParameterList makes parameters of plain tensors",
    "torch.tensor(used, device=x.device)  ->  torch.tensor(used)": "the checks run on the CPU, where the two are the same",
    "rates[0] * steps < 0.1 * size  ->  rates[0] * steps <= 0.1 * size": "the two differ where random numbers are equal",
}
