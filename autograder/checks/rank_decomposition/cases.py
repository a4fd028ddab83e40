"""Random orthonormal columns, and how far a dtype rounds."""

import torch
from torch import Tensor

from autograder.cases import normal


def orthonormal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(generator, rows, columns, dtype=torch.float64))[0]


def eps_of(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
