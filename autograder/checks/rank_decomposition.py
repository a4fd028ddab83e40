"""Checks of unit 02_rank_decomposition: what is judged of a factorization is what does not depend on the signs of an SVD."""

import math

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.drive import Observation
from autograder.exercise import PEAK_BYTES, Exercise

RETURNED = "what is returned"


def _orthonormal(generator: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(generator, rows, columns, dtype=torch.float64))[0]


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


# ======================================================================================================================
# 1. truncated_svd
# ======================================================================================================================
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, rank) and A (rank, in) with B A the best approximation; each singular value is shared out evenly."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept_U, kept_sigma, kept_Vh = U[:, :rank], sigma[:rank], Vh[:rank]
    share = torch.diag(kept_sigma.sqrt())
    B = kept_U @ share
    A = share @ kept_Vh
    return B, A


def drive_truncated_svd(truncated_svd, matrix, rank):
    """Return the two factors, or what came instead; of a large matrix the shapes alone."""
    import torch

    result = truncated_svd(matrix, rank)
    if not (isinstance(result, tuple | list) and len(result) == 2 and all(torch.is_tensor(factor) for factor in result)):
        return {"returned": repr(result)[:100]}
    B, A = (factor.detach() for factor in result)
    return {"returned": "two tensors", "shapes": [list(B.shape), list(A.shape)], "B": B[:, :16].clone(), "A": A[:, :16].clone()}


_BTB, _AAT = "B.T @ B, which should be the kept singular values on a diagonal,", "A @ A.T, which should be the same diagonal,"


def read_factors(observation: Observation, case: dict) -> Observation:
    """Turn the factors into what no choice of signs can change."""
    read = {RETURNED: observation["returned"]}
    if "shapes" not in observation:
        return read
    out_features, in_features = case["matrix"].shape
    read["the shapes of B and A"] = observation["shapes"]
    if observation["shapes"] != [[out_features, case["rank"]], [case["rank"], in_features]] or in_features > 16:
        return read
    B, A = observation["B"], observation["A"]
    read["the dtypes of B and A"] = [str(B.dtype), str(A.dtype)]
    B, A = B.double(), A.double()
    return read | {"the product B @ A": B @ A, _BTB: B.T @ B, _AAT: A @ A.T}


def matrix_case(
    generator: torch.Generator,
    wide: bool,
    dtype: torch.dtype = torch.float32,
    true_rank: int | None = None,
    rank: int | None = None,
) -> dict:
    """Return a matrix of random shape and known singular values, the next at most 0.8 times the last."""
    sizes = sorted((between(generator, 7, 10), between(generator, 12, 15)), reverse=not wide)
    count = min(sizes)
    steps = 0.6 + 0.2 * torch.rand(count, generator=generator, dtype=torch.float64)
    sigma = 5 * steps.cumprod(0)
    if true_rank is not None:
        sigma[true_rank:] = 0
    matrix = _orthonormal(generator, sizes[0], count) * sigma @ _orthonormal(generator, sizes[1], count).T
    return {"matrix": matrix.to(dtype), "rank": rank or between(generator, 3, 5)}


def thin_case(generator: torch.Generator) -> dict:
    """Return a matrix of few rows and very many columns, of which the whole V would take 61 MiB."""
    return {"matrix": normal(generator, 6, 4000), "rank": 3}


def factors_tolerance(case: dict) -> dict[str, float]:
    """Bound by how much two right answers differ.

    A computed SVD is that of a matrix which differs by E, with |E| <= max(m, n) * eps * sigma_1 (the customary bound, as in
    `torch.linalg.matrix_rank`). A singular value moves by at most |E| (Weyl), and a truncation, to first order, by
    |E| * sigma_r / (sigma_r - sigma_(r+1)), or by |E| twice if nothing was cut off. Two answers: twice that.
    """
    matrix, rank = case["matrix"], case["rank"]
    if max(matrix.shape) > 16:
        return {PEAK_BYTES: 24 * 2**20}  # less than half of the whole V, and five times the noise of the process
    sigma = torch.linalg.svdvals(matrix.double())
    error = max(matrix.shape) * _eps(matrix) * sigma[0].item()
    kept, cut = sigma[rank - 1].item(), sigma[rank].item() if rank < len(sigma) else 0.0
    factor = kept / (kept - cut) if kept > error else 1.0
    return {"the product B @ A": 2 * error * (1 + factor), _BTB: 4 * error, _AAT: 4 * error}


