"""`rslora_alpha`: the alpha with which plain LoRA is rsLoRA."""

import math

import torch

from autograder.checking.cases import EPS, between
from autograder.checking.exercise import Exercise

_NOT_SQUARE = [5, 6, 7, 8, 10, 11, 12]
"""Ranks whose root is no whole number and not half of them, as the root of 4 is."""


def rslora_alpha(rank: int, alpha: float) -> float:
    """Return the alpha that makes LoRA's scale, alpha / rank, as large as rsLoRA's."""
    rslora_scale = alpha / math.sqrt(rank)
    return rslora_scale * rank


def pairs_case(generator: torch.Generator, ranks: list[int] | None = None, low: float = 9.0) -> dict:
    """Return pairs of a rank and an alpha between `low` and twice that, and at the end a pair whose alpha is an int.

    Without `ranks`, they are one, two that are no squares, and a large one.
    """
    order = torch.randperm(len(_NOT_SQUARE), generator=generator)[:2].tolist()
    ranks = ranks or [1, *(_NOT_SQUARE[number] for number in order), 2 * between(generator, 51, 63)]
    pairs = [(rank, round(low * (1 + torch.rand((), generator=generator).item()), 3)) for rank in ranks]
    return {"pairs": [*pairs, (ranks[-1] + 1, 2 * between(generator, 7, 11) + 1)]}


def drive_rslora_alpha(rslora_alpha, pairs):
    """Return the answer for each pair as a number; what is no number, as text."""
    seen = {}
    for rank, alpha in pairs:
        answer = rslora_alpha(rank, alpha)
        try:
            number = repr(answer) if isinstance(answer, str) else float(answer)
        except (TypeError, ValueError, RuntimeError):
            number = repr(answer)[:100]
        seen[f"rslora_alpha({rank}, {alpha})"] = number
    return seen


def alpha_tolerance(case: dict) -> dict[str, float]:
    """Allow for single precision, as in a tensor: alpha, root, quotient and product are each rounded by half an eps."""
    return {f"rslora_alpha({rank}, {alpha})": 2 * EPS * alpha * math.sqrt(rank) for rank, alpha in case["pairs"]}


_RETURN = "return rslora_scale * rank"

check_rslora_alpha = Exercise(
    spec=[rslora_alpha],
    cases=lambda generator: [pairs_case(generator)],
    driver=drive_rslora_alpha,
    tolerance=alpha_tolerance,
    mistakes={
        "alpha came back as it was: plain LoRA divides it by the rank, so its update would be too small": {
            _RETURN: "return alpha"
        },
        "this is rsLoRA's scale, alpha / sqrt(rank): return the alpha that LoRA divides by the rank to get it": {
            _RETURN: "return rslora_scale"
        },
        "this is plain LoRA's scale, alpha / rank: return the alpha that gives rsLoRA's scale": {
            _RETURN: "return alpha / rank"
        },
        "alpha is multiplied by the rank: then the scale is alpha itself, and the root is lost": {
            _RETURN: "return alpha * rank"
        },
        "rsLoRA's scale is divided by the rank once more: multiply by the rank, because LoRA divides by it": {
            _RETURN: "return rslora_scale / rank"
        },
        "alpha is multiplied by the rank and by its root: LoRA's division by the rank leaves sqrt(rank), not 1 / sqrt(rank)": {
            _RETURN: "return alpha * rank * math.sqrt(rank)"
        },
        "the root covers alpha as well: only the rank is under it": {_RETURN: "return math.sqrt(alpha * rank)"},
        "the root is taken of alpha: take it of the rank": {_RETURN: "return rank * math.sqrt(alpha)"},
        "rank**1/2 is half the rank: write rank ** 0.5 or math.sqrt(rank)": {_RETURN: "return alpha * rank**1/2"},
        "alpha is multiplied by the rank's square: take its root": {_RETURN: "return alpha * rank**2"},
        "the root is rounded down to a whole number: use math.sqrt": {_RETURN: "return alpha * math.isqrt(rank)"},
        "the result is rounded down to a whole number: an alpha may have decimals": {
            _RETURN: "return int(rslora_scale * rank)"
        },
        "alpha is not in the result: multiply it by the root of the rank": {_RETURN: "return math.sqrt(rank)"},
        "nothing is returned: write `return` in front of the result": {_RETURN: "rslora_scale * rank"},
    },
    variants={
        "the root at once": {_RETURN: "return alpha * rank**0.5"},
        "a tensor in single precision": "def rslora_alpha(rank, alpha):\n    return alpha * torch.tensor(float(rank)).sqrt()\n",
        "a number of numpy's": """
            def rslora_alpha(rank, alpha):
                import numpy

                return numpy.float32(alpha) / numpy.sqrt(numpy.float32(rank)) * numpy.float32(rank)
        """,
        "logarithms": "def rslora_alpha(rank, alpha):\n    return math.exp(math.log(alpha) + math.log(rank) / 2)\n",
    },
)
