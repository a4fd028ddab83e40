"""`factor_parameters` and `break_even_rank`."""

import torch

from autograder.cases import between
from autograder.exercise import Exercise


def factor_parameters(out_features: int, in_features: int, rank: int) -> int:
    """Return how many numbers B (out, rank) and A (rank, in) have together."""
    return out_features * rank + rank * in_features


def break_even_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank at which the factors have fewer numbers than the matrix."""
    rank = 0
    while factor_parameters(out_features, in_features, rank + 1) < out_features * in_features:
        rank += 1
    return rank


def shapes_case(generator: torch.Generator, low: int = 40) -> dict:
    """Return a tall and a wide shape, one where equality occurs, and a rank."""
    small, large, half = (
        between(generator, low, low + 20),
        between(generator, 2 * low + 30, 2 * low + 60),
        2 * between(generator, 11, 19),
    )
    return {"shapes": [(large, small), (small, large), (half, half)], "rank": between(generator, 3, 7)}


def drive_break_even(factor_parameters, break_even_rank, shapes, rank):
    """Return both figures for each shape."""
    seen = {}
    for out_features, in_features in shapes:
        counted, limit = factor_parameters(out_features, in_features, rank), break_even_rank(out_features, in_features)
        where = f"for a {out_features} × {in_features} matrix"
        seen[f"factor_parameters at rank {rank} {where}"] = counted if isinstance(counted, int | float) else repr(counted)[:100]
        seen[f"break_even_rank {where}"] = limit if isinstance(limit, int | float) else repr(limit)[:100]
    return seen


_COUNT = "out_features * rank + rank * in_features"
_LIMIT = "    return rank\n"

check_break_even = Exercise(
    spec=[factor_parameters, break_even_rank],
    cases=lambda generator: [shapes_case(generator)],
    driver=drive_break_even,
    mistakes={
        "factor_parameters counts the product B A: count its two factors": {_COUNT: "out_features * in_features"},
        "factor_parameters multiplies the factors' sizes: add them": {_COUNT: "out_features * rank * in_features"},
        "factor_parameters counts one factor only: there are two": {_COUNT: "rank * in_features"},
        "factor_parameters adds the singular values: they are inside B and A": {_COUNT: _COUNT + " + rank"},
        "factor_parameters adds a rank × rank matrix between B and A: there is none": {_COUNT: _COUNT + " + rank * rank"},
        "break_even_rank counts equality as a saving: the factors must have *fewer* numbers than the matrix": {
            "< out_features * in_features": "<= out_features * in_features"
        },
        "break_even_rank is one too large: it is the last rank that saves, not the first that does not": {
            _LIMIT: "    return rank + 1\n"
        },
        "break_even_rank is the smaller side, the largest rank that there is: the factors are larger than the matrix long before": {
            _LIMIT: "    return min(out_features, in_features)\n"
        },
        "break_even_rank is half the smaller side: right for squares only, and there by one too large": {
            _LIMIT: "    return min(out_features, in_features) // 2\n"
        },
        "break_even_rank is not a whole number: it is a rank": {
            _LIMIT: "    return out_features * in_features / (out_features + in_features)\n"
        },
    },
    variants={
        "a factor taken out": {_COUNT: "rank * (out_features + in_features)"},
        "whole division of one less": {_LIMIT: "    return (out_features * in_features - 1) // (out_features + in_features)\n"},
        "ceil, less one": {_LIMIT: "    return math.ceil(out_features * in_features / (out_features + in_features)) - 1\n"},
        "the largest of all that save": {
            _LIMIT: "    return max(r for r in range(out_features) "
            "if factor_parameters(out_features, in_features, r) < out_features * in_features)\n"
        },
    },
)