_KEPT = "U[:, :rank], sigma[:rank], Vh[:rank]"
_SHARE = "torch.diag(kept_sigma.sqrt())"

check_truncated_svd = Exercise(
    spec=[truncated_svd],
    driver=drive_truncated_svd,
    reading=read_factors,
    cases=lambda generator: [matrix_case(generator, wide=True), matrix_case(generator, wide=False), thin_case(generator)],
    tolerance=factors_tolerance,
    measures_peak=lambda case: max(case["matrix"].shape) > 16,
    at_most=frozenset({PEAK_BYTES}),
    mistakes={
        "all of the singular values went into B: each factor gets their square roots": {
            _SHARE: "torch.diag(kept_sigma)",
            "share @ kept_Vh": "kept_Vh",
        },
        "all of the singular values went into A: each factor gets their square roots": {
            _SHARE: "torch.diag(kept_sigma)",
            "kept_U @ share": "kept_U",
        },
        "both factors are multiplied by the singular values, so that the product has their squares: take square roots": {
            _SHARE: "torch.diag(kept_sigma)",
        },
        "the singular values are missing: U and Vh alone give every direction the same weight": {
            _SHARE: "torch.eye(rank, dtype=sigma.dtype)",
        },
        "only one factor is multiplied by the square roots: both are": {"kept_U @ share": "kept_U"},
        "the smallest singular values are kept: the SVD lists the largest first, and these are the ones to keep": {
            _KEPT: "U[:, -rank:], sigma[-rank:], Vh[-rank:]",
        },
        "the first rank *rows* of U are taken: its columns are the singular vectors, `U[:, :rank]`": {
            _KEPT: "U[:rank, :rank], sigma[:rank], Vh[:rank]",
        },
        "columns of Vh are taken: torch.linalg.svd returns V transposed already, so take its first `rank` rows": {
            _KEPT: "U[:, :rank], sigma[:rank], Vh[:, :rank].T",
        },
        "B and A have changed places: return B, of shape (out, rank), first": {"return B, A": "return A, B"},
        "A is transposed: it is (rank, in), as in the product B @ A": {"return B, A": "return B, A.T"},
        "one rank too many is kept": {_KEPT: "U[:, : rank + 1], sigma[: rank + 1], Vh[: rank + 1]"},
        "one rank too few is kept": {_KEPT: "U[:, : rank - 1], sigma[: rank - 1], Vh[: rank - 1]"},
        "nothing is cut off: keep the first `rank` singular values and vectors": {_KEPT: "U, sigma, Vh"},
        "three factors are returned: multiply the singular values into B and A": {
            "return B, A": "return kept_U, kept_sigma, kept_Vh"
        },
        "the product is returned: return its two factors": {"return B, A": "return B @ A"},
        "the whole square V is built, which of a 6 × 4000 matrix takes 61 MiB: ask for `full_matrices=False`": {
            "full_matrices=False": "full_matrices=True",
        },
    },
    variants={
        "broadcast": {
            "kept_U @ share": "kept_U * kept_sigma.sqrt()",
            "share @ kept_Vh": "kept_sigma.sqrt()[:, None] * kept_Vh",
        },
        "in double precision": {
            "torch.linalg.svd(matrix, full": "torch.linalg.svd(matrix.double(), full",
            "return B, A": "return B.to(matrix.dtype), A.to(matrix.dtype)",
        },
        "of the transposed matrix": {
            "torch.linalg.svd(matrix, full": "torch.linalg.svd(matrix.T, full",
            _KEPT: "Vh[:rank].T, sigma[:rank], U[:, :rank].T",
        },
        "other signs": {"return B, A": "return -B, -A"},
        "eigenvectors of the smaller Gram matrix, in double precision": """
            def truncated_svd(matrix, rank):
                M = matrix.double()
                wide = M.shape[0] < M.shape[1]
                vectors = torch.linalg.eigh(M @ M.T if wide else M.T @ M)[1].flip(-1)[:, :rank]
                other = M.T @ vectors if wide else M @ vectors
                root = other.norm(dim=0).sqrt()
                B, A = (vectors * root, (other / root).T) if wide else (other / root, (vectors * root).T)
                return B.to(matrix.dtype), A.to(matrix.dtype)
        """,
    },
)


