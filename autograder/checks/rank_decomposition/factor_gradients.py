"""`factor_gradients`: from a matrix's gradient to its factors'."""

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.checks.rank_decomposition.cases import eps_of
from autograder.exercise import Exercise


def factor_gradients(gradient: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of B and A, from that of their product W = B A: dW = dB A + B dA."""
    dB = torch.einsum("oi,ri->or", gradient, A)
    dA = torch.einsum("or,oi->ri", B, gradient)
    return dB, dA


def gradient_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, zero_B: bool = False) -> dict:
    """Return factors and the gradient of their product; no two sizes are equal."""
    out_features = between(generator, 7, 9)
    in_features, rank = out_features + between(generator, 3, 6), between(generator, 3, 5)
    B = normal(generator, out_features, rank, dtype=dtype)
    return {
        "gradient": normal(generator, out_features, in_features, dtype=dtype),
        "B": torch.zeros_like(B) if zero_B else B,
        "A": normal(generator, rank, in_features, dtype=dtype),
    }


def drive_factor_gradients(factor_gradients, gradient, B, A):
    """Return both gradients, or what came instead, and whether what was given is as it was."""
    import torch

    given = [tensor.clone() for tensor in (gradient, B, A)]
    result = factor_gradients(gradient, B, A)
    if not (isinstance(result, tuple | list) and len(result) == 2 and all(torch.is_tensor(part) for part in result)):
        return {"what is returned": repr(result)[:100]}
    return {
        "what is returned": "two tensors",
        "the gradient of B": result[0].detach(),
        "the gradient of A": result[1].detach(),
        "gradient, B and A are left as they were": all(map(torch.equal, given, (gradient, B, A))),
    }


def gradient_tolerance(case: dict) -> dict[str, float]:
    """A dot product of n terms is off by n u (sum of |terms|), u = eps / 2, and two answers by twice that (Higham 2002)."""
    gradient, B, A = (case[name].double().abs() for name in ("gradient", "B", "A"))
    eps = eps_of(case["A"])
    return {
        "the gradient of B": A.shape[1] * eps * (gradient @ A.T).max().item(),
        "the gradient of A": B.shape[0] * eps * (B.T @ gradient).max().item(),
    }


_GRADIENT_OF_B = 'torch.einsum("oi,ri->or", gradient, A)'
_GRADIENT_OF_A = 'torch.einsum("or,oi->ri", B, gradient)'
_RETURN_GRADIENTS = "return dB, dA"

check_factor_gradients = Exercise(
    spec=[factor_gradients],
    cases=lambda generator: [gradient_case(generator), gradient_case(generator)],
    driver=drive_factor_gradients,
    tolerance=gradient_tolerance,
    mistakes={
        "A is not transposed in the gradient of B: the shapes have to give (out, rank)": {_GRADIENT_OF_B: "gradient @ A"},
        "B is not transposed in the gradient of A: the shapes have to give (rank, in)": {_GRADIENT_OF_A: "B @ gradient"},
        "the gradient of the product is transposed: it has the shape of B @ A, and comes first in the one, last in the other": {
            _GRADIENT_OF_B: "gradient.T @ A.T",
            _GRADIENT_OF_A: "B.T @ gradient.T",
        },
        "the two gradients have changed places: B's is returned first": {_RETURN_GRADIENTS: "return dA, dB"},
        "both gradients are transposed: each has the shape of its factor": {_RETURN_GRADIENTS: "return dB.T, dA.T"},
        "the signs are those of a descent step: return the gradients themselves": {_RETURN_GRADIENTS: "return -dB, -dA"},
        "the gradients are halved: product rule, each factor gets all of its term": {
            _RETURN_GRADIENTS: "return dB / 2, dA / 2"
        },
        "the gradients are divided by the rank": {_RETURN_GRADIENTS: "return dB / A.shape[0], dA / A.shape[0]"},
        "the gradient of A uses the gradient of B where it should use B": {
            _GRADIENT_OF_A: 'torch.einsum("or,oi->ri", dB, gradient)'
        },
        "the gradient of A uses B after a step: both gradients belong to the same point": {
            _GRADIENT_OF_A: "(B - dB).T @ gradient"
        },
        "the product B A stands where its gradient should": {_GRADIENT_OF_B: "(B @ A) @ A.T", _GRADIENT_OF_A: "B.T @ (B @ A)"},
        "the gradient of B does not depend on A here: its factor is missing": {_GRADIENT_OF_B: "gradient[:, : A.shape[0]]"},
    },
    variants={
        "matrix products": {_GRADIENT_OF_B: "gradient @ A.T", _GRADIENT_OF_A: "B.T @ gradient"},
        "transposed twice": {_GRADIENT_OF_B: "(A @ gradient.T).T", _GRADIENT_OF_A: "(gradient.T @ B).T"},
        "autograd": {
            _GRADIENT_OF_B: "None\n    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()",
            _GRADIENT_OF_A: "None\n    dB, dA = torch.autograd.grad(B @ A, (B, A), gradient)",
        },
        "in double precision": {
            _GRADIENT_OF_B: "(gradient.double() @ A.double().T).to(A.dtype)",
            _GRADIENT_OF_A: "(B.double().T @ gradient.double()).to(A.dtype)",
        },
    },
)
