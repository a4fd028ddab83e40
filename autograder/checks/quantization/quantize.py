"""`quantize_4bit` and `quantize_nf4`: a weight in blocks."""

import torch
from torch import Tensor

from autograder.cases import between, total_bytes, uneven_levels
from autograder.checks.quantization.cases import blocks_of_many_sizes, clear_of
from autograder.checks.quantization.levels import nf4_levels
from autograder.checks.quantization.nearest_level import nearest_level
from autograder.checks.quantization.pack import pack
from autograder.drive import Observation
from autograder.exercise import Exercise
from autograder.helpers import seeing


def quantize_4bit(weight: Tensor, levels: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return the packed codes of the weight's blocks, flattened row by row, and their absmax in fp32."""
    if weight.numel() % block_size:
        raise ValueError(f"{weight.numel()} weights do not fill blocks of {block_size}")
    values = weight.reshape(-1).float()
    packed, absmax = [], []
    for block in values.split(block_size):
        largest = block.abs().max()
        scaled = block * (1 / largest.clamp(min=1e-38))
        absmax.append(largest)
        packed.append(pack(nearest_level(scaled, levels)))
    return torch.cat(packed), torch.stack(absmax)


def quantize_nf4(weight: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight with the levels of NF4."""
    return quantize_4bit(weight, nf4_levels(), block_size)


def quantize_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    block_size: int = 32,
    transposed: bool = False,
    axes: int = 2,
) -> dict:
    """Return a weight whose rows are one and a half blocks long, none of it near to the boundary of two levels.

    What is near is set to zero. As zero is a level, and in no block the largest, nothing else changes by that. In fp32 some
    weights are planted so near that 16 bits would not do; in 16 bits the weight is such that computing in its own dtype would
    give other codes.
    """
    levels, other_levels = uneven_levels(generator), uneven_levels(generator)
    rows = 2 * between(generator, 2, 3)
    while True:
        blocks = blocks_of_many_sizes(generator, rows * 3 // 2, block_size).to(dtype)
        absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        midpoints = (levels[:-1] + levels[1:]) / 2
        if dtype.itemsize > 2:
            places = torch.randperm(block_size, generator=generator)
            places = places[places != blocks[0].abs().argmax()][: len(midpoints)]
            signs = 2 * torch.randint(0, 2, midpoints.shape, generator=generator) - 1
            blocks[0, places] = (midpoints + 3e-5 * signs) * absmax[0]
        for wide in (levels.double(), other_levels.double()):
            blocks[~clear_of(blocks.double() / absmax.double(), (wide[:-1] + wide[1:]) / 2, 1e-5)] = 0
        rounded, exact = blocks * (1 / absmax), blocks.float() / absmax.float()
        if dtype.itemsize > 2 or not torch.equal(rounded[..., None] > midpoints, exact[..., None] > midpoints):
            break
    weight = blocks.reshape(rows, -1) if axes == 2 else blocks.reshape(2, rows // 2, -1)
    weight = weight.mT.contiguous().mT if transposed else weight
    return {"weight": weight, "levels": levels, "other_levels": other_levels, "block_size": block_size}


def drive_quantize(quantize_4bit, quantize_nf4, weight, levels, other_levels, block_size):
    """Quantize a weight with two sets of levels, and one that does not fill its last block.

    While it runs, `nearest_level`, `pack` and `nf4_levels` are ours, whatever the student's are: those have their own checks.
    """
    from peftlab.memory import whole_storage

    def nearest_level(x, levels):
        return (x[..., None] > (levels[:-1] + levels[1:]) / 2).sum(-1).byte()

    def pack(codes):
        if codes.dim() != 1 and "pack" in theirs:
            return theirs["pack"](codes)  # `pack` was promised codes in one row: what comes of others depends on it
        pairs = codes.reshape(-1, 2)
        return (pairs[:, :1] * 16 + pairs[:, 1:]).byte()

    size = () if block_size == 64 else (block_size,)
    ours = {"nearest_level": nearest_level, "pack": pack, "nf4_levels": lambda: other_levels}
    with seeing(quantize_4bit, **ours) as theirs:
        packed, absmax = quantize_4bit(weight, levels, *size)
        by_default, _ = quantize_nf4(weight, *size)
        try:
            quantize_4bit(weight.flatten()[: block_size + 2], levels, block_size)
            refused = "nothing"
        except Exception as error:
            refused = type(error).__name__
    kept = {"packed": whole_storage(packed), "absmax": whole_storage(absmax)}
    return {
        "absmax": absmax.clone(),
        "packed": packed.clone(),
        "by default": by_default.clone(),
        "kept": kept,
        "refused": refused,
        "weight": weight,
    }


def read_quantize(observation: Observation, case: dict) -> Observation:
    """Count the bytes that came back."""
    kept = observation["kept"]
    return {
        "absmax": observation["absmax"],
        "packed": observation["packed"],
        "packed from quantize_nf4": observation["by default"],
        f"the number of bits a parameter, in blocks of {case['block_size']}, that absmax and packed keep in memory": (
            8 * total_bytes(kept.values()) / case["weight"].numel()
        ),
        "the error for a weight that does not fill its last block": observation["refused"],
        "the weight after the call": observation["weight"],
    }


_QUANTIZE_NF4 = """
            def quantize_nf4(weight, block_size=64):
                return quantize_4bit(weight, nf4_levels(), block_size)
        """
_SCALED = "block * (1 / largest.clamp(min=1e-38))"
_LARGEST = "block.abs().max()"
_VALUES = "weight.reshape(-1).float()"

check_quantize = Exercise(
    spec=[quantize_4bit, quantize_nf4],
    cases=lambda generator: [
        quantize_case(generator),
        quantize_case(generator, torch.bfloat16, 64, axes=3),
        quantize_case(generator, transposed=True),
    ],
    driver=drive_quantize,
    helpers=[seeing],
    reading=read_quantize,
    # An absmax that was kept above zero, to divide by it, is as good as zero.
    tolerance=lambda case: {"absmax": 1e-30},
    at_most=frozenset(
        f"the number of bits a parameter, in blocks of {size}, that absmax and packed keep in memory" for size in (32, 64, 128)
    ),
    mistakes={
        "one absmax for the whole weight: each block has its own": {_LARGEST: "values.abs().max()"},
        "a block is a row of the weight: flatten first, and take `block_size` values at a time, whatever the rows are": {
            "values.split(block_size)": "weight.float()",
        },
        "the weight is flattened down its columns: a block is `block_size` neighbours in a row": {
            _VALUES: "weight.permute(*range(weight.dim())[::-1]).reshape(-1).float()",
        },
        "a block takes every n-th value: its values are neighbours": {
            "values.split(block_size)": "values.reshape(block_size, -1).T",
        },
        "the largest is taken with its sign: it may be negative, so take `abs` first": {_LARGEST: "block.max()"},
        "the weights are not scaled: divide each block by its absmax before you look for levels": {_SCALED: "block"},
        "the weights are multiplied by absmax: quantizing divides by it, dequantizing multiplies": {_SCALED: "block * largest"},
        "the codes are packed block by block: `pack` takes all codes in one row, so flatten them first": """
            def pack(codes):
                return ((codes[::2] << 4) | codes[1::2])[:, None]

            def quantize_4bit(weight, levels, block_size=64):
                if weight.numel() % block_size:
                    raise ValueError("ragged")
                blocks = weight.reshape(-1, block_size).float()
                absmax = blocks.abs().amax(1)
                return pack(nearest_level(blocks / absmax.clamp(min=1e-38)[:, None], levels)), absmax
        """
        + _QUANTIZE_NF4,
        "`view` cannot flatten every weight, a transposed one for example: `reshape` copies where it must": {
            _VALUES: "weight.view(-1).float()",
        },
        "the numbers come in the order in which they lie in memory: take them in the order in which the weight shows them": {
            _VALUES: "torch.as_strided(weight, (weight.numel(),), (1,)).float()",
        },
        "a block of tiny weights loses its codes: what keeps the divisor from zero is too large": {
            "clamp(min=1e-38)": "clamp(min=1e-6)",
        },
        "`levels` is not used: quantize_4bit takes whatever levels it is given": {
            "pack(nearest_level(scaled, levels))": "pack(nearest_level(scaled, nf4_levels()))",
        },
        "a weight whose rows do not fill blocks was refused: what counts is the whole weight, and a block may go on in the next row": {
            "if weight.numel() % block_size:": "if weight.shape[-1] % block_size:",
            "{weight.numel()} weights do not fill blocks of {block_size}": "",
        },
        "a block of zeros becomes NaN, as 0 * (1 / 0): keep absmax away from zero where you divide by it": {
            _SCALED: "block * (1 / largest)",
        },
        "absmax is not fp32: keep it in fp32, whatever the weight is in": {
            "torch.stack(absmax)": "torch.stack(absmax).to(weight.dtype)"
        },
        "absmax is rounded to bf16: keep it in fp32": {"absmax.append(largest)": "absmax.append(largest.bfloat16().float())"},
        "it was computed in the weight's own dtype: bf16 has 8 significant bits, so go to fp32 first": {
            _VALUES: "weight.reshape(-1)",
            "torch.stack(absmax)": "torch.stack(absmax).float()",
        },
        "the codes are not packed: two of them share a byte": {
            "pack(nearest_level(scaled, levels))": "nearest_level(scaled, levels)"
        },
        "absmax has an axis too many: its shape is (blocks,)": {"torch.stack(absmax)": "torch.stack(absmax)[:, None]"},
        "`block_size` is not used: it need not be 64": {"values.split(block_size)": "values.split(64)"},
        "a weight that does not fill its last block goes unnoticed: raise a ValueError": {
            'raise ValueError(f"{weight.numel()} weights do not fill blocks of {block_size}")': "pass",
        },
        "the weight that was given was changed: no trailing underscore, no `*=`": {
            _SCALED: "block.mul_(1 / largest.clamp(min=1e-38))",
            "absmax.append(largest)": "absmax.append(largest.clone())",
        },
    },
    variants={
        "vectorised": """
            def quantize_4bit(weight, levels, block_size=64):
                if weight.numel() % block_size != 0:
                    raise ValueError("ragged")
                blocks = weight.reshape(-1, block_size).float()
                absmax = blocks.abs().amax(dim=1)
                scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
                return pack(nearest_level(scaled, levels).flatten()), absmax
        """
        + _QUANTIZE_NF4,
        "divided, in fp64": """
            def quantize_4bit(weight, levels, block_size=64):
                count, rest = divmod(weight.numel(), block_size)
                if rest:
                    raise ValueError(rest)
                blocks = weight.contiguous().view(count, block_size).double()
                absmax = torch.linalg.vector_norm(blocks, ord=float("inf"), dim=1)
                scaled = torch.nan_to_num(blocks / absmax.unsqueeze(1))
                return pack(nearest_level(scaled, levels.double()).view(-1)), absmax.to(torch.float32)
        """
        + _QUANTIZE_NF4,
        "everything by hand": """
            def quantize_4bit(weight, levels, block_size=64):
                flat = torch.flatten(weight).to(torch.float32)
                if flat.numel() // block_size * block_size != flat.numel():
                    raise ValueError("does not divide")
                absmax = flat.unfold(0, block_size, block_size).abs().max(dim=1).values
                per_value = absmax.repeat_interleave(block_size)
                scaled = torch.where(per_value > 0, flat / per_value, torch.zeros_like(flat))
                codes = (scaled[:, None] - levels).abs().argmin(1)
                return (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], absmax
        """
        + _QUANTIZE_NF4,
        "levels scaled instead of weights": """
            def quantize_4bit(weight, levels, block_size=64):
                if weight.numel() % block_size:
                    raise ValueError("ragged")
                packed, absmax = [], []
                for block in weight.flatten().float().view(-1, block_size):
                    absmax.append(block.abs().max())
                    scale = absmax[-1] if absmax[-1] > 0 else 1.0
                    packed.append(pack(nearest_level(block, levels * scale)))
                return torch.cat(packed), torch.tensor(absmax)
        """
        + _QUANTIZE_NF4,
    },
)
