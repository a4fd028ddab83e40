"""What random cases are made of, how their bytes are counted, and files read: shared by the checks of all units."""

from collections.abc import Iterable

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal numbers of any dtype; drawn in fp64, so that a seed gives the same numbers in each."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def between(generator: torch.Generator, low: int, high: int) -> int:
    """Return a random whole number, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def uneven_levels(generator: torch.Generator, count: int = 16) -> Tensor:
    """Return ascending levels from -1 to 1, in fp32, with an exact zero, at unequal distances of at least 1/40."""
    grid = torch.cat([torch.arange(-39, 0), torch.arange(1, 40)])
    inner = grid[torch.randperm(len(grid), generator=generator)[: count - 3]]
    return torch.cat([inner, torch.tensor([-40, 0, 40])]).sort().values / 40


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that came back from a student's process, each of which has its own storage."""
    return sum(tensor.nbytes for tensor in tensors)


def read_safetensors(content: object) -> tuple[list[str] | str, dict[str, Tensor], int]:
    """Read a file that came back as a tensor of bytes, without the student's help.

    Returns:
        The names in it, in order, its tensors and its bytes; or a sentence in place of the names, none and 0.
    """
    from safetensors.torch import load

    try:
        tensors = load(content.numpy().tobytes())
    except Exception:  # whatever it is, it is no such file
        return "not in safetensors format", {}, 0
    return sorted(tensors), tensors, len(content)
