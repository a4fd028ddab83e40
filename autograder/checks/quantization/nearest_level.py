"""`nearest_level`: the code of a number."""

import torch
from torch import Tensor

from autograder.exercise import Exercise


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return in uint8 how many of the midpoints between neighbouring levels lie below each number: the nearest level's index."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for number in range(1, len(levels)):
        midpoint = (levels[number - 1] + levels[number]) / 2
        codes += (x > midpoint).to(torch.uint8)
    return codes


def nearest_case(
    generator: torch.Generator, count: int = 16, shape: tuple[int, ...] = (5, 7, 11), dtype: torch.dtype = torch.float32
) -> dict:
    """Return levels on a grid of 2^-14 and numbers on one of 2^-15: in fp32 every midpoint and every distance is exact.

    All levels and all midpoints are among the numbers, and so are some beyond the outermost levels.
    """
    one = 2**14
    inner = torch.randperm(2 * one - 1, generator=generator)[: count - 2] - one + 1
    levels = torch.cat([torch.tensor([-one]), inner.sort().values, torch.tensor([one])])
    x = torch.randint(-38_000, 38_001, shape, generator=generator)
    special = torch.cat([2 * levels, levels[:-1] + levels[1:]])
    places = torch.randperm(x.numel(), generator=generator)[: len(special)]
    x.view(-1)[places] = special[: len(places)]
    return {"x": x.to(dtype) / (2 * one), "levels": levels.to(dtype) / one}


def drive_nearest(nearest_level, x, levels):
    """Return the codes, and the arguments as they are afterwards."""
    return {"the codes": nearest_level(x, levels), "x afterwards": x, "the levels afterwards": levels}


_COMPARED = "x > midpoint"

check_nearest_level = Exercise(
    spec=[nearest_level],
    cases=lambda generator: [nearest_case(generator), nearest_case(generator, 9, (211,))],
    driver=drive_nearest,
    mistakes={
        "a tie goes to the upper level: halfway between two levels, take the lower": {_COMPARED: "x >= midpoint"},
        "the level below was taken: take the nearest, which may be the one above": {_COMPARED: "x >= levels[number]"},
        "the level above was taken: compare with the midpoints between levels, not with the levels": {
            _COMPARED: "x > levels[number - 1]"
        },
        "the midpoints lack their half: the boundary between two levels is half their sum": {
            "(levels[number - 1] + levels[number]) / 2": "levels[number - 1] + levels[number]",
        },
        "the levels are taken for boundaries: the boundaries are the midpoints between them": {
            "return codes": "return torch.bucketize(x, levels).to(torch.uint8)",
        },
        "the levels themselves were returned: return their indices": {
            "return codes": "return levels[codes.long()]",
        },
        "the codes are not uint8: in another dtype they take up to eight times the memory": {
            "return codes": "return codes.long()"
        },
        "the codes start at 1: the first level has index 0": {"torch.zeros(": "torch.ones("},
        "the farthest level was taken: `argmin` of the distance, not `argmax`": {
            "return codes": "return (x[..., None] - levels).abs().argmax(-1).to(torch.uint8)",
        },
        "the difference keeps its sign, so the largest level always wins: take its absolute value": {
            "return codes": "return (x[..., None] - levels).argmin(-1).to(torch.uint8)",
        },
        "the levels are taken to be evenly spaced: they are not, so look at the levels": {
            "return codes": "return ((x.clamp(-1, 1) + 1) / 2 * (len(levels) - 1)).round().to(torch.uint8)",
        },
        "the shape of x is lost: return codes in the same shape": {"return codes": "return codes[None]"},
        "the codes count from the largest level down: index 0 is the first level": {
            "return codes": "return len(levels) - 1 - codes",
        },
        "x was changed: make a new tensor": {"return codes": "x.clamp_(-1, 1)\n    return codes"},
    },
    variants={
        "bucketize": """
            def nearest_level(x, levels):
                return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
        """,
        "argmin of all distances": """
            def nearest_level(x, levels):
                return (x.unsqueeze(-1) - levels).abs().argmin(dim=-1).to(torch.uint8)
        """,
        "searchsorted": """
            def nearest_level(x, levels):
                midpoints = levels[:-1] + (levels[1:] - levels[:-1]) / 2
                return torch.searchsorted(midpoints, x, side="left").byte()
        """,
        "a running best": """
            def nearest_level(x, levels):
                best = torch.full_like(x, float("inf"))
                codes = torch.zeros_like(x, dtype=torch.uint8)
                for number, level in enumerate(levels):
                    distance = (x - level).abs()
                    codes[distance < best] = number
                    best = torch.minimum(best, distance)
                return codes
        """,
        "all comparisons at once": """
            def nearest_level(x, levels):
                midpoints = (levels[:-1] + levels[1:]) / 2
                return (x[..., None] > midpoints).sum(-1).to(torch.uint8)
        """,
    },
)
