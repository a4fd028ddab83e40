"""A linear layer's forward and backward pass by hand, and the pieces that several mistakes change."""

import torch
from torch import Tensor


def biased_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the layer's output, and what the backward pass will need."""
    output = torch.einsum("...i,oi->...o", x, weight) + bias
    return output, (weight,)


def biased_linear_backward(kept: tuple[Tensor, ...], output_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the bias, from the gradient of the output."""
    (weight,) = kept
    x_gradient = torch.einsum("...o,oi->...i", output_gradient, weight)
    bias_gradient = torch.zeros_like(output_gradient[(0,) * (output_gradient.dim() - 1)])
    for row in output_gradient.reshape(-1, output_gradient.shape[-1]):
        bias_gradient += row
    return x_gradient, bias_gradient


OUTPUT = 'torch.einsum("...i,oi->...o", x, weight) + bias'
KEPT = "return output, (weight,)"
TAKEN = "(weight,) = kept"
X_GRADIENT = 'x_gradient = torch.einsum("...o,oi->...i", output_gradient, weight)'
START = "bias_gradient = torch.zeros_like(output_gradient[(0,) * (output_gradient.dim() - 1)])"
ADD_ROWS = "for row in output_gradient.reshape(-1, output_gradient.shape[-1]):\n        bias_gradient += row"


def bias_gradient(expression: str) -> dict[str, str]:
    """Return the edits that compute the bias's gradient by this expression."""
    return {START: f"bias_gradient = {expression}", ADD_ROWS: "pass"}
