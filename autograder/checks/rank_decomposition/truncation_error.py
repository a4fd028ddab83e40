"""`truncation_error`: what the dropped singular values weigh."""

import math

import torch
from torch import Tensor

from autograder.cases import between
from autograder.checks.rank_decomposition.cases import eps_of
from autograder.checks.rank_decomposition.helpers import as_number
from autograder.exercise import Exercise


def truncation_error(singular_values: Tensor, rank: int) -> float:
    """Return the Frobenius norm of what the best approximation of this rank leaves out (Eckart and Young 1936)."""
    total = 0.0
    dropped = singular_values[rank:]
    for sigma in dropped:
        total += sigma.item() ** 2
    return math.sqrt(total)


def error_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, ranks: list[int] | None = None) -> dict:
    """Return a spectrum in which no sum of squares, of values or of neighbours equals another."""
    count = between(generator, 9, 12)
    sigma = 0.3 + 3 * torch.rand(count, generator=generator, dtype=torch.float64).sort(descending=True).values
    return {"singular_values": sigma.to(dtype), "ranks": ranks or [between(generator, 3, count - 4), 0, count]}


def drive_truncation_error(truncation_error, singular_values, ranks):
    """Return the error at each rank, as a number, or what came instead."""
    errors = []
    for rank in ranks:
        error = as_number(truncation_error(singular_values, rank))
        if isinstance(error, str):
            return {"what is returned": error}
        errors.append(error)
    return {"what is returned": "numbers"} | {f"the error at rank {rank}": error for rank, error in zip(ranks, errors)}


def error_tolerance(case: dict) -> dict[str, float]:
    """A sum of n squares and its root: at most n + 2 roundings, each relative to at most the norm of all values."""
    sigma = case["singular_values"]
    bound = (len(sigma) + 2) * eps_of(sigma) * sigma.double().norm().item()
    return {f"the error at rank {rank}": bound for rank in case["ranks"]}


_DROPPED = "singular_values[rank:]"
_ROOT = "math.sqrt(total)"

check_truncation_error = Exercise(
    spec=[truncation_error],
    cases=lambda generator: [error_case(generator), error_case(generator)],
    driver=drive_truncation_error,
    helpers=[as_number],
    tolerance=error_tolerance,
    mistakes={
        "the kept singular values are summed: the error is made of the dropped ones, from index `rank` on": {
            _DROPPED: "singular_values[:rank]"
        },
        "one singular value too many is dropped: those with index 0 to rank - 1 are kept": {
            _DROPPED: "singular_values[max(rank - 1, 0) :]"
        },
        "one singular value too few is dropped: counting starts at 0, so the first dropped one has index `rank`": {
            _DROPPED: "singular_values[rank + 1 :]"
        },
        "the square root is missing: this is the squared error": {_ROOT: "total"},
        "the dropped singular values are summed: sum their squares, then take the root": {
            "sigma.item() ** 2": "sigma.item()",
            _ROOT: "total",
        },
        "the root is of the sum of the dropped singular values: of the sum of their squares": {
            "sigma.item() ** 2": "sigma.item()"
        },
        "only the largest dropped singular value counts here: that is the error in the spectral norm, not in Frobenius's": {
            _DROPPED: "singular_values[rank : rank + 1]"
        },
        "the error is divided by the norm of the matrix: asked for is the absolute error": {
            _ROOT: "math.sqrt(total) / singular_values.norm().item()"
        },
        "the squares are averaged: sum them": {_ROOT: "math.sqrt(total / max(len(dropped), 1))"},
        "the norm of what is kept is subtracted from the norm of all: squares add up, norms do not": {
            _ROOT: "singular_values.norm().item() - singular_values[:rank].norm().item()"
        },
    },
    variants={
        "a norm": {_ROOT: f"{_DROPPED}.norm()"},
        "sum of squares": {_ROOT: f"{_DROPPED}.square().sum().sqrt().item()"},
        "hypot": {_ROOT: f"math.hypot(*{_DROPPED}.tolist())"},
        "a dot product, in double precision": {_ROOT: f"float(({_DROPPED}.double() @ {_DROPPED}.double()) ** 0.5)"},
    },
)
