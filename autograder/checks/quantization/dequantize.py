"""`dequantize_4bit` and `dequantize_nf4`."""

import torch
from torch import Tensor

from autograder.cases import between, uneven_levels
from autograder.checks.quantization.levels import nf4_levels
from autograder.checks.quantization.pack import unpack
from autograder.exercise import Exercise
from autograder.helpers import seeing


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, levels: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64
) -> Tensor:
    """Return level times absmax, a product in fp32, rounded to `dtype` at the end, in `shape`."""
    values = levels[unpack(packed).long()]
    blocks = [block * largest for block, largest in zip(values.split(block_size), absmax)]
    return torch.cat(blocks).reshape(shape).to(dtype)


def dequantize_nf4(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64) -> Tensor:
    """Dequantize a weight that has the levels of NF4."""
    return dequantize_4bit(packed, absmax, nf4_levels(), shape, dtype, block_size)


def dequantize_case(generator: torch.Generator, dtype: str = "float32", block_size: int = 32, axes: int = 2) -> dict:
    """Return random bytes for a weight whose rows are one and a half blocks long."""
    rows = 2 * between(generator, 3, 5)
    columns = block_size * 3 // 2
    absmax = 0.2 + 3 * torch.rand(rows * 3 // 2, generator=generator)
    return {
        "packed": torch.randint(0, 256, (rows * columns // 2, 1), generator=generator, dtype=torch.uint8),
        "absmax": absmax,
        "levels": uneven_levels(generator),
        "other_levels": uneven_levels(generator),
        "shape": [rows, columns] if axes == 2 else [2, rows // 2, columns],
        "dtype": dtype,
        "block_size": block_size,
    }


def drive_dequantize(dequantize_4bit, dequantize_nf4, packed, absmax, levels, other_levels, shape, dtype, block_size):
    """Dequantize with two sets of levels; `unpack` and `nf4_levels` are ours, whatever the student's: those have own checks."""
    import torch

    def unpack(packed):
        return torch.stack([packed.flatten() // 16, packed.flatten() % 16], 1).flatten().byte()

    target = (tuple(shape), getattr(torch, dtype), *(() if block_size == 64 else (block_size,)))
    with seeing(dequantize_4bit, unpack=unpack, nf4_levels=lambda: other_levels):
        weight = dequantize_4bit(packed, absmax, levels, *target)
        by_default = dequantize_nf4(packed, absmax, *target)
    return {
        "the weight": weight,
        "the weight from dequantize_nf4": by_default,
        "packed afterwards": packed,
        "absmax afterwards": absmax,
        "the levels afterwards": levels,
    }


_DEQUANTIZE_NF4 = """
            def dequantize_nf4(packed, absmax, shape, dtype, block_size=64):
                return dequantize_4bit(packed, absmax, nf4_levels(), shape, dtype, block_size)
        """
_LEVELS = "levels[unpack(packed).long()]"
_PRODUCTS = "[block * largest for block, largest in zip(values.split(block_size), absmax)]"

check_dequantize = Exercise(
    spec=[dequantize_4bit, dequantize_nf4],
    cases=lambda generator: [dequantize_case(generator), dequantize_case(generator, "bfloat16", 64, axes=3)],
    driver=drive_dequantize,
    helpers=[seeing],
    # One product in fp32 and one rounding: there is only one right answer.
    mistakes={
        "absmax is left out: the levels are between -1 and 1 and have to be scaled": {_PRODUCTS: "[values]"},
        "the levels are divided by absmax: quantizing divides, dequantizing multiplies": {
            _PRODUCTS: _PRODUCTS.replace(" * ", " / ")
        },
        "the product was computed in the target dtype: multiply in fp32, and round once, at the end": {
            _LEVELS: _LEVELS + ".to(dtype)",
            "zip(values.split(block_size), absmax)": "zip(values.split(block_size), absmax.to(dtype))",
        },
        "the levels were rounded to the target dtype before they were multiplied: round once, at the end": {
            _LEVELS: _LEVELS + ".to(dtype).float()",
        },
        "absmax was rounded to the target dtype before it was multiplied: round once, at the end": {
            "zip(values.split(block_size), absmax)": "zip(values.split(block_size), absmax.to(dtype).float())",
        },
        "value i is multiplied by absmax i % blocks: a block is `block_size` neighbours, so it is i // block_size": {
            _PRODUCTS: "[values * absmax.repeat(block_size)]",
        },
        "every value is multiplied by the same absmax: each block has its own": {_PRODUCTS: "[values * absmax[0]]"},
        "the weight lies flat: return it in `shape`": {".reshape(shape)": ""},
        "the weight is transposed": {".reshape(shape)": ".reshape(shape[::-1]).permute(*range(len(shape))[::-1])"},
        "the dtype asked for is ignored": {".to(dtype)": ""},
        "`block_size` is not used: it need not be 64": {
            _PRODUCTS: "[values * absmax.repeat_interleave(64)[: len(values)]]",
        },
        "the codes are taken for evenly spaced numbers: they are indices of levels": {
            _LEVELS: "unpack(packed).float() * (2 / 15) - 1",
        },
        "`levels` is not used: dequantize_4bit takes whatever levels it is given": {
            _LEVELS: "nf4_levels()[unpack(packed).long()]"
        },
        "the levels are read in reverse": {_LEVELS: "levels.flip(0)[unpack(packed).long()]"},
    },
    variants={
        "vectorised": """
            def dequantize_4bit(packed, absmax, levels, shape, dtype, block_size=64):
                blocks = levels[unpack(packed).int()].view(-1, block_size)
                return (blocks * absmax[:, None]).view(shape).to(dtype)
        """
        + _DEQUANTIZE_NF4,
        "repeat_interleave": """
            def dequantize_4bit(packed, absmax, levels, shape, dtype, block_size=64):
                values = levels.index_select(0, unpack(packed).to(torch.int64))
                return (values * absmax.repeat_interleave(block_size)).to(dtype).reshape(*shape)
        """
        + _DEQUANTIZE_NF4,
        "in double precision": """
            def dequantize_4bit(packed, absmax, levels, shape, dtype, block_size=64):
                values = torch.take(levels.double(), unpack(packed).long()).unflatten(0, (-1, block_size))
                return torch.einsum("bs,b->bs", values, absmax.double()).float().reshape(shape).to(dtype)
        """
        + _DEQUANTIZE_NF4,
        "a table of every block's own levels": """
            def dequantize_4bit(packed, absmax, levels, shape, dtype, block_size=64):
                codes = unpack(packed).long().view(-1, block_size)
                return torch.outer(absmax, levels).gather(1, codes).reshape(shape).to(dtype)
        """
        + _DEQUANTIZE_NF4,
    },
)
