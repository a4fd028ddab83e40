"""`dequantize_nf4`: fast, and in few bytes."""

import torch
from torch import Tensor

from autograder.cases import between, uneven_levels
from autograder.checks.qlora.cases import random_bytes
from autograder.exercise import Exercise


def dequantize_nf4(
    packed: Tensor, absmax: Tensor, levels: Tensor, shape: tuple[int, ...], dtype: torch.dtype, block_size: int = 64
) -> Tensor:
    """Return level times absmax, a product in fp32, rounded to `dtype` at the end: a table of bytes, a gather, a product."""
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)
    positions = packed.flatten().int()
    values = table.index_select(0, positions)
    del positions
    blocks = values.view(-1, block_size)
    blocks.mul_(absmax[:, None])
    return values.view(tuple(shape)).to(dtype)


def fast_case(generator: torch.Generator, dtype: str = "float32", block_size: int = 64) -> dict:
    """Return random bytes for a weight whose rows are one and a half blocks long."""
    rows = 1000 * between(generator, 3, 5)
    columns = block_size * 3 // 2
    return {
        "packed": random_bytes(generator, rows * columns // 2, 1),
        "absmax": 0.2 + 3 * torch.rand(rows * 3 // 2, generator=generator),
        "levels": uneven_levels(generator),
        "shape": [rows, columns],
        "dtype": dtype,
        "block_size": block_size,
    }


def drive_dequantize_nf4(dequantize_nf4, packed, absmax, levels, shape, dtype, block_size):
    """Dequantize, and follow every allocation while that is going on; then do it on the device "meta"."""
    import torch

    from peftlab.tracker import PeftMemTracker

    target = (tuple(shape), getattr(torch, dtype), *(() if block_size == 64 else (block_size,)))
    tracker = PeftMemTracker()
    tracker.track_external(packed, absmax, levels)
    with tracker:
        start = tracker.bytes_by_category("current")["Total"]
        weight = dequantize_nf4(packed, absmax, levels, *target)
        peak = tracker.bytes_by_category("peak")["Total"] - start
    seen = {
        "the weight": weight,
        "the packed bytes afterwards": packed,
        "absmax afterwards": absmax,
        "the levels afterwards": levels,
        "peak bytes a weight of all that was made, beyond the 6 that fp32 values (4) and an index of bytes (2) take": max(
            0.0, peak / (2 * packed.numel()) - 6
        ),
    }
    elsewhere = dequantize_nf4(packed.to("meta"), absmax.to("meta"), levels.to("meta"), *target)
    return seen | {"the device of the weight, if all was on the device 'meta'": elsewhere.device.type}


_PEAK = "peak bytes a weight of all that was made, beyond the 6 that fp32 values (4) and an index of bytes (2) take"


def fast_tolerance(case: dict) -> dict[str, float]:
    """Return what the table of bytes takes, twice, and a tenth of a byte a weight: what is wrong takes half a byte and more.

    Less than six bytes is no mistake: a weight can be made some blocks at a time, as the master does.
    """
    return {_PEAK: 0.1 + 2 * 256 * 8 / (2 * case["packed"].numel())}


_TABLE = "torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)"
_GATHER = "table.index_select(0, positions)"
_PRODUCT = "blocks.mul_(absmax[:, None])"

check_fast_dequantize = Exercise(
    spec=[dequantize_nf4],
    cases=lambda generator: [fast_case(generator), fast_case(generator, "bfloat16", 32)],
    driver=drive_dequantize_nf4,
    # One product in fp32 and one rounding: there is only one right answer. For the bytes see `fast_tolerance`.
    tolerance=fast_tolerance,
    at_most=frozenset({_PEAK}),
    mistakes={
        "the two values of a byte have changed places: the first is in the high half": {
            _TABLE: "torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1)",
        },
        "the first values of all bytes come first, then the second ones: the two values of a byte are neighbours": {
            _GATHER: "table.index_select(0, positions).T.contiguous().flatten()",
        },
        "absmax is left out: the levels are between -1 and 1 and have to be scaled": {_PRODUCT: "pass"},
        "the levels are divided by absmax: quantizing divides, dequantizing multiplies": {
            _PRODUCT: "blocks.div_(absmax[:, None])"
        },
        "the product was computed in the target dtype: multiply in fp32, and round once, at the end": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.to(dtype).repeat_interleave(16), levels.to(dtype).repeat(16)",
            _PRODUCT: "blocks.mul_(absmax.to(dtype)[:, None])",
        },
        "the table was cast to the target dtype, and the product is rounded to it, too: cast once, at the end": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.to(dtype).repeat_interleave(16), levels.to(dtype).repeat(16)",
        },
        "absmax was rounded to the target dtype before it was multiplied: round once, at the end": {
            _PRODUCT: "blocks.mul_(absmax.to(dtype).float()[:, None])",
        },
        "value i is multiplied by absmax i % blocks: a block is `block_size` neighbours, so it is i // block_size": {
            "values.view(-1, block_size)": "values.view(block_size, -1)",
            "absmax[:, None]": "absmax",
        },
        "the weight lies flat, or two values a row: return it in `shape`": {"values.view(tuple(shape))": "values"},
        "the dtype asked for is ignored": {".to(dtype)": ""},
        "`block_size` is not used: it need not be 64": {
            "values.view(-1, block_size)": "values.view(-1, 64)",
            "absmax[:, None]": "absmax.repeat_interleave(block_size)[::64][:, None]",
        },
        "the index is int64, eight bytes for each packed one: int32 is enough": {
            "packed.flatten().int()": "packed.flatten().long()",
        },
        "every weight has an index of its own: look up bytes, two weights at a time": {
            "packed.flatten().int()": "torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()",
            _GATHER: "levels.index_select(0, positions)",
        },
        "every weight has an index of its own, and the product is a second copy: look up bytes, and multiply in place": """
            def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
                codes = torch.cat([packed >> 4, packed & 0xF], dim=1).flatten().int()
                return (levels[codes].view(-1, block_size) * absmax[:, None]).view(shape).to(dtype)
        """,
        "the product is a second fp32 copy of the weight: multiply in place": {
            "blocks = values.view(-1, block_size)": "blocks = values.view(-1, block_size) * absmax[:, None]",
            _PRODUCT: "pass",
            "values.view(tuple(shape))": "blocks.view(tuple(shape))",
        },
        "the table is in fp64, and with it all that is gathered: fp32 will do": {
            "levels.repeat_interleave(16), levels.repeat(16)": "levels.double().repeat_interleave(16), levels.double().repeat(16)",
            "values.view(tuple(shape)).to(dtype)": "values.float().view(tuple(shape)).to(dtype)",
        },
        "the packed bytes have been changed: they are needed in every step": {
            "del positions": "packed.zero_()",
        },
        "the table is not on the device of the packed bytes: make it from `levels`, which is": {
            _TABLE: f"torch.empty(256, 2).copy_({_TABLE})",
        },
    },
    variants={
        "indexing": {_GATHER: "table[positions]"},
        "pairs as numbers of eight bytes": {
            _TABLE: "torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).view(torch.float64).flatten()",
            _GATHER: "table.index_select(0, positions).view(torch.float32)",
        },
        "the table from every byte": {
            _TABLE: (
                "torch.stack([levels[torch.arange(256, device=levels.device) // 16], "
                "levels[torch.arange(256, device=levels.device) % 16]], 1)"
            ),
        },
        "an embedding": {_GATHER: "torch.nn.functional.embedding(positions, table)"},
        "block by block": """
            def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
                table = torch.cartesian_prod(levels, levels)
                weight = torch.empty(shape, dtype=dtype, device=packed.device)
                rows = weight.view(-1, block_size)
                for start in range(0, len(absmax), 100):
                    some = packed.view(-1, block_size // 2)[start : start + 100].long()
                    rows[start : start + 100] = table[some].view(-1, block_size) * absmax[start : start + 100, None]
                return weight
        """,
    },
)
