"""Bug hunt: `add_products`, the sum of two products as one."""

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.checks.rank_decomposition.cases import eps_of
from autograder.drive import Observation
from autograder.exercise import Exercise


def add_products(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return B and A with B A = w1 B1 A1 + w2 B2 A2."""
    (B1, A1), (B2, A2) = first, second
    w1, w2 = weights
    columns, rows = [], []
    columns += [w1 * B1, w2 * B2]
    rows += [A1, A2]
    return torch.cat(columns, dim=1), torch.cat(rows, dim=0)


def sum_case(
    generator: torch.Generator, ranks: tuple[int, int], weights: list[float], dtype: torch.dtype = torch.float32
) -> dict:
    """Return two factorizations of the same shape."""
    out_features = between(generator, 9, 11)
    in_features = out_features + between(generator, 3, 5)
    case = {"weights": weights}
    for number, rank in enumerate(ranks, 1):
        case[f"B{number}"] = normal(generator, out_features, rank, dtype=dtype)
        case[f"A{number}"] = normal(generator, rank, in_features, dtype=dtype)
    return case


def drive_add_products(add_products, B1, A1, B2, A2, weights):
    """Return the two factors, or what came instead, and whether what was given is as it was."""
    import torch

    given = [tensor.clone() for tensor in (B1, A1, B2, A2)]
    result = add_products((B1, A1), (B2, A2), tuple(weights))
    if not (isinstance(result, tuple | list) and len(result) == 2 and all(torch.is_tensor(factor) for factor in result)):
        return {"returned": repr(result)[:100]}
    B, A = (factor.detach().clone() for factor in result)
    unchanged = all(map(torch.equal, given, (B1, A1, B2, A2)))
    return {"returned": "two tensors", "shapes": [list(B.shape), list(A.shape)], "B": B, "A": A, "unchanged": unchanged}


RETURNED = "what is returned"


def read_sum(observation: Observation, case: dict) -> Observation:
    """Turn the factors into their product: how the weights are shared out between B and A is free."""
    read = {RETURNED: observation["returned"]}
    if "shapes" not in observation:
        return read
    read |= {
        "the shapes of B and A": observation["shapes"],
        "the factors given are left as they were": observation["unchanged"],
    }
    B, A = observation["B"], observation["A"]
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        return read
    return read | {"the dtypes of B and A": [str(B.dtype), str(A.dtype)], "the product B @ A": B.double() @ A.double()}


def sum_tolerance(case: dict) -> dict[str, float]:
    """Each entry of the product is a sum of r1 + r2 terms with up to four roundings each: the weight, its roots, the product.

    Factors from a computed SVD are those of a matrix that differs by max(m, n) * eps * sigma_1 (see `factors_tolerance`).
    """
    w1, w2 = case["weights"]
    B1, A1, B2, A2 = (case[name].double() for name in ("B1", "A1", "B2", "A2"))
    terms = (abs(w1) * B1.abs() @ A1.abs() + abs(w2) * B2.abs() @ A2.abs()).max().item()
    total = w1 * B1 @ A1 + w2 * B2 @ A2
    decomposed = max(total.shape) * eps_of(total) * torch.linalg.matrix_norm(total, 2).item()
    return {"the product B @ A": (A1.shape[0] + A2.shape[0] + 4) * eps_of(case["B1"]) * terms + decomposed}


_COLUMNS, _ROWS = "[w1 * B1, w2 * B2]", "[A1, A2]"
_SUM = "return torch.cat(columns, dim=1), torch.cat(rows, dim=0)"

check_add_products = Exercise(
    spec=[add_products],
    cases=lambda generator: [
        sum_case(generator, (3, 3), [0.7, -1.3]),
        sum_case(generator, (2, 4), [1.6, 0.4]),
    ],
    driver=drive_add_products,
    reading=read_sum,
    tolerance=sum_tolerance,
    mistakes={
        "the factors are added, so that B1 A2 and B2 A1 get into the product: put them side by side": {
            _SUM: "return w1 * B1 + w2 * B2, A1 + A2"
        },
        "the factors are added with roots of the weights, as peft's `linear` does: B1 A2 and B2 A1 still get in": {
            _SUM: "return abs(w1)**0.5 * B1 + abs(w2)**0.5 * B2, abs(w1)**0.5 * A1 + abs(w2)**0.5 * A2"
        },
        "the weights are in B and in A, so that they count squared": {_ROWS: "[w1 * A1, w2 * A2]"},
        "the weights are missing": {_COLUMNS: "[B1, B2]"},
        "the sign of a weight is lost: a root of it on both factors cannot be negative": {
            _COLUMNS: "[abs(w1) * B1, abs(w2) * B2]"
        },
        "both products get the same weight": {_COLUMNS: "[w1 * B1, w1 * B2]"},
        "the weights have changed places": {_COLUMNS: "[w2 * B1, w1 * B2]"},
        "B and A list the two products in different orders: B's columns go with A's rows": {_ROWS: "[A2, A1]"},
        "B1 and B2 are stacked on top of each other: they have the same rows, so put their columns side by side": {
            "columns, dim=1": "columns, dim=0"
        },
        "A1 and A2 are put side by side: they have the same columns, so put one on top of the other": {
            "rows, dim=0": "rows, dim=1"
        },
        "the second product is missing": {_COLUMNS: "[w1 * B1]", _ROWS: "[A1]"},
        "the sum itself is returned: return its two factors": {_SUM: "return w1 * B1 @ A1 + w2 * B2 @ A2"},
        "B and A have changed places: return B, of shape (out, ranks), first": {
            _SUM: "return torch.cat(rows, dim=0), torch.cat(columns, dim=1)"
        },
    },
    variants={
        "the weights in A": {_COLUMNS: "[B1, B2]", _ROWS: "[w1 * A1, w2 * A2]"},
        "hstack and vstack": {_SUM: "return torch.hstack(columns), torch.vstack(rows)"},
        "roots, with the sign in B": {
            _COLUMNS: "[math.copysign(abs(w1)**0.5, w1) * B1, math.copysign(abs(w2)**0.5, w2) * B2]",
            _ROWS: "[abs(w1)**0.5 * A1, abs(w2)**0.5 * A2]",
        },
        "the second one first": {_COLUMNS: "[w2 * B2, w1 * B1]", _ROWS: "[A2, A1]"},
        "any factors of the sum that have this many ranks": {
            _SUM: "r = A1.shape[0] + A2.shape[0]\n"
            "    U, S, Vh = torch.linalg.svd((w1 * B1 @ A1 + w2 * B2 @ A2).double(), full_matrices=False)\n"
            "    return (U[:, :r] * S[:r]).to(B1.dtype), Vh[:r].to(B1.dtype)"
        },
    },
)
"""Every exercise of the unit, by the name of its check."""
