"""`biased_linear` and its backward pass: the bytes that are kept."""

import torch

from autograder.cases import between, total_bytes
from autograder.checks.bitfit.biased_linear import (
    KEPT,
    OUTPUT,
    TAKEN,
    X_GRADIENT,
    bias_gradient,
    biased_linear,
    biased_linear_backward,
)
from autograder.checks.bitfit.cases import numbers
from autograder.drive import Observation
from autograder.exercise import Exercise


def bias_memory_case(generator: torch.Generator, *batch: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return a layer and an input large enough that no two things that might be kept have the same size.

    In half precision the weights are whole numbers up to 2, so that the sum of a column, at most 60 * 2 = 120, is exact.
    """
    out_features = between(generator, 40, 60)
    in_features = out_features + between(generator, 11, 30)
    return {
        "x": numbers(generator, dtype, 2, *batch, in_features),
        "weight": numbers(generator, dtype, 2, out_features, in_features),
        "bias": numbers(generator, dtype, 2, out_features),
    }


def drive_bias_memory(biased_linear, biased_linear_backward, x, weight, bias):
    """Make a layer of the two functions, take a training step, and return what was kept and what came out."""
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    class BiasedLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            output, kept = biased_linear(x, weight, bias)
            ctx.save_for_backward(*kept)
            return output

        @staticmethod
        def backward(ctx, output_gradient):
            x_gradient, bias_gradient = biased_linear_backward(ctx.saved_tensors, output_gradient)
            return x_gradient, None, bias_gradient

    x.requires_grad_(True)  # its gradient is wanted by the layers below
    parameters = [nn.Parameter(weight, requires_grad=False), nn.Parameter(bias)]
    optimizer = torch.optim.AdamW(parameters[1:], lr=1e-3)
    step = tensors_of_step(lambda: BiasedLinear.apply(x, *parameters).sum(), parameters, optimizer)
    return step | {"x gradient": x.grad, "bias gradient": parameters[1].grad}


def read_bias_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes besides the layer's own weight and bias that forward keeps for backward": total_bytes(observation["saved"]),
        "the gradient of x": observation["x gradient"],
        "the gradient of the bias": observation["bias gradient"],
    }


def bias_memory_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding: the output's gradient is all ones, so that of x sums a column of the weight, the bias's counts rows.

    Counting up to 256 is exact in every dtype, and so is the other sum in half precision (see `bias_memory_case`).
    """
    if case["x"].dtype in (torch.bfloat16, torch.float16):
        return {}
    weight = case["weight"].double().abs()
    return {"the gradient of x": weight.shape[0] * torch.finfo(case["x"].dtype).eps * weight.sum(0).max().item()}


check_bias_memory = Exercise(
    spec=[biased_linear, biased_linear_backward],
    cases=lambda generator: [bias_memory_case(generator, 3, between(generator, 20, 30))],
    driver=drive_bias_memory,
    reading=read_bias_memory,
    tolerance=bias_memory_tolerance,
    at_most=frozenset(
        {
            "gradient bytes",
            "optimizer state bytes",
            "bytes besides the layer's own weight and bias that forward keeps for backward",
        }
    ),
    mistakes={
        "x is kept: it is needed for the gradient of the weight, and the weight is frozen": {
            KEPT: "return output, (weight, x)",
            TAKEN: "weight = kept[0]",
        },
        "a tensor as large as the output is kept (the output, the bias expanded, a one for every number): none is needed": {
            KEPT: "return output, (weight, torch.ones_like(output))",
            TAKEN: "weight = kept[0]\n    output_gradient = output_gradient * kept[1]",
        },
        "x and the output are both kept: neither is needed": {
            KEPT: "return output, (weight, x, output)",
            TAKEN: "weight = kept[0]",
        },
        "a copy of x in half precision is kept: cheaper than x, and just as needless": {
            KEPT: "return output, (weight, x.bfloat16())",
            TAKEN: "weight = kept[0]",
        },
        "a copy of the weight is kept, transposed or not: keep the weight itself, which is in memory anyway": {
            KEPT: "return output, (weight.T.contiguous(),)",
            TAKEN: "weight = kept[0].T",
        },
        "the weight is kept in fp64: keep it as it is": {
            KEPT: "return output, (weight.double(),)",
            TAKEN: "weight = kept[0].to(output_gradient.dtype)",
        },
        "an identity matrix is kept, the derivative by the bias: multiplying by it changes nothing": {
            KEPT: "return output, (weight, torch.eye(len(bias)).to(x))",
            TAKEN: "weight = kept[0]\n    output_gradient = output_gradient @ kept[1]",
        },
        "the bias was made a column of the weight, and that larger weight is kept": {
            KEPT: "return output, (torch.cat([weight, bias[:, None]], dim=1),)",
            TAKEN: "weight = kept[0][:, :-1]",
        },
        "the input with a column of ones is kept: so one would train a bias as a part of the weight": {
            KEPT: "return output, (weight, torch.cat([x, torch.ones_like(x[..., :1])], dim=-1))",
            TAKEN: "weight = kept[0]",
        },
        "where x is positive is kept, as a relu would: a linear layer does not need to know": {
            KEPT: "return output, (weight, x > 0)",
            TAKEN: "weight = kept[0]",
        },
    },
    variants={
        "matrix products": {
            OUTPUT: "x @ weight.T + bias",
            X_GRADIENT: "x_gradient = output_gradient @ weight",
            **bias_gradient("output_gradient.flatten(0, -2).sum(0)"),
        },
        "a view of the weight, and the bias": {
            KEPT: "return output, (weight.T, bias)",
            TAKEN: "weight = kept[0].T",
        },
        "F.linear, and the bias expanded": {
            OUTPUT: "nn.functional.linear(x, weight, bias)",
            KEPT: "return output, (weight, bias.expand_as(output))",
            TAKEN: "weight = kept[0]",
        },
    },
)
