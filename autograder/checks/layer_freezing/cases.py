"""Sizes of random models, and their parts by name."""

from collections.abc import Sequence

import torch

from autograder.cases import between

TENSORS_OF_A_LAYER = 9
"""Four projections of attention, three of the MLP, two norms."""


def sizes_of_a_llama(generator: torch.Generator, layers: tuple[int, int] = (4, 6)) -> list[int]:
    """Return the arguments of a `LlamaConfig`: vocabulary, hidden, intermediate, layers, heads, key-value heads.

    No two sizes are equal, nor is any twice another of the same layer: the hidden size is 12 to 24, and keys and values are a
    third as wide.
    """
    heads, key_value_heads, head_dim = [(6, 2, 4), (6, 2, 2), (9, 3, 2)][between(generator, 0, 2)]
    return [
        between(generator, 30, 39),
        heads * head_dim,
        (53, 59, 61)[between(generator, 0, 2)],
        between(generator, *layers),
        heads,
        key_value_heads,
    ]


def parts(names: Sequence[str], tensors_of_a_layer: int = TENSORS_OF_A_LAYER) -> list[str]:
    """Return which parts of a Llama these parameters are; of layers that are there in part, how many tensors."""
    counted: dict[str, int] = {}
    for name in names:
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            part = ".".join(part.split(".")[:2])
        counted[part] = counted.get(part, 0) + 1
    runs: list[list[str]] = []  # of layers one after the other, as much of each
    for part, count in counted.items():
        previous = runs[-1][-1] if runs else ""
        follows = previous.startswith("layers.") and part == f"layers.{int(previous.split('.')[1]) + 1}"
        if follows and counted[previous] == count:
            runs[-1].append(part)
        else:
            runs.append([part])
    listed = []
    for run in runs:
        count = counted[run[0]]
        in_part = run[0].startswith("layers.") and count != tensors_of_a_layer
        listed.append(" to ".join(dict.fromkeys([run[0], run[-1]])) + f" ({count} of {tensors_of_a_layer})" * in_part)
    return listed
