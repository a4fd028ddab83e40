"""`dead_zone`: the gradients that leave a stored second moment where it is."""

import math

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from peftlab.dynamic_code import dynamic_code


def dead_zone(code: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Return, for each value, the smallest and the largest size of a gradient after which the moment is stored as before."""
    middles = (code[:-1] + code[1:]) / 2
    lowest_moment = torch.cat([code[:1], middles])
    highest_moment = torch.cat([middles, code[-1:]])
    lowest = (lowest_moment - beta2 * code) / (1 - beta2)
    highest = (highest_moment - beta2 * code) / (1 - beta2)
    return lowest.clamp(min=0).sqrt(), highest.sqrt()


def zone_case(generator: torch.Generator, beta2: float | None = None, dynamic: bool = False) -> dict:
    """Return values from 0 to 1 at random distances, and a beta2 with which some of them can fall alone and some cannot."""
    distances = 0.02 + torch.rand(between(generator, 9, 14), generator=generator, dtype=torch.float64)
    code = torch.cat([torch.zeros(1, dtype=torch.float64), distances.cumsum(0) / distances.sum()]).float()
    code[-1] = 1
    if beta2 is None:
        beta2 = 0.85 + 0.1 * torch.rand((), generator=generator).item()
    return {"code": dynamic_code(False) if dynamic else code, "beta2": beta2}


def drive_dead_zone(dead_zone, code, beta2):
    """Return both ends, and the values as they are afterwards."""
    lowest, highest = dead_zone(code, beta2)
    return {"lowest": lowest, "highest": highest, "after": code}


def read_dead_zone(observation: Observation, case: dict) -> Observation:
    """Square the ends: a root near zero blows rounding up, its square does not. An infinite end becomes a large number."""
    lowest, highest = observation["lowest"], observation["highest"]
    whole = isinstance(lowest, Tensor) and isinstance(highest, Tensor)
    return {
        "the list of values at which an end is NaN": (
            [index for end in (lowest, highest) for index in end.isnan().nonzero().flatten().tolist()] if whole else []
        ),
        "the smallest gradients, squared": lowest.square() if whole else lowest,
        "the largest gradients, squared": highest.square().nan_to_num(nan=math.nan, posinf=1e30) if whole else highest,
        "`code` afterwards": observation["after"],
    }


def zone_tolerance(case: dict) -> dict[str, float]:
    """A difference of numbers up to 1 is off by two eps; it is divided by 1 - beta2, which may be off by an eps over itself."""
    eps, left = torch.finfo(case["code"].dtype).eps, 1 - case["beta2"]
    bound = 8 * eps / left * (1 + 1 / left * case["code"].diff().max().item())
    return {"the smallest gradients, squared": bound, "the largest gradients, squared": bound}


_MIDDLES = "(code[:-1] + code[1:]) / 2"
_FLOOR = "torch.cat([code[:1], middles])"
_CEILING = "torch.cat([middles, code[-1:]])"
_LOWEST = "lowest = (lowest_moment - beta2 * code) / (1 - beta2)"
_HIGHEST = "highest = (highest_moment - beta2 * code) / (1 - beta2)"
_RETURN = "return lowest.clamp(min=0).sqrt(), highest.sqrt()"

check_dead_zone = Exercise(
    spec=[dead_zone],
    cases=lambda generator: [zone_case(generator), zone_case(generator, beta2=0.999, dynamic=True)],
    driver=drive_dead_zone,
    reading=read_dead_zone,
    tolerance=zone_tolerance,
    mistakes={
        "a moment has to reach the next value: it is enough that it passes the middle between two": {
            f"middles = {_MIDDLES}": "middles = code[1:]",
            _FLOOR: "torch.cat([code[:1], code[:-1]])",
        },
        "squares come back: the second moment holds g², the zone is of g": {
            _RETURN: "return lowest.clamp(min=0), highest",
        },
        "beta2 and 1 - beta2 have changed places: beta2 weighs the old moment": {
            _LOWEST: "lowest = (lowest_moment - (1 - beta2) * code) / beta2",
            _HIGHEST: "highest = (highest_moment - (1 - beta2) * code) / beta2",
        },
        "the root of a negative number is NaN: where even a gradient of zero leaves the value, the smallest is 0": {
            _RETURN: "return lowest.sqrt(), highest.sqrt()",
        },
        "the old moment is kept whole: each step shrinks it by beta2 first": {
            _LOWEST: _LOWEST.replace("beta2 * code", "code"),
            _HIGHEST: _HIGHEST.replace("beta2 * code", "code"),
        },
        "the gradient's weight is missing: g² is multiplied by 1 - beta2": {
            _LOWEST: "lowest = lowest_moment - beta2 * code",
            _HIGHEST: "highest = highest_moment - beta2 * code",
        },
        "the two ends have changed places: the smallest comes first": {
            _RETURN: "return highest.sqrt(), lowest.clamp(min=0).sqrt()",
        },
        "the last value has no end: the absmax stays, so the moment may grow to the last value and no further": {
            _CEILING: "torch.cat([middles, torch.full_like(code[-1:], math.inf)])",
        },
        "the middle is that of a ratio, √(ab): a number takes the value at the smaller distance, so it is (a + b) / 2": {
            _MIDDLES: "(code[:-1] * code[1:]).sqrt()",
        },
        "the ends belong to the value above: value k lies between middles k - 1 and k": {
            _FLOOR: "torch.cat([middles, code[-1:]])",
            _CEILING: "torch.cat([middles[1:], code[-1:], code[-1:]])",
        },
        "only the inner values have ends: return one for each value": {
            _RETURN: "return lowest.clamp(min=0).sqrt()[1:-1], highest.sqrt()[1:-1]",
        },
        "`code` was changed in place": {"    middles = ": "    code += 0.001\n    middles = "},
    },
    variants={
        "value by value": """
            def dead_zone(code, beta2):
                lowest, highest = torch.zeros_like(code), torch.zeros_like(code)
                for k in range(len(code)):
                    low = (code[k - 1] + code[k]) / 2 if k else code[0]
                    high = (code[k] + code[k + 1]) / 2 if k + 1 < len(code) else code[k]
                    lowest[k] = max(0.0, (low - beta2 * code[k]) / (1 - beta2)) ** 0.5
                    highest[k] = ((high - beta2 * code[k]) / (1 - beta2)) ** 0.5
                return lowest, highest
        """,
        "repeated ends and a mean": """
            def dead_zone(code, beta2):
                padded = torch.cat([code[:1], code, code[-1:]])
                ends = torch.lerp(padded[:-1], padded[1:], 0.5)
                squares = (torch.stack([ends[:-1], ends[1:]]) - beta2 * code).div(1 - beta2)
                return tuple(torch.relu(squares).sqrt())
        """,
        "the surplus of each step": {
            _LOWEST: "lowest = code + (lowest_moment - code) / (1 - beta2)",
            _HIGHEST: "highest = code + (highest_moment - code) / (1 - beta2)",
            _RETURN: "return torch.where(lowest > 0, lowest, 0.0).sqrt(), highest ** 0.5",
        },
    },
)
