"""Numbers in eight bits, slowly: the spec of `to_8bit` and `from_8bit`, with which cases are made, too."""

import torch
from torch import Tensor

from peftlab.dynamic_code import dynamic_code, nearest_code


def to_8bit(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return dynamic codes in the shape of x, and the absmax, in fp32, of every 256 values in a row or what is left of them."""
    blocks = x.flatten().float().split(256)
    absmax = torch.stack([block.abs().max() for block in blocks])
    codes = [nearest_code(block / largest, signed) for block, largest in zip(blocks, absmax)]
    return torch.cat(codes).view(x.shape), absmax


def from_8bit(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Return the numbers that the codes stand for, in fp32 and in their shape."""
    values = dynamic_code(signed, codes.device)[codes.long()]
    scaled = [block * largest for block, largest in zip(values.flatten().split(256), absmax)]
    return torch.cat(scaled).view(codes.shape)
