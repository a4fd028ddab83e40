"""`random_code`: rounding to one of two neighbours, so that the mean is right."""

import torch
from torch import Tensor

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise


def random_code(x: Tensor, code: Tensor, noise: Tensor) -> Tensor:
    """Return the code of one of each number's two neighbours: the upper one where noise is below the share of the way to it."""
    upper = torch.searchsorted(code, x).clamp(1, len(code) - 1)
    lower = upper - 1
    share = (x - code[lower]) / (code[upper] - code[lower])
    return torch.where(noise < share, upper, lower).to(torch.uint8)


def random_code_case(generator: torch.Generator, count: int = 0, shape: tuple[int, ...] = (5, 40), scale: float = 1.0) -> dict:
    """Return ascending values, numbers between the first and the last, some of them values, and noise that decides clearly."""
    distances = 0.1 + torch.rand(count or between(generator, 20, 30), generator=generator)
    code = scale * torch.cat([torch.zeros(1), distances.cumsum(0) / distances.sum()])
    at = torch.randint(0, len(code) - 1, shape, generator=generator)
    share = 0.05 + 0.9 * torch.rand(shape, generator=generator)
    x = code[at] + share * (code[at + 1] - code[at])
    noise = torch.rand(shape, generator=generator)
    while (close := (noise - share).abs() < 0.03).any():
        noise = torch.where(close, torch.rand(shape, generator=generator), noise)
    flat, exact = x.view(-1), torch.randint(0, len(code), (6,), generator=generator)
    exact[:2] = torch.tensor([0, len(code) - 1])
    flat[:6] = code[exact]
    noise.view(-1)[:6] = 0.1 + 0.8 * torch.rand(6, generator=generator)
    return {"x": x, "code": code, "noise": noise}


def drive_random_code(random_code, x, code, noise):
    """Return the codes, and the arguments as they are afterwards."""
    codes = random_code(x, code, noise)
    return {"the codes": codes, "`x` afterwards": x, "`code` afterwards": code, "`noise` afterwards": noise}


_UPPER = "upper = torch.searchsorted(code, x).clamp(1, len(code) - 1)"
_SHARE = "(x - code[lower]) / (code[upper] - code[lower])"
_CHOICE = "torch.where(noise < share, upper, lower)"

check_random_code = Exercise(
    spec=[random_code],
    # Noise keeps clear of the share, so that there is one right answer.
    cases=lambda generator: [random_code_case(generator)],
    driver=drive_random_code,
    mistakes={
        "the nearest value is taken, and noise is not used": {_CHOICE: "torch.where(share > 0.5, upper, lower)"},
        "the choice is the wrong way round: the upper value is taken where noise is *below* the share": {
            _CHOICE: "torch.where(noise < share, lower, upper)",
        },
        "both neighbours are taken equally often: the nearer one has to be likelier": {
            _CHOICE: "torch.where(noise < 0.5, upper, lower)",
        },
        "the upper value is taken with the share of the way that is left": {
            _CHOICE: "torch.where(noise < 1 - share, upper, lower)",
        },
        "it is always rounded down": {_CHOICE: "lower"},
        "it is always rounded up": {_CHOICE: "upper"},
        "the distance to the lower value is not divided by the gap between the two": {_SHARE: "x - code[lower]"},
        "x is divided by the upper value: what counts is the way from the lower one": {_SHARE: "x / code[upper]"},
        "the gap is that of evenly spaced values: take the two neighbours' own": {
            _SHARE: "(x - code[lower]) * (len(code) - 1) / code[-1]",
        },
        "every code is too large by one: `searchsorted` gives the upper neighbour": {
            _CHOICE: "torch.where(noise < share, upper + 1, lower + 1)",
        },
        "the values come back instead of their codes": {
            f"{_CHOICE}.to(torch.uint8)": f"code[{_CHOICE}]",
        },
        "the codes are whole numbers of eight bytes: store bytes": {f"{_CHOICE}.to(torch.uint8)": _CHOICE},
        "one number of noise decides for all: each has its own": {
            _CHOICE: "torch.where(noise.flatten()[0] < share, upper, lower)"
        },
    },
    variants={
        "buckets from the right": """
            def random_code(x, code, noise):
                lower = (torch.bucketize(x, code, right=True) - 1).clamp(0, len(code) - 2)
                gap = code.diff()[lower]
                return (lower + (noise * gap < x - code[lower])).to(torch.uint8)
        """,
        "counted": """
            def random_code(x, code, noise):
                lower = ((x[..., None] >= code).sum(-1) - 1).clamp(max=len(code) - 2)
                left = (code[lower + 1] - x) / (code[lower + 1] - code[lower])
                return torch.where(1 - noise > left, lower + 1, lower).byte()
        """,
        "added noise, rounded down": """
            def random_code(x, code, noise):
                upper = torch.searchsorted(code, x).clamp(1, len(code) - 1)
                position = upper - 1 + (x - code[upper - 1]) / (code[upper] - code[upper - 1])
                return (position + (1 - noise)).floor().clamp(max=len(code) - 1).to(torch.uint8)
        """,
    },
)
