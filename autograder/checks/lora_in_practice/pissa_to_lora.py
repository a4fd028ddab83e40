"""`pissa_to_lora`: what PiSSA has learned, as a plain LoRA adapter of the weight that it took apart."""

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


@torch.no_grad()
def pissa_to_lora(
    lora_A: Tensor, lora_B: Tensor, start_A: Tensor, start_B: Tensor, alpha: float
) -> tuple[Tensor, Tensor, float]:
    """Return factors of twice the rank with B A - B0 A0 as their product, and twice the alpha: the scale stays the same."""
    rows = [lora_A, start_A]
    columns = [lora_B, -start_B]
    return torch.cat(rows, dim=0), torch.cat(columns, dim=1), 2 * alpha


def converted_case(
    generator: torch.Generator, dtype: torch.dtype = torch.float32, rank: int | None = None, alpha: float | None = None
) -> dict:
    """Return trained factors and those of the start; no two sizes are equal, so that no mix-up can hide."""
    rank = rank or between(generator, 3, 5)
    out_features = between(generator, 11, 13)
    in_features = out_features + between(generator, 3, 5)
    return {
        "lora_A": normal(generator, rank, in_features, dtype=dtype),
        "lora_B": normal(generator, out_features, rank, dtype=dtype),
        "start_A": normal(generator, rank, in_features, dtype=dtype),
        "start_B": normal(generator, out_features, rank, dtype=dtype),
        "alpha": alpha or rank * (1.6 + torch.rand((), generator=generator).item()),
    }


def drive_pissa_to_lora(pissa_to_lora, lora_A, lora_B, start_A, start_B, alpha):
    """Return the new factors and alpha, and whether what was given is as it was."""
    import torch
    from torch import nn

    given = [nn.Parameter(tensor.clone()) for tensor in (lora_A, lora_B, start_A, start_B)]
    A, B, new_alpha = pissa_to_lora(*given, alpha)
    return {
        "A": A.detach().clone(),
        "B": B.detach().clone(),
        "alpha": float(new_alpha),
        "gradients": [A.requires_grad, B.requires_grad],
        "unchanged": all(map(torch.equal, given, (lora_A, lora_B, start_A, start_B))),
    }


_UPDATE = "the update alpha / rank * lora_B @ lora_A of the new adapter"


def read_converted(observation: Observation, case: dict) -> Observation:
    """Turn the adapter into its update: how that is shared out between the factors and alpha is free."""
    A, B = observation["A"], observation["B"]
    read = {
        "the list of shapes of lora_A and lora_B": [list(A.shape), list(B.shape)],
        "the list of their dtypes": [str(A.dtype), str(B.dtype)],
        "the list of whether they require a gradient": observation["gradients"],
        "the factors that were given are left as they were": observation["unchanged"],
    }
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return read
    return read | {_UPDATE: observation["alpha"] / A.shape[0] * B.double() @ A.double()}


def converted_tolerance(case: dict) -> dict[str, float]:
    """Each entry of the update is a sum of 2 rank products, with up to four roundings each, or it comes from a computed SVD.

    The bound allows for factors that are differences of those given.

    Factors from an SVD are those of a matrix that differs by at most max(out, in) * eps * sigma_1 (the customary bound); in
    16 bits the SVD is made in fp32, and its factors are then rounded, like the others.
    """
    A, B, A0, B0 = (case[name].double() for name in ("lora_A", "lora_B", "start_A", "start_B"))
    scale, eps = case["alpha"] / A.shape[0], torch.finfo(case["lora_A"].dtype).eps
    terms = scale * ((B.abs() + B0.abs()) @ (A.abs() + A0.abs())).max().item()
    largest = scale * torch.linalg.matrix_norm(B @ A - B0 @ A0, 2).item()
    fine = min(eps, torch.finfo(torch.float32).eps)
    return {_UPDATE: (2 * A.shape[0] + 4) * eps * terms + (max(B.shape[0], A.shape[1]) * fine + 2 * eps) * largest}


_ROWS, _COLUMNS = "[lora_A, start_A]", "[lora_B, -start_B]"
_RETURN = "return torch.cat(rows, dim=0), torch.cat(columns, dim=1), 2 * alpha"

