"""Checks of unit 09_quantization (Dettmers et al. 2023, arXiv 2305.14314, section 3).

A code says which of two neighbouring levels is nearer, so the rounding of a right answer matters where a number lies on the
boundary between them, and nowhere else. The cases keep clear of the boundaries by some fifty times the rounding, and then codes
are compared exactly. (Where a tie is the point, everything is a multiple of a power of two, and nothing is rounded.)
"""

from statistics import NormalDist

import torch
from torch import Tensor

from autograder.cases import between, normal, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.dynamic_code import dynamic_code, nearest_code

EPS = torch.finfo(torch.float32).eps


def blocks_of_many_sizes(generator: torch.Generator, count: int, size: int) -> Tensor:
    """Return normal numbers in fp64, (count, size): of one scale a block, the largest negative in one block, one all zeros.

    Neither the first nor the last block is that of zeros, one block has an outlier, the first is small, and the last tiny: a
    number that keeps a divisor from zero must be smaller yet.
    """
    scales = 0.2 + 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    scales[0], scales[-1] = 0.03, 1e-9
    blocks = scales * normal(generator, count, size, dtype=torch.float64)
    zero, negative, outlier = (1 + torch.randperm(count - 2, generator=generator)[:3]).tolist()
    blocks[zero] = 0
    blocks[negative, between(generator, 0, size - 1)] = -1.3 * blocks[negative].abs().max()
    blocks[outlier, between(generator, 0, size - 1)] *= 20
    return blocks


def clear_of(values: Tensor, boundaries: Tensor, margin: float) -> Tensor:
    """Return whether each number is at least `margin` away from every boundary."""
    return ((values[..., None] - boundaries).abs() > margin).all(-1)


# ======================================================================================================================
# 1. absmax int8
# ======================================================================================================================
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


_ABSMAX = "torch.stack([block.abs().max() for block in blocks])"
_ROUNDED = "torch.round(block * (127 / absmax[number])).to(torch.int8)"
_STEPS = "row.float() * (largest / 127)"

