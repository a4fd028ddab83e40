"""Random prompts, texts and models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autograder.cases import between, normal
from peftlab.llama import LlamaConfig, LlamaModel


def padding(generator: torch.Generator, batch: int, seq: int, side: str) -> Tensor | None:
    """Return the attention mask of rows that are padded on this side, each by another amount and one by none.

    "each" has rows that are padded on the left, on the right, on both sides and on none.
    """
    if side == "none":
        return None
    mask = torch.ones(batch, seq, dtype=torch.long)
    for row, padded in enumerate(torch.randperm(batch, generator=generator).tolist()):
        left = {"left": 2 * padded, "right": 0, "each": (0, 3, 0, 2)[padded]}[side]
        right = {"left": 0, "right": 2 * padded, "each": (0, 0, 4, 1)[padded]}[side]
        mask[row, :left] = 0
        mask[row, seq - right :] = 0
    return mask


def llama_sizes(generator: torch.Generator, layers: int = 1) -> list[int]:
    """Return the sizes of a LLaMA with three heads of eight features, which share one key-value head."""
    return [between(generator, 29, 33), 24, between(generator, 36, 42), layers, 3, 1]


def llama_weights(generator: torch.Generator, sizes: Sequence[int]) -> Tensor:
    """Return all weights of such a model, in one vector; large enough for positions and masks to matter."""
    count = sum(parameter.numel() for parameter in LlamaModel(LlamaConfig(*sizes)).parameters())
    return 0.3 * normal(generator, count)


def prompted_case(generator: torch.Generator, side: str = "none", layers: int = 1) -> dict:
    """Return a model, a prompt and a batch of four rows, of which no two sizes are equal."""
    sizes, batch, length, seq = llama_sizes(generator, layers), 4, between(generator, 5, 6), between(generator, 9, 11)
    mask = padding(generator, batch, seq, side)
    output_gradient = normal(generator, batch, seq, sizes[1])
    return {
        "sizes": sizes,
        "weights": llama_weights(generator, sizes),
        "start": normal(generator, length, sizes[1]),
        "input_ids": torch.randint(0, sizes[0], (batch, seq), generator=generator),
        "attention_mask": mask,
        "output_gradient": output_gradient if mask is None else output_gradient * mask[..., None],
        "exact": False,
    }


def exact_case(generator: torch.Generator, side: str, dtype: torch.dtype, prompt_dtype: torch.dtype = torch.float32) -> dict:
    """Return a case of small whole numbers for the exact model and a prompt, each in any dtype.

    One position of each row gets a gradient of -1, 0 or 1 a feature: its sums over the batch are below 256, and exact in bf16.
    """
    case = prompted_case(generator, side)
    batch, seq = case["input_ids"].shape
    kept = torch.ones(batch, seq) if case["attention_mask"] is None else case["attention_mask"]
    last = (kept * torch.arange(1, seq + 1)).argmax(1)
    gradient = torch.zeros_like(case["output_gradient"])
    gradient[torch.arange(batch), last] = torch.randint(-1, 2, (batch, gradient.shape[2]), generator=generator).float()
    weights = torch.randint(1, 4, case["weights"].shape, generator=generator)
    start = torch.randint(-4, 5, case["start"].shape, generator=generator).to(prompt_dtype)
    return case | {"weights": weights.to(dtype), "start": start, "output_gradient": gradient.to(dtype), "exact": True}