check_pissa_to_lora = Exercise(
    spec=[pissa_to_lora],
    cases=lambda generator: [converted_case(generator), converted_case(generator, torch.bfloat16)],
    driver=drive_pissa_to_lora,
    reading=read_converted,
    tolerance=converted_tolerance,
    mistakes={
        "alpha is not doubled: the rank is twice as large, so the scale alpha / rank would be half of what it was": {
            "2 * alpha": "alpha"
        },
        "alpha is halved: the rank is twice as large, so alpha must be, too": {"2 * alpha": "alpha / 2"},
        "the scale alpha / rank comes back: return an alpha, because plain LoRA divides it by the rank": {
            "2 * alpha": "alpha / len(lora_A)"
        },
        "the scale counts twice: it is in the factors and in alpha": {
            _COLUMNS: "[alpha / len(lora_A) * lora_B, -alpha / len(lora_A) * start_B]"
        },
        "the start's product is added: subtract it, by a minus in one of its factors, not in none and not in both": {
            _COLUMNS: "[lora_B, start_B]"
        },
        "the trained product is subtracted from the start's: it is the other way round": {_COLUMNS: "[-lora_B, start_B]"},
        "the start is missing, zeros fill up the rank: subtract start_B @ start_A": {
            _ROWS: "[lora_A, torch.zeros_like(start_A)]",
            _COLUMNS: "[lora_B, torch.zeros_like(start_B)]",
        },
        "the trained factors alone come back: subtract start_B @ start_A, with factors of twice the rank": {
            _RETURN: "return lora_A.clone(), lora_B.clone(), alpha"
        },
        "the factors are subtracted: it is the products that subtract, so put the factors side by side": {
            _RETURN: "return lora_A - start_A, lora_B - start_B, alpha"
        },
        "the differences of the factors stand beside the trained ones: B A - B0 A0 is not a product of differences": {
            _ROWS: "[lora_A, lora_A - start_A]",
            _COLUMNS: "[lora_B, lora_B - start_B]",
        },
        "lora_A and lora_B list the two products in different orders: B's columns go with A's rows": {
            _COLUMNS: "[-start_B, lora_B]"
        },
        "the trained lora_B is multiplied by the start's lora_A: start_A goes with start_B": {_COLUMNS: "[lora_B, -lora_B]"},
        "the A's are put side by side: they have the same columns, so put one on top of the other": {
            "rows, dim=0": "rows, dim=1"
        },
        "the B's are stacked on top of each other: they have the same rows, so put their columns side by side": {
            "columns, dim=1": "columns, dim=0"
        },
        "lora_A and lora_B have changed places: return lora_A, of shape (2 rank, in), first": {
            _RETURN: "return torch.cat(columns, dim=1), torch.cat(rows, dim=0), 2 * alpha"
        },
        "alpha is missing: return it as the third value": {", 2 * alpha": ""},
        "`start_B` is changed in place: use `-start_B`, which is a new tensor": {_COLUMNS: "[lora_B, start_B.neg_()]"},
        "the factors come back in another dtype than they had": {
            _RETURN: "return torch.cat(rows, dim=0).float(), torch.cat(columns, dim=1).float(), 2 * alpha"
        },
        "what comes back requires a gradient: return plain tensors": {
            _RETURN: "return nn.Parameter(torch.cat(rows, dim=0)), nn.Parameter(torch.cat(columns, dim=1)), 2 * alpha"
        },
    },
    variants={
        "the minus in A, the start first": {_ROWS: "[-start_A, lora_A]", _COLUMNS: "[start_B, lora_B]"},
        "the same alpha, and twice the B": {_COLUMNS: "[2 * lora_B, -2 * start_B]", "2 * alpha": "alpha"},
        "the scale in B, and as alpha the new rank": {
            _COLUMNS: "[alpha / len(lora_A) * lora_B, -alpha / len(lora_A) * start_B]",
            "2 * alpha": "2 * len(lora_A)",
        },
        "what has changed in A and what has changed in B": {
            _ROWS: "[lora_A - start_A, start_A]",
            _COLUMNS: "[lora_B, lora_B - start_B]",
        },
        "filled in row by row": """
            def pissa_to_lora(lora_A, lora_B, start_A, start_B, alpha):
                rank = lora_A.shape[0]
                A = lora_A.detach().new_empty(2 * rank, lora_A.shape[1])
                B = lora_B.detach().new_empty(lora_B.shape[0], 2 * rank)
                with torch.no_grad():
                    for i in range(rank):
                        A[2 * i], A[2 * i + 1] = lora_A[i], start_A[i]
                        B[:, 2 * i], B[:, 2 * i + 1] = lora_B[:, i], -start_B[:, i]
                return A, B, alpha * 2.0
        """,
        "any factors of the difference": """
            @torch.no_grad()
            def pissa_to_lora(lora_A, lora_B, start_A, start_B, alpha):
                exact = [t.float() if t.dtype.itemsize == 2 else t for t in (lora_A, lora_B, start_A, start_B)]
                U, S, Vh = torch.linalg.svd(exact[1] @ exact[0] - exact[3] @ exact[2], full_matrices=False)
                r = 2 * lora_A.shape[0]
                return Vh[:r].to(lora_A.dtype), (U[:, :r] * S[:r]).to(lora_B.dtype), 2 * alpha
        """,
    },
)
