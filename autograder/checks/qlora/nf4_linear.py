"""NF4Linear, and the pieces of it that several mistakes change."""

import torch
from torch import Tensor, nn

from autograder.checks.qlora.fast_dequantize import dequantize_nf4
from peftlab.dynamic_code import dynamic_code


class NF4Product(torch.autograd.Function):
    """x W^T for the weight of an `NF4Linear`, which is dequantized in forward and once more in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "NF4Linear") -> Tensor:
        ctx.layer = layer
        return torch.einsum("...i,oi->...o", x, layer.dequantized())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.dequantized()
        return torch.einsum("...o,oi->...i", gradient, weight), None


class NF4Linear(nn.Module):
    """A frozen linear layer that holds packed codes and statistics, nothing else."""

    def __init__(self, packed, statistics, levels, shape, compute_dtype, bias=None):
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", statistics[0])
        self.register_buffer("nested_absmax", statistics[1] if len(statistics) == 3 else None)
        self.register_buffer("offset", statistics[2] if len(statistics) == 3 else None)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)
        self.shape, self.compute_dtype = tuple(shape), compute_dtype

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def dequantized(self) -> Tensor:
        absmax = self.absmax
        if self.nested_absmax is not None:
            scale = torch.cat([largest.expand(256) for largest in self.nested_absmax])[: absmax.numel()]
            values = dynamic_code(device=absmax.device)[absmax.long()]
            absmax = values * scale + self.offset
        return dequantize_nf4(self.packed, absmax, self.levels, self.shape, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = NF4Product.apply(x.to(self.compute_dtype), self)
        if self.bias is not None:
            product = product + self.bias.to(self.compute_dtype)
        return product.to(x.dtype)


APPLIED = "NF4Product.apply(x.to(self.compute_dtype), self)"
KEEP_LAYER = "ctx.layer = layer"
PRODUCT_FORWARD = 'torch.einsum("...i,oi->...o", x, layer.dequantized())'
PRODUCT_BACKWARD = 'torch.einsum("...o,oi->...i", gradient, weight)'
ABSMAX_BUFFER = 'self.register_buffer("absmax", statistics[0])'
SIZES = "self.shape, self.compute_dtype = tuple(shape), compute_dtype"
BY_HOOKS = {
    APPLIED: "self._product(x.to(self.compute_dtype))",
    "    def dequantized(self)": (
        "    def _product(self, x):\n"
        "        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.shape, self._again):\n"
        "            return torch.nn.functional.linear(x, self.dequantized())\n\n"
        "    def _again(self, shape):\n"
        "        weight = self.dequantized()\n"
        "        return weight if weight.shape == shape else weight.T\n\n"
        "    def dequantized(self)"
    ),
}
"""Saved tensors that are dequantized when they are asked for."""
