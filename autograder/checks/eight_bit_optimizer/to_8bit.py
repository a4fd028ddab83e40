"""`to_8bit` and `from_8bit`: numbers as dynamic codes in blocks of 256, and back."""

from autograder.checking.cases import EPS
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.eight_bit_optimizer.cases import codes_case, codes_that_count
from autograder.checks.eight_bit_optimizer.spec import from_8bit, to_8bit


def drive_to_8bit(to_8bit, from_8bit, numbers, other_codes, other_absmax):
    """Quantize numbers with and without their signs; read other codes back."""
    seen = {}
    for signed, kind in ((True, "signed"), (False, "unsigned")):
        codes, absmax = to_8bit(numbers if signed else numbers.abs(), signed)
        seen |= {
            f"codes, {kind}": codes,
            f"the absmax from to_8bit, {kind}": absmax,
            f"what from_8bit returns, {kind}": from_8bit(other_codes, other_absmax, signed),
        }
    return seen | {"`x` afterwards": numbers, "the codes after from_8bit": other_codes}


def read_to_8bit(observation: Observation, case: dict) -> Observation:
    """Compare the codes themselves, but for those of a block of zeros, which may be any."""
    read = {}
    for kind in ("signed", "unsigned"):
        codes, absmax = observation[f"codes, {kind}"], observation[f"the absmax from to_8bit, {kind}"]
        read[f"the absmax from to_8bit, {kind}"] = absmax
        read[f"the dtype of to_8bit's codes, {kind}"] = str(getattr(codes, "dtype", type(codes)))
        read[f"the codes from to_8bit, {kind}"] = codes_that_count(codes, absmax)
        read[f"what from_8bit returns, {kind}"] = observation[f"what from_8bit returns, {kind}"]
    return read | {name: observation[name] for name in ("`x` afterwards", "the codes after from_8bit")}


def codes_tolerance(case: dict) -> dict[str, float]:
    """A value is one product of two fp32 numbers; the codes are the same, and their absmax is no sum."""
    tolerance = {}
    for kind in ("signed", "unsigned"):
        tolerance[f"what from_8bit returns, {kind}"] = 2 * EPS * case["other_absmax"].max().item()
    return tolerance


_SPLIT = "x.flatten().float().split(256)"
_NEAREST = "nearest_code(block / largest, signed)"
_TABLE = "dynamic_code(signed, codes.device)"
_SCALED = "[block * largest for block, largest in zip(values.flatten().split(256), absmax)]"

check_to_8bit = Exercise(
    spec=[to_8bit, from_8bit],
    cases=lambda generator: [codes_case(generator)],
    driver=drive_to_8bit,
    reading=read_to_8bit,
    tolerance=codes_tolerance,
    mistakes={
        "one absmax for the whole tensor: every 256 values have their own, or one outlier spoils all": {
            _SPLIT: "x.flatten().float().split(x.numel())",
            "values.flatten().split(256)": "values.flatten().split(values.numel())",
        },
        "the blocks have 64 values, as those of a weight: here they have 256": {
            _SPLIT: "x.flatten().float().split(64)",
            "values.flatten().split(256)": "values.flatten().split(64)",
        },
        "absmax is repeated as a whole: each belongs to 256 neighbours, so `repeat_interleave(256)`": {
            _SCALED: "[values.flatten() * absmax.repeat(256)[: codes.numel()]]",
        },
        "something is added to absmax lest it be zero: the second moments of small gradients are smaller; `nearest_code` takes 0 / 0": {
            _NEAREST: "nearest_code(block / (largest + 1e-8), signed)",
        },
        "absmax has a floor, and smaller numbers are lost: `nearest_code` takes 0 / 0": {
            _NEAREST: "nearest_code(block / largest.clamp(min=1e-8), signed)",
        },
        "the numbers are not divided by their absmax: the codes stand for numbers between -1 and 1": {
            _NEAREST: "nearest_code(block, signed)",
        },
        "absmax is the largest number, not the largest size: a block's largest size may have a minus": {
            "block.abs().max()": "block.max()",
        },
        "the values are divided by absmax when they are read back: multiply": {
            "block * largest for": "block / largest for",
        },
        "`signed` is not used": {
            _NEAREST: "nearest_code(block / largest)",
            _TABLE: "dynamic_code(device=codes.device)",
        },
        "`signed` is not used when codes are read back": {_TABLE: "dynamic_code(device=codes.device)"},
        "`signed` is not used when codes are made": {_NEAREST: "nearest_code(block / largest)"},
        "the codes lie flat, or in padded blocks: they have the shape of `x`": {
            "torch.cat(codes).view(x.shape)": "torch.cat(codes)",
        },
        "the codes are whole numbers of eight bytes: `nearest_code` returns bytes, keep them": {
            "torch.cat(codes).view(x.shape)": "torch.cat(codes).view(x.shape).long()",
        },
        "`x` was changed in place: it is needed for the step": {
            "    blocks = ": "    x /= 2 * x.abs().max()\n    blocks = ",
        },
    },
    variants={
        "padded blocks": """
            def to_8bit(x, signed):
                count = x.numel()
                blocks = torch.nn.functional.pad(x.flatten().float(), (0, -count % 256)).view(-1, 256)
                absmax = blocks.abs().amax(1)
                codes = nearest_code(blocks * (1 / absmax)[:, None], signed)
                return codes.flatten()[:count].clone().view(x.shape), absmax

            def from_8bit(codes, absmax, signed):
                scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
                return dynamic_code(signed, codes.device)[codes.int()] * scale
        """,
        "codes cut off from padded blocks without a copy, as in the hint": {
            (
                "    blocks = x.flatten().float().split(256)\n"
                "    absmax = torch.stack([block.abs().max() for block in blocks])\n"
                "    codes = [nearest_code(block / largest, signed) for block, largest in zip(blocks, absmax)]\n"
                "    return torch.cat(codes).view(x.shape), absmax\n"
            ): (
                "    flat = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % 256)).view(-1, 256)\n"
                "    absmax = flat.abs().amax(1)\n"
                "    return nearest_code(flat / absmax[:, None], signed).flatten()[: x.numel()].view(x.shape), absmax\n"
            ),
        },
        "a norm, and a floor that only zeros reach": {
            f"    blocks = {_SPLIT}\n    absmax = torch.stack([block.abs().max() for block in blocks])\n": (
                "    flat = torch.nn.functional.pad(x.reshape(-1).float(), (0, -x.numel() % 256)).view(-1, 256)\n"
                "    absmax = torch.linalg.vector_norm(flat, float('inf'), dim=1)\n"
                "    blocks = (flat * (1 / absmax.clamp(min=1e-38))[:, None] * absmax[:, None]).flatten()[: x.numel()].split(256)\n"
            ),
        },
        "a loop that fills": {
            f"    values = {_TABLE}[codes.long()]\n    scaled = {_SCALED}\n    return torch.cat(scaled).view(codes.shape)": (
                f"    values = {_TABLE}[codes.long()].flatten()\n"
                "    for start, largest in zip(range(0, values.numel(), 256), absmax):\n"
                "        values[start : start + 256] *= largest\n"
                "    return values.view(codes.shape)"
            ),
        },
    },
)
