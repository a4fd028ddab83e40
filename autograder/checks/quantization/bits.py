"""`bits_per_parameter`, with the statistics counted."""

import torch

from autograder.cases import between
from autograder.exercise import Exercise


def bits_per_parameter(bits: int, block_size: int = 64, nested_block_size: int | None = None) -> float:
    """Return the bits of a code, and its share of the bits of an absmax, counted for one large block of blocks."""
    if nested_block_size is None:
        return (bits * block_size + 32) / block_size
    weights = block_size * nested_block_size
    return (bits * weights + 8 * nested_block_size + 32) / weights


def bits_case(generator: torch.Generator, low: int = 3, high: int = 9) -> dict:
    """Return settings with and without double quantization, block sizes that are powers of two, and one that is not."""
    size, nested = (2 ** between(generator, low, high) for _ in range(2))
    nested = nested if nested != size else 2 * nested
    bits = between(generator, 5, 7)  # 4 would hide that `bits` is not used
    return {"settings": [[bits, 24], [bits, size], [bits, size, nested], [8, 2 * size], [8, 2 * size, 4 * nested], [bits]]}


def drive_bits(bits_per_parameter, settings):
    """Return the bits for several settings."""
    seen = {}
    for arguments in settings:
        bits = bits_per_parameter(*arguments)
        seen[f"bits_per_parameter({', '.join(map(str, arguments))})"] = bits if isinstance(bits, int | float) else repr(bits)
    return seen


_SINGLE = "(bits * block_size + 32) / block_size"
_NESTED_BITS = "(bits * weights + 8 * nested_block_size + 32) / weights"

check_bits = Exercise(
    spec=[bits_per_parameter],
    cases=lambda generator: [bits_case(generator)],
    driver=drive_bits,
    # All of these numbers have few binary digits; a sum of thirds of an ulp is still less than this.
    tolerance=lambda case: {f"bits_per_parameter({', '.join(map(str, arguments))})": 1e-9 for arguments in case["settings"]},
    mistakes={
        "absmax is forgotten: every block has one of 32 bits": {_SINGLE: "float(bits)", _NESTED_BITS: "float(bits)"},
        "absmax is counted with 16 bits: it is fp32": {
            _SINGLE: "(bits * block_size + 16) / block_size",
            _NESTED_BITS: "(bits * weights + 8 * nested_block_size + 16) / weights",
        },
        "absmax is counted in bytes: 4 bytes are 32 bits": {_SINGLE: "(bits * block_size + 4) / block_size"},
        "absmax is counted once for every weight: a block shares one": {_SINGLE: "bits + 32.0"},
        "`bits` is not used: a code need not have 4": {
            _SINGLE: "4 + 32 / block_size",
            _NESTED_BITS: "4 + 8 / block_size + 32 / weights",
        },
        "`//` cuts the fraction off: divide with `/`": {
            _SINGLE: "bits + 32 // block_size",
            _NESTED_BITS: "bits + 8 // block_size + 32 // weights",
        },
        "`nested_block_size` is not used": {_NESTED_BITS: _SINGLE},
        "with double quantization the nested absmax is forgotten: one of 32 bits for every nested block": {
            _NESTED_BITS: "bits + 8 / block_size",
        },
        "with double quantization the 8-bit codes are forgotten: one for every block": {
            _NESTED_BITS: "bits + 32 / weights",
        },
        "with double quantization the fp32 absmax is counted as well: its codes take its place": {
            _NESTED_BITS: _NESTED_BITS + " + 32 / block_size",
        },
        "a nested block is taken for so many weights: it holds so many *blocks*": {
            _NESTED_BITS: "bits + 8 / block_size + 32 / nested_block_size",
        },
        "the codes of double quantization are counted with `bits`: they have 8": {
            _NESTED_BITS: "(bits * weights + bits * nested_block_size + 32) / weights",
        },
        "the result is rounded up to whole bits: a parameter's share may be a fraction": {
            _SINGLE: "float(-(-(bits * block_size + 32) // block_size))",
            _NESTED_BITS: "float(-(-(bits * weights + 8 * nested_block_size + 32) // weights))",
        },
    },
    variants={
        "a sum of shares": """
            def bits_per_parameter(bits, block_size=64, nested_block_size=None):
                if nested_block_size is None:
                    return bits + 32 / block_size
                return bits + 8 / block_size + 32 / (block_size * nested_block_size)
        """,
        "absmax by itself": """
            def bits_per_parameter(bits, block_size=64, nested_block_size=None):
                absmax = 8 + 32 / nested_block_size if nested_block_size else 32
                return bits + absmax / block_size
        """,
        "recursion": """
            def bits_per_parameter(bits, block_size=64, nested_block_size=None):
                constant = 32 if nested_block_size is None else bits_per_parameter(8, nested_block_size)
                return bits + constant / block_size
        """,
        "fractions": """
            def bits_per_parameter(bits, block_size=64, nested_block_size=None):
                from fractions import Fraction
                extra = Fraction(32) if nested_block_size is None else 8 + Fraction(32, nested_block_size)
                return float(bits + extra / block_size)
        """,
    },
)