# ======================================================================================================================
# 2. truncation_error
# ======================================================================================================================
def truncation_error(singular_values: Tensor, rank: int) -> float:
    """Return the Frobenius norm of what the best approximation of this rank leaves out (Eckart and Young 1936)."""
    total = 0.0
    dropped = singular_values[rank:]
    for sigma in dropped:
        total += sigma.item() ** 2
    return math.sqrt(total)


def drive_truncation_error(truncation_error, singular_values, ranks):
    """Return the error at each rank, as a number, or what came instead."""
    import torch

    errors = []
    for rank in ranks:
        error = truncation_error(singular_values, rank)
        if torch.is_tensor(error) and error.numel() == 1:
            error = error.item()
        if not isinstance(error, int | float):
            return {"what is returned": repr(error)[:100]}
        errors.append(float(error))
    return {"what is returned": "numbers"} | {f"the error at rank {rank}": error for rank, error in zip(ranks, errors)}


def error_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, ranks: list[int] | None = None) -> dict:
    """Return a spectrum in which no sum of squares, of values or of neighbours equals another."""
    count = between(generator, 9, 12)
    sigma = 0.3 + 3 * torch.rand(count, generator=generator, dtype=torch.float64).sort(descending=True).values
    return {"singular_values": sigma.to(dtype), "ranks": ranks or [between(generator, 3, count - 4), 0, count]}


def error_tolerance(case: dict) -> dict[str, float]:
    """A sum of n squares and its root: at most n + 2 roundings, each relative to at most the norm of all values."""
    sigma = case["singular_values"]
    bound = (len(sigma) + 2) * _eps(sigma) * sigma.double().norm().item()
    return {f"the error at rank {rank}": bound for rank in case["ranks"]}


_DROPPED = "singular_values[rank:]"
_ROOT = "math.sqrt(total)"

