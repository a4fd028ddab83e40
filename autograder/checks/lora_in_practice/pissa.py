"""`pissa`: the largest singular components of a weight as LoRA's factors, and the rest of it."""

import math

import torch
from torch import Tensor

from autograder.checking.cases import EPS, between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise


@torch.no_grad()
def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lora_A, lora_B and the rest, with scaling * lora_B @ lora_A the weight's `rank` largest singular components."""
    exact = weight.float()
    U, sigma, Vh = torch.linalg.svd(exact, full_matrices=False)
    U, sigma, Vh = U[:, :rank], sigma[:rank], Vh[:rank]
    root = torch.diag((sigma / scaling).sqrt())
    lora_A = root @ Vh
    lora_B = U @ root
    rest = exact - scaling * (lora_B @ lora_A)
    return lora_A.to(weight.dtype), lora_B.to(weight.dtype), rest.to(weight.dtype)


def pissa_case(
    generator: torch.Generator,
    wide: bool,
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
    scaling: float | None = None,
) -> dict:
    """Return a weight, of more inputs than outputs if it is wide, whose singular values are each 0.6 to 0.8 times the last."""
    out_features, in_features = sorted((between(generator, 7, 10), between(generator, 12, 15)), reverse=not wide)
    count = min(out_features, in_features)
    left, right = (
        torch.linalg.qr(normal(generator, size, count, dtype=torch.float64))[0] for size in (out_features, in_features)
    )
    sigma = 5 * (0.6 + 0.2 * torch.rand(count, generator=generator, dtype=torch.float64)).cumprod(0)
    return {
        "weight": (left * sigma @ right.T).to(dtype),
        "rank": rank or between(generator, 3, 5),
        "scaling": scaling or 1.6 + torch.rand((), generator=generator).item(),
    }


def drive_pissa(pissa, weight, rank, scaling):
    """Return the three tensors, whether they require a gradient, and whether the weight is as it was."""
    import torch
    from torch import nn

    parameter = nn.Parameter(weight.clone())
    lora_A, lora_B, rest = pissa(parameter, rank, scaling)
    return {
        "lora_A": lora_A.detach().clone(),
        "lora_B": lora_B.detach().clone(),
        "rest": rest.detach().clone(),
        "gradients": [lora_A.requires_grad, lora_B.requires_grad, rest.requires_grad],
        "unchanged": torch.equal(parameter, weight),
    }


_PRODUCT, _REST = "scaling * lora_B @ lora_A", "the rest"
_ROWS, _COLUMNS = "the list of norms of lora_A's rows, sorted,", "the list of norms of lora_B's columns, sorted,"
_GRAM_A, _GRAM_B = "lora_A.T @ lora_A", "lora_B @ lora_B.T"


def read_pissa(observation: Observation, case: dict) -> Observation:
    """Turn the factors into what neither the signs of singular vectors nor their order can change."""
    A, B = observation["lora_A"], observation["lora_B"]
    read = {
        "the list of shapes of lora_A, lora_B and the rest": [list(observation[n].shape) for n in ("lora_A", "lora_B", "rest")],
        "the list of their dtypes": [str(observation[n].dtype) for n in ("lora_A", "lora_B", "rest")],
        "the list of whether they require a gradient": observation["gradients"],
        "the weight is left as it was": observation["unchanged"],
    }
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        return read
    A, B = A.double(), B.double()
    return read | {
        _COLUMNS: B.norm(dim=0).sort().values,  # before lora_A's: where B starts at zero, A may be random
        _ROWS: A.norm(dim=1).sort().values,
        _PRODUCT: case["scaling"] * B @ A,
        _GRAM_A: A.T @ A,
        _GRAM_B: B @ B.T,
        _REST: observation["rest"],
    }


