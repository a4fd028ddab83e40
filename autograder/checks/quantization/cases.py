"""Blocks of numbers that keep clear of the boundaries between codes."""

import torch
from torch import Tensor

from autograder.cases import between, normal


def blocks_of_many_sizes(generator: torch.Generator, count: int, size: int) -> Tensor:
    """Return normal numbers in fp64, (count, size): of one scale a block, the largest negative in one block, one all zeros.

    Neither the first nor the last block is that of zeros, one block has an outlier, the first is small, and the last tiny: a
    number that keeps a divisor from zero must be smaller yet.
    """
    scales = 0.2 + 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    scales[0], scales[-1] = 0.03, 1e-9
    blocks = scales * normal(generator, count, size, dtype=torch.float64)
    zero, negative, outlier = (1 + torch.randperm(count - 2, generator=generator)[:3]).tolist()
    blocks[zero] = 0
    blocks[negative, between(generator, 0, size - 1)] = -1.3 * blocks[negative].abs().max()
    blocks[outlier, between(generator, 0, size - 1)] *= 20
    return blocks


def clear_of(values: Tensor, boundaries: Tensor, margin: float) -> Tensor:
    """Return whether each number is at least `margin` away from every boundary."""
    return ((values[..., None] - boundaries).abs() > margin).all(-1)
