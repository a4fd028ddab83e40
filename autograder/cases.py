"""What random cases are made of, and how their bytes are counted: shared by the checks of all units."""

from collections.abc import Iterable

import torch
from torch import Tensor


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers of any dtype; drawn in fp64, so that a seed gives the same numbers in each."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def between(generator: torch.Generator, low: int, high: int) -> int:
    """Return a random whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that came back from a student's process, each of which has its own storage."""
    return sum(tensor.nbytes for tensor in tensors)
