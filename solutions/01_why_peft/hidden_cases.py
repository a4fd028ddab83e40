"""The hidden cases of unit 01_why_peft: for every check, what kind of case it is and how to make one."""

from dataclasses import asdict

import torch
from peftlab.llama import PRESETS

from autograder.checks import why_peft


def _preset(name: str):
    return lambda generator: asdict(PRESETS[name])


CASES = {
    why_peft.check_count_parameters: {
        "for SmolLM2-135M": _preset("SmolLM2-135M"),
        "for LLaMA-7B": _preset("LLaMA-7B"),
        "for LLaMA-13B": _preset("LLaMA-13B"),
        "for LLaMA-65B": _preset("LLaMA-65B"),
        "for a tied model without grouped-query attention": lambda generator: why_peft.random_config(
            generator, grouped=False, tied=True
        ),
    },
    why_peft.check_training_bytes: {
        "for a model of billions": lambda generator: why_peft.bytes_case(generator, scale=7_000_000),
        "where nothing is adapted": lambda generator: why_peft.bytes_case(generator) | {"adapted": 0},
    },
    why_peft.check_activation_bytes: {
        "for one long sequence": lambda generator: (
            why_peft.activations_case(generator, False) | {"batch_size": 1, "sequence_length": 1024}
        ),
        "without grouped-query attention": lambda generator: why_peft.activations_case(generator, False, grouped=False),
        "of five layers": lambda generator: why_peft.activations_case(generator, False) | {"num_hidden_layers": 5},
        "for one layer, with checkpointing": lambda generator: (
            why_peft.activations_case(generator, True) | {"num_hidden_layers": 1}
        ),
    },
    why_peft.check_adam_step: {
        "in fp32": lambda generator: why_peft.adam_case(generator, torch.float32),
        "in the thousandth step": lambda generator: why_peft.adam_case(generator) | {"step": 1000},
    },
    why_peft.check_classify: {"for a deeper model": lambda generator: why_peft.evidence_case(generator, layers=4)},
    why_peft.check_count_trainable: {
        "for a wide model": lambda generator: why_peft.trainable_case(generator) | {"out_features": 501},
        "for a tied one": lambda generator: why_peft.trainable_case(generator, tied=True),
    },
}

# Automatic mutants that no check rejects (`python -m autograder.proving.prove`), and why they may live.
SURVIVORS = {
    "torch.Size(getattr(parameter, 'original_shape', parameter.shape))  ->  "
    "getattr(parameter, 'original_shape', parameter.shape)": "it is a torch.Size already",
}