check_absmax_int8 = Exercise(
    spec=[absmax_int8, from_int8],
    driver=drive_int8,
    cases=lambda generator: [int8_case(generator), int8_case(generator, torch.bfloat16)],
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


# ======================================================================================================================
# 2. levels from normal quantiles
# ======================================================================================================================
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


def drive_levels(normal_float_levels, nf4_levels, bits, outermost):
    """Return the levels of another number of bits, and NF4's."""
    return {
        f"the levels for {bits} bits": normal_float_levels(bits, outermost),
        "what nf4_levels returns": nf4_levels(),
    }


def levels_case(generator: torch.Generator, bits: int) -> dict:
    """Return an outermost probability that is not NF4's: whoever has copied the table has not derived it."""
    return {"bits": bits, "outermost": 0.93 + 0.05 * torch.rand((), generator=generator).item()}


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
    driver=drive_levels,
    cases=lambda generator: [levels_case(generator, 3), levels_case(generator, 5)],
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


# ======================================================================================================================
# 3. the nearest level
# ======================================================================================================================
def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Return in uint8 how many of the midpoints between neighbouring levels lie below each number: the nearest level's index."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for number in range(1, len(levels)):
        midpoint = (levels[number - 1] + levels[number]) / 2
        codes += (x > midpoint).to(torch.uint8)
    return codes


def drive_nearest(nearest_level, x, levels):
    """Return the codes, and the arguments as they are afterwards."""
    return {"the codes": nearest_level(x, levels), "x afterwards": x, "the levels afterwards": levels}


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


_COMPARED = "x > midpoint"

check_nearest_level = Exercise(
    spec=[nearest_level],
    driver=drive_nearest,
    cases=lambda generator: [nearest_case(generator), nearest_case(generator, 9, (211,))],
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


# ======================================================================================================================
# 4. two codes a byte
# ======================================================================================================================
def pack(codes: Tensor) -> Tensor:
    """Return bytes of shape (n / 2, 1): 16 times the first code of a pair plus the second."""
    pairs = codes.reshape(-1, 2).tolist()
    return torch.tensor([[16 * first + second] for first, second in pairs], dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return the codes, two for every byte, in their order."""
    codes = []
    for byte in packed.flatten().tolist():
        codes += [byte // 16, byte % 16]
    return torch.tensor(codes, dtype=torch.uint8)


def drive_pack(pack, unpack, codes, other):
    """Pack codes, and unpack bytes that the case supplies: the second must not depend on the first."""
    from peftlab.memory import whole_storage

    packed = pack(codes)
    return {
        "packed": packed.clone(),
        "kept": whole_storage(packed),
        "unpacked": unpack(other),
        "codes": codes,
        "other": other,
    }


def read_pack(observation: Observation, case: dict) -> Observation:
    """Count what the packed tensor keeps in memory, which may be more than it shows."""
    return {
        "what pack returns": observation["packed"],
        "the number of bytes that it keeps in memory": total_bytes([observation["kept"]]),
        "what unpack returns": observation["unpacked"],
        "the codes after pack": observation["codes"],
        "the bytes after unpack": observation["other"],
    }


def pack_case(generator: torch.Generator, low: int = 20, high: int = 40) -> dict:
    """Return codes, and bytes of another number: both have all values."""
    half = between(generator, low, high)
    return {
        "codes": torch.randint(0, 16, (2 * half,), generator=generator, dtype=torch.uint8),
        "other": torch.randint(0, 256, (half + 3, 1), generator=generator, dtype=torch.uint8),
    }


_BYTE = "[16 * first + second]"
_PACKED = "torch.tensor([[16 * first + second] for first, second in pairs], dtype=torch.uint8)"
_CODES = "[byte // 16, byte % 16]"
_UNPACKED = "return torch.tensor(codes, dtype=torch.uint8)"

check_pack = Exercise(
    spec=[pack, unpack],
    driver=drive_pack,
    reading=read_pack,
    cases=lambda generator: [pack_case(generator), pack_case(generator)],
    at_most=frozenset({"the number of bytes that it keeps in memory"}),
    mistakes={
        "the first code of a pair sits in the low half of the byte: it belongs in the high half": {
            _BYTE: "[16 * second + first]"
        },
        "code i shares its byte with code i + n/2: neighbours share a byte": {
            "codes.reshape(-1, 2).tolist()": "codes.reshape(2, -1).T.tolist()",
        },
        "the two halves overlap: shift the first code by four bits, that is, multiply it by 16": {
            _BYTE: "[(first + second) % 256]"
        },
        "the first code is shifted by three bits: a code has four": {_BYTE: "[(8 * first) | second]"},
        "the halves are joined by `&`, which keeps only common bits: use `|` or `+`": {_BYTE: "[(16 * first) & second]"},
        "what pack returns lies flat: its shape is (n / 2, 1), as in bitsandbytes": {_BYTE: "16 * first + second"},
        "the bytes are signed: use uint8": {_PACKED: _PACKED + ".view(torch.int8)"},
        "a byte is kept in a larger dtype: use uint8": {_PACKED: _PACKED + ".int()"},
        "what pack returns is a view, and keeps more in memory than it shows: make a tensor of its own": {
            "return " + _PACKED: "wide = torch.zeros(2 * len(pairs), 1, dtype=torch.uint8)\n"
            f"    wide[::2] = {_PACKED}\n"
            "    return wide[::2]",
        },
        "unpack gives the low half first: the first code is in the high half": {_CODES: "[byte % 16, byte // 16]"},
        "unpack gives all high halves and then all low ones: the two codes of a byte are neighbours": {
            _UNPACKED: "return torch.tensor(codes[::2] + codes[1::2], dtype=torch.uint8)",
        },
        "unpack does not shift the high half down: divide by 16, or shift by four bits": {
            _CODES: "[byte // 16 * 16, byte % 16]"
        },
        "unpack does not mask the low half: take `& 0xF`, or the remainder by 16": {_CODES: "[byte // 16, byte]"},
        "unpack shifts a signed byte, and its sign comes along: stay in uint8": {
            _CODES: "[(byte - 256 * (byte > 127)) // 16 % 256, byte % 16]",
        },
        "unpack returns another dtype: codes are uint8": {_UNPACKED: "return torch.tensor(codes)"},
        "unpack returns pairs: its shape is (n,), all codes in a row": {_UNPACKED: _UNPACKED + ".view(-1, 2)"},
    },
    variants={
        "shift and or": """
            def pack(codes):
                return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)

            def unpack(packed):
                flat = packed.flatten()
                return torch.stack([flat >> 4, flat & 0xF], dim=1).flatten()
        """,
        "arithmetic in int32": """
            def pack(codes):
                pairs = codes.int().view(-1, 2)
                return (pairs * torch.tensor([16, 1])).sum(1, keepdim=True).to(torch.uint8)

            def unpack(packed):
                wide = packed.int()
                return torch.cat([wide // 16, wide % 16], dim=1).reshape(-1).to(torch.uint8)
        """,
        "filling an empty tensor": """
            def pack(codes):
                packed = torch.empty(len(codes) // 2, 1, dtype=torch.uint8)
                packed[:, 0] = codes[0::2] * 16 + codes[1::2]
                return packed

            def unpack(packed):
                codes = packed.new_empty(2 * packed.numel())
                codes[0::2] = packed.view(-1) // 16
                codes[1::2] = packed.view(-1).remainder(16)
                return codes
        """,
        "in place on a copy": """
            def pack(codes):
                high = codes[0::2].clone()
                high.mul_(16).add_(codes[1::2])
                return high[:, None]

            def unpack(packed):
                return torch.cat([packed >> 4, packed - (packed >> 4 << 4)], 1).view(-1)
        """,
    },
)


# ======================================================================================================================
# 5. quantize a weight in blocks
# ======================================================================================================================
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


def drive_quantize(quantize_4bit, quantize_nf4, weight, levels, other_levels, block_size):
    """Quantize a weight with two sets of levels, and one that does not fill its last block.

    While it runs, `nearest_level`, `pack` and `nf4_levels` are ours, whatever the student's are: those have their own checks.
    """
    import inspect

    from peftlab.memory import whole_storage

    def nearest_level(x, levels):
        return (x[..., None] > (levels[:-1] + levels[1:]) / 2).sum(-1).byte()

    def pack(codes):
        if codes.dim() != 1 and "pack" in theirs:
            return theirs["pack"](codes)  # `pack` was promised codes in one row: what comes of others depends on it
        pairs = codes.reshape(-1, 2)
        return (pairs[:, :1] * 16 + pairs[:, 1:]).byte()

    ours = {"nearest_level": nearest_level, "pack": pack, "nf4_levels": lambda: other_levels}
    scope = getattr(inspect.unwrap(quantize_4bit), "__globals__", {})
    theirs = {name: scope[name] for name in ours if name in scope}
    scope.update({name: ours[name] for name in theirs})
    size = () if block_size == 64 else (block_size,)
    try:
        packed, absmax = quantize_4bit(weight, levels, *size)
        by_default, _ = quantize_nf4(weight, *size)
        try:
            quantize_4bit(weight.flatten()[: block_size + 2], levels, block_size)
            refused = "nothing"
        except Exception as error:
            refused = type(error).__name__
    finally:
        scope.update(theirs)
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


def uneven_levels(generator: torch.Generator, count: int = 16) -> Tensor:
    """Return ascending levels from -1 to 1, in fp32, with an exact zero, at unequal distances of at least 1/40."""
    grid = torch.cat([torch.arange(-39, 0), torch.arange(1, 40)])
    inner = grid[torch.randperm(len(grid), generator=generator)[: count - 3]]
    return torch.cat([inner, torch.tensor([-40, 0, 40])]).sort().values / 40


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


_QUANTIZE_NF4 = """
            def quantize_nf4(weight, block_size=64):
                return quantize_4bit(weight, nf4_levels(), block_size)
        """
_SCALED = "block * (1 / largest.clamp(min=1e-38))"
_LARGEST = "block.abs().max()"
_VALUES = "weight.reshape(-1).float()"

check_quantize = Exercise(
    spec=[quantize_4bit, quantize_nf4],
    driver=drive_quantize,
    reading=read_quantize,
    cases=lambda generator: [
        quantize_case(generator),
        quantize_case(generator, torch.bfloat16, 64, axes=3),
        quantize_case(generator, transposed=True),
    ],
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


# ======================================================================================================================
# 6. dequantize
# ======================================================================================================================
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


def drive_dequantize(dequantize_4bit, dequantize_nf4, packed, absmax, levels, other_levels, shape, dtype, block_size):
    """Dequantize with two sets of levels; `unpack` and `nf4_levels` are ours, whatever the student's: those have own checks."""
    import inspect

    import torch

    def unpack(packed):
        return torch.stack([packed.flatten() // 16, packed.flatten() % 16], 1).flatten().byte()

    ours = {"unpack": unpack, "nf4_levels": lambda: other_levels}
    scope = getattr(inspect.unwrap(dequantize_4bit), "__globals__", {})
    theirs = {name: scope[name] for name in ours if name in scope}
    scope.update({name: ours[name] for name in theirs})
    target = (tuple(shape), getattr(torch, dtype), *(() if block_size == 64 else (block_size,)))
    try:
        weight = dequantize_4bit(packed, absmax, levels, *target)
        by_default = dequantize_nf4(packed, absmax, *target)
    finally:
        scope.update(theirs)
    return {
        "the weight": weight,
        "the weight from dequantize_nf4": by_default,
        "packed afterwards": packed,
        "absmax afterwards": absmax,
        "the levels afterwards": levels,
    }


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


_DEQUANTIZE_NF4 = """
            def dequantize_nf4(packed, absmax, shape, dtype, block_size=64):
                return dequantize_4bit(packed, absmax, nf4_levels(), shape, dtype, block_size)
        """
_LEVELS = "levels[unpack(packed).long()]"
_PRODUCTS = "[block * largest for block, largest in zip(values.split(block_size), absmax)]"

check_dequantize = Exercise(
    spec=[dequantize_4bit, dequantize_nf4],
    driver=drive_dequantize,
    cases=lambda generator: [dequantize_case(generator), dequantize_case(generator, "bfloat16", 64, axes=3)],
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


# ======================================================================================================================
# 7. double quantization
# ======================================================================================================================
def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 8-bit codes of absmax less its mean, in blocks of 256, with the absmax of those, and the mean."""
    offset = absmax.mean()
    centred = absmax - offset
    codes, nested_absmax = [], []
    for block in centred.split(256):
        largest = block.abs().max()
        nested_absmax.append(largest)
        codes.append(nearest_code(block * (1 / largest)))
    return torch.cat(codes), torch.stack(nested_absmax), offset


def undo_double(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Return absmax as it is read back: value times nested absmax, plus the mean."""
    values = dynamic_code()[codes.long()]
    blocks = [block * largest for block, largest in zip(values.split(256), nested_absmax)]
    return torch.cat(blocks) + offset


def drive_double(double_quantize, undo_double, absmax, other_codes, other_nested, other_offset):
    """Quantize absmax, and read one back that the case supplies; and quantize one whose values are all equal."""
    import torch

    from peftlab.memory import whole_storage

    codes, nested_absmax, offset = double_quantize(absmax)
    kept = {"codes": whole_storage(codes), "nested": whole_storage(nested_absmax)}
    equal = torch.full((5,), 0.75)

    def undone(*quantized):
        try:
            return undo_double(*quantized)
        except NotImplementedError:
            raise
        except Exception as error:  # or it would hide what may be wrong with double_quantize
            return f"{type(error).__name__}: {error}"

    return {
        "offset": offset.clone() if torch.is_tensor(offset) else repr(offset),
        "nested": nested_absmax.clone(),
        "codes": codes.clone(),
        "kept": kept,
        "undone": undone(other_codes, other_nested, other_offset),
        "equal": undone(*double_quantize(equal)),
        "absmax": absmax,
        "others": [other_codes, other_nested, other_offset],
    }


def read_double(observation: Observation, case: dict) -> Observation:
    """Count the bytes that came back."""
    codes, nested, offset = observation["others"]
    return {
        "the offset": observation["offset"],
        "the nested absmax": observation["nested"],
        "the codes": observation["codes"],
        "the number of bytes that codes and nested absmax keep in memory": total_bytes(observation["kept"].values()),
        "what undo_double returns": observation["undone"],
        "what comes back of five equal absmax": observation["equal"],
        "absmax after the call": observation["absmax"],
        "the codes after the call": codes,
        "the nested absmax after the call": nested,
        "the offset after the call": offset,
    }


def double_case(generator: torch.Generator, low: int = 530, high: int = 700) -> dict:
    """Return absmax on a grid of 1024ths, three blocks with the last not full, none of it near to the boundary of two codes.

    The sum is then exact in any order, and the mean rounded once, the same for everyone. Where bitsandbytes' table does not
    give the nearest code, there is no number: whoever looks for the nearest is right, too.
    """
    values = dynamic_code().double()
    count = between(generator, low, high)
    while True:
        middle = torch.tensor([900, 1500, 700, 1100])[: -(-count // 256)].repeat_interleave(256)[:count]
        spread = torch.tensor([100, 400, 600, 300])[: -(-count // 256)].repeat_interleave(256)[:count]
        absmax = (middle + spread * (2 * torch.rand(count, generator=generator) - 1)).round() / 1024
        centred = absmax.double() - absmax.double().mean()
        scaled = torch.cat([block / block.abs().max() for block in centred.split(256)])
        codes = nearest_code(scaled.float()).long()
        shifted = [scaled - 2e-6, scaled + 2e-6]
        found = [nearest_code(near.float()).long() for near in shifted]
        found += [torch.bucketize(near, (values[:-1] + values[1:]) / 2) for near in shifted]
        if all(torch.equal(codes, near) for near in found):
            break
    other = between(generator, 300, 500)
    return {
        "absmax": absmax,
        "other_codes": torch.randint(0, 256, (other,), generator=generator, dtype=torch.uint8),
        "other_nested": 0.2 + torch.rand(2, generator=generator),
        "other_offset": 1 + torch.rand((), generator=generator),
    }


def double_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding: of a difference and of a maximum, of a product and of a sum, each by half an ulp and twice over."""
    largest = case["absmax"].max().item()
    return {
        "the offset": EPS * largest,
        "the nested absmax": 2 * EPS * largest,
        # The codes may be a slice of a padded tensor.
        "the number of bytes that codes and nested absmax keep in memory": 256,
        "what undo_double returns": 2 * EPS * (case["other_nested"].max() + case["other_offset"]).item(),
    }


_CENTRED = "centred = absmax - offset"
_NESTED = "block * largest for block, largest in zip(values.split(256), nested_absmax)"
_NEAREST = "nearest_code(block * (1 / largest))"
_VALUES_8 = "dynamic_code()[codes.long()]"

check_double_quantize = Exercise(
    spec=[double_quantize, undo_double],
    driver=drive_double,
    reading=read_double,
    cases=lambda generator: [double_case(generator), double_case(generator, 512, 512)],
    tolerance=double_tolerance,
    at_most=frozenset({"the number of bytes that codes and nested absmax keep in memory"}),
    mistakes={
        "the mean is not subtracted: absmax is never negative, and half of the codes would lie idle": {
            _CENTRED: "centred = absmax"
        },
        "the offset is the middle between smallest and largest: take the mean": {
            "absmax.mean()": "(absmax.min() + absmax.max()) / 2",
        },
        "the offset is the median: take the mean": {"absmax.mean()": "absmax.median()"},
        "the offset is the smallest absmax, so that no difference is negative: take the mean, the codes are signed": {
            "absmax.mean()": "absmax.min()",
        },
        "the nested blocks have 64 values: here they have 256": {"centred.split(256)": "centred.split(64)"},
        "one nested absmax for all: every 256 values have their own": {
            "block.abs().max()": "centred.abs().max()",
        },
        "the nested absmax is taken with its sign: the differences have both signs, so take `abs` first": {
            "block.abs().max()": "block.max()",
        },
        "the differences are not scaled: divide them by their block's absmax before you look for codes": {
            _NEAREST: "nearest_code(block)",
        },
        "the codes are evenly spaced integers: use `nearest_code`": {
            _NEAREST: "((block * (1 / largest) + 1) * 127.5).round().to(torch.uint8)",
        },
        "the last block is dropped because it is not full": {
            "centred.split(256)": "centred[: len(centred) // 256 * 256].split(256)",
        },
        "where the last block is full, a whole block of zeros was added: pad by `-len % 256`, which is 0 then": """
            def double_quantize(absmax):
                offset = absmax.mean()
                missing = 256 - len(absmax) % 256
                blocks = torch.nn.functional.pad(absmax - offset, (0, missing)).view(-1, 256)
                nested_absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks / nested_absmax.clamp(min=1e-30)[:, None])
                return codes.flatten()[: len(absmax)], nested_absmax, offset

            def undo_double(codes, nested_absmax, offset):
                return dynamic_code()[codes.long()] * nested_absmax.repeat_interleave(256)[: len(codes)] + offset
        """,
        "the padding is not zero any more: subtract the mean first, then pad": """
            def double_quantize(absmax):
                offset = absmax.mean()
                blocks = torch.nn.functional.pad(absmax, (0, -len(absmax) % 256)).view(-1, 256) - offset
                nested_absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks / nested_absmax.clamp(min=1e-30)[:, None])
                return codes.flatten()[: len(absmax)], nested_absmax, offset

            def undo_double(codes, nested_absmax, offset):
                return dynamic_code()[codes.long()] * nested_absmax.repeat_interleave(256)[: len(codes)] + offset
        """,
        "the codes are not uint8: they would take more memory than they save": {
            "torch.cat(codes), torch": "torch.cat(codes).long(), torch"
        },
        "the absmax that was given was changed: make a new tensor of the differences": {
            _CENTRED: "centred = absmax.sub_(offset)",
        },
        "undo_double does not add the offset back": {" + offset": ""},
        "undo_double subtracts the offset: it was subtracted before, so add it": {" + offset": " - offset"},
        "undo_double adds the offset before it multiplies: it is added last": {
            _NESTED: _NESTED.replace("block * largest", "(block + offset) * largest"),
            " + offset": "",
        },
        "undo_double leaves out the nested absmax": {_NESTED: _NESTED.replace("block * largest", "block")},
        "undo_double takes one nested absmax for all": {
            _NESTED: _NESTED.replace("block * largest", "block * nested_absmax[0]")
        },
        "undo_double takes the codes for evenly spaced numbers: they are indices of `dynamic_code()`": {
            _VALUES_8: "codes.float() / 127.5 - 1",
        },
    },
    variants={
        "padded": """
            def double_quantize(absmax):
                offset = absmax.mean()
                count = len(absmax)
                blocks = torch.nn.functional.pad(absmax - offset, (0, -count % 256)).view(-1, 256)
                nested_absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks * (1 / nested_absmax)[:, None]).flatten()[:count]
                return codes, nested_absmax, offset

            def undo_double(codes, nested_absmax, offset):
                scale = nested_absmax.repeat_interleave(256)[: len(codes)]
                return dynamic_code()[codes.int()] * scale + offset
        """,
        "divided, and guarded": """
            def double_quantize(absmax):
                offset = absmax.sum() / absmax.numel()
                centred = absmax - offset
                nested_absmax = torch.stack([block.abs().max() for block in centred.split(256)])
                divisor = nested_absmax.clamp(min=1e-30).repeat_interleave(256)[: absmax.numel()]
                return nearest_code(centred / divisor), nested_absmax, offset

            def undo_double(codes, nested_absmax, offset):
                values = dynamic_code().index_select(0, codes.long())
                numbers = torch.arange(len(codes)) // 256
                return torch.addcmul(offset.expand(len(codes)), values, nested_absmax[numbers])
        """,
        "a search for the nearest code": """
            def double_quantize(absmax):
                offset, values = absmax.mean(), dynamic_code()
                blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
                nested_absmax = blocks.abs().amax(1)
                scaled = blocks / nested_absmax.clamp(min=1e-30)[:, None]
                codes = torch.bucketize(scaled, (values[:-1] + values[1:]) / 2).to(torch.uint8)
                return codes.flatten()[: len(absmax)], nested_absmax, offset

            def undo_double(codes, nested_absmax, offset):
                return dynamic_code()[codes.long()] * nested_absmax.repeat_interleave(256)[: len(codes)] + offset
        """,
        "in double precision": """
            def double_quantize(absmax):
                offset = absmax.double().mean()
                blocks = (absmax.double() - offset).split(256)
                nested_absmax = torch.stack([torch.linalg.vector_norm(block, float("inf")) for block in blocks])
                codes = [nearest_code((block / largest).float()) for block, largest in zip(blocks, nested_absmax)]
                return torch.cat(codes), nested_absmax.float(), offset.float()

            def undo_double(codes, nested_absmax, offset):
                values = dynamic_code().double()[codes.long()]
                for number, start in enumerate(range(0, len(codes), 256)):
                    values[start : start + 256] *= nested_absmax[number]
                return (values + offset).float()
        """,
    },
)


# ======================================================================================================================
# 8. bits a parameter
# ======================================================================================================================
def bits_per_parameter(bits: int, block_size: int = 64, nested_block_size: int | None = None) -> float:
    """Return the bits of a code, and its share of the bits of an absmax, counted for one large block of blocks."""
    if nested_block_size is None:
        return (bits * block_size + 32) / block_size
    weights = block_size * nested_block_size
    return (bits * weights + 8 * nested_block_size + 32) / weights


def drive_bits(bits_per_parameter, settings):
    """Return the bits for several settings."""
    seen = {}
    for arguments in settings:
        bits = bits_per_parameter(*arguments)
        seen[f"bits_per_parameter({', '.join(map(str, arguments))})"] = bits if isinstance(bits, int | float) else repr(bits)
    return seen


def bits_case(generator: torch.Generator, low: int = 3, high: int = 9) -> dict:
    """Return settings with and without double quantization, block sizes that are powers of two, and one that is not."""
    size, nested = (2 ** between(generator, low, high) for _ in range(2))
    nested = nested if nested != size else 2 * nested
    bits = between(generator, 5, 7)  # 4 would hide that `bits` is not used
    return {"settings": [[bits, 24], [bits, size], [bits, size, nested], [8, 2 * size], [8, 2 * size, 4 * nested], [bits]]}


_SINGLE = "(bits * block_size + 32) / block_size"
_NESTED_BITS = "(bits * weights + 8 * nested_block_size + 32) / weights"

check_bits = Exercise(
    spec=[bits_per_parameter],
    driver=drive_bits,
    cases=lambda generator: [bits_case(generator)],
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


# ======================================================================================================================
# 9. the bug hunt: blocks of a weight that does not lie in memory as it looks
# ======================================================================================================================
def to_blocks(weight: Tensor, block_size: int = 64) -> Tensor:
    """Return the weight's values row by row, as it shows them, `block_size` to a row; without a copy where that can be."""
    flat = weight.contiguous().view(-1)
    return flat.view(flat.numel() // block_size, block_size)


def drive_blocks(to_blocks, memory, block_size):
    """Cut several views of one piece of memory into blocks; say which of the results share that memory."""
    import torch

    views = {
        "a whole weight": memory,
        "the lower rows of a weight": memory[2:],
        "a transposed weight": memory.T,
        "every other row": memory[::2],
        "some columns": memory[:, block_size : 3 * block_size],
        "a row, repeated without a copy": memory[1].expand(5, -1),
        "a weight of three axes": memory.view(2, -1, memory.shape[1]),
    }
    seen = {}
    for name, view in views.items():
        blocks = to_blocks(view) if block_size == 64 else to_blocks(view, block_size)
        if not torch.is_tensor(blocks):
            raise TypeError(f"to_blocks should return a tensor, not {blocks!r}")
        seen[f"the blocks of {name}"] = blocks.clone()
        if view.is_contiguous():
            start = blocks.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
            seen[f"the blocks of {name} share its memory"] = start
    return seen | {"the weight afterwards": memory}


def blocks_case(generator: torch.Generator, block_size: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Return a matrix that divides into blocks whichever way it is cut below."""
    block_size = block_size or between(generator, 4, 8)
    return {"memory": normal(generator, 2 * between(generator, 3, 5), 4 * block_size, dtype=dtype), "block_size": block_size}


_FLAT = "weight.contiguous().view(-1)"
_CUT = "flat.view(flat.numel() // block_size, block_size)"

check_to_blocks = Exercise(
    spec=[to_blocks],
    driver=drive_blocks,
    cases=lambda generator: [blocks_case(generator), blocks_case(generator, dtype=torch.bfloat16)],
    mistakes={
        "a weight in 16 bits becomes one in fp32, which is a copy of twice its size: blocks are the weight's own values": {
            _FLAT: "weight.float().reshape(-1)"
        },
        "the values come in the order in which they lie in memory: take them in the order in which the weight shows them": {
            _FLAT: "torch.as_strided(weight, (weight.numel(),), (1,))",
        },
        "a weight that is not contiguous raises an error: `view` cannot copy, `reshape` and `contiguous` can": {
            _FLAT: "weight.view(-1)",
        },
        "a weight that is contiguous is copied all the same: that doubles its memory for nothing": {
            _FLAT: "weight.clone().reshape(-1)"
        },
        "the values come column by column: take them row by row": {_FLAT: "weight.T.contiguous().view(-1)"},
        "only the transposed weight is put right: other views lie in memory in other ways": {
            _FLAT: "weight.reshape(-1) if weight.T.is_contiguous() else torch.as_strided(weight, (weight.numel(),), (1,))",
        },
        "the values are read from the beginning of the memory: a view may start further on": {
            _FLAT: "torch.as_strided(weight, (weight.numel(),), (1,), 0) if weight.is_contiguous() else weight.reshape(-1)",
        },
        "a block takes every n-th value: its values are neighbours": {
            _CUT: "flat.view(block_size, -1).T",
        },
        "blocks lie in columns: the shape is (blocks, block_size)": {_CUT: "flat.view(-1, block_size).T"},
        "the values lie flat: the shape is (blocks, block_size)": {_CUT: "flat"},
        "`block_size` is not used": {_CUT: "flat.view(-1, 2)"},
        "the dtype is changed: blocks are the weight's own values": {_FLAT: "weight.double().reshape(-1)"},
    },
    variants={
        "reshape": """
            def to_blocks(weight, block_size=64):
                return weight.reshape(-1, block_size)
        """,
        "flatten and unflatten": """
            def to_blocks(weight, block_size=64):
                return weight.flatten().unflatten(0, (-1, block_size))
        """,
        "copied only if need be": """
            def to_blocks(weight, block_size=64):
                if not weight.is_contiguous():
                    weight = weight.clone(memory_format=torch.contiguous_format)
                return weight.view(weight.numel() // block_size, block_size)
        """,
        "ravel and unfold": """
            def to_blocks(weight, block_size=64):
                return weight.ravel().unfold(0, block_size, block_size)
        """,
    },
)


EXERCISES = {
    "check_absmax_int8": check_absmax_int8,
    "check_levels": check_levels,
    "check_nearest_level": check_nearest_level,
    "check_pack": check_pack,
    "check_quantize": check_quantize,
    "check_dequantize": check_dequantize,
    "check_double_quantize": check_double_quantize,
    "check_bits": check_bits,
    "check_to_blocks": check_to_blocks,
}
