"""`double_quantize` and `undo_double`: the statistics in 8 bits."""

import torch
from torch import Tensor

from autograder.checking.cases import EPS, between, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from peftlab.dynamic_code import dynamic_code, nearest_code


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


def double_case(generator: torch.Generator, low: int = 530, high: int = 700) -> dict:
    """Return absmax on a grid of 1024ths, three blocks with the last not full, none of it near to the boundary of two codes.

    The sum is then exact in any order, and the mean rounded once, the same for everyone. Where bitsandbytes' table does not
    give the nearest code, there is no number: an answer that looks for the nearest is right, too.
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

check_double_quantize = Exercise(
    spec=[double_quantize, undo_double],
    cases=lambda generator: [double_case(generator), double_case(generator, 512, 512)],
    driver=drive_double,
    reading=read_double,
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
            "dynamic_code()[codes.long()]": "codes.float() / 127.5 - 1",
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
