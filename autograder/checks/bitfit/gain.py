"""`gained` and its backward pass: what multiplying keeps, where adding keeps nothing."""

import torch
from torch import Tensor

from autograder.checking.cases import between, total_bytes
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.bitfit.by_hand import pass_by_hand
from autograder.checks.bitfit.cases import numbers


def gained(normed: Tensor, gain: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the normed input times the gain, and what the backward pass will need."""
    output = normed * gain
    return output, (normed, gain)


def gained_backward(kept: tuple[Tensor, ...], output_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the normed input and of the gain."""
    normed, gain = kept
    normed_gradient = output_gradient * gain
    gain_gradient = (output_gradient * normed).flatten(0, -2).sum(0)
    return normed_gradient, gain_gradient


def gain_case(generator: torch.Generator, *batch: int, dtype: torch.dtype = torch.float32) -> dict:
    """Return random numbers, with a gain that is zero in one place.

    In half precision they are whole, and so small that every sum is exact: at most 24 rows of 4 * 2 are 192.
    """
    features = between(generator, 30, 40)
    gain = numbers(generator, dtype, 2, features)
    gain[between(generator, 0, features - 1)] = 0
    return {
        "normed": numbers(generator, dtype, 2, *batch, features),
        "gain": gain,
        "output_gradient": numbers(generator, dtype, 4, *batch, features),
    }


def drive_gained(gained, gained_backward, normed, gain, output_gradient, copies=1):
    """Run both functions on the given numbers, then take a training step with a layer of them, and return what it kept.

    With copies, so many times the rows go through as many layers, one after the other, and a sample is returned.
    """
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    class Gain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, normed, gain):
            output, kept = gained(normed, gain)
            ctx.save_for_backward(*kept)
            return output

        @staticmethod
        def backward(ctx, output_gradient):
            return tuple(gained_backward(ctx.saved_tensors, output_gradient))

    if copies > 1:
        first = normed.repeat(copies, 1).requires_grad_()
        gain.requires_grad_()
        h = first
        for _ in range(copies):
            h = Gain.apply(h, gain)
        h.sum().backward()
        return {"a sample of the outcome": first.grad[0]}
    called, inputs = ("gained", "gained_backward"), {"the normed input": normed, "the gain": gain}
    seen, gradients = pass_by_hand(gained, gained_backward, called, inputs, output_gradient)
    if gradients is None:
        return seen
    seen |= {"the gradient of the normed input": gradients[0], "the gradient of the gain": gradients[1]}
    normed.requires_grad_(True)  # its gradient is wanted by the layers below
    parameter = nn.Parameter(gain)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    step = tensors_of_step(lambda: Gain.apply(normed, parameter).sum(), [parameter], optimizer)
    return seen | {"saved": step["saved"]}


BYTES = "the bytes besides the gain that forward keeps for backward"


