"""Exercise 5: one adapter out of several: a weighted sum of their products, cut back to a rank."""

from collections.abc import Sequence

import torch
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checking.judging import PEAK_BYTES


def combine(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a rank whose product B A is as near as can be to the weighted sum of the adapters' products."""
    A = torch.cat([A for A, _ in factors])
    B = torch.cat([weight * B for weight, (_, B) in zip(weights, factors, strict=True)], dim=1)
    Q_A, R_A = torch.linalg.qr(A.T)
    Q_B, R_B = torch.linalg.qr(B)
    U, sigma, Vh = torch.linalg.svd(R_B @ R_A.T)
    U, sigma, Vh = U[:, :rank], sigma[:rank], Vh[:rank]
    return Vh @ Q_A.T, Q_B @ U * sigma


def combine_case(
    generator: torch.Generator, ranks: Sequence[int] = (3, 3, 3), rank: int = 4, dtype: torch.dtype = torch.float32
) -> dict:
    """Return adapters whose weighted sum has known singular values, each 0.7 times the last, and weights of both signs."""
    total, out_features, in_features = sum(ranks), between(generator, 15, 18), between(generator, 20, 23)
    left, right, *turns = (
        torch.linalg.qr(normal(generator, size, total, dtype=torch.float64))[0]
        for size in (out_features, in_features, total, total)
    )
    sigma = 5 * 0.7 ** torch.arange(total, dtype=torch.float64)
    mix = turns[0] * torch.linspace(0.6, 1.6, total, dtype=torch.float64) @ turns[1]  # so that A's rows are not orthogonal
    weights = [0.8, -0.6, 1.7][: len(ranks)]
    B, A = left * sigma @ mix, torch.linalg.inv(mix) @ right.T
    scale = torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(ranks))
    return {"A": A.to(dtype), "B": (B / scale).to(dtype), "ranks": list(ranks), "weights": weights, "rank": rank}


def tall_case(generator: torch.Generator) -> dict:
    """Return two adapters of a layer with 200,000 outputs: their factors take 5 MiB, the product would take 73."""
    B = normal(generator, 200_000, 6) * torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    return {"A": normal(generator, 6, 96), "B": B, "ranks": [3, 3], "weights": [1.0, -0.5], "rank": 3}


def drive_combine(combine, A, B, ranks, weights, rank):
    """Return the combined factors, and whether those that were given are as they were; of large factors the shapes only."""
    import torch

    given = list(zip(A.split(ranks), B.split(ranks, dim=1), strict=True))
    before = A.clone(), B.clone()
    combined_A, combined_B = combine(given, weights, rank)
    seen = {"shapes": [list(combined_A.shape), list(combined_B.shape)]}
    if B.shape[0] > 1000:
        return seen
    untouched = torch.equal(A, before[0]) and torch.equal(B, before[1])
    return seen | {"A": combined_A, "B": combined_B, "untouched": untouched}


def read_combine(observation: Observation, case: dict) -> Observation:
    """Multiply the factors out, because many pairs of factors have one product."""
    shapes = {"the shapes of A and B": observation["shapes"]}
    if "A" not in observation:
        return shapes
    A, B = observation["A"], observation["B"]
    return {
        **shapes,
        "the dtypes of A and B": [str(A.dtype), str(B.dtype)],
        "the product B A": B.double() @ A.double(),
        "the factors that were given are unchanged": observation["untouched"],
    }


def combine_tolerance(case: dict) -> dict[str, float]:
    """Bound by how much two right answers differ, as in unit 02.

    QR and SVD are exact for factors whose product differs by E, with |E| <= size * eps * |B| |A| in Frobenius norms. Cutting off
    moves, to first order, by |E| * sigma_r / (sigma_r - sigma_(r+1)), which is |E| / 0.3 here. Two answers: twice |E| (1 + 1 / 0.3).
    """
    A, B = case["A"], case["B"]
    scale = torch.tensor(case["weights"]).abs().repeat_interleave(torch.tensor(case["ranks"]))
    error = max(A.shape[1], B.shape[0]) * torch.finfo(A.dtype).eps * ((B * scale).norm() * A.norm()).item()
    return {"the product B A": 2 * error * (1 + 1 / 0.3), PEAK_BYTES: 48 * 2**20}


_CAT_A = "torch.cat([A for A, _ in factors])"
_CAT_B = "torch.cat([weight * B for weight, (_, B) in zip(weights, factors, strict=True)], dim=1)"
_CUT = "U[:, :rank], sigma[:rank], Vh[:rank]"
_RETURN = "return Vh @ Q_A.T, Q_B @ U * sigma"

