"""`energy_rank`: the rank that holds a share of the energy."""

import torch
from torch import Tensor

from autograder.cases import between
from autograder.checks.rank_decomposition.helpers import as_number
from autograder.exercise import Exercise


def energy_rank(singular_values: Tensor, share: float) -> int:
    """Return the smallest rank that holds at least this share of the energy, the sum of the squares."""
    energy = [sigma**2 for sigma in singular_values.tolist()]
    goal = share * sum(energy)
    held, rank = 0.0, 0
    while held < goal:
        held += energy[rank]
        rank += 1
    return rank


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


def drive_energy_rank(energy_rank, singular_values, shares):
    """Return the rank for each share."""
    seen = {}
    for share in shares:
        seen[f"the rank that holds {share:.1%}"] = as_number(energy_rank(singular_values, share))
    return seen


_RANK = "return rank"

check_energy_rank = Exercise(
    spec=[energy_rank],
    cases=lambda generator: [energy_case(generator), exact_case(generator)],
    driver=drive_energy_rank,
    helpers=[as_number],
    mistakes={
        "the singular values are summed: energy is the sum of their squares": {"sigma**2 for sigma": "sigma for sigma"},
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
