"""Random bytes, and numbers that no product of them rounds."""

import torch
from torch import Tensor

from autograder.cases import between, normal, uneven_levels


def random_bytes(generator: torch.Generator, *shape: int) -> Tensor:
    """Return bytes of every value."""
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def unit_rows(generator: torch.Generator, rows: int, size: int) -> Tensor:
    """Return rows with a single number in each, a power of two with a sign, no two in one column.

    What is multiplied by such a row is not rounded, in whatever dtype: the product shows the numbers of a matrix themselves.
    """
    unit = torch.zeros(rows, size)
    sizes = 2.0 ** torch.randint(-1, 2, (rows,), generator=generator)
    signs = 2 * torch.randint(0, 2, (rows,), generator=generator) - 1
    unit[torch.arange(rows), torch.randperm(size, generator=generator)[:rows]] = sizes * signs
    return unit


def coarse(generator: torch.Generator, *shape: int) -> Tensor:
    """Return multiples of 1/4 from -3/2 to 3/2: sums of a few products of these are exact in bf16, too."""
    return torch.randint(-6, 7, shape, generator=generator) / 4


def nf4_case(
    generator: torch.Generator,
    compute: str = "float32",
    dtype: torch.dtype = torch.float32,
    double: bool = True,
    bias: bool = False,
    batch: bool = True,
) -> dict:
    """Return a layer of random bytes with more than 256 blocks of 64, whose rows are no whole number of blocks.

    Of every sequence the first three rows, and output gradients, have a single number other than zero.
    """
    out_features = 8 * between(generator, 17, 20)
    in_features = out_features + 8 * between(generator, 1, 3)
    blocks = out_features * in_features // 64
    absmax = 0.2 + 3 * torch.rand(blocks, generator=generator)
    x = normal(generator, 2, 6, in_features)
    output_gradient = normal(generator, 2, 6, out_features)
    for row in range(2):
        x[row, :3] = unit_rows(generator, 3, in_features)
        output_gradient[row, :3] = unit_rows(generator, 3, out_features)
    return {
        "packed": random_bytes(generator, out_features * in_features // 2, 1),
        "absmax": random_bytes(generator, blocks) if double else absmax,
        "nested_absmax": 0.2 + torch.rand(-(-blocks // 256), generator=generator) if double else None,
        "offset": 2 + torch.rand((), generator=generator) if double else None,
        "levels": uneven_levels(generator),
        "shape": [out_features, in_features],
        "compute": compute,
        "bias": normal(generator, out_features) if bias else None,
        "x": (x if batch else x[0]).to(dtype),
        "output_gradient": (output_gradient if batch else output_gradient[0]).to(dtype),
        "units": 3,
    }
