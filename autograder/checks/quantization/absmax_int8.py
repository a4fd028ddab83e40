"""`absmax_int8` and `from_int8`: blocks in 8 bits."""

import torch
from torch import Tensor

from autograder.cases import EPS, between
from autograder.checks.quantization.cases import blocks_of_many_sizes
from autograder.exercise import Exercise


def absmax_int8(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes round(127 x / absmax) in int8 and the absmax of every row in fp32."""
    blocks = blocks.float()
    absmax = torch.stack([block.abs().max() for block in blocks])
    codes = torch.zeros(blocks.shape, dtype=torch.int8)
    for number, block in enumerate(blocks):
        if absmax[number] > 0:
            codes[number] = torch.round(block * (127 / absmax[number])).to(torch.int8)
    return codes, absmax


def from_int8(codes: Tensor, absmax: Tensor) -> Tensor:
    """Return code * absmax / 127 in fp32."""
    return torch.stack([row.float() * (largest / 127) for row, largest in zip(codes, absmax)])


def int8_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return blocks without a number that lies halfway between two codes: such are set to zero."""
    count, size = between(generator, 5, 7), between(generator, 30, 40)
    blocks = blocks_of_many_sizes(generator, count, size).to(dtype).double()
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    blocks[((127 * blocks / absmax) % 1 - 0.5).abs() < 1e-2] = 0
    return {
        "blocks": blocks.to(dtype),
        "other_codes": torch.randint(-127, 128, (count, size), generator=generator, dtype=torch.int8),
        "other_absmax": 0.2 + 3 * torch.rand(count, generator=generator),
    }


def drive_int8(absmax_int8, from_int8, blocks, other_codes, other_absmax):
    """Quantize blocks, and dequantize codes that the case supplies: the second must not depend on the first."""
    codes, absmax = absmax_int8(blocks)
    try:
        back = from_int8(other_codes, other_absmax)
    except NotImplementedError:
        raise
    except Exception as error:  # or it would hide what may be wrong with the first
        back = f"{type(error).__name__}: {error}"
    return {
        "absmax": absmax,
        "the codes": codes,
        "what from_int8 returns": back,
        "the blocks after the call": blocks,
    }


_ABSMAX = "torch.stack([block.abs().max() for block in blocks])"
_ROUNDED = "torch.round(block * (127 / absmax[number])).to(torch.int8)"
_STEPS = "row.float() * (largest / 127)"

check_absmax_int8 = Exercise(
    spec=[absmax_int8, from_int8],
    cases=lambda generator: [int8_case(generator), int8_case(generator, torch.bfloat16)],
    driver=drive_int8,
    # code * (absmax / 127) and (code * absmax) / 127 are rounded twice each.
    tolerance=lambda case: {"what from_int8 returns": 2 * EPS * case["other_absmax"].max().item()},
    mistakes={
        "the quotient is rounded down: `floor` makes the largest error twice what `round` makes it": {
            "torch.round(": "torch.floor("
        },
        "the fraction is cut off, for converting to int8 does not round: call `round` first": {
            _ROUNDED: "(block * (127 / absmax[number])).to(torch.int8)"
        },
        "the scale is 128 / absmax: int8 ends at 127, and the largest number of a block wraps round to -128": {
            "127 / absmax[number]": "128 / absmax[number]"
        },
        "only half of the codes are used: they go from -127 to 127, not from -63 to 63": {
            "127 / absmax[number]": "63 / absmax[number]"
        },
        "the scale is 128 / absmax: int8 ends at 127, so the steps are 127 on either side, and -128 is not used": {
            _ROUNDED: "torch.round(block * (128 / absmax[number])).clamp(-128, 127).to(torch.int8)",
        },
        "the scale was rounded to the blocks' own dtype: go to fp32 before you divide": {
            "127 / absmax[number]": "(127 / absmax[number]).bfloat16().float()"
        },
        "a block of tiny numbers loses its codes: what keeps the divisor from zero is too large": {
            "127 / absmax[number]": "127 / absmax[number].clamp(min=1e-6)"
        },
        "one absmax for all blocks: each block, a row of `blocks`, has its own": {
            _ABSMAX: "torch.stack([blocks.abs().max() for block in blocks])"
        },
        "absmax is taken down the columns: a block is a row of `blocks`": {_ABSMAX: "blocks.abs().amax(0)"},
        "the largest number is taken with its sign: a block's largest may be negative, so take `abs` first": {
            _ABSMAX: "torch.stack([block.max() for block in blocks])"
        },
        "the range from min to max is mapped: absmax quantization is symmetric, and zero gets code 0": {
            _ROUNDED: "((block - block.min()) * (254 / (block.max() - block.min())) - 127).round().to(torch.int8)"
        },
        "absmax has an axis too many: its shape is (blocks,), so leave out `keepdim` or take the axis away again": {
            "return codes, absmax": "return codes, absmax[:, None]"
        },
        "the codes are not int8: that dtype is what makes them small": {
            ".to(torch.int8)": "",
            "dtype=torch.int8": "dtype=torch.float32",
        },
        "absmax / 127 was returned: return absmax itself, from_int8 divides": {
            "return codes, absmax": "return codes, absmax / 127"
        },
        "it was computed in the blocks' own dtype: bf16 has 8 significant bits, so go to fp32 first": {
            "blocks = blocks.float()": "pass",
        },
        "the blocks that were given were changed: no trailing underscore, no `*=`": {
            _ROUNDED: "torch.round(block.mul_(127 / absmax[number])).to(torch.int8)",
        },
        "from_int8 does not divide by 127: the code 127 stands for absmax": {_STEPS: "row.float() * largest"},
        "from_int8 divides by the step: a code is so many steps of absmax / 127": {_STEPS: "row.float() / (largest / 127)"},
        "from_int8 takes one absmax for all blocks": {_STEPS: "row.float() * (absmax[0] / 127)"},
    },
    variants={
        "vectorised": """
            def absmax_int8(blocks):
                absmax = blocks.float().abs().amax(dim=1)
                scale = 127 / absmax.clamp(min=1e-30)
                return (blocks.float() * scale[:, None]).round().to(torch.int8), absmax

            def from_int8(codes, absmax):
                return codes * (absmax / 127)[:, None]
        """,
        "divided by absmax first": """
            def absmax_int8(blocks):
                blocks = blocks.to(torch.float32)
                absmax = torch.max(torch.abs(blocks), dim=-1).values
                safe = torch.where(absmax == 0, torch.ones_like(absmax), absmax)
                return torch.round(blocks / safe.unsqueeze(1) * 127).char(), absmax

            def from_int8(codes, absmax):
                return codes.float() * absmax.unsqueeze(1) / 127
        """,
        "in double precision": """
            def absmax_int8(blocks):
                wide = blocks.double()
                absmax = wide.abs().amax(1)
                codes = torch.nan_to_num(wide * 127 / absmax[:, None]).round().clamp(-127, 127).to(torch.int8)
                return codes, absmax.float()

            def from_int8(codes, absmax):
                return (codes.double() * absmax.double()[:, None] / 127).float()
        """,
        "floor of x + 1/2": {
            "torch.round(block * (127 / absmax[number]))": "torch.floor(block * (127 / absmax[number]) + 0.5)"
        },
        "the norm": {"block.abs().max()": "torch.linalg.vector_norm(block, float('inf'))"},
    },
)