def pissa_tolerance(case: dict) -> dict[str, float]:
    """Bound by how much two right answers differ, both computed in fp32 or finer.

    A computed SVD is that of a matrix which differs by E, with |E| <= max(out, in) * eps * sigma_1 (the customary bound). A
    singular value moves by at most |E| (Weyl), its root by |E| / (2 root), and a truncation, to first order, by
    |E| * sigma_r / (sigma_r - sigma_(r+1)). Two answers: twice that. Then each factor is rounded to the weight's dtype, by half
    an eps; so is the rest, in which those roundings may be, or not, and up to four more of its own.
    """
    weight, rank, scaling = case["weight"].double(), case["rank"], case["scaling"]
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    kept, cut = sigma[rank - 1].item(), sigma[rank].item() if rank < len(sigma) else 0.0
    error = max(weight.shape) * EPS * sigma[0].item()
    truncated = 2 * error * (2 + kept / (kept - cut))
    eps = max(torch.finfo(case["weight"].dtype).eps, EPS)
    A, B = (sigma[:rank, None] / scaling).sqrt() * Vh[:rank].abs(), U[:, :rank].abs() * (sigma[:rank] / scaling).sqrt()
    largest_norm, product = math.sqrt(sigma[0].item() / scaling), (scaling * B @ A).max().item()
    norm = error / math.sqrt(kept * scaling) + eps * largest_norm
    return {
        _COLUMNS: norm,
        _ROWS: norm,
        _PRODUCT: truncated + 2 * eps * product,
        _GRAM_A: truncated / scaling + 2 * eps * (A.T @ A).max().item(),
        _GRAM_B: truncated / scaling + 2 * eps * (B @ B.T).max().item(),
        _REST: truncated + 4 * eps * (product + weight.abs().max().item()),
    }


_KEPT = "U[:, :rank], sigma[:rank], Vh[:rank]"
_ROOT = "torch.diag((sigma / scaling).sqrt())"
_A, _B = "root @ Vh", "U @ root"
_SUBTRACTED = "exact - scaling * (lora_B @ lora_A)"
_RETURN = "return lora_A.to(weight.dtype), lora_B.to(weight.dtype), rest.to(weight.dtype)"

