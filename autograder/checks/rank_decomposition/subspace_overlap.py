"""`subspace_overlap`: how much of one subspace lies in another."""

import torch
from torch import Tensor

from autograder.cases import between
from autograder.checks.rank_decomposition.cases import eps_of, orthonormal
from autograder.checks.rank_decomposition.helpers import as_number
from autograder.exercise import Exercise


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Return phi = |first^T second|_F^2 / min(i, j) of two sets of orthonormal columns (Hu et al. 2022, equation 4)."""
    total = 0.0
    for u in first.T:
        for v in second.T:
            total += (u @ v).item() ** 2
    return total / min(first.shape[1], second.shape[1])


def overlap_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, inside: bool = False) -> dict:
    """Return two sets of orthonormal columns of different sizes that are a random rotation apart."""
    features = between(generator, 14, 18)
    i, j = between(generator, 2, 4), between(generator, 6, 8)
    first, second = orthonormal(generator, features, i), orthonormal(generator, features, j)
    if inside:  # the smaller space lies in the larger, in another basis
        first = second @ orthonormal(generator, j, i)
    return {"first": first.to(dtype), "second": second.to(dtype)}


def drive_subspace_overlap(subspace_overlap, first, second):
    """Return the overlap in both orders, as numbers, or what came instead."""
    seen = {}
    for name, pair in (("the overlap", (first, second)), ("the overlap in the other order", (second, first))):
        seen[name] = as_number(subspace_overlap(*pair))
    return seen


def overlap_tolerance(case: dict) -> dict[str, float]:
    """Products of unit vectors of n numbers are off by n eps; i * j squares, each at most 1, by 2 n eps more, over min."""
    n, i = case["first"].shape
    j = case["second"].shape[1]
    bound = (2 * n + i * j) * eps_of(case["first"]) * max(i, j)
    return dict.fromkeys(("the overlap", "the overlap in the other order"), bound)


_SQUARES = "(u @ v).item() ** 2"
_SMALLER_WIDTH = "min(first.shape[1], second.shape[1])"

check_subspace_overlap = Exercise(
    spec=[subspace_overlap],
    cases=lambda generator: [overlap_case(generator), overlap_case(generator)],
    driver=drive_subspace_overlap,
    helpers=[as_number],
    tolerance=overlap_tolerance,
    mistakes={
        "the products of the vectors are not squared: signs of singular vectors mean nothing, and must not matter": {
            _SQUARES: "(u @ v).item()"
        },
        "the absolute values are summed: sum the squares": {_SQUARES: "abs((u @ v).item())"},
        "the norm is not squared": {f"total / {_SMALLER_WIDTH}": f"math.sqrt(total) / {_SMALLER_WIDTH}"},
        "the root of the overlap is returned": {f"total / {_SMALLER_WIDTH}": f"math.sqrt(total / {_SMALLER_WIDTH})"},
        "it is divided by the larger number of columns: by the smaller, so that a space inside another gives 1": {
            _SMALLER_WIDTH: "max(first.shape[1], second.shape[1])"
        },
        "it is divided by the product of both numbers of columns: by the smaller": {
            _SMALLER_WIDTH: "(first.shape[1] * second.shape[1])"
        },
        "it is divided by the first one's number of columns: by the smaller of both": {_SMALLER_WIDTH: "first.shape[1]"},
        "it is not divided by the smaller number of columns": {f"total / {_SMALLER_WIDTH}": "total"},
        "it is divided by the number of features: the columns are the vectors, `shape[1]` counts them": {
            _SMALLER_WIDTH: "min(first.shape[0], second.shape[0])"
        },
        "only vectors of the same number are compared: every vector of the one goes with every vector of the other": {
            f"return total / {_SMALLER_WIDTH}": f"k = {_SMALLER_WIDTH}\n    return (first[:, :k] * second[:, :k]).sum(0).square().sum().item() / k",
        },
        "the rows are taken for the vectors, `first @ second.T`: the columns are, `first.T @ second`": {
            f"return total / {_SMALLER_WIDTH}": f"return (first @ second.T).square().sum().item() / {_SMALLER_WIDTH}"
        },
    },
    variants={
        "a norm": {f"return total / {_SMALLER_WIDTH}": f"return (first.T @ second).norm() ** 2 / {_SMALLER_WIDTH}"},
        "squares": {f"return total / {_SMALLER_WIDTH}": f"return (first.T @ second).square().sum().item() / {_SMALLER_WIDTH}"},
        "by singular values": {
            f"return total / {_SMALLER_WIDTH}": "return torch.linalg.svdvals(first.T @ second).square().mean()"
        },
        "by projections": {
            f"return total / {_SMALLER_WIDTH}": f"return torch.trace(first @ first.T @ second @ second.T) / {_SMALLER_WIDTH}"
        },
    },
)