check_truncation_error = Exercise(
    spec=[truncation_error],
    driver=drive_truncation_error,
    cases=lambda generator: [error_case(generator), error_case(generator)],
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


# ======================================================================================================================
# 3. stable_rank and effective_rank
# ======================================================================================================================
def stable_rank(singular_values: Tensor) -> float:
    """Return the squared Frobenius norm divided by the squared spectral norm."""
    sigma = singular_values.double()
    return (sigma.square().sum() / sigma.max().square()).item()


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of the singular values, normalised to sum to one (Roy and Vetterli 2007)."""
    p = singular_values.double() / singular_values.double().sum()
    entropy = 0.0
    for share in p.tolist():
        if share > 0:
            entropy -= share * math.log(share)
    return math.exp(entropy)


def drive_soft_ranks(stable_rank, effective_rank, singular_values):
    """Return both figures, as numbers, or what came instead."""
    import torch

    seen = {}
    for name, function in (("stable_rank", stable_rank), ("effective_rank", effective_rank)):
        value = function(singular_values)
        if torch.is_tensor(value) and value.numel() == 1:
            value = value.item()
        seen[name] = float(value) if isinstance(value, int | float) else repr(value)[:100]
    return seen


def read_soft_ranks(observation: Observation, case: dict) -> Observation:
    """Write nan as a word: no number is equal to it, not even itself."""
    return {name: "nan" if value != value else value for name, value in observation.items()}


def spectrum_case(generator: torch.Generator, zeros: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> dict:
    """Return singular values, the last `zeros` of them zero; none is one, nor is their sum."""
    count = between(generator, 8, 14)
    sigma = scale * (0.05 + torch.rand(count, generator=generator, dtype=torch.float64)).sort(descending=True).values
    return {"singular_values": torch.cat([sigma, torch.zeros(zeros)]).to(dtype)}


def soft_tolerance(case: dict) -> dict[str, float]:
    """Bound the roundings: n + 3 for the stable rank.

    In the entropy every p has n + 1 roundings, which moves p log p by (1 + |log p|) p times as much, the sum by
    1 + log n; the logarithms, products and the sum add 2 n more; exp multiplies by its own value, at most n.
    """
    sigma = case["singular_values"]
    n = len(sigma)
    return {
        "stable_rank": (n + 3) * _eps(sigma) * n,
        "effective_rank": 2 * (3 * n + 4) * (1 + math.log(n)) * _eps(sigma) * n,
    }


_STABLE = "(sigma.square().sum() / sigma.max().square()).item()"
_P = "singular_values.double() / singular_values.double().sum()"
_TERM = "entropy -= share * math.log(share)"
_EXP = "math.exp(entropy)"
_LOOP = "for share in p.tolist():\n        if share > 0:\n            entropy -= share * math.log(share)"

check_soft_ranks = Exercise(
    spec=[stable_rank, effective_rank],
    driver=drive_soft_ranks,
    reading=read_soft_ranks,
    cases=lambda generator: [spectrum_case(generator), spectrum_case(generator, zeros=3)],
    tolerance=soft_tolerance,
    mistakes={
        "stable_rank does not square: it is the sum of the squares over the largest square": {
            _STABLE: "(sigma.sum() / sigma.max()).item()"
        },
        "stable_rank is the ratio of the norms: it is the ratio of their squares": {
            _STABLE: "(sigma.norm() / sigma.max()).item()"
        },
        "stable_rank divides by the largest singular value, unsquared": {
            _STABLE: "(sigma.square().sum() / sigma.max()).item()"
        },
        "stable_rank is upside down: the Frobenius norm is on top": {
            _STABLE: "(sigma.max().square() / sigma.square().sum()).item()"
        },
        "stable_rank squares the sum: sum the squares": {_STABLE: "(sigma.sum().square() / sigma.max().square()).item()"},
        "stable_rank counts the singular values that are not zero: that is the ordinary rank": {
            _STABLE: "float((sigma > 0).sum())"
        },
        "effective_rank is the entropy itself: take exp of it": {_EXP: "entropy"},
        "effective_rank takes exp of an entropy in bits: use the natural logarithm, or 2 to the power": {
            _TERM: "entropy -= share * math.log2(share)"
        },
        "effective_rank normalises the squares of the singular values: Roy and Vetterli take the values themselves": {
            _P: "singular_values.double().square() / singular_values.double().square().sum()"
        },
        "effective_rank does not normalise: the singular values are first divided by their sum": {
            _P: "singular_values.double()"
        },
        "effective_rank divides by the largest singular value: divide by the sum, so that they add up to one": {
            _P: "singular_values.double() / singular_values.double().max()"
        },
        "effective_rank divides by the norm: divide by the sum, so that they add up to one": {
            _P: "singular_values.double() / singular_values.double().norm()"
        },
        "effective_rank has the wrong sign: entropy is minus the sum of p log p": {_TERM: "entropy += share * math.log(share)"},
        "effective_rank is nan where a singular value is zero: 0 log 0 counts as zero here": {
            _LOOP: "entropy = -(p * p.log()).sum().item()"
        },
        "effective_rank is divided by the number of singular values": {_EXP: "math.exp(entropy) / len(p)"},
    },
    variants={
        "torch.special.entr": {_LOOP: "entropy = torch.special.entr(p).sum().item()"},
        "xlogy, in the given precision": {
            _P: "singular_values / singular_values.sum()",
            _LOOP: "entropy = -torch.xlogy(p, p).sum()",
            _EXP: "entropy.exp()",
        },
        "the zeros left out": {_LOOP: "p = p[p > 0]; entropy = -(p * p.log()).sum().item()"},
        "2 to the power of bits": {_TERM: "entropy -= share * math.log2(share)", _EXP: "2**entropy"},
        "ratios first, in the given precision": {_STABLE: "((singular_values / singular_values[0]) ** 2).sum()"},
        "norms": {_STABLE: "(torch.linalg.vector_norm(sigma) / torch.linalg.vector_norm(sigma, math.inf)).item() ** 2"},
    },
)


# ======================================================================================================================
# 3. energy_rank
# ======================================================================================================================
def energy_rank(singular_values: Tensor, share: float) -> int:
    """Return the smallest rank that holds at least this share of the energy, the sum of the squares."""
    energy = [sigma**2 for sigma in singular_values.tolist()]
    goal = share * sum(energy)
    held, rank = 0.0, 0
    while held < goal:
        held += energy[rank]
        rank += 1
    return rank


def drive_energy_rank(energy_rank, singular_values, shares):
    """Return the rank for each share."""
    import torch

    seen = {}
    for share in shares:
        rank = energy_rank(singular_values, share)
        rank = rank.item() if torch.is_tensor(rank) and rank.numel() == 1 else rank
        seen[f"the rank that holds {share:.1%}"] = rank if isinstance(rank, int | float) else repr(rank)[:100]
    return seen


def energy_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, shares: int = 3) -> dict:
    """Return a spectrum, and shares halfway between what two ranks hold, so that no rounding can decide."""
    count = between(generator, 12, 16)
    sigma = (0.4 + 3 * torch.rand(count, generator=generator, dtype=torch.float64)).sort(descending=True).values
    held = (sigma.square().cumsum(0) / sigma.square().sum()).tolist()
    ranks = torch.randperm(count - 6, generator=generator)[:shares].tolist()
    return {"singular_values": sigma.to(dtype), "shares": [(held[rank + 3] + held[rank + 4]) / 2 for rank in ranks]}


def exact_case(generator: torch.Generator) -> dict:
    """Return a spectrum whose energies are whole numbers, sixteen in all, so that two ranks hold half of it exactly."""
    return {"singular_values": torch.tensor([2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), "shares": [0.5, 0.75]}


_ENERGY = "sigma**2 for sigma"
_RANK = "return rank"

check_energy_rank = Exercise(
    spec=[energy_rank],
    driver=drive_energy_rank,
    cases=lambda generator: [energy_case(generator), exact_case(generator)],
    mistakes={
        "the singular values are summed: energy is the sum of their squares": {_ENERGY: "sigma for sigma"},
        "the rank is one too small: an index counts from 0, a rank from 1": {_RANK: "return rank - 1"},
        "the rank is one too large": {_RANK: "return rank + 1"},
        "a rank that holds the share exactly is passed over: *at least* this share is enough": {"held < goal": "held <= goal"},
        "the energy is summed from the smallest singular value on: begin with the largest": {
            "in singular_values.tolist()": "in singular_values.flip(0).tolist()"
        },
        "this is the share of the *number* of singular values, whatever their size": {
            _RANK: "return math.ceil(share * len(energy))"
        },
        "the singular values above that share of the largest one are counted: add energies up instead": {
            _RANK: "return int((singular_values >= share * singular_values[0]).sum())"
        },
        "the share is compared with the root of the energy: compare it with the energy": {
            "share * sum(energy)": "share**2 * sum(energy)"
        },
        "the largest rank that holds no more than the share is returned: asked for is the smallest that holds it": {
            _RANK: "return rank - (held > goal)"
        },
        "the share that is held is returned: asked for is the rank": {_RANK: "return held / sum(energy)"},
    },
    variants={
        "searchsorted": {
            _RANK: "energies = singular_values.double().square().cumsum(0)\n    "
            "return int(torch.searchsorted(energies, share * energies[-1])) + 1"
        },
        "counting": {
            _RANK: "energies = singular_values.square().cumsum(0)\n    return (energies < share * energies[-1]).sum() + 1"
        },
        "by the error": {
            _RANK: "norm = sum(energy)\n    "
            "return next(r for r in range(len(energy) + 1) if sum(energy[r:]) <= (1 - share) * norm)"
        },
        "argmax of a comparison": {
            _RANK: "part = singular_values.square().cumsum(0) / singular_values.square().sum()\n    "
            "return (part >= share).float().argmax().item() + 1"
        },
    },
)


# ======================================================================================================================
# 4. factor_parameters and break_even_rank
# ======================================================================================================================
def factor_parameters(out_features: int, in_features: int, rank: int) -> int:
    """Return how many numbers B (out, rank) and A (rank, in) have together."""
    return out_features * rank + rank * in_features


def break_even_rank(out_features: int, in_features: int) -> int:
    """Return the largest rank at which the factors have fewer numbers than the matrix."""
    rank = 0
    while factor_parameters(out_features, in_features, rank + 1) < out_features * in_features:
        rank += 1
    return rank


def drive_break_even(factor_parameters, break_even_rank, shapes, rank):
    """Return both figures for each shape."""
    seen = {}
    for out_features, in_features in shapes:
        counted, limit = factor_parameters(out_features, in_features, rank), break_even_rank(out_features, in_features)
        where = f"for a {out_features} × {in_features} matrix"
        seen[f"factor_parameters at rank {rank} {where}"] = counted if isinstance(counted, int | float) else repr(counted)[:100]
        seen[f"break_even_rank {where}"] = limit if isinstance(limit, int | float) else repr(limit)[:100]
    return seen


def shapes_case(generator: torch.Generator, low: int = 40) -> dict:
    """Return a tall and a wide shape, one where equality occurs, and a rank."""
    small, large, half = (
        between(generator, low, low + 20),
        between(generator, 2 * low + 30, 2 * low + 60),
        2 * between(generator, 11, 19),
    )
    return {"shapes": [(large, small), (small, large), (half, half)], "rank": between(generator, 3, 7)}


_COUNT = "out_features * rank + rank * in_features"
_LIMIT = "    return rank\n"

check_break_even = Exercise(
    spec=[factor_parameters, break_even_rank],
    driver=drive_break_even,
    cases=lambda generator: [shapes_case(generator)],
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


# ======================================================================================================================
# 5. factor_gradients
# ======================================================================================================================
def factor_gradients(gradient: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of B and A, from that of their product W = B A: dW = dB A + B dA."""
    dB = torch.einsum("oi,ri->or", gradient, A)
    dA = torch.einsum("or,oi->ri", B, gradient)
    return dB, dA


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


def gradient_tolerance(case: dict) -> dict[str, float]:
    """A dot product of n terms is off by n u (sum of |terms|), u = eps / 2, and two answers by twice that (Higham 2002)."""
    gradient, B, A = (case[name].double().abs() for name in ("gradient", "B", "A"))
    eps = _eps(case["A"])
    return {
        "the gradient of B": A.shape[1] * eps * (gradient @ A.T).max().item(),
        "the gradient of A": B.shape[0] * eps * (B.T @ gradient).max().item(),
    }


_DB = 'torch.einsum("oi,ri->or", gradient, A)'
_DA = 'torch.einsum("or,oi->ri", B, gradient)'
_RETURN_GRADIENTS = "return dB, dA"

check_factor_gradients = Exercise(
    spec=[factor_gradients],
    driver=drive_factor_gradients,
    cases=lambda generator: [gradient_case(generator), gradient_case(generator)],
    tolerance=gradient_tolerance,
    mistakes={
        "A is not transposed in the gradient of B: the shapes have to give (out, rank)": {_DB: "gradient @ A"},
        "B is not transposed in the gradient of A: the shapes have to give (rank, in)": {_DA: "B @ gradient"},
        "the gradient of the product is transposed: it has the shape of B @ A, and comes first in the one, last in the other": {
            _DB: "gradient.T @ A.T",
            _DA: "B.T @ gradient.T",
        },
        "the two gradients have changed places: B's is returned first": {_RETURN_GRADIENTS: "return dA, dB"},
        "both gradients are transposed: each has the shape of its factor": {_RETURN_GRADIENTS: "return dB.T, dA.T"},
        "the signs are those of a descent step: return the gradients themselves": {_RETURN_GRADIENTS: "return -dB, -dA"},
        "the gradients are halved: product rule, each factor gets all of its term": {
            _RETURN_GRADIENTS: "return dB / 2, dA / 2"
        },
        "the gradients are divided by the rank": {_RETURN_GRADIENTS: "return dB / A.shape[0], dA / A.shape[0]"},
        "the gradient of A uses the gradient of B where it should use B": {_DA: 'torch.einsum("or,oi->ri", dB, gradient)'},
        "the gradient of A uses B after a step: both gradients belong to the same point": {_DA: "(B - dB).T @ gradient"},
        "the product B A stands where its gradient should": {_DB: "(B @ A) @ A.T", _DA: "B.T @ (B @ A)"},
        "the gradient of B does not depend on A here: its factor is missing": {_DB: "gradient[:, : A.shape[0]]"},
    },
    variants={
        "matrix products": {_DB: "gradient @ A.T", _DA: "B.T @ gradient"},
        "transposed twice": {_DB: "(A @ gradient.T).T", _DA: "(gradient.T @ B).T"},
        "autograd": {
            _DB: "None\n    B, A = B.clone().requires_grad_(), A.clone().requires_grad_()",
            _DA: "None\n    dB, dA = torch.autograd.grad(B @ A, (B, A), gradient)",
        },
        "in double precision": {
            _DB: "(gradient.double() @ A.double().T).to(A.dtype)",
            _DA: "(B.double().T @ gradient.double()).to(A.dtype)",
        },
    },
)


# ======================================================================================================================
# 6. subspace_overlap
# ======================================================================================================================
def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """Return phi = |first^T second|_F^2 / min(i, j) of two sets of orthonormal columns (Hu et al. 2022, equation 4)."""
    total = 0.0
    for u in first.T:
        for v in second.T:
            total += (u @ v).item() ** 2
    return total / min(first.shape[1], second.shape[1])


def drive_subspace_overlap(subspace_overlap, first, second):
    """Return the overlap in both orders, as numbers, or what came instead."""
    import torch

    seen = {}
    for name, pair in (("the overlap", (first, second)), ("the overlap in the other order", (second, first))):
        value = subspace_overlap(*pair)
        if torch.is_tensor(value) and value.numel() == 1:
            value = value.item()
        seen[name] = float(value) if isinstance(value, int | float) else repr(value)[:100]
    return seen


def overlap_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, inside: bool = False) -> dict:
    """Return two sets of orthonormal columns of different sizes that are a random rotation apart."""
    features = between(generator, 14, 18)
    i, j = between(generator, 2, 4), between(generator, 6, 8)
    first, second = _orthonormal(generator, features, i), _orthonormal(generator, features, j)
    if inside:  # the smaller space lies in the larger, in another basis
        first = second @ _orthonormal(generator, j, i)
    return {"first": first.to(dtype), "second": second.to(dtype)}


