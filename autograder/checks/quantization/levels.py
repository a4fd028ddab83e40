"""Levels from normal quantiles."""

from statistics import NormalDist

import torch
from torch import Tensor

from autograder.checking.cases import EPS
from autograder.checking.exercise import Exercise


def normal_float_levels(bits: int, outermost: float = 0.9677083) -> Tensor:
    """Return the 2^bits levels of NormalFloat, ascending from -1 to 1, with an exact zero; fp32."""
    above = 2 ** (bits - 1)
    below = above - 1
    up = torch.linspace(outermost, 0.5, above + 1)[:above].tolist()
    down = torch.linspace(outermost, 0.5, below + 1)[:below].tolist()
    quantiles = [-NormalDist().inv_cdf(p) for p in down] + [0.0] + [NormalDist().inv_cdf(p) for p in reversed(up)]
    levels = torch.tensor(quantiles)
    return levels / levels.max()


def nf4_levels() -> Tensor:
    """Return the sixteen levels of NF4."""
    return normal_float_levels(4)


def levels_case(generator: torch.Generator, bits: int) -> dict:
    """Return an outermost probability that is not NF4's: an answer with a copied table has not derived it."""
    return {"bits": bits, "outermost": 0.93 + 0.05 * torch.rand((), generator=generator).item()}


def drive_levels(normal_float_levels, nf4_levels, bits, outermost):
    """Return the levels of another number of bits, and NF4's."""
    return {
        f"the levels for {bits} bits": normal_float_levels(bits, outermost),
        "what nf4_levels returns": nf4_levels(),
    }


