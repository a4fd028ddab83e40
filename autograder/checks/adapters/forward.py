"""The adapter's forward pass, and where its training starts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation
from autograder.checking.exercise import Exercise
from autograder.checks.adapters.adapter import CHANGE, DOWN, GELU, SQUEEZED, START_DOWN, START_UP_BIAS, SUM, UP, Adapter


def adapter_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] | None = None) -> dict:
    """Return weights and an input of random sizes, no two of them equal; GELU's inputs lie on both sides of zero.

    In half precision all is larger, so that roundings average out.
    """
    half = torch.finfo(dtype).eps > 1e-4
    hidden = between(generator, 24, 28) if half else between(generator, 13, 16)
    bottleneck = between(generator, 8, 11) if half else between(generator, 4, 7)
    shape = shape or ((3, 40) if half else (2, 9))
    return {
        "down_weight": normal(generator, bottleneck, hidden, dtype=dtype) * (1.5 / math.sqrt(hidden)),
        "down_bias": normal(generator, bottleneck, dtype=dtype),
        "up_weight": normal(generator, hidden, bottleneck, dtype=dtype) * (1.5 / math.sqrt(bottleneck)),
        "up_bias": normal(generator, hidden, dtype=dtype),
        "h": normal(generator, *shape, hidden, dtype=dtype),
        "output_gradient": normal(generator, *shape, hidden, dtype=dtype),
    }


def drive_adapter(Adapter, down_weight, down_bias, up_weight, up_bias, h, output_gradient):
    """Look at new adapters, then give one these weights; return its output and all gradients."""
    import torch

    bottleneck, hidden = down_weight.shape
    adapter, another = Adapter(hidden, bottleneck), Adapter(hidden, bottleneck)
    parameters = dict(adapter.named_parameters())
    given = {"down.weight": down_weight, "down.bias": down_bias, "up.weight": up_weight, "up.bias": up_bias}
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    seen = {"shapes": dict(sorted(shapes.items()))}
    if shapes != {name: list(tensor.shape) for name, tensor in given.items()}:
        return seen
    adapter.to(h.dtype)
    start = adapter(h)
    if not torch.is_tensor(start):
        return seen | {"what forward returns": repr(start)[:100]}
    seen |= {
        "tensors at the start": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "another's down.weight": another.down.weight.detach().to(h.dtype),
        "a larger down.weight": Adapter(256, 64).down.weight.detach(),  # enough numbers to tell their standard deviation
        "start": start.detach(),
    }
    with torch.no_grad():
        for name, tensor in given.items():
            parameters[name].copy_(tensor)
    leaf = h.clone().requires_grad_()
    entering = leaf * 1.0  # in a model h is no leaf either
    output = adapter.eval()(entering)
    if not torch.is_tensor(output):
        return seen | {"what forward returns": repr(output)[:100]}
    seen |= {"what forward returns": "a tensor", "output": output.detach().clone(), "h afterwards": entering.detach().clone()}
    if output.requires_grad and output.shape == output_gradient.shape:
        output.backward(output_gradient.to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return seen | {"gradients": gradients | ({"h": leaf.grad} if leaf.grad is not None else {})}


def start_of_down(weight: Tensor) -> str:
    """Say how an adapter's down.weight starts, from one of hidden size 256 and bottleneck 64.

    The standard deviation of n = 16,384 normal numbers is itself off by 1 / sqrt(2 n) = 0.55%, and their mean by 1 / sqrt(n) of
    the standard deviation; nine of each are allowed. Houlsby et al. cut the normal distribution off at two standard
    deviations, which leaves 0.8796 of it: that is right too.
    """
    mean, deviation = weight.double().mean().item(), weight.double().std().item()
    if not weight.any():
        return "at zero"
    if deviation <= 1e-6 * abs(mean):
        return "as one number everywhere"
    if abs(mean) > 9 * deviation / math.sqrt(weight.numel()):
        return "at random, with a mean other than 0"
    if 0.95 * 0.8796 * 0.01 <= deviation <= 1.05 * 0.01:
        return "at random, with a standard deviation of 0.01"
    if 0.95 <= deviation <= 1.05:
        return "at random, with a standard deviation of 1"
    return f"at random, with a standard deviation {'above' if deviation > 0.01 else 'below'} 0.01"


def read_adapter(observation: Observation, case: dict) -> Observation:
    """Judge the start from the tensors; in half precision, hold output and gradients against exact ones on average."""
    read = {"the shapes of its parameters by name": observation["shapes"]}
    if "what forward returns" in observation:
        read["what forward returns"] = observation["what forward returns"]
    if "start" not in observation:
        return read
    start, tensors = observation["start"], observation["tensors at the start"]
    zero = sorted(name for name, tensor in tensors.items() if not tensor.any())
    read["the list of what is zero at the start"] = zero
    if {"up.weight", "up.bias"} <= set(zero):
        read["what a new adapter returns"] = start
    read |= {
        "a new adapter returns h itself, to the bit": start.dtype == case["h"].dtype and torch.equal(start, case["h"]),
        "how down.weight starts": start_of_down(observation["a larger down.weight"]),
        "two adapters start from the same down.weight": torch.equal(
            tensors["down.weight"], observation["another's down.weight"]
        ),
    }
    if "output" not in observation:
        return read
    gradients = observation["gradients"]
    read |= {
        "h is left as it was": torch.equal(observation["h afterwards"], case["h"]),
        "the output": observation["output"],
        "the list of what gets a gradient": sorted(gradients),
        **{f"the gradient of {name}": gradient for name, gradient in gradients.items()},
    }
    if torch.finfo(case["h"].dtype).eps < 1e-4:
        return read
    found = {"change": observation["output"].double() - case["h"].double(), **gradients}
    for name, exact in case["exact"].items():
        if name in found and found[name].shape == exact.shape:
            read[_multiple(name)] = (found[name].double().flatten() @ exact.flatten() / exact.square().sum()).item()
    return read


def _multiple(name: str) -> str:
    return f"the {'change' if name == 'change' else f'gradient of {name}'} as a multiple of the exact one"


def exact_adapter(case: dict) -> dict:
    """Return the change that the adapter makes to h, and the gradients of more than one axis, in double precision."""
    if torch.finfo(case["h"].dtype).eps < 1e-4:
        return {}
    down, up, h = leaves = [case[name].double().requires_grad_() for name in ("down_weight", "up_weight", "h")]
    change = F.gelu(h @ down.T + case["down_bias"].double()) @ up.T + case["up_bias"].double()
    gradients = torch.autograd.grad(h + change, leaves, case["output_gradient"].double())
    return {"exact": {"change": change.detach(), **dict(zip(("down.weight", "up.weight", "h"), gradients))}}


def adapter_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A sum of n terms is off by n * u * (sum of |terms|), u = eps / 2 (Higham 2002, section 3.1), and two answers by twice
    that. An error passes GELU, whose slope is at most 1.13, and comes out of it at most 1.13 times as large, four roundings
    more; its slope in turn changes by at most 0.8 times the error. The sums of |terms| come from the formulas on absolute
    values. In half precision that bound is wider than 1%. There, output and gradients are held against exact ones on average
    too: each of the k roundings on the way to a number moves it by at most u of its size, up or down, so that a mean over n
    numbers has a standard deviation below sqrt(k / (3 n)) * u, and we allow six of these. The smallest n is a weight's.
    """
    down, down_bias, up, up_bias, h, g = (
        case[name].double().abs().flatten(0, -2 if case[name].dim() > 1 else -1)
        for name in ("down_weight", "down_bias", "up_weight", "up_bias", "h", "output_gradient")
    )
    (bottleneck, hidden), tokens = down.shape, h.shape[0]
    eps = torch.finfo(case["h"].dtype).eps
    squeezed = h @ down.T + down_bias
    bent_error = (1.13 * (hidden + 2) + 4) * squeezed
    output = (bent_error @ up.T + (bottleneck + 3) * (squeezed @ up.T + up_bias) + 2 * h).max().item()
    arriving = g @ up
    passing = 1.13 * arriving
    passing_error = (1.13 * (hidden + 6) + 0.8 * (hidden + 2) * squeezed) * arriving
    bounds = {
        "up.bias": (tokens + 2) * g.sum(0),
        "up.weight": g.T @ bent_error + (tokens + 2) * g.T @ squeezed,
        "down.bias": passing_error.sum(0) + (tokens + 2) * passing.sum(0),
        "down.weight": passing_error.T @ h + (tokens + 2) * passing.T @ h,
        "h": passing_error @ down + (bottleneck + 3) * passing @ down + 2 * g,
    }
    on_average = 6 * math.sqrt((hidden + bottleneck + 6) / (3 * hidden * bottleneck)) * eps / 2
    return {
        "what a new adapter returns": eps * h.max().item(),
        "the output": eps * output,
        **{f"the gradient of {name}": eps * bound.max().item() for name, bound in bounds.items()},
        **{_multiple(name): on_average for name in ("change", "down.weight", "up.weight", "h")},
    }