def overlap_tolerance(case: dict) -> dict[str, float]:
    """Products of unit vectors of n numbers are off by n eps; i * j squares, each at most 1, by 2 n eps more, over min."""
    n, i = case["first"].shape
    j = case["second"].shape[1]
    bound = (2 * n + i * j) * _eps(case["first"]) * max(i, j)
    return dict.fromkeys(("the overlap", "the overlap in the other order"), bound)


_SQUARES = "(u @ v).item() ** 2"
_MIN = "min(first.shape[1], second.shape[1])"

check_subspace_overlap = Exercise(
    spec=[subspace_overlap],
    driver=drive_subspace_overlap,
    cases=lambda generator: [overlap_case(generator), overlap_case(generator)],
    tolerance=overlap_tolerance,
    mistakes={
        "the products of the vectors are not squared: signs of singular vectors mean nothing, and must not matter": {
            _SQUARES: "(u @ v).item()"
        },
        "the absolute values are summed: sum the squares": {_SQUARES: "abs((u @ v).item())"},
        "the norm is not squared": {f"total / {_MIN}": f"math.sqrt(total) / {_MIN}"},
        "the root of the overlap is returned": {f"total / {_MIN}": f"math.sqrt(total / {_MIN})"},
        "it is divided by the larger number of columns: by the smaller, so that a space inside another gives 1": {
            _MIN: "max(first.shape[1], second.shape[1])"
        },
        "it is divided by the product of both numbers of columns: by the smaller": {_MIN: "(first.shape[1] * second.shape[1])"},
        "it is divided by the first one's number of columns: by the smaller of both": {_MIN: "first.shape[1]"},
        "it is not divided by the smaller number of columns": {f"total / {_MIN}": "total"},
        "it is divided by the number of features: the columns are the vectors, `shape[1]` counts them": {
            _MIN: "min(first.shape[0], second.shape[0])"
        },
        "only vectors of the same number are compared: every vector of the one goes with every vector of the other": {
            f"return total / {_MIN}": f"k = {_MIN}\n    return (first[:, :k] * second[:, :k]).sum(0).square().sum().item() / k",
        },
        "the rows are taken for the vectors, `first @ second.T`: the columns are, `first.T @ second`": {
            f"return total / {_MIN}": f"return (first @ second.T).square().sum().item() / {_MIN}"
        },
    },
    variants={
        "a norm": {f"return total / {_MIN}": f"return (first.T @ second).norm() ** 2 / {_MIN}"},
        "squares": {f"return total / {_MIN}": f"return (first.T @ second).square().sum().item() / {_MIN}"},
        "by singular values": {f"return total / {_MIN}": "return torch.linalg.svdvals(first.T @ second).square().mean()"},
        "by projections": {f"return total / {_MIN}": f"return torch.trace(first @ first.T @ second @ second.T) / {_MIN}"},
    },
)