check_pissa = Exercise(
    spec=[pissa],
    cases=lambda generator: [pissa_case(generator, wide=True), pissa_case(generator, wide=False, dtype=torch.bfloat16)],
    driver=drive_pissa,
    reading=read_pissa,
    tolerance=pissa_tolerance,
    mistakes={
        "the smallest singular components are taken, as in MiLoRA: PiSSA trains the largest ones, which come first": {
            _KEPT: "U[:, -rank:], sigma[-rank:], Vh[-rank:]"
        },
        "one component too few is taken": {_KEPT: "U[:, : rank - 1], sigma[: rank - 1], Vh[: rank - 1]"},
        "all components are taken: cut off after `rank`": {_KEPT: "U, sigma, Vh"},
        "each sigma went into lora_B alone: both factors get its root": {_ROOT: "torch.diag(sigma / scaling)", _A: "Vh"},
        "each sigma went into lora_A alone: both factors get its root": {_ROOT: "torch.diag(sigma / scaling)", _B: "U"},
        "the singular values are missing: each row and column should have the norm sqrt(sigma / scaling)": {
            _ROOT: "torch.eye(len(sigma)) / scaling**0.5"
        },
        "both factors have sigma / scaling, so that the product has its square: take the root": {
            _ROOT: "torch.diag(sigma / scaling)"
        },
        "the factors are not divided by the root of the scaling: scaling * lora_B @ lora_A is too large": {
            _ROOT: "torch.diag(sigma.sqrt())"
        },
        "the scaling is left out, in the factors and in the rest: forward multiplies the product by it": {
            _ROOT: "torch.diag(sigma.sqrt())",
            _SUBTRACTED: "exact - lora_B @ lora_A",
        },
        "both factors are divided by the scaling: divide each by its root": {_ROOT: "torch.diag(sigma.sqrt() / scaling)"},
        "one factor alone is divided by the scaling: divide each by its root": {
            _ROOT: "torch.diag(sigma.sqrt())",
            _B: "U @ root / scaling",
        },
        "sigma is multiplied by the scaling: divide by it, because forward multiplies": {
            _ROOT: "torch.diag((sigma * scaling).sqrt())"
        },
        "the product is subtracted without the scaling: the rest is weight - scaling * lora_B @ lora_A": {
            _SUBTRACTED: "exact - lora_B @ lora_A"
        },
        "the rest is the whole weight: subtract scaling * lora_B @ lora_A": {_SUBTRACTED: "exact"},
        "the product is added to the weight: subtract it": {_SUBTRACTED: "exact + scaling * (lora_B @ lora_A)"},
        "the rest is what the factors hold: it is what they leave of the weight": {_SUBTRACTED: "scaling * (lora_B @ lora_A)"},
        "columns of Vh are taken: torch.linalg.svd returns V transposed already, so take its first `rank` rows": {
            _KEPT: "U[:, :rank], sigma[:rank], Vh[:, :rank].T"
        },
        "the factors are LoRA's, at random and zero: PiSSA's come from the weight": {
            _A: "torch.randn(rank, weight.shape[1])",
            _B: "torch.zeros(weight.shape[0], rank)",
        },
        "lora_A and lora_B have changed places: return lora_A, of shape (rank, in), first": {
            _RETURN: "return lora_B.to(weight.dtype), lora_A.to(weight.dtype), rest.to(weight.dtype)"
        },
        "the weight is changed in place: return a new tensor": {
            _RETURN: "return lora_A.to(weight.dtype), lora_B.to(weight.dtype), weight.copy_(rest)"
        },
        "fp32 comes back, whatever the weight's dtype: convert all three to `weight.dtype`": {
            _RETURN: "return lora_A, lora_B, rest"
        },
        "torch.linalg.svd knows no 16 bits: compute in fp32": {"weight.float()": "weight"},
        "what comes back requires a gradient: return plain tensors": {
            _RETURN: "return tuple(nn.Parameter(t.to(weight.dtype)) for t in (lora_A, lora_B, rest))"
        },
    },
    variants={
        "broadcast, in double precision": """
            def pissa(weight, rank, scaling):
                W = weight.detach().double()
                U, S, Vh = torch.linalg.svd(W)
                root = (S[:rank] / scaling) ** 0.5
                A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
                return A.to(weight.dtype), B.to(weight.dtype), (W - scaling * B @ A).to(weight.dtype)
        """,
        "other signs, in another order": {_A: "-(root @ Vh).flip(0)", _B: "-(U @ root).flip(1)"},
        "the rest from the other components": """
            def pissa(weight, rank, scaling):
                U, S, V = torch.svd(weight.detach().float())
                A = (V[:, :rank] * S[:rank].sqrt()).T / math.sqrt(scaling)
                B = U[:, :rank] * S[:rank].sqrt() / math.sqrt(scaling)
                rest = U[:, rank:] @ torch.diag(S[rank:]) @ V[:, rank:].T
                return A.to(weight.dtype), B.to(weight.dtype), rest.to(weight.dtype)
        """,
        "the rest from the rounded factors, in the weight's dtype": {
            _SUBTRACTED: "weight - scaling * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype))"
        },
        "one component at a time": """
            def pissa(weight, rank, scaling):
                rest = weight.detach().float()
                U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
                A, B = [], []
                for i in range(rank):
                    A.append((S[i] / scaling).sqrt() * Vh[i])
                    B.append((S[i] / scaling).sqrt() * U[:, i])
                    rest = rest - scaling * torch.outer(B[-1], A[-1])
                return tuple(t.to(weight.dtype) for t in (torch.stack(A), torch.stack(B, dim=1), rest))
        """,
    },
)