def levels_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A probability near 1, in fp32, is off by at most 2^-24 for two roundings, the quantile q by that over the density at q (at most
    26 times as much in our cases), and dividing by the largest quantile (at least 1.47) passes both errors on. An fp32 quantile
    function adds a few ulps.
    """

    def bound(outermost: float) -> float:
        largest = NormalDist().inv_cdf(outermost)
        return 2 * 2**-24 / NormalDist().pdf(largest) / largest + 4 * EPS

    return {
        f"the levels for {case['bits']} bits": bound(case["outermost"]),
        "what nf4_levels returns": bound(0.9677083),
    }


_DOWN = "torch.linspace(outermost, 0.5, below + 1)[:below].tolist()"
_UP = "torch.linspace(outermost, 0.5, above + 1)[:above].tolist()"
_SORTED = "[-NormalDist().inv_cdf(p) for p in down] + [0.0] + [NormalDist().inv_cdf(p) for p in reversed(up)]"

check_levels = Exercise(
    spec=[normal_float_levels, nf4_levels],
    cases=lambda generator: [levels_case(generator, 3), levels_case(generator, 5)],
    driver=drive_levels,
    tolerance=levels_tolerance,
    mistakes={
        "no level is zero: one symmetric grid of an even number of levels has none, so build the two sides apart": {
            _SORTED: "[NormalDist().inv_cdf(p) for p in torch.linspace(1 - outermost, outermost, 2**bits).tolist()]",
        },
        "there is one more level below zero than above it: it is the other way round": {
            "levels = torch.tensor(quantiles)": "levels = -torch.tensor(quantiles).flip(0)",
        },
        "the quantiles are not normalised: divide them by the largest, so that the levels end at -1 and 1": {
            "return levels / levels.max()": "return levels",
        },
        "the levels are evenly spaced: the *probabilities* are, the levels are their quantiles": {
            "NormalDist().inv_cdf(p) for p in reversed(up)": "p - 0.5 for p in reversed(up)",
            "-NormalDist().inv_cdf(p) for p in down": "0.5 - p for p in down",
        },
        "zero is there more than once: drop the probability 1/2 at the end of each side, and add one zero": {
            _DOWN: "torch.linspace(outermost, 0.5, below + 1).tolist()",
            _UP: "torch.linspace(outermost, 0.5, above + 1).tolist()",
        },
        "the side below takes the steps of the side above: it has one level less, so its range is cut into one step less": {
            _DOWN: "torch.linspace(outermost, 0.5, above + 1)[:below].tolist()",
        },
        "the steps are one too few: a side with n levels besides zero has n steps down to 1/2, so n + 1 probabilities": {
            _DOWN: "torch.linspace(outermost, 0.5, below)[:below].tolist()",
            _UP: "torch.linspace(outermost, 0.5, above)[:above].tolist()",
        },
        "the levels are not sorted: they go from -1 up to 1": {
            _SORTED: "[-NormalDist().inv_cdf(p) for p in reversed(down)] + [0.0] + [NormalDist().inv_cdf(p) for p in up]",
        },
        "the outermost probability was dropped, and 1/2 was kept: keep the first of each side, and drop the last": {
            _DOWN: "torch.linspace(outermost, 0.5, below + 1)[1:].tolist()",
            _UP: "torch.linspace(outermost, 0.5, above + 1)[1:].tolist()",
        },
        "zero is not among the levels: add it between the two sides": {" + [0.0] + ": " + "},
        "the levels descend: they go from -1 up to 1": {
            "return levels / levels.max()": "return (levels / levels.max()).flip(0)",
        },
        "the levels are in fp64: return fp32": {"torch.tensor(quantiles)": "torch.tensor(quantiles, dtype=torch.float64)"},
        "`bits` is not used": {"above = 2 ** (bits - 1)": "above = 2 ** (4 - 1)"},
        "`outermost` is not used": {"below = above - 1": "below, outermost = above - 1, 0.9677083"},
        "the levels below zero are missing": {"[-NormalDist().inv_cdf(p) for p in down] + ": ""},
        "these are values of the distribution function: a quantile is its inverse": {
            "NormalDist().inv_cdf(p) for p in reversed(up)": "NormalDist().cdf(p) for p in reversed(up)",
            "-NormalDist().inv_cdf(p) for p in down": "-NormalDist().cdf(p) for p in down",
        },
    },
    variants={
        "ndtri, sorted": """
            def normal_float_levels(bits, outermost=0.9677083):
                half = 2 ** (bits - 1)
                above = torch.special.ndtri(torch.linspace(outermost, 0.5, half + 1)[:-1].double())
                below = -torch.special.ndtri(torch.linspace(outermost, 0.5, half)[:-1].double())
                levels = torch.cat([below, torch.zeros(1), above]).sort().values.float()
                return levels / levels[-1]

            def nf4_levels():
                return normal_float_levels(4)
        """,
        "all in fp32": """
            def normal_float_levels(bits, outermost=0.9677083):
                half = 2 ** (bits - 1)
                above = torch.special.ndtri(torch.linspace(0.5, outermost, half + 1))[1:]
                below = torch.special.ndtri(torch.linspace(1 - outermost, 0.5, half))[:-1]
                return torch.cat([below, torch.zeros(1), above]) / above.max()

            def nf4_levels():
                return normal_float_levels(4)
        """,
        "icdf in fp64": """
            def normal_float_levels(bits, outermost=0.9677083):
                normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
                halves = []
                for count in (2 ** (bits - 1) - 1, 2 ** (bits - 1)):
                    probabilities = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)[:count]
                    halves.append(normal.icdf(probabilities))
                levels = torch.cat([-halves[0], torch.tensor([0.0]), halves[1].flip(0)])
                return (levels / levels.abs().max()).float()

            def nf4_levels():
                return normal_float_levels(4, 0.9677083)
        """,
        "one quantile at a time": """
            def normal_float_levels(bits, outermost=0.9677083):
                def side(count):
                    step = (outermost - 0.5) / count
                    return [NormalDist().inv_cdf(0.5 + i * step) for i in range(1, count + 1)]
                above = side(2 ** (bits - 1))
                below = [-q for q in side(2 ** (bits - 1) - 1)]
                return torch.tensor([q / max(above) for q in sorted(below + [0.0] + above)])

            def nf4_levels():
                return normal_float_levels(bits=4)
        """,
    },
)
