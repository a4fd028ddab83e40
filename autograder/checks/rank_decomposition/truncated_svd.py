"""`truncated_svd`: the best two thin factors of a matrix."""

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.judging import PEAK_BYTES
from autograder.checks.rank_decomposition.add_products import RETURNED
from autograder.checks.rank_decomposition.cases import eps_of, orthonormal


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (out, rank) and A (rank, in) with B A the best approximation; each singular value is shared out evenly."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept_U, kept_sigma, kept_Vh = U[:, :rank], sigma[:rank], Vh[:rank]
    share = torch.diag(kept_sigma.sqrt())
    B = kept_U @ share
    A = share @ kept_Vh
    return B, A


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
    matrix = orthonormal(generator, sizes[0], count) * sigma @ orthonormal(generator, sizes[1], count).T
    return {"matrix": matrix.to(dtype), "rank": rank or between(generator, 3, 5)}


def thin_case(generator: torch.Generator) -> dict:
    """Return a matrix of few rows and very many columns, of which the whole V would take 61 MiB."""
    return {"matrix": normal(generator, 6, 4000), "rank": 3}


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
    error = max(matrix.shape) * eps_of(matrix) * sigma[0].item()
    kept, cut = sigma[rank - 1].item(), sigma[rank].item() if rank < len(sigma) else 0.0
    factor = kept / (kept - cut) if kept > error else 1.0
    return {"the product B @ A": 2 * error * (1 + factor), _BTB: 4 * error, _AAT: 4 * error}


_KEPT = "U[:, :rank], sigma[:rank], Vh[:rank]"
_SHARE = "torch.diag(kept_sigma.sqrt())"

check_truncated_svd = Exercise(
    spec=[truncated_svd],
    cases=lambda generator: [matrix_case(generator, wide=True), matrix_case(generator, wide=False), thin_case(generator)],
    driver=drive_truncated_svd,
    reading=read_factors,
    tolerance=factors_tolerance,
    at_most=frozenset({PEAK_BYTES}),
    measures_peak=lambda case: max(case["matrix"].shape) > 16,
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