_START_DOWN_BIAS = "nn.init.zeros_(self.down.bias)"
_START_UP = "nn.init.zeros_(self.up.weight)"

check_adapter = Exercise(
    spec=[Adapter],
    cases=lambda generator: [adapter_case(generator), adapter_case(generator, torch.bfloat16)],
    driver=drive_adapter,
    reading=read_adapter,
    exact=exact_adapter,
    tolerance=adapter_tolerance,
    mistakes={
        "the residual connection is missing: the adapter returns h plus its change": {SUM: "return change"},
        "the nonlinearity is missing: what is left is linear, and could be merged into the layer before": {GELU: "squeezed"},
        "there is a ReLU where GELU belongs": {GELU: "F.relu(squeezed)"},
        "GELU is approximated by a tanh: use F.gelu as it is": {GELU: 'F.gelu(squeezed, approximate="tanh")'},
        "GELU comes after `up`: it belongs between down and up, on the few numbers": {
            GELU: "squeezed",
            CHANGE: f"F.gelu({CHANGE})",
        },
        "the change is divided by the bottleneck's width: an adapter has no scale, that is LoRA's": {
            SUM: "return h + change / self.down.out_features"
        },
        "down and up have no biases: here both have": {
            DOWN: "nn.Linear(hidden, bottleneck, bias=False)",
            UP: "nn.Linear(bottleneck, hidden, bias=False)",
            " + self.down.bias": "",
            " + self.up.bias": "",
            _START_DOWN_BIAS: "pass",
            START_UP_BIAS: "pass",
        },
        "down and up have changed places: down has `bottleneck` outputs, up has `hidden`": {DOWN: UP, UP: DOWN},
        "there is a LayerNorm inside: this adapter has down and up and nothing else": {
            START_UP_BIAS: START_UP_BIAS + "\n        self.norm = nn.LayerNorm(hidden)",
            SQUEEZED: SQUEEZED.replace("(h,", "(self.norm(h),"),
        },
        "up starts at random, so that the model changes before it has learned anything: weight and bias start at zero": {
            _START_UP: "pass",
            START_UP_BIAS: "pass",
        },
        "only up.weight starts at zero: its bias moves every h at once, and starts at zero too": {START_UP_BIAS: "pass"},
        "down.weight starts at zero too: then each waits for the other, for ever": {
            START_DOWN: "nn.init.zeros_(self.down.weight)",
        },
        "down starts at zero and up at random: it is the other way round": {
            START_DOWN: "nn.init.zeros_(self.down.weight)",
            _START_UP: "pass",
            START_UP_BIAS: "pass",
        },
        "down.bias starts at random: it starts at zero, as up.weight and up.bias do": {_START_DOWN_BIAS: "pass"},
        "down.weight starts with a standard deviation of 1: write std=0.01, for the first number of nn.init.normal_ is the mean": {
            START_DOWN: "nn.init.normal_(self.down.weight, 0.01)"
        },
        "down.weight starts with a standard deviation above 0.01, as nn.Linear's own start does: nn.init.normal_ with std=0.01": {
            START_DOWN: "pass"
        },
        "down.weight starts with a standard deviation below 0.01: numbers drawn evenly from -0.01 to 0.01 have 0.0058": {
            START_DOWN: "nn.init.uniform_(self.down.weight, -0.01, 0.01)"
        },
        "down.weight starts with a mean other than zero: 0.01 is the standard deviation": {
            START_DOWN: "nn.init.normal_(self.down.weight, 0.01, 0.01)"
        },
        "down.weight starts as one number everywhere, so that all features of the bottleneck are the same: draw at random": {
            START_DOWN: "nn.init.constant_(self.down.weight, 0.01)"
        },
        "every adapter starts from the same down.weight: do not set a seed inside": {
            START_DOWN: "torch.manual_seed(0); " + START_DOWN
        },
        "the bottleneck reads a detached h: what lies below gets only the residual's part of the gradient": {
            SQUEEZED: SQUEEZED.replace("(h,", "(h.detach(),")
        },
        "the residual's h is detached: what lies below gets only the bottleneck's part of the gradient": {
            SUM: "return h.detach() + change"
        },
        "the change is computed without gradients: down and up could never learn": {SUM: "return h + change.detach()"},
        "forward returns None: its last line needs a `return`": {SUM: "h + change"},
        "the input is changed in place: `h + change` makes a new tensor, `h += change` writes into the old one": {
            SUM: "h += change\n        return h"
        },
        "the adapter works in training mode only: it always does": {SUM: "return h + change if self.training else h"},
        "the result is in fp32 whatever h is in: keep h's dtype": {SUM: "return h.float() + change.float()"},
    },
    variants={
        "in one line": {
            SQUEEZED: "self.down(h)",
            CHANGE: "self.up(bent)",
        },
        "F.linear and nn.GELU, and a start drawn by hand": {
            SQUEEZED: "F.linear(h, self.down.weight, self.down.bias)",
            GELU: "nn.GELU()(squeezed)",
            CHANGE: "F.linear(bent, self.up.weight, self.up.bias)",
            SUM: "return change + h",
            START_DOWN: "self.down.weight = nn.Parameter(0.01 * torch.randn(bottleneck, hidden))",
            _START_DOWN_BIAS: "self.down.bias.data.zero_()",
            _START_UP: "self.up.weight.data.zero_()",
            START_UP_BIAS: "self.up.bias.data.fill_(0.0)",
        },
        "in double precision, GELU by its definition": {
            SQUEEZED: "h.double() @ self.down.weight.double().T + self.down.bias",
            GELU: "squeezed * 0.5 * (1 + torch.erf(squeezed / 2**0.5))",
            CHANGE: "bent @ self.up.weight.double().T + self.up.bias",
            SUM: "return (h + change).to(h.dtype)",
        },
        "the start cut off at two standard deviations, as Houlsby et al. have it": {
            START_DOWN: "nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)"
        },
        "a loop over the bottleneck": {
            CHANGE: "self.up.bias + sum(bent[..., [m]] * self.up.weight[:, m] for m in range(self.down.out_features))",
        },
    },
)
