"""The dynamic 8-bit data types: the signed one, with which double quantization stores the absmax of blocks, and the unsigned
one, in which an 8-bit optimizer keeps what is never negative.

Dettmers (2015), arXiv 1511.04561; Dettmers et al. (2022), *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861.
Most of the 256 values are small: a leading run of zero bits counts powers of ten, and the bits that are left divide a decade
evenly. Each decade has half as many values as the one above it, so a number ten times smaller keeps one bit less. Without a
sign there is one bit more.
"""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

DECADES = 7


def dynamic_code(signed: bool = True, device: torch.device | str | None = None) -> Float[Tensor, "256"]:
    """Return a data type's 256 values, in fp32 and in ascending order, on `device`; not to be modified.

    Signed, they lie between -0.993 and 1, and code 127 is zero; the decade that ends at 10^-i has 2^(6 - i) values of each
    sign, the centres of as many equal parts of it. Unsigned, they lie between 0 and 1, code 0 is zero, and a decade has twice
    as many. Equal to `bitsandbytes.functional.create_dynamic_map(signed)`.
    """
    if device is not None and torch.device(device).type == "cuda":
        return _on_cuda(signed, torch.device(device))
    return torch.tensor(_VALUES[signed], device=device)


@cache
def _on_cuda(signed: bool, device: torch.device) -> Tensor:
    """Return the values on a GPU: made once, because each copy from the host waits until the GPU has done its work."""
    with torch.inference_mode(False):  # or training could not use later what inference has made
        return torch.tensor(_VALUES[signed], device=device)


def nearest_code(x: Float[Tensor, "..."], signed: bool = True) -> UInt8[Tensor, "..."]:
    """Return the code, 0 to 255, of the value nearest to each number in [-1, 1]; numbers beyond are clamped.

    On the CPU the answer equals bitsandbytes' to the bit, which is not quite the nearest: its kernel rounds x to one of 65,536
    positions first and looks the code up in a table. So a number very near to a midpoint may get the code beside, and those
    values that lie closer together than positions, the smallest, are mixed up. On other devices it is the true nearest. NaN,
    which is what 0 / 0 gives in a block of zeros, gets code 0 as in bitsandbytes.
    """
    x = x.float().nan_to_num(nan=-1.0).clamp(-1, 1)
    if x.device.type != "cpu":
        code = dynamic_code(signed, x.device)
        return torch.bucketize(x, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
    position = ((x + 1) * 0.5).double() * 65535 + 0.5  # in fp64, because the kernel's fused multiply-add rounds once
    return _table(signed)[position.float().long()]


def _values(signed: bool) -> list[float]:
    values = [0.0, 1.0]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1, 2**decade * (1 if signed else 2) + 1, device="cpu")
        centres = (edges[:-1] + edges[1:]) / 2
        scale = 10 ** (decade - DECADES + 1)
        values += (scale * centres).tolist()
        if signed:
            values += (-scale * centres).tolist()
    return sorted(values)


_VALUES = {signed: _values(signed) for signed in (True, False)}
"""Plain numbers, made when the module is imported: a tensor of them can be made anywhere, on "meta" or among fakes."""


@cache
def _table(signed: bool) -> Tensor:
    """Return the code of each of 65,536 evenly spaced positions from -1 to 1."""
    code = dynamic_code(signed)
    positions = -1 + 2 * torch.arange(65536, dtype=torch.float32) / 65535
    return torch.bucketize(positions, 0.5 * (code[:-1] + code[1:])).to(torch.uint8)
