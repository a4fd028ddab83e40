"""`dequantize_nf4`: fast, and in few bytes."""

import torch
from torch import Tensor

from autograder.checking.cases import between, uneven_levels
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.qlora.cases import random_bytes


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


def drive_dequantize_nf4(dequantize_nf4, packed, absmax, levels, shape, dtype, block_size, copies=1):
    """Dequantize, and follow every storage while that is going on; then do it on the device "meta".

    Of several copies of the weight, one below the other, a sample is returned.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    target = (tuple(shape), getattr(torch, dtype), *(() if block_size == 64 else (block_size,)))
    if copies > 1:
        target = ((copies * shape[0], shape[1]), *target[1:])
        weight = dequantize_nf4(packed.repeat(copies, 1), absmax.repeat(copies), levels, *target)
        return {"a sample of the outcome": weight[:: shape[0] // 2].clone()}

    class Alive(TorchDispatchMode):
        """Follows the storages that operations make, and notes of which dtypes they are when most bytes are there."""

        def __init__(self):
            super().__init__()
            self.given = {tensor.untyped_storage()._cdata for tensor in (packed, absmax, levels)}
            self.storages, self.peak, self.most = {}, {}, 0

        def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
            made = operation(*arguments, **(keywords or {}))
            self.storages = {at: entry for at, entry in self.storages.items() if not entry[0].expired()}
            for tensor in tree_leaves(made):
                if torch.is_tensor(tensor) and (at := tensor.untyped_storage()._cdata) not in self.given:
                    self.storages.setdefault(at, (StorageWeakRef(tensor.untyped_storage()), str(tensor.dtype)[6:]))
                    self.storages[at] = (*self.storages[at][:2], tensor.untyped_storage().nbytes())
            if (most := sum(entry[2] for entry in self.storages.values())) > self.most:
                self.most, self.peak = most, {}
                for _, name, size in self.storages.values():
                    self.peak[name] = self.peak.get(name, 0) + size
            return made

    with Alive() as alive:
        weight = dequantize_nf4(packed, absmax, levels, *target)
    seen = {
        "the weight": weight,
        "the packed bytes afterwards": packed,
        "absmax afterwards": absmax,
        "the levels afterwards": levels,
        "peak": alive.peak,
    }
    elsewhere = dequantize_nf4(packed.to("meta"), absmax.to("meta"), levels.to("meta"), *target)
    return seen | {"the device of the weight, if all was on the device 'meta'": elsewhere.device.type}


def read_dequantize_nf4(observation: Observation, case: dict) -> Observation:
    """Say in bytes a weight what was there at the peak, if it was more than fp32 values (4) and an index of bytes (2) take.

    Beyond these 6 a table of bytes has room, twice, and a tenth of a byte a weight: what is wrong takes half a byte and more.
    Less than six bytes is no mistake: a weight can be made some blocks at a time, as the master does.
    """
    read = {name: value for name, value in observation.items() if name != "peak"}
    count, peak = 2 * case["packed"].numel(), observation["peak"]
    most = sum(peak.values())
    parts = [f"{size / count:.3g} of {name}" for name, size in sorted(peak.items()) if size > 0.05 * count]
    fits = most <= 6.1 * count + 2 * 256 * 8
    return read | {_PEAK: _FITS if fits else f"{most / count:.3g} bytes a weight: {', '.join(parts)}"}


_PEAK = "what is in memory at once"
_FITS = "at most 6 bytes a weight"

_TABLE = "torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)"
_GATHER = "table.index_select(0, positions)"
_PRODUCT = "blocks.mul_(absmax[:, None])"

check_fast_dequantize = Exercise(
    spec=[dequantize_nf4],
    # One product in fp32 and one rounding: there is only one right answer.
    cases=lambda generator: [fast_case(generator), fast_case(generator, "bfloat16", 32)],
    driver=drive_dequantize_nf4,
    reading=read_dequantize_nf4,
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
        "the index is int64, and kept until the end: int32 is enough, and it needs no name": {
            "packed.flatten().int()": "packed.flatten().long()",
            "    del positions\n": "",
        },
        "the index is still there when the values are cast: `del` it, or give it no name": {"    del positions\n": ""},
        "a second fp32 copy is there for a moment, although the first is dropped: multiply in place, by `*=` or `mul_`": {
            "    blocks = values.view(-1, block_size)\n": "    values = values.view(-1, block_size) * absmax[:, None]\n",
            f"    {_PRODUCT}\n": "",
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
        "unit 09's way takes 13 bytes a weight, and 6 are allowed: look up bytes, not codes, and multiply in place": """
            def dequantize_nf4(packed, absmax, levels, shape, dtype, block_size=64):
                codes = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()
                return (levels[codes.long()].view(-1, block_size) * absmax[:, None]).view(shape).to(dtype)
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
            "    del positions\n": "    del positions\n    packed.zero_()\n",
        },
        "something is made on another device, the table or the weight: make it from `levels`, or with `device=packed.device`": {
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