check_combine = Exercise(
    spec=[combine],
    driver=drive_combine,
    reading=read_combine,
    cases=lambda generator: [combine_case(generator), combine_case(generator, (2, 3, 4), 3), tall_case(generator)],
    tolerance=combine_tolerance,
    measures_peak=lambda case: case["B"].shape[0] > 1000,
    at_most=frozenset({PEAK_BYTES}),
    mistakes={
        "the factors were added, and their product holds every B times every A: it is the products B A that add up": {
            _CAT_A: "sum(A.new_zeros(max(len(A) for A, _ in factors), A.shape[1]).index_add(0, torch.arange(len(A)), A) for A, _ in factors)",
            _CAT_B: (
                "sum(B.new_zeros(len(B), max(B.shape[1] for _, B in factors)).index_add(1, torch.arange(B.shape[1]), weight * B)"
                " for weight, (_, B) in zip(weights, factors, strict=True))"
            ),
            _CUT: "torch.nn.functional.pad(U, (0, rank))[:, :rank], torch.nn.functional.pad(sigma, (0, rank))[:rank], torch.nn.functional.pad(Vh, (0, 0, 0, rank))[:rank]",
        },
        "the weights are left out": {_CAT_B: "torch.cat([B for _, B in factors], dim=1)"},
        "both factors are multiplied by the weight, so that it counts squared: it belongs to one of them": {
            _CAT_A: "torch.cat([weight * A for weight, (A, _) in zip(weights, factors, strict=True)])",
        },
        "a negative weight has lost its sign": {"[weight * B for": "[abs(weight) * B for"},
        "the weights are normalised to a sum of one: take them as they are": {
            "[weight * B for": "[weight / sum(weights) * B for"
        },
        "only the first adapter is there": {
            _CAT_A: "factors[0][0]",
            _CAT_B: "weights[0] * factors[0][1]",
            _CUT: (
                "torch.nn.functional.pad(U, (0, rank))[:, :rank], torch.nn.functional.pad(sigma, (0, rank))[:rank], torch.nn.functional.pad(Vh, (0, 0, 0, rank))[:rank]"
            ),
        },
        "nothing is cut off: the ranks have added up, and `rank` is wanted": {_CUT: "U, sigma, Vh"},
        "the first `rank` columns are kept without an SVD: sort by singular value first": {
            _RETURN: "return A[:rank], B[:, :rank]",
        },
        "the smallest singular values are kept: the SVD lists the largest first": {
            _CUT: "U[:, -rank:], sigma[-rank:], Vh[-rank:]"
        },
        "the singular values are missing: U and Vh alone give every direction the same weight": {
            _RETURN: "return Vh @ Q_A.T, Q_B @ U"
        },
        "both factors are multiplied by the singular values, so that the product has their squares": {
            _RETURN: "return sigma[:, None] * (Vh @ Q_A.T), Q_B @ U * sigma",
        },
        "one rank too few is kept": {_CUT: "U[:, : rank - 1], sigma[: rank - 1], Vh[: rank - 1]"},
        "A and B have changed places: return A, of shape (rank, in), first": {_RETURN: "return Q_B @ U * sigma, Vh @ Q_A.T"},
        "the product of out × in numbers is built, 73 MiB where the factors take 5: decompose the factors, and their small R's": {
            "torch.linalg.svd(R_B @ R_A.T)": "torch.linalg.svd(B @ A, full_matrices=False)",
            _RETURN: "return Vh, U * sigma",
        },
        "the factors that were given are changed: `*=` works in place": {"[weight * B for": "[B.mul_(weight) for"},
    },
    variants={
        "roots of the singular values in both": {
            _RETURN: "root = sigma.sqrt()\n    return root[:, None] * (Vh @ Q_A.T), Q_B @ U * root",
        },
        "weights in A, and in double precision": """
            def combine(factors, weights, rank):
                stacked = torch.cat([w * A for w, (A, _) in zip(weights, factors)]).double()
                beside = torch.cat([B for _, B in factors], 1).double()
                Q, R = torch.linalg.qr(beside)
                U, sigma, Vh = torch.linalg.svd(R @ stacked, full_matrices=False)
                dtype = factors[0][0].dtype
                return (sigma[:rank, None] * Vh[:rank]).to(dtype), (Q @ U[:, :rank]).to(dtype)
        """,
        "a diagonal matrix": {_RETURN: "return torch.diag(sigma) @ Vh @ Q_A.T, Q_B @ U"},
    },
)