# ======================================================================================================================
# Bug hunt: add_products
# ======================================================================================================================
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


def sum_tolerance(case: dict) -> dict[str, float]:
    """Each entry of the product is a sum of r1 + r2 terms with up to four roundings each: the weight, its roots, the product.

    Factors from a computed SVD are those of a matrix that differs by max(m, n) * eps * sigma_1 (see `factors_tolerance`).
    """
    w1, w2 = case["weights"]
    B1, A1, B2, A2 = (case[name].double() for name in ("B1", "A1", "B2", "A2"))
    terms = (abs(w1) * B1.abs() @ A1.abs() + abs(w2) * B2.abs() @ A2.abs()).max().item()
    total = w1 * B1 @ A1 + w2 * B2 @ A2
    decomposed = max(total.shape) * _eps(total) * torch.linalg.matrix_norm(total, 2).item()
    return {"the product B @ A": (A1.shape[0] + A2.shape[0] + 4) * _eps(case["B1"]) * terms + decomposed}


_COLUMNS, _ROWS = "[w1 * B1, w2 * B2]", "[A1, A2]"
_SUM = "return torch.cat(columns, dim=1), torch.cat(rows, dim=0)"

check_add_products = Exercise(
    spec=[add_products],
    driver=drive_add_products,
    reading=read_sum,
    cases=lambda generator: [
        sum_case(generator, (3, 3), [0.7, -1.3]),
        sum_case(generator, (2, 4), [1.6, 0.4]),
    ],
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

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
