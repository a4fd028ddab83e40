"""A smaller SmolLM2 for a master's cells, to save time.

Whether a cell runs, and where its tensors have to be, does not depend on sizes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from peftlab import pretrained
from peftlab.llama import Llama

SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
SIZES = {
    "00_start_here": {},  # loads the real one, and only once
    "02_rank_decomposition": SMALL | {"num_hidden_layers": 30},  # names layer 29
    "03_layer_freezing": SMALL | {"num_hidden_layers": 30},  # freezes up to 30 layers
    "05_prompt_tuning": {"num_hidden_layers": 3},  # makes a prompt of width 576
    "14_many_gpus": {},  # its `torchrun` starts Pythons of their own, which load the real one
    "07_adapters": {"num_hidden_layers": 16, "intermediate_size": 128},  # names layer 15, and makes an adapter of width 576
}
"""Sizes for the masters that need others than `SMALL`."""


def make_smaller(unit: str) -> None:
    """Have `load_smollm2` give a smaller model to whatever imports it from now on."""
    pretrained.load_smollm2 = with_sizes(pretrained.load_smollm2, SIZES.get(unit, SMALL))


def with_sizes(load: Callable, sizes: dict[str, int]) -> Callable:
    """Return a function like `load_smollm2` for a model of smaller sizes, made of the first layers, rows and columns."""
    if not sizes:
        return load
    whole, tokenizer = load()
    weights = whole.state_dict()

    def load_smaller() -> tuple[Llama, object]:
        with torch.device("meta"):
            model = Llama(replace(whole.config, **sizes))
        parts = {name: tuple(map(slice, tensor.shape)) for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: weights[name][part].clone() for name, part in parts.items()}, assign=True)
        model.tie_weights()
        return model.eval(), tokenizer

    return load_smaller