def read_gained(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that were kept."""
    seen = {name: value for name, value in observation.items() if name != "saved"}
    return seen | {BYTES: total_bytes(observation["saved"])} if "saved" in observation else seen


def gain_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers: nothing in half precision, where all sums are exact (see `gain_case`).

    A product is rounded once; a sum of n terms is off by at most n * u * (sum of |terms|), and two answers by twice that.
    """
    dtype = case["normed"].dtype
    if dtype in (torch.bfloat16, torch.float16):
        return {}
    normed, gain, g = (case[name].double().abs() for name in ("normed", "gain", "output_gradient"))
    eps = torch.finfo(dtype).eps
    rows = (g * normed).flatten(0, -2)
    return {
        "the output": eps * (normed * gain).max().item(),
        "the gradient of the normed input": eps * (g * gain).max().item(),
        "the gradient of the gain": (len(rows) + 1) * eps * rows.sum(0).max().item(),
    }


_KEPT, _TAKEN, _RETURNED = "return output, (normed, gain)", "normed, gain = kept", "return normed_gradient, gain_gradient"
_OF_NORMED, _OF_GAIN = "output_gradient * gain", "(output_gradient * normed).flatten(0, -2).sum(0)"

check_gain = Exercise(
    spec=[gained, gained_backward],
    cases=lambda generator: [
        gain_case(generator, 3, 7),
        gain_case(generator, 5),
        gain_case(generator, 2, 4, dtype=torch.bfloat16),
    ],
    driver=drive_gained,
    helpers=[pass_by_hand],
    reading=read_gained,
    tolerance=gain_tolerance,
    at_most=frozenset({BYTES}),
    mistakes={
        "the gradient of the gain is a bias's, the sum of the output's gradient: each token's is multiplied by its normed input": {
            _OF_GAIN: "output_gradient.flatten(0, -2).sum(0)"
        },
        "the gradient of the gain is summed over the first axis only: sum over every axis but the last": {
            _OF_GAIN: "(output_gradient * normed).sum(0)"
        },
        "the gradient of the gain is not summed: all tokens share the gain, so add theirs up": {
            _OF_GAIN: "output_gradient * normed"
        },
        "the gradient of the gain is a mean over the tokens: it is their sum": {
            _OF_GAIN: "(output_gradient * normed).flatten(0, -2).mean(0)"
        },
        "the gradient of the gain is summed over the features: the last axis is the one to keep": {
            _OF_GAIN: "(output_gradient * normed).sum(-1)"
        },
        "the sums are multiplied, not the products summed: multiply token by token, then add up": {
            _OF_GAIN: "output_gradient.flatten(0, -2).sum(0) * normed.flatten(0, -2).sum(0)"
        },
        "the gradient of the normed input is the output's: it has to be multiplied by the gain": {
            _OF_NORMED: "output_gradient.clone()"
        },
        "the gradient of the normed input is multiplied by that input: it is the gain that it was multiplied by": {
            _OF_NORMED: "output_gradient * normed"
        },
        "the gradient of the normed input is missing: the layers below would learn nothing": {
            _RETURNED: "return None, gain_gradient"
        },
        "the two gradients have changed places: the normed input's first, then the gain's": {
            _RETURNED: "return gain_gradient, normed_gradient"
        },
        "the output is kept, and divided by the gain: where the gain is zero, nothing is left to divide": {
            _KEPT: "return output, (output, gain)",
            _TAKEN: "output, gain = kept\n    normed = output / gain",
        },
        "something as large as the normed input is kept beside it (the output, a gain for every token): it and the gain will do": {
            _KEPT: "return output, (normed, gain, output)",
            _TAKEN: "normed, gain, _ = kept",
        },
        "the normed input is kept in a wider dtype: keep it as it is": {
            _KEPT: "return output, (normed.double(), gain)",
            _TAKEN: "normed, gain = kept\n    normed = normed.to(output_gradient.dtype)",
        },
        "the output's gradient was changed in place: others may need it still": {
            _RETURNED: _RETURNED + " + 0 * output_gradient.zero_().sum()"
        },
        "the normed input was changed in place: the layers before may need it still": {
            "normed * gain": "normed.mul_(gain)",
            _KEPT: "return output.clone(), (normed / gain, gain)",
        },
        "gained returns the output alone: return a pair, the output and a tuple of what to keep": {_KEPT: "return output"},
        "what is kept is a tensor: put it in a tuple": {_KEPT: "return output, normed"},
    },
    variants={
        "einsum, and a list": {
            _KEPT: "return output, [gain, normed]",
            _TAKEN: "gain, normed = kept",
            _OF_GAIN: "torch.einsum('...i,...i->i', output_gradient, normed)",
        },
        "rows first": {
            _OF_GAIN: "(output_gradient.reshape(-1, normed.shape[-1]) * normed.reshape(-1, normed.shape[-1])).sum(dim=0)",
        },
        "as many axes as there are": {
            "normed * gain": "torch.mul(gain, normed)",
            _OF_NORMED: "gain.mul(output_gradient)",
            _OF_GAIN: "normed.mul(output_gradient).sum(dim=tuple(range(normed.dim() - 1)))",
        },
        "the gain expanded, which takes no memory": {_KEPT: "return output, (normed, gain.expand_as(normed))"},
        "by autograd": """
            def gained(normed, gain):
                return normed * gain, (normed, gain)

            def gained_backward(kept, output_gradient):
                with torch.enable_grad():
                    normed, gain = (tensor.detach().requires_grad_() for tensor in kept)
                    return torch.autograd.grad(normed * gain, (normed, gain), output_gradient)
        """,
    },
)
