"""`stable_rank` and `effective_rank`."""

import math

import torch
from torch import Tensor

from autograder.cases import between
from autograder.checks.rank_decomposition.cases import eps_of
from autograder.checks.rank_decomposition.helpers import as_number
from autograder.drive import Observation
from autograder.exercise import Exercise


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


def spectrum_case(generator: torch.Generator, zeros: int = 0, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> dict:
    """Return singular values, the last `zeros` of them zero; none is one, nor is their sum."""
    count = between(generator, 8, 14)
    sigma = scale * (0.05 + torch.rand(count, generator=generator, dtype=torch.float64)).sort(descending=True).values
    return {"singular_values": torch.cat([sigma, torch.zeros(zeros)]).to(dtype)}


def drive_soft_ranks(stable_rank, effective_rank, singular_values):
    """Return both figures, as numbers, or what came instead."""
    seen = {}
    for name, function in (("stable_rank", stable_rank), ("effective_rank", effective_rank)):
        seen[name] = as_number(function(singular_values))
    return seen


def read_soft_ranks(observation: Observation, case: dict) -> Observation:
    """Write nan as a word: no number is equal to it, not even itself."""
    return {name: "nan" if value != value else value for name, value in observation.items()}


def soft_tolerance(case: dict) -> dict[str, float]:
    """Bound the roundings: n + 3 for the stable rank.

    In the entropy every p has n + 1 roundings, which moves p log p by (1 + |log p|) p times as much, the sum by
    1 + log n; the logarithms, products and the sum add 2 n more; exp multiplies by its own value, at most n.
    """
    sigma = case["singular_values"]
    n = len(sigma)
    return {
        "stable_rank": (n + 3) * eps_of(sigma) * n,
        "effective_rank": 2 * (3 * n + 4) * (1 + math.log(n)) * eps_of(sigma) * n,
    }


_STABLE = "(sigma.square().sum() / sigma.max().square()).item()"
_SHARES = "singular_values.double() / singular_values.double().sum()"
_TERM = "entropy -= share * math.log(share)"
_EXPONENTIAL = "math.exp(entropy)"
_LOOP = "for share in p.tolist():\n        if share > 0:\n            entropy -= share * math.log(share)"

check_soft_ranks = Exercise(
    spec=[stable_rank, effective_rank],
    cases=lambda generator: [spectrum_case(generator), spectrum_case(generator, zeros=3)],
    driver=drive_soft_ranks,
    helpers=[as_number],
    reading=read_soft_ranks,
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
        "effective_rank is the entropy itself: take exp of it": {_EXPONENTIAL: "entropy"},
        "effective_rank takes exp of an entropy in bits: use the natural logarithm, or 2 to the power": {
            _TERM: "entropy -= share * math.log2(share)"
        },
        "effective_rank normalises the squares of the singular values: Roy and Vetterli take the values themselves": {
            _SHARES: "singular_values.double().square() / singular_values.double().square().sum()"
        },
        "effective_rank does not normalise: the singular values are first divided by their sum": {
            _SHARES: "singular_values.double()"
        },
        "effective_rank divides by the largest singular value: divide by the sum, so that they add up to one": {
            _SHARES: "singular_values.double() / singular_values.double().max()"
        },
        "effective_rank divides by the norm: divide by the sum, so that they add up to one": {
            _SHARES: "singular_values.double() / singular_values.double().norm()"
        },
        "effective_rank has the wrong sign: entropy is minus the sum of p log p": {_TERM: "entropy += share * math.log(share)"},
        "effective_rank is nan where a singular value is zero: 0 log 0 counts as zero here": {
            _LOOP: "entropy = -(p * p.log()).sum().item()"
        },
        "effective_rank is divided by the number of singular values": {_EXPONENTIAL: "math.exp(entropy) / len(p)"},
    },
    variants={
        "torch.special.entr": {_LOOP: "entropy = torch.special.entr(p).sum().item()"},
        "xlogy, in the given precision": {
            _SHARES: "singular_values / singular_values.sum()",
            _LOOP: "entropy = -torch.xlogy(p, p).sum()",
            _EXPONENTIAL: "entropy.exp()",
        },
        "the zeros left out": {_LOOP: "p = p[p > 0]; entropy = -(p * p.log()).sum().item()"},
        "2 to the power of bits": {_TERM: "entropy -= share * math.log2(share)", _EXPONENTIAL: "2**entropy"},
        "ratios first, in the given precision": {_STABLE: "((singular_values / singular_values[0]) ** 2).sum()"},
        "norms": {_STABLE: "(torch.linalg.vector_norm(sigma) / torch.linalg.vector_norm(sigma, math.inf)).item() ** 2"},
    },
)
