"""What random cases of several exercises are made of."""

import torch
from torch import Tensor

from autograder.cases import between, normal


def llama_sizes(generator: torch.Generator, layers: int = 2) -> list[int]:
    """Return sizes of a tiny LLaMA, as `LlamaConfig` takes them: queries are wider than keys and values."""
    head_dim = 2 * between(generator, 2, 3)
    return [between(generator, 30, 40), 4 * head_dim, 7 * between(generator, 5, 7), layers, 4, 2]


def numbers(generator: torch.Generator, dtype: torch.dtype, largest: int, *shape: int) -> Tensor:
    """Return normal numbers; in half precision whole ones up to `largest`, small enough that sums of their products are exact."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)
    return normal(generator, *shape, dtype=dtype)
