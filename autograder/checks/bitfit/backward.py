"""`biased_linear` and its backward pass: the values."""

import torch

from autograder.checking.cases import between
from autograder.checking.exercise import Exercise
from autograder.checks.bitfit.biased_linear import (
    ADD_ROWS,
    KEPT,
    OUTPUT,
    START,
    TAKEN,
    X_GRADIENT,
    bias_gradient,
    biased_linear,
    biased_linear_backward,
)
from autograder.checks.bitfit.by_hand import pass_by_hand
from autograder.checks.bitfit.cases import numbers


def backward_case(generator: torch.Generator, *batch: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return random numbers for a layer; no two sizes are equal.

    In half precision they are whole numbers so small that every sum of their products is exact (at most 15 * 2 * 2 + 2 = 62 for
    the output, 12 * 4 * 2 = 96 and 21 * 4 = 84 for the gradients: bf16 has all whole numbers up to 256). Then nothing rounds, and
    no tolerance is needed, which at eps = 2^-8 would hide an error of several percent.
    """
    out_features = between(generator, 10, 12)
    in_features = out_features + between(generator, 2, 3)
    return {
        "x": numbers(generator, dtype, 2, *batch, in_features),
        "weight": numbers(generator, dtype, 2, out_features, in_features),
        "bias": numbers(generator, dtype, 2, out_features),
        "output_gradient": numbers(generator, dtype, 4, *batch, out_features),
    }


def drive_backward(biased_linear, biased_linear_backward, x, weight, bias, output_gradient):
    """Run the layer forward and backward on the given numbers, and look whether it changed any of them."""
    called = "biased_linear", "the backward function"
    inputs = {"x": x, "the weight": weight, "the bias": bias}
    seen, gradients = pass_by_hand(biased_linear, biased_linear_backward, called, inputs, output_gradient)
    if gradients is None:
        return seen
    return seen | {"the gradient of x": gradients[0], "the gradient of the bias": gradients[1]}


def backward_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers: nothing in half precision, where all sums are exact.

    Else a sum of n terms is off by at most n * u * (sum of |terms|), u = eps / 2 (Higham 2002, section 3.1), and two answers by
    twice that.
    """
    dtype = case["x"].dtype
    if dtype in (torch.bfloat16, torch.float16):
        return {}
    x, weight, bias, g = (case[name].double().abs() for name in ("x", "weight", "bias", "output_gradient"))
    out_features, in_features = weight.shape
    rows = g.flatten(0, -2)
    eps = torch.finfo(dtype).eps
    return {
        "the output": (in_features + 1) * eps * (x @ weight.T + bias).max().item(),
        "the gradient of x": out_features * eps * (g @ weight).max().item(),
        "the gradient of the bias": rows.shape[0] * eps * rows.sum(0).max().item(),
    }


_GRADIENTS = "return x_gradient, bias_gradient"

check_bias_backward = Exercise(
    spec=[biased_linear, biased_linear_backward],
    cases=lambda generator: [
        backward_case(generator, 3, 7),
        backward_case(generator, 5),
        backward_case(generator, 2, 4, dtype=torch.bfloat16),
    ],
    driver=drive_backward,
    helpers=[pass_by_hand],
    tolerance=backward_tolerance,
    mistakes={
        "the bias is missing in the output": {OUTPUT: OUTPUT.removesuffix(" + bias")},
        "the bias is subtracted: it is added": {OUTPUT: OUTPUT.replace("+ bias", "- bias")},
        "the gradient of the bias is summed over the batch only: sum over every axis but the last, positions too": bias_gradient(
            "output_gradient.sum(0)"
        ),
        "the gradient of the bias is not summed: every token's gradient reaches the same bias, so add them up": bias_gradient(
            "output_gradient.clone()"
        ),
        "the gradient of the bias is summed over the outputs: the last axis is the one to keep": bias_gradient(
            "output_gradient.sum(-1)"
        ),
        "the gradient of the bias is summed over everything: the last axis is the one to keep": bias_gradient(
            "output_gradient.sum()"
        ),
        "the gradient of the bias is summed over the first two axes: `x` has just two here, and the last axis is the one to keep": (
            bias_gradient("output_gradient.sum((0, 1))")
        ),
        "the gradient of the bias is in fp32, whatever the output's gradient is in: return it in that dtype": bias_gradient(
            "output_gradient.float().flatten(0, -2).sum(0)"
        ),
        "the gradient of the bias is a mean over the tokens: it is their sum": {
            _GRADIENTS: "return x_gradient, bias_gradient / (output_gradient.numel() / output_gradient.shape[-1])"
        },
        "the gradient of the bias is the last token's alone: add up those of all tokens": bias_gradient(
            "output_gradient[(-1,) * (output_gradient.dim() - 1)]"
        ),
        "the gradient of the bias is multiplied by the weight: nothing stands between the bias and the output": {
            _GRADIENTS: "return x_gradient, x_gradient.flatten(0, -2).sum(0)"
        },
        "the gradient of x is computed with the weight transposed: (..., out) times (out, in) gives (..., in)": {
            X_GRADIENT: "x_gradient = output_gradient @ weight.T"
        },
        "the gradient of x is missing: the layers below would learn nothing": {
            _GRADIENTS: "return None, bias_gradient",
        },
        "the gradient of x is the output's gradient: it has to go through the weight": {
            X_GRADIENT: "x_gradient = output_gradient.clone()"
        },
        "the two gradients have changed places: x's first, then the bias's": {_GRADIENTS: "return bias_gradient, x_gradient"},
        "a gradient of the weight is returned too: the weight is frozen, and that gradient would need x": {
            _GRADIENTS: "return x_gradient, torch.zeros_like(weight), bias_gradient"
        },
        "the output's gradient was changed in place: others may need it still": {
            _GRADIENTS: _GRADIENTS + " + 0 * output_gradient.zero_().sum()"
        },
        "biased_linear returns the output alone: return a pair, the output and a tuple of what to keep": {
            KEPT: "return output"
        },
        "what is kept is a tensor: put it in a tuple, `(weight,)` with the comma": {KEPT: "return output, weight"},
    },
    variants={
        "matrix products": {
            OUTPUT: "x @ weight.T + bias",
            X_GRADIENT: "x_gradient = output_gradient @ weight",
            **bias_gradient("output_gradient.flatten(0, -2).sum(0)"),
        },
        "F.linear": {
            OUTPUT: "nn.functional.linear(x, weight, bias)",
            X_GRADIENT: "x_gradient = nn.functional.linear(output_gradient, weight.T)",
            **bias_gradient("output_gradient.sum(dim=tuple(range(output_gradient.dim() - 1)))"),
        },
        "a product with ones, and a list": {
            KEPT: "return output, [weight.T]",
            TAKEN: "weight = kept[0].T",
            START: "rows = output_gradient.reshape(-1, output_gradient.shape[-1])",
            ADD_ROWS: "bias_gradient = rows.new_ones(len(rows)) @ rows",
        },
        "by autograd": """
            def biased_linear(x, weight, bias):
                return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.T).view(*x.shape[:-1], -1), (weight, bias)

            def biased_linear_backward(kept, output_gradient):
                weight, bias = kept
                with torch.enable_grad():
                    x = output_gradient.new_zeros(*output_gradient.shape[:-1], weight.shape[1]).requires_grad_()
                    b = bias.detach().clone().requires_grad_()
                    return torch.autograd.grad(x @ weight.detach().T + b, (x, b), output_gradient)
        """,
    },
)
