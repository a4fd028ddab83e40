"""Checks of unit 07_adapters (Houlsby et al. 2019, arXiv 1902.00751)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograder.cases import between, normal, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise
from peftlab.llama import Llama, LlamaConfig


# ======================================================================================================================
# 1. Adapter: the forward pass, and where training starts
# ======================================================================================================================
class Adapter(nn.Module):
    """h + W_up gelu(W_down h + b_down) + b_up (section 2.1)."""

    def __init__(self, hidden: int, bottleneck: int):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.normal_(self.down.weight, std=0.01)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return h and what the bottleneck has to add to it."""
        squeezed = torch.matmul(h, self.down.weight.T) + self.down.bias
        bent = F.gelu(squeezed)
        change = torch.matmul(bent, self.up.weight.T) + self.up.bias
        return h + change


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


_STARTS_AS_IDENTITY = "a new adapter returns h itself, to the bit"
_DOWN_STARTS = "how down.weight starts"


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
        _STARTS_AS_IDENTITY: start.dtype == case["h"].dtype and torch.equal(start, case["h"]),
        _DOWN_STARTS: start_of_down(observation["a larger down.weight"]),
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
    for name, exact in exact_adapter(case).items():
        if name in found and found[name].shape == exact.shape:
            read[_multiple(name)] = (found[name].double().flatten() @ exact.flatten() / exact.square().sum()).item()
    return read


def _multiple(name: str) -> str:
    return f"the {'change' if name == 'change' else f'gradient of {name}'} as a multiple of the exact one"


def exact_adapter(case: dict) -> dict[str, Tensor]:
    """Return the change that the adapter makes to h, and the gradients of more than one axis, in double precision."""
    down, up, h = leaves = [case[name].double().requires_grad_() for name in ("down_weight", "up_weight", "h")]
    change = F.gelu(h @ down.T + case["down_bias"].double()) @ up.T + case["up_bias"].double()
    gradients = torch.autograd.grad(h + change, leaves, case["output_gradient"].double())
    return {"change": change.detach(), **dict(zip(("down.weight", "up.weight", "h"), gradients))}


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


def adapter_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A sum of n terms is off by n * u * (sum of |terms|), u = eps / 2 (Higham 2002, section 3.1), and two answers by twice
    that. An error passes GELU, whose slope is at most 1.13, and comes out of it at most 1.13 times as large, four roundings
    more; its slope in turn changes by at most 0.8 times the error. The sums of |terms| come from the formulas on absolute
    values. In half precision that bound is wider than 1%. There, output and gradients are held against exact ones on average
    too: each of the k roundings on the way to a number moves it by at most u of its size, up or down, so that a mean over n
    numbers has a standard deviation below sqrt(k / (3 n)) * u, of which we allow six. The smallest n is a weight's.
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


_DOWN = "nn.Linear(hidden, bottleneck)"
_UP = "nn.Linear(bottleneck, hidden)"
_SQUEEZED = "torch.matmul(h, self.down.weight.T) + self.down.bias"
_GELU = "F.gelu(squeezed)"
_CHANGE = "torch.matmul(bent, self.up.weight.T) + self.up.bias"
_SUM = "return h + change"
_START_DOWN = "nn.init.normal_(self.down.weight, std=0.01)"
_START_DOWN_BIAS = "nn.init.zeros_(self.down.bias)"
_START_UP = "nn.init.zeros_(self.up.weight)"
_START_UP_BIAS = "nn.init.zeros_(self.up.bias)"

check_adapter = Exercise(
    spec=[Adapter],
    driver=drive_adapter,
    reading=read_adapter,
    cases=lambda generator: [adapter_case(generator), adapter_case(generator, torch.bfloat16)],
    tolerance=adapter_tolerance,
    mistakes={
        "the residual connection is missing: the adapter returns h plus its change": {_SUM: "return change"},
        "the nonlinearity is missing: what is left is linear, and could be merged into the layer before": {_GELU: "squeezed"},
        "there is a ReLU where GELU belongs": {_GELU: "F.relu(squeezed)"},
        "GELU is approximated by a tanh: use F.gelu as it is": {_GELU: 'F.gelu(squeezed, approximate="tanh")'},
        "GELU comes after `up`: it belongs between down and up, on the few numbers": {
            _GELU: "squeezed",
            _CHANGE: f"F.gelu({_CHANGE})",
        },
        "the change is divided by the bottleneck's width: an adapter has no scale, that is LoRA's": {
            _SUM: "return h + change / self.down.out_features"
        },
        "down and up have no biases: here both have": {
            _DOWN: "nn.Linear(hidden, bottleneck, bias=False)",
            _UP: "nn.Linear(bottleneck, hidden, bias=False)",
            " + self.down.bias": "",
            " + self.up.bias": "",
            _START_DOWN_BIAS: "pass",
            _START_UP_BIAS: "pass",
        },
        "down and up have changed places: down has `bottleneck` outputs, up has `hidden`": {_DOWN: _UP, _UP: _DOWN},
        "there is a LayerNorm inside: this adapter has down and up and nothing else": {
            _START_UP_BIAS: _START_UP_BIAS + "\n        self.norm = nn.LayerNorm(hidden)",
            _SQUEEZED: _SQUEEZED.replace("(h,", "(self.norm(h),"),
        },
        "up starts at random, so that the model changes before it has learned anything: weight and bias start at zero": {
            _START_UP: "pass",
            _START_UP_BIAS: "pass",
        },
        "only up.weight starts at zero: its bias moves every h at once, and starts at zero too": {_START_UP_BIAS: "pass"},
        "down.weight starts at zero too: then each waits for the other, for ever": {
            _START_DOWN: "nn.init.zeros_(self.down.weight)",
        },
        "down starts at zero and up at random: it is the other way round": {
            _START_DOWN: "nn.init.zeros_(self.down.weight)",
            _START_UP: "pass",
            _START_UP_BIAS: "pass",
        },
        "down.bias starts at random: it starts at zero, as up.weight and up.bias do": {_START_DOWN_BIAS: "pass"},
        "down.weight starts with a standard deviation of 1: write std=0.01, for the first number of nn.init.normal_ is the mean": {
            _START_DOWN: "nn.init.normal_(self.down.weight, 0.01)"
        },
        "down.weight starts with a standard deviation above 0.01, as nn.Linear's own start does: nn.init.normal_ with std=0.01": {
            _START_DOWN: "pass"
        },
        "down.weight starts with a standard deviation below 0.01: numbers drawn evenly from -0.01 to 0.01 have 0.0058": {
            _START_DOWN: "nn.init.uniform_(self.down.weight, -0.01, 0.01)"
        },
        "down.weight starts with a mean other than zero: 0.01 is the standard deviation": {
            _START_DOWN: "nn.init.normal_(self.down.weight, 0.01, 0.01)"
        },
        "down.weight starts as one number everywhere, so that all features of the bottleneck are the same: draw at random": {
            _START_DOWN: "nn.init.constant_(self.down.weight, 0.01)"
        },
        "every adapter starts from the same down.weight: do not set a seed inside": {
            _START_DOWN: "torch.manual_seed(0); " + _START_DOWN
        },
        "the bottleneck reads a detached h: what lies below gets only the residual's part of the gradient": {
            _SQUEEZED: _SQUEEZED.replace("(h,", "(h.detach(),")
        },
        "the residual's h is detached: what lies below gets only the bottleneck's part of the gradient": {
            _SUM: "return h.detach() + change"
        },
        "the change is computed without gradients: down and up could never learn": {_SUM: "return h + change.detach()"},
        "forward returns None: its last line needs a `return`": {_SUM: "h + change"},
        "the input is changed in place: `h + change` makes a new tensor, `h += change` writes into the old one": {
            _SUM: "h += change\n        return h"
        },
        "the adapter works in training mode only: it always does": {_SUM: "return h + change if self.training else h"},
        "the result is in fp32 whatever h is in: keep h's dtype": {_SUM: "return h.float() + change.float()"},
    },
    variants={
        "in one line": {
            _SQUEEZED: "self.down(h)",
            _CHANGE: "self.up(bent)",
        },
        "F.linear and nn.GELU, and a start drawn by hand": {
            _SQUEEZED: "F.linear(h, self.down.weight, self.down.bias)",
            _GELU: "nn.GELU()(squeezed)",
            _CHANGE: "F.linear(bent, self.up.weight, self.up.bias)",
            _SUM: "return change + h",
            _START_DOWN: "self.down.weight = nn.Parameter(0.01 * torch.randn(bottleneck, hidden))",
            _START_DOWN_BIAS: "self.down.bias.data.zero_()",
            _START_UP: "self.up.weight.data.zero_()",
            _START_UP_BIAS: "self.up.bias.data.fill_(0.0)",
        },
        "in double precision, GELU by its definition": {
            _SQUEEZED: "h.double() @ self.down.weight.double().T + self.down.bias",
            _GELU: "squeezed * 0.5 * (1 + torch.erf(squeezed / 2**0.5))",
            _CHANGE: "bent @ self.up.weight.double().T + self.up.bias",
            _SUM: "return (h + change).to(h.dtype)",
        },
        "the start cut off at two standard deviations, as Houlsby et al. have it": {
            _START_DOWN: "nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)"
        },
        "a loop over the bottleneck": {
            _CHANGE: "self.up.bias + sum(bent[..., [m]] * self.up.weight[:, m] for m in range(self.down.out_features))",
        },
    },
)


# ======================================================================================================================
# 2. Adapter: measured memory
# ======================================================================================================================
def drive_adapter_memory(Adapter, hidden, bottleneck, rows):
    """Take a training step; return what is there after it, and what forward kept for backward."""
    import torch

    from peftlab.memory import tensors_of_step

    adapter = Adapter(hidden, bottleneck)
    h = torch.ones(rows, hidden, requires_grad=True)  # its gradient is wanted by the layers below
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-3)
    returned = adapter(h.detach().clone())
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    tensors = tensors_of_step(lambda: adapter(h).sum(), adapter.parameters(), optimizer, not_counted=[h])
    values = [value for module in adapter.modules() for value in vars(module).values()]
    attributes = [one for value in values for one in (value if isinstance(value, list) else [value]) if torch.is_tensor(one)]
    kept = [*adapter.state_dict().values(), *(held.detach() for held in attributes)]
    return tensors | {"returned": "a tensor", "kept": kept}


_WEIGHTS = "the bytes of weights and of tensors that are kept as buffers or attributes"
_SAVED = "the bytes that forward saves for backward besides h and the weights"


def read_adapter_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "kept" not in observation:
        return {"what forward returns": observation["returned"]}
    return {
        "what forward returns": observation["returned"],
        "the bytes of gradients": total_bytes(observation["gradients"]),
        "the bytes of optimizer state": total_bytes(observation["optimizer state"]),
        _WEIGHTS: total_bytes(observation["kept"]),
        _SAVED: total_bytes(observation["saved"]),
    }


def adapter_memory_case(generator: torch.Generator) -> dict:
    """Return sizes, no two of them equal."""
    return {"hidden": between(generator, 60, 90), "bottleneck": between(generator, 7, 12), "rows": between(generator, 40, 50)}


_KEEP = "self.down = nn.Linear(hidden, bottleneck)"

check_adapter_memory = Exercise(
    spec=[Adapter],
    driver=drive_adapter_memory,
    reading=read_adapter_memory,
    cases=lambda generator: [adapter_memory_case(generator)],
    at_most=frozenset({_WEIGHTS, _SAVED}),
    # Gradients and optimizer state belong to the four parameters, and are counted to the byte; a plain number that is kept as
    # a buffer may weigh something.
    tolerance=lambda case: {_WEIGHTS: 64},
    mistakes={
        "GELU is written out, and every step of it keeps a tensor for backward: F.gelu keeps its input alone": {
            _GELU: "squeezed * 0.5 * (1 + torch.erf(squeezed / 2**0.5))"
        },
        "GELU comes last, and keeps `hidden` numbers a token: it belongs between down and up, on the few": {
            _SUM: "return F.gelu(h + change) + F.gelu(change)"
        },
        "a copy of h is kept for backward: hand h itself to down": {_SQUEEZED: _SQUEEZED.replace("(h,", "(h.clone(),")},
        "the computation is done in fp64, and the copies are kept for backward": {
            _SQUEEZED: "h.double() @ self.down.weight.double().T + self.down.bias",
            _CHANGE: "bent @ self.up.weight.double().T + self.up.bias",
            _SUM: "return (h + change).to(h.dtype)",
        },
        "down and up are in fp64: twice the bytes of weights, gradients and optimizer state": {
            _SQUEEZED: "h @ self.down.weight.to(h.dtype).T + self.down.bias.to(h.dtype)",
            _CHANGE: "bent @ self.up.weight.to(h.dtype).T + self.up.bias.to(h.dtype)",
            _START_UP_BIAS: _START_UP_BIAS + "\n        self.double()",
        },
        "the bottleneck is not the one asked for: down and up are twice as large as they should be": {
            _DOWN: "nn.Linear(hidden, 2 * bottleneck)",
            _UP: "nn.Linear(2 * bottleneck, hidden)",
        },
        "there is no bottleneck: down keeps all `hidden` numbers": {
            _DOWN: "nn.Linear(hidden, hidden)",
            _UP: "nn.Linear(hidden, hidden)",
        },
        "dropout keeps a mask for backward: it has no place in this adapter": {
            _GELU: "F.dropout(F.gelu(squeezed), 0.1, self.training)"
        },
        "the change is multiplied by a learned scale, and all of it is kept for backward: an adapter has no scale": {
            _START_UP_BIAS: _START_UP_BIAS + "\n        self.scale = nn.Parameter(torch.ones(()))",
            _SUM: "return h + self.scale * change",
        },
        "the change is made by a whole hidden × hidden matrix: multiply by down first, then by up": {
            _CHANGE: "h @ (self.up.weight @ self.down.weight).T + self.up.bias + 0 * bent.sum()",
        },
        "the last change is kept as an attribute: it stays in memory until the next one": {
            _SUM: "self.change = change.detach()\n        return h + change"
        },
        "a part of the adapter is frozen: all four parameters are trained": {
            _START_DOWN: _START_DOWN + "\n        self.down.bias.requires_grad_(False)",
        },
    },
    variants={
        "in one line": {_SQUEEZED: "self.down(h)", _CHANGE: "self.up(bent)"},
        "F.linear, and nn.GELU": {
            _SQUEEZED: "F.linear(h, self.down.weight, self.down.bias)",
            _GELU: "nn.GELU()(squeezed)",
            _CHANGE: "F.linear(bent, self.up.weight, self.up.bias)",
            _SUM: "return change + h",
        },
        "matrix products": {
            _SQUEEZED: "h @ self.down.weight.T + self.down.bias",
            _CHANGE: "bent @ self.up.weight.T + self.up.bias",
        },
        "computed again in backward": {
            _SQUEEZED: "None",
            _GELU: "None",
            _CHANGE: ("torch.utils.checkpoint.checkpoint(lambda h: self.up(F.gelu(self.down(h))), h, use_reentrant=False)"),
        },
    },
)


# ======================================================================================================================
# 3. Adapted and add_adapters: where the adapters stand
# ======================================================================================================================
class Adapted(nn.Module):
    """A sub-layer and the adapter that its output passes through, before the decoder layer adds it to the residual stream."""

    def __init__(self, sublayer: nn.Module, adapter: nn.Module):
        super().__init__()
        self.sublayer = sublayer
        self.adapter = adapter

    def forward(self, *args: object) -> Tensor:
        """Return the adapter's output on the sub-layer's."""
        output = self.sublayer(*args)
        return self.adapter(output)


def add_adapters(model: Llama, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> None:
    """Freeze the model; then let the output of these sub-layers pass through adapters, in every decoder layer."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weight = model.lm_head.weight
    for number in range(len(model.model.layers)):
        layer = model.model.layers[number]
        for place in places:
            adapter = Adapter(model.config.hidden_size, bottleneck).to(weight.device, weight.dtype)
            sublayer = getattr(layer, place)
            setattr(layer, place, Adapted(sublayer, adapter))


def drive_add_adapters(Adapted, add_adapters, layers, tied, weights, input_ids, attention_mask, bottleneck, places, trained):
    """Put adapters into a tiny LLaMA; return its logits at the start and with other weights in the adapters, and gradients.

    The adapters are made by an `Adapter` of our own, so that this does not depend on an earlier exercise.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    class Bottleneck(nn.Module):
        def __init__(self, hidden, bottleneck):
            super().__init__()
            self.down, self.up = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, h):
            return h + self.up(F.gelu(self.down(h)))

    returned = Adapted(nn.Linear(12, 12), Bottleneck(12, bottleneck))(torch.ones(1, 2, 12))
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}

    def add(model):
        names = getattr(add_adapters, "__globals__", {})
        theirs, names["Adapter"] = names.get("Adapter"), Bottleneck
        try:
            if places is None:
                add_adapters(model, bottleneck)
            else:
                add_adapters(model, bottleneck, places)
        finally:
            names["Adapter"] = theirs

    config = LlamaConfig(31, 12, 20, layers, 2, 1, tie_word_embeddings=tied)
    model = Llama(config).to(weights.dtype)
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in model.parameters())].clone(), model.parameters())
    before, held = model(input_ids, attention_mask).detach(), model.model.layers[0].self_attn.v_proj.weight
    add(model)
    adapters = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "down", None), nn.Linear)}
    seen = {
        "returned": "a tensor",
        "adapters": sorted(adapters),
        "before": before,
        "start": model(input_ids, attention_mask).detach(),
    }
    learned = [parameter for name in sorted(adapters) for parameter in adapters[name].parameters()]
    if learned:
        nn.utils.vector_to_parameters(trained[: sum(p.numel() for p in learned)].to(learned[0].dtype), learned)
    with torch.no_grad():
        held += 0.5  # someone else holds the base's weights: the adapted model still uses these very tensors
    logits = model.eval()(input_ids, attention_mask)
    if logits.requires_grad:
        logits.square().mean().backward()
    seen |= {
        "logits": logits.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "trainable": sorted(name for name, p in model.named_parameters() if p.requires_grad),
    }
    elsewhere = Llama(LlamaConfig(2, 4, 4, 1, 1, 1)).to("meta", torch.bfloat16)
    add(elsewhere)
    where = [m.down.weight for m in elsewhere.modules() if isinstance(getattr(m, "down", None), nn.Linear)]
    return seen | {"elsewhere": sorted({f"{weight.dtype} on {weight.device.type}" for weight in where})}


_ADDED_LOGITS = "the logits once the adapters have learned and the base's own v_proj has been changed"
_ADDED_START = "the logits are those of the base at the start, to the bit"


def read_add_adapters(observation: Observation, case: dict) -> Observation:
    """Judge the start from the logits, and what learns from the gradients themselves."""
    read = {"what Adapted's forward returns": observation["returned"]}
    if "adapters" not in observation:
        return read
    gradients, trainable = observation["gradients"], set(observation["trainable"])
    learn = {
        f"{one}.{part}.{kind}" for one in observation["adapters"] for part in ("down", "up") for kind in ("weight", "bias")
    }
    read |= {
        "the list of adapters": observation["adapters"],
        "the logits at the start": observation["start"],
        _ADDED_START: torch.equal(observation["before"], observation["start"]),
        "the list of what wrongly gets a gradient": sorted(gradients.keys() - learn),
        "the list of what wrongly gets no gradient": sorted(learn - gradients.keys()),
        "the list of what wrongly requires a gradient": sorted(trainable - learn),
        "the list of what wrongly requires no gradient": sorted(learn - trainable),
        _ADDED_LOGITS: observation["logits"],
        "the list of dtypes and devices of the adapters of a bf16 model on the meta device": observation["elsewhere"],
    }
    adapters = [name for name in sorted(gradients) if ".adapter." in name]
    if adapters:
        read["the adapters' gradients"] = torch.cat([gradients[name].flatten() for name in adapters])
    return read


def add_case(
    generator: torch.Generator,
    places: Sequence[str] | None = None,
    layers: int = 2,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Return a tiny LLaMA's weights, and weights for its adapters; the batch is padded on the left."""
    attention_mask = torch.ones(3, 5, dtype=torch.long)
    attention_mask[0, :2] = 0
    return {
        "layers": layers,
        "tied": tied,
        "weights": normal(generator, 5_000, dtype=dtype) * 0.4,
        "input_ids": torch.randint(0, 31, (3, 5), generator=generator),
        "attention_mask": attention_mask,
        "bottleneck": between(generator, 3, 4),
        "places": None if places is None else list(places),
        "trained": normal(generator, 1_500, dtype=dtype) * 0.5,
    }


def add_tolerance(case: dict) -> dict[str, float]:
    """The adapted model does the same operations in the same order whoever put it together, up to an addition or two.

    Logits here are of size 1 to 30, gradients of up to 100; a wrong order of two operations moves them in the first digits.
    """
    unit = 1e3 * torch.finfo(case["weights"].dtype).eps
    return {
        "the logits at the start": unit,
        _ADDED_LOGITS: unit,
        "the adapters' gradients": 10 * unit,
    }


_FROZEN = "for parameter in model.parameters():\n        parameter.requires_grad_(False)"
_OUTPUT = "output = self.sublayer(*args)\n        return self.adapter(output)"
_NEW_ADAPTER = "Adapter(model.config.hidden_size, bottleneck)"
_MOVED = ".to(weight.device, weight.dtype)"
_WRAPPED = "setattr(layer, place, Adapted(sublayer, adapter))"
_LAST_PLACE = "\n            setattr(layer, place, Adapted(sublayer, adapter))"
_OVER_LAYERS = "for number in range(len(model.model.layers)):"

check_add_adapters = Exercise(
    spec=[Adapted, add_adapters],
    driver=drive_add_adapters,
    reading=read_add_adapters,
    cases=lambda generator: [add_case(generator), add_case(generator, places=["mlp"])],
    tolerance=add_tolerance,
    mistakes={
        "the adapter stands after the residual addition, around the whole decoder layer: it belongs to the sub-layer's output": {
            "sublayer = getattr(layer, place)": "pass",
            "for place in places:\n": "for place in places[:1]:\n",
            _LAST_PLACE: "\n        model.model.layers[number] = Adapted(layer, adapter)",
        },
        "the adapter reads the sub-layer's input, beside it: it reads the sub-layer's output": {
            _OUTPUT: "return self.sublayer(*args) + self.adapter(args[0]) - args[0]"
        },
        "the adapter stands before the sub-layer: it belongs behind it": {
            _OUTPUT: "return self.sublayer(self.adapter(args[0]), *args[1:])"
        },
        "the sub-layer's output is added once more: the residual connection is inside the adapter already": {
            _OUTPUT: "output = self.sublayer(*args)\n        return output + self.adapter(output)"
        },
        "only the first argument reaches the sub-layer: attention needs cos, sin and mask as well, `*args`": {
            _OUTPUT: "return self.adapter(self.sublayer(args[0]))"
        },
        "the adapters work in training mode only: they always do": {
            _OUTPUT: "output = self.sublayer(*args)\n        return self.adapter(output) if self.training else output"
        },
        "one adapter serves all layers: each place needs its own": {
            _OVER_LAYERS: f"shared = {_NEW_ADAPTER}{_MOVED}\n    {_OVER_LAYERS}",
            f"{_NEW_ADAPTER}{_MOVED}": "shared",
        },
        "the base is not frozen: adapters are all that is trained": {_FROZEN: "pass"},
        "the model is frozen after the adapters were put in, so that they are frozen too: freeze it first": {
            _FROZEN: "pass",
            _LAST_PLACE: f"{_LAST_PLACE}\n    model.requires_grad_(False)",
        },
        "only the wrapped sub-layers are frozen: freeze embedding, norms and head as well": {
            _FROZEN: "pass",
            "sublayer = getattr(layer, place)": "sublayer = getattr(layer, place).requires_grad_(False)",
        },
        "the head is left trainable: freeze the whole model, not `model.model` alone": {
            _FROZEN: _FROZEN.replace("model.parameters()", "model.model.parameters()")
        },
        "the norms are left trainable: Houlsby et al. train them too, here adapters are all that learns": {
            _FROZEN: _FROZEN.replace("model.parameters()", "[p for n, p in model.named_parameters() if 'norm' not in n]")
        },
        "the adapters are in fp32 whatever the model is in, on the CPU wherever it is: `.to` the model's dtype and device": {
            _MOVED: '.to("cpu", torch.float32)'
        },
        "the MLP's adapter has the MLP's inner width: it stands behind down_proj, where there are hidden_size features": {
            _NEW_ADAPTER: (
                "Adapter(model.config.intermediate_size if place == 'mlp' else model.config.hidden_size, bottleneck)"
            )
        },
        "`places` is ignored: adapters stand where it says, and nowhere else": {
            "for place in places:\n": 'for place in ("self_attn", "mlp"):\n'
        },
        "only the first layer gets adapters: every decoder layer does": {_OVER_LAYERS: "for number in range(1):"},
        "the sub-layer runs without gradients: its weights need none, but the adapters below need the one that passes through it": {
            _OUTPUT: "with torch.no_grad():\n            output = self.sublayer(*args)\n        return self.adapter(output)"
        },
        "forward of Adapted returns None: its last line needs a `return`": {
            _OUTPUT: "output = self.sublayer(*args)\n        self.adapter(output)"
        },
        "the sub-layer was copied: wrap the very module that is there": {
            "Adapted(sublayer, adapter)": "Adapted(__import__('copy').deepcopy(sublayer), adapter)"
        },
    },
    variants={
        "over the layers themselves": """
            class Adapted(nn.Module):
                def __init__(self, sublayer, adapter):
                    super().__init__()
                    self.adapter, self.sublayer = adapter, sublayer

                def forward(self, x, *more):
                    return self.adapter(self.sublayer(x, *more))

            def add_adapters(model, bottleneck, places=("self_attn", "mlp")):
                model.requires_grad_(False)
                like = next(model.parameters())
                for layer in model.model.layers:
                    for place in places:
                        adapter = Adapter(layer.input_layernorm.weight.numel(), bottleneck)
                        adapter.to(dtype=like.dtype, device=like.device)
                        layer._modules[place] = Adapted(layer._modules[place], adapter)
        """,
        "by name": """
            class Adapted(nn.Module):
                def __init__(self, sublayer, adapter):
                    super().__init__()
                    self.sublayer = sublayer
                    self.adapter = adapter

                def forward(self, *args, **named):
                    h = self.sublayer(*args, **named)
                    return self.adapter(h)

            def add_adapters(model, bottleneck, places=("self_attn", "mlp")):
                for parameter in model.parameters():
                    parameter.requires_grad = False
                hidden = model.config.hidden_size
                embedding = model.model.embed_tokens.weight
                for name, module in list(model.named_modules()):
                    if name.split(".")[-1] in places:
                        with torch.device(embedding.device):
                            adapter = Adapter(hidden, bottleneck).to(embedding.dtype)
                        model.set_submodule(name, Adapted(module, adapter))
        """,
        "frozen afterwards, the adapters thawed": {
            _FROZEN: "pass",
            _LAST_PLACE: (
                f"{_LAST_PLACE}\n    for name, parameter in model.named_parameters():\n"
                '        parameter.requires_grad_(".adapter." in name)'
            ),
        },
    },
)


# ======================================================================================================================
# 4. Adapted and add_adapters: measured memory
# ======================================================================================================================
def drive_adapted_memory(Adapted, add_adapters, layers, seq, bottleneck, places, dtype):
    """Put adapters into a tiny LLaMA and take a training step; return what is there after it, and what forward kept.

    The adapters are made by an `Adapter` of our own, so that this does not depend on an earlier exercise.
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    from peftlab.llama import Llama, LlamaConfig
    from peftlab.memory import tensors_of_step

    class Bottleneck(nn.Module):
        def __init__(self, hidden, bottleneck):
            super().__init__()
            self.down, self.up = nn.Linear(hidden, bottleneck), nn.Linear(bottleneck, hidden)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, h):
            return h + self.up(F.gelu(self.down(h)))

    returned = Adapted(nn.Linear(12, 12), Bottleneck(12, bottleneck))(torch.ones(1, 2, 12))
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    names = getattr(add_adapters, "__globals__", {})
    theirs, names["Adapter"] = names.get("Adapter"), Bottleneck
    model = Llama(LlamaConfig(31, 12, 20, layers, 2, 1)).to(getattr(torch, dtype))
    try:
        add_adapters(model, bottleneck, places)
    finally:
        names["Adapter"] = theirs
    input_ids = torch.arange(2 * seq).view(2, seq)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tensors = tensors_of_step(
        lambda: model(input_ids).float().square().mean(), model.parameters(), optimizer, not_counted=[input_ids]
    )
    values = [value for module in model.modules() for value in vars(module).values()]
    attributes = [one for value in values for one in (value if isinstance(value, list) else [value]) if torch.is_tensor(one)]
    kept = [*model.state_dict().values(), *(held.detach() for held in attributes)]
    return tensors | {"returned": "a tensor", "kept": kept}


_MODEL_SAVED = "the bytes that forward saves for backward besides the weights"


def read_adapted_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "kept" not in observation:
        return {"what Adapted's forward returns": observation["returned"]}
    return {
        "what Adapted's forward returns": observation["returned"],
        "the bytes of gradients": total_bytes(observation["gradients"]),
        "the bytes of optimizer state": total_bytes(observation["optimizer state"]),
        _WEIGHTS: total_bytes(observation["kept"]),
        _MODEL_SAVED: total_bytes(observation["saved"]),
    }


def adapted_memory_case(
    generator: torch.Generator, places: Sequence[str] = ("self_attn", "mlp"), dtype: str = "float32", layers: int = 2
) -> dict:
    """Return sizes, no two of them equal."""
    return {
        "layers": layers,
        "seq": between(generator, 8, 13),
        "bottleneck": between(generator, 3, 5),
        "places": list(places),
        "dtype": dtype,
    }


_GATE = (
    "self.adapter = adapter\n        self.gate = nn.Parameter(torch.ones_like(adapter.up.bias))",
    "output = self.sublayer(*args)\n        return self.gate * self.adapter(output)",
)

check_adapted_memory = Exercise(
    spec=[Adapted, add_adapters],
    driver=drive_adapted_memory,
    reading=read_adapted_memory,
    cases=lambda generator: [adapted_memory_case(generator), adapted_memory_case(generator, ["mlp"], "bfloat16")],
    at_most=frozenset({_WEIGHTS, _MODEL_SAVED}),
    # Gradients and optimizer state belong to the adapters, and are counted to the byte.
    tolerance=lambda case: {_WEIGHTS: 64},
    mistakes={
        "the base is left trainable: its gradients and its optimizer state are what adapters are there to save": {
            _FROZEN: "pass"
        },
        "only the wrapped sub-layers are frozen: embedding, norms and head still have gradients": {
            _FROZEN: "pass",
            "sublayer = getattr(layer, place)": "sublayer = getattr(layer, place).requires_grad_(False)",
        },
        "the head is left trainable: its gradient is as large as itself": {
            _FROZEN: _FROZEN.replace("model.parameters()", "model.model.parameters()")
        },
        "the adapters of a bf16 model are in fp32: use the model's dtype": {
            _MOVED: ".to(weight.device)",
            _OUTPUT: "output = self.sublayer(*args)\n        return self.adapter(output.float()).to(output.dtype)",
        },
        "the bottleneck is not the one asked for: the adapters are twice as large as they should be": {
            _NEW_ADAPTER: "Adapter(model.config.hidden_size, 2 * bottleneck)"
        },
        "there are adapters at places that were not asked for": {
            "for place in places:\n": 'for place in ("self_attn", "mlp"):\n'
        },
        "every place has two adapters, one behind the other: one is asked for": {
            _WRAPPED: (
                f"{_WRAPPED}\n            another = {_NEW_ADAPTER}{_MOVED}\n"
                "            setattr(layer, place, Adapted(getattr(layer, place), another))"
            )
        },
        "the sub-layer runs twice in every forward pass, and keeps its activations twice: call it once": {
            _OUTPUT: "return self.sublayer(*args) + (self.adapter(self.sublayer(*args)) - self.sublayer(*args))"
        },
        "there is a learned gate behind the adapter: it has gradients, and keeps the adapter's output": {
            "self.adapter = adapter": _GATE[0],
            _OUTPUT: _GATE[1],
        },
        "the sub-layer's last output is kept as an attribute: it stays in memory until the next one": {
            _OUTPUT: "self.output = self.sublayer(*args)\n        return self.adapter(self.output)"
        },
        "the sub-layer is there twice, once as a copy: wrap the very module that is there": {
            "self.sublayer = sublayer": "self.sublayer, self.untouched = sublayer, __import__('copy').deepcopy(sublayer)"
        },
    },
    variants={
        "over the layers themselves": check_add_adapters.variants["over the layers themselves"],
        "by name": check_add_adapters.variants["by name"],
        "frozen afterwards, the adapters thawed": check_add_adapters.variants["frozen afterwards, the adapters thawed"],
        "computed again in backward": {
            _OUTPUT: (
                "output = self.sublayer(*args)\n"
                "        return torch.utils.checkpoint.checkpoint(self.adapter, output, use_reentrant=False)"
            )
        },
    },
)


# ======================================================================================================================
# 5. How many parameters, and which bottleneck
# ======================================================================================================================
def adapter_parameters(config: LlamaConfig, bottleneck: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return the number of parameters of a LLaMA's adapters: 2 m d + d + m each (Houlsby et al. 2019, section 2.1)."""
    count = 0
    for _ in range(config.num_hidden_layers):
        for _ in places:
            count += config.hidden_size * bottleneck + bottleneck  # down
            count += bottleneck * config.hidden_size + config.hidden_size  # up
    return count


def largest_bottleneck(config: LlamaConfig, budget: int, places: Sequence[str] = ("self_attn", "mlp")) -> int:
    """Return the largest bottleneck whose adapters have, all together, at most `budget` parameters."""
    bottleneck = 0
    while adapter_parameters(config, bottleneck + 1, places) <= budget:
        bottleneck += 1
    if bottleneck == 0:
        raise ValueError(f"{budget} parameters are not enough")
    return bottleneck


def drive_parameters(adapter_parameters, largest_bottleneck, sizes, bottleneck, places, budgets):
    """Count, then ask for the bottleneck of several budgets, the last of which is too small."""
    from peftlab.llama import LlamaConfig

    config = LlamaConfig(**sizes)
    both = adapter_parameters(config, bottleneck)
    seen = {
        "the type of what adapter_parameters returns": type(both).__name__,
        "the number of parameters, at both places": both,
        f"the number of parameters, at places {places}": adapter_parameters(config, bottleneck, tuple(places)),
    }

    def widest(budget, *where):
        try:
            return largest_bottleneck(config, budget, *where)
        except ValueError:
            return "ValueError"

    found = widest(budgets[0])
    return seen | {
        "the type of what largest_bottleneck returns": type(found).__name__,
        f"the largest bottleneck for a budget of {budgets[0]} parameters, at both places": found,
        f"the list of largest bottlenecks for budgets of {budgets} parameters, at places {places}": [
            widest(budget, tuple(places)) for budget in budgets
        ],
    }


def parameters_case(generator: torch.Generator, places: Sequence[str] = ("mlp",), low: int = 3) -> dict:
    """Return a LLaMA's sizes, a bottleneck, and budgets: exactly enough for one, one less, between two, too small for any.

    The budgets come from the formula 2 m d + d + m; the last but one is exactly enough for m = 1. The fourth to sixth tell
    apart those who round to the nearest and those who forget biases where they turn the formula round. Just above half way,
    only the former get one too many. With all of an adapter but `up`'s d biases, who forgets all of these gets one too many,
    and who takes d off once does not; with half of these biases, who takes d off once does, and who forgets down's does not.
    """
    heads = 2 * between(generator, 2, 4)
    hidden = heads * 2 * between(generator, low, low + 2)
    number = (layers := between(generator, 3, 7)) * len(places)
    chosen = between(generator, 10, 15)
    exactly, one_less, above_half = (number * (2 * m * hidden + hidden + m) for m in (chosen, chosen + 2, chosen + 4))
    above_half += number * hidden + 3 * number // 4
    no_bias = number * (chosen + 6) * (2 * hidden + 1)
    half_bias = number * (5 * (2 * hidden + 1) + hidden // 2)
    smallest = number * (3 * hidden + 1)
    return {
        "sizes": {
            "vocab_size": between(generator, 300, 400),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden + between(generator, 3, 20),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
        },
        "bottleneck": between(generator, 17, 29),
        "places": list(places),
        "budgets": [2 * exactly + 3, exactly, one_less - 1, above_half, no_bias, half_bias, smallest, smallest - 1],
    }


_DOWN_COUNT = "config.hidden_size * bottleneck + bottleneck"
_UP_COUNT = "bottleneck * config.hidden_size + config.hidden_size"
_FITS = "adapter_parameters(config, bottleneck + 1, places) <= budget"
_TOO_SMALL = 'if bottleneck == 0:\n        raise ValueError(f"{budget} parameters are not enough")'
_SEARCH = f"while {_FITS}:\n        bottleneck += 1"
_TURNED = "d, adapters = config.hidden_size, config.num_hidden_layers * len(places)\n    bottleneck = "

check_adapter_parameters = Exercise(
    spec=[adapter_parameters, largest_bottleneck],
    driver=drive_parameters,
    cases=lambda generator: [parameters_case(generator), parameters_case(generator, ("mlp", "self_attn"))],
    mistakes={
        "the biases are not counted: each adapter has d + m of them": {
            _DOWN_COUNT: "config.hidden_size * bottleneck",
            _UP_COUNT: "bottleneck * config.hidden_size",
        },
        "both biases are counted with the hidden size: down's has m numbers": {
            _DOWN_COUNT: "config.hidden_size * bottleneck + config.hidden_size"
        },
        "only one of the two matrices is counted: down and up have m d numbers each": {
            _UP_COUNT: "config.hidden_size",
        },
        "only one layer is counted: every decoder layer has its own adapters": {
            "for _ in range(config.num_hidden_layers):": "for _ in range(1):"
        },
        "one adapter a layer is counted, whatever `places` says": {"for _ in places:": "for _ in range(1):"},
        "two adapters a layer are counted, whatever `places` says": {"for _ in places:": "for _ in range(2):"},
        "the MLP's adapter is counted with the MLP's inner width: it stands behind down_proj, where there are d features": {
            "for _ in places:\n": "for place in places:\n            d = config.intermediate_size if place == 'mlp' "
            "else config.hidden_size\n",
            _DOWN_COUNT: "d * bottleneck + bottleneck",
            _UP_COUNT: "bottleneck * d + d",
        },
        "the number of parameters is a float: count in whole numbers": {"return count": "return float(count)"},
        "a budget that is used up exactly fits as well: at most, not less than": {_FITS: _FITS.replace("<=", "<")},
        "the bottleneck is rounded to the nearest: the budget is the most there may be, so round down": {
            _SEARCH: (
                "fixed = config.num_hidden_layers * len(places) * config.hidden_size\n    bottleneck = round((budget - fixed) "
                "/ (config.num_hidden_layers * len(places) * (2 * config.hidden_size + 1)))"
            ),
        },
        "up's biases are forgotten where the formula is turned round: each adapter's d of them come off the budget first": {
            _SEARCH: f"{_TURNED}budget // (adapters * (2 * d + 1))"
        },
        "up's biases come off the budget once: each adapter has d of them": {
            _SEARCH: f"{_TURNED}(budget - d) // (adapters * (2 * d + 1))"
        },
        "down's biases are forgotten where the formula is turned round: a feature of the bottleneck takes 2 d + 1 numbers": {
            _SEARCH: f"{_TURNED}(budget // adapters - d) // (2 * d)"
        },
        "the budget is for one layer: it is for all of them together": {
            _FITS: _FITS + " * config.num_hidden_layers",
        },
        "largest_bottleneck ignores `places`": {_FITS: "adapter_parameters(config, bottleneck + 1) <= budget"},
        "a budget too small for a bottleneck of 1 goes unnoticed: raise a ValueError": {_TOO_SMALL: "pass"},
        "the bottleneck is a float: use // where you divide": {
            _SEARCH: (
                "fixed = config.num_hidden_layers * len(places) * config.hidden_size\n    bottleneck = float((budget - fixed) "
                "// (config.num_hidden_layers * len(places) * (2 * config.hidden_size + 1)))"
            ),
        },
    },
    variants={
        "in closed form": """
            def adapter_parameters(config, bottleneck, places=("self_attn", "mlp")):
                d, m = config.hidden_size, bottleneck
                return config.num_hidden_layers * len(places) * (2 * m * d + d + m)

            def largest_bottleneck(config, budget, places=("self_attn", "mlp")):
                d = config.hidden_size
                each = budget // (config.num_hidden_layers * len(places))
                if each < 3 * d + 1:
                    raise ValueError("too small")
                return (each - d) // (2 * d + 1)
        """,
        "shape by shape, and bisection": """
            def adapter_parameters(config, bottleneck, places=("self_attn", "mlp")):
                shapes = [(bottleneck, config.hidden_size), (bottleneck,), (config.hidden_size, bottleneck), (config.hidden_size,)]
                return sum(torch.Size(shape).numel() for shape in shapes) * len(list(places)) * config.num_hidden_layers

            def largest_bottleneck(config, budget, places=("self_attn", "mlp")):
                if adapter_parameters(config, 1, places) > budget:
                    raise ValueError(f"not even a bottleneck of 1: {budget}")
                low, high = 1, 2
                while adapter_parameters(config, high, places) <= budget:
                    low, high = high, 2 * high
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if adapter_parameters(config, middle, places) <= budget else (low, middle)
                return low
        """,
        "from two points of the line": {
            _SEARCH: (
                "first, second = (adapter_parameters(config, m, places) for m in (1, 2))\n"
                "    bottleneck = max(0, 1 + (budget - first) // (second - first))"
            ),
        },
    },
)


# ======================================================================================================================
# 6. AdapterBank and activate: several adapters in one place
# ======================================================================================================================
class AdapterBank(nn.Module):
    """Several adapters in one place, by name; those that are active work one after the other (Pfeiffer et al. 2020, MAD-X)."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []

    def forward(self, h: Tensor) -> Tensor:
        """Return h after the active adapters, in their order; h itself if there are none."""
        for name in self.active:
            adapter = self.adapters[name]
            h = adapter(h)
        return h


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters work, in this order, in every bank of the model, and the last of them learn."""
    banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
    for bank in banks:
        for name in names:
            if name not in bank.adapters:
                raise ValueError(f"there is no adapter {name!r}")
    for bank in banks:
        bank.active = list(names)
        for name, adapter in bank.adapters.items():
            learns = len(names) > 0 and name == names[-1]
            adapter.requires_grad_(learns)


def drive_bank(AdapterBank, activate, weights, x, banks, calls):
    """Put two banks into a small model, the first of them deep inside, and activate one selection after the other.

    The model's first layer stays trainable, its third is frozen. At last, adapters of another model are switched on.
    """
    import contextlib

    import torch
    import torch.nn.functional as F
    from torch import nn

    hidden = x.shape[-1]

    class Bend(nn.Module):  # the least of an adapter: here what it does inside does not matter, but its order does
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(hidden, hidden)

        def forward(self, h):
            return h + F.gelu(self.line(h))

    first, last = AdapterBank(), AdapterBank()
    returned = last(x)
    if not torch.is_tensor(returned):
        return {"returned": repr(returned)[:100]}
    inside = nn.Sequential(nn.Sequential(first))
    model = nn.Sequential(nn.Linear(hidden, hidden), inside, nn.Linear(hidden, hidden), last).to(x.dtype)
    new, plain = model(x).detach(), model[2](model[0](x)).detach()
    for bank, names in zip((first, last), banks):
        for name in names:
            bank.adapters[name] = Bend().to(x.dtype)
    if len(list(model.parameters())) == 4 + 2 * sum(map(len, banks)):
        nn.utils.vector_to_parameters(weights.clone(), model.parameters())
    model[2].requires_grad_(False)
    seen = {"returned": "a tensor", "new": new, "plain": plain, "names": sorted(model.state_dict()), "calls": []}
    for names in calls:
        try:
            activate(model, *names)
            raised = "nothing"
        except Exception as error:
            raised = type(error).__name__
        model.zero_grad()
        try:
            output = model(x)
        except Exception as error:
            output = torch.zeros(0)
            raised = f"{raised}, and {type(error).__name__} in the forward pass that follows"
        if output.requires_grad and raised == "nothing":
            output.square().sum().backward()
        seen["calls"].append(
            {
                "raised": raised,
                "output": output.detach(),
                "trainable": sorted(name for name, p in model.named_parameters() if p.requires_grad),
                "gradients": [name for name, p in model.named_parameters() if p.grad is not None],
            }
        )
    other = nn.Sequential(AdapterBank())
    other[0].adapters["en"] = Bend().to(x.dtype)
    try:
        activate(other, "en")
        seen["at last"] = model(x).detach()
    except Exception as error:
        seen["at last"] = type(error).__name__
    with contextlib.suppress(Exception):
        activate(other)  # a list that belongs to the class would be there when the check is run again
    return seen


_AT_LAST = "the output of the model after activate(another_model, 'en')"


def read_bank(observation: Observation, case: dict) -> Observation:
    """Name each observation by the call that led to it.

    What is to learn follows from the last call that was not to be refused: before it, everything but the frozen third layer.
    """
    read = {"what AdapterBank's forward returns": observation["returned"]}
    if "names" not in observation:
        return read
    read |= {
        "a new bank leaves everything as it is": torch.equal(observation["new"], observation["plain"]),
        "the list of names in the state dict": observation["names"],
    }
    learn = {name for name in observation["names"] if not name.startswith("2.")}
    for names, seen in zip(case["calls"], observation["calls"]):
        if all(name in bank for bank in case["banks"] for name in names):
            learner = names[-1] if names else "none"
            learn = {name for name in observation["names"] if name.startswith("0.") or f".adapters.{learner}." in name}
        call = f"activate(model, {', '.join(map(repr, names))})" if names else "activate(model)"
        read |= {
            f"the error of {call}": seen["raised"],
            f"the output after {call}": seen["output"],
        }
        for what, found in (("requires", set(seen["trainable"])), ("gets", set(seen["gradients"]))):
            read[f"the list of what wrongly {what} a gradient after {call}"] = sorted(found - learn)
            if what == "requires" or seen["raised"] == "nothing":  # after an error there is no backward pass
                read[f"the list of what wrongly {what} no gradient after {call}"] = sorted(learn - found)
    return read | {_AT_LAST: observation["at last"]}


_IN_BANKS = [["reviews", "fr", "en", "de"], ["en", "de", "reviews", "sw"]]


def bank_case(generator: torch.Generator, calls: list[list[str]], dtype: torch.dtype = torch.float32) -> dict:
    """Return weights for the small model's two layers and the adapters in its two banks, and inputs."""
    hidden = between(generator, 7, 9)
    return {
        "weights": normal(generator, (2 + sum(map(len, _IN_BANKS))) * (hidden * hidden + hidden)).to(dtype) * 0.5,
        "x": normal(generator, 3, hidden).to(dtype),
        "banks": _IN_BANKS,
        "calls": calls,
    }


# "fr" is missing in the last bank only, "sw" in the first only; a missing name comes first or last.
_CALLS = [["en", "reviews"], ["reviews", "fr"], ["fr", "reviews"], ["sw", "reviews"], ["reviews", "sw"]]
_CALLS += [["reviews", "en"], ["de", "en", "reviews"], []]
_STACK = "h = adapter(h)"
_BANKS = "banks = [module for module in model.modules() if isinstance(module, AdapterBank)]"
_UNKNOWN = 'if name not in bank.adapters:\n                raise ValueError(f"there is no adapter {name!r}")'
_ACTIVE = "bank.active = list(names)"
_LEARNS = "len(names) > 0 and name == names[-1]"

check_adapter_bank = Exercise(
    spec=[AdapterBank, activate],
    driver=drive_bank,
    reading=read_bank,
    cases=lambda generator: [bank_case(generator, _CALLS)],
    # Everybody does the same operations; the outputs are of size 1 to 300.
    tolerance=lambda case: {
        name: 1e4 * torch.finfo(case["x"].dtype).eps
        for names in case["calls"]
        for name in [f"the output after activate(model{''.join(f', {name!r}' for name in names)})", _AT_LAST]
    },
    mistakes={
        "the active adapters work in the opposite order: the first name comes first": {
            "for name in self.active:": "for name in reversed(self.active):"
        },
        "the active adapters work in the order in which they were put in: the order of the names counts": {
            "for name in self.active:": "for name in [name for name in self.adapters if name in self.active]:"
        },
        "the active adapters work side by side, each on the bank's input: stacked, each reads what the one before it gives": {
            "for name in self.active:": "entering = h\n        for name in self.active:",
            _STACK: "h = h + adapter(entering) - entering",
        },
        "h is added once more behind each adapter: the residual connection is inside": {_STACK: "h = h + adapter(h)"},
        "only the last active adapter works: all of them do, one behind the other": {
            "for name in self.active:": "for name in self.active[-1:]:"
        },
        "forward of AdapterBank returns None: its last line needs a `return`": {"return h": "h"},
        "all adapters work, active or not": {"for name in self.active:": "for name in self.adapters:"},
        "the adapters are in a plain dict, where neither an optimizer nor a state dict finds them: use nn.ModuleDict": {
            "nn.ModuleDict()": "{}"
        },
        "every active adapter learns: only the last one does, those below it are finished": {
            _LEARNS: "name in names",
        },
        "the first of the active adapters learns: it is the last one, on top of those that are finished": {
            _LEARNS: "len(names) > 0 and name == names[0]"
        },
        "only active adapters are frozen: those that are switched off do not learn either": {
            "adapter.requires_grad_(learns)": "name in names and adapter.requires_grad_(learns)"
        },
        "nothing is frozen: adapters that do not learn must not ask for gradients": {
            "adapter.requires_grad_(learns)": "adapter.requires_grad_(True)"
        },
        "an adapter that was frozen once stays frozen: switch gradients on as well as off": {
            "adapter.requires_grad_(learns)": "learns or adapter.requires_grad_(False)"
        },
        "the whole model is frozen: `activate` freezes adapters in the banks, and leaves all else as it is": {
            "for bank in banks:\n        bank.active": "model.requires_grad_(False)\n    for bank in banks:\n        bank.active"
        },
        "only the model's direct children are searched: a bank may lie deeper, use model.modules()": {
            "model.modules()": "model.children()"
        },
        "only the first bank is switched: every bank of the model is": {_BANKS: _BANKS + "[:1]"},
        "a name that a bank does not have goes unnoticed: raise a ValueError": {
            _UNKNOWN: "pass",
            "adapter = self.adapters[name]": "adapter = self.adapters[name] if name in self.adapters else nn.Identity()",
        },
        "only the last of the names is looked up: any of them may be missing": {
            "for name in names:\n            if": "for name in names[-1:]:\n            if"
        },
        "only the first bank is looked into before the change: any bank may lack a name": {
            "for bank in banks:\n        for name in names:": "for bank in banks[:1]:\n        for name in names:"
        },
        "only the last bank is looked into before the change: any bank may lack a name": {
            "for bank in banks:\n        for name in names:": "for bank in banks[-1:]:\n        for name in names:"
        },
        "a refused call has changed some of the banks already: look into all of them before the first change": {
            'raise ValueError(f"there is no adapter {name!r}")\n    for bank in banks:\n        bank.active': (
                'raise ValueError(f"there is no adapter {name!r}")\n        bank.active'
            ),
        },
        "a bank is switched before its names are looked up: a refused call must leave everything as it was": {
            "for bank in banks:\n        for name in names:": "for bank in banks:\n        bank.active = list(names)\n"
            "        for name in names:",
        },
        "the names add up from call to call: each call says all that is active": {_ACTIVE: "bank.active += names"},
        "`active` belongs to the class, so that all models share one list: make it in __init__": {
            "    def __init__(self):": "    active = []\n\n    def __init__(self):",
            "self.active: list[str] = []": "pass",
            _ACTIVE: "bank.active[:] = names",
        },
        "activate(model) without a name leaves everything as it was: it switches all adapters off": {
            _BANKS: f"if not names:\n        return\n    {_BANKS}"
        },
    },
    variants={
        "early return, and a tuple": """
            class AdapterBank(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.active = ()
                    self.adapters = nn.ModuleDict({})

                def forward(self, h):
                    if not self.active:
                        return h
                    return nn.Sequential(*(self.adapters[name] for name in self.active))(h)

            def activate(model, *names):
                banks = [module for module in model.modules() if type(module) is AdapterBank]
                if any(set(names) - set(bank.adapters) for bank in banks):
                    raise ValueError(f"some bank lacks one of {names}")
                for bank in banks:
                    bank.active = names
                    bank.adapters.requires_grad_(False)
                    if names:
                        bank.adapters[names[-1]].requires_grad_(True)
        """,
        "functools.reduce": {
            "for name in self.active:\n            adapter = self.adapters[name]\n            h = adapter(h)\n        return h": (
                "import functools\n        return functools.reduce(lambda h, name: self.adapters[name](h), self.active, h)"
            ),
        },
        "one parameter at a time": {
            "adapter.requires_grad_(learns)": (
                "for parameter in adapter.parameters():\n                parameter.requires_grad = learns"
            ),
            _LEARNS: "list(names)[-1:] == [name]",
        },
    },
)


# ======================================================================================================================
# 7. bug hunt: two adapters made one
# ======================================================================================================================
def join(first: dict[str, Tensor], second: dict[str, Tensor], weights: tuple[float, float]) -> dict[str, Tensor]:
    """Return the state dict of one adapter whose change is w1 times the first one's plus w2 times the second one's.

    The bottlenecks stand side by side. GELU works on each of their features by itself, so it does not notice; the weights go
    behind it, into `up`.
    """
    w1, w2 = weights
    rows = [first["down.weight"], second["down.weight"]]
    offsets = [first["down.bias"], second["down.bias"]]
    columns = [w1 * first["up.weight"], w2 * second["up.weight"]]
    up_bias = w1 * first["up.bias"] + w2 * second["up.bias"]
    return {
        "down.weight": torch.cat(rows, dim=0),
        "down.bias": torch.cat(offsets, dim=0),
        "up.weight": torch.cat(columns, dim=1),
        "up.bias": up_bias,
    }


def drive_join(join, first, second, weights, h):
    """Return the joined adapter's tensors, or what came instead, and whether what was given is as it was."""
    import torch

    given = [tensor.clone() for adapter in (first, second) for tensor in adapter.values()]
    first, second = ({name: tensor.clone() for name, tensor in adapter.items()} for adapter in (first, second))
    joined = join(first, second, tuple(weights))
    if not isinstance(joined, dict) or not all(map(torch.is_tensor, joined.values())):
        return {"returned": repr(joined)[:100]}
    now = [tensor for adapter in (first, second) for tensor in adapter.values()]
    return {
        "returned": "a dict of tensors",
        "joined": {str(name): tensor.detach().clone() for name, tensor in joined.items()},
        "unchanged": all(map(torch.equal, given, now)),
    }


def change(adapter: dict[str, Tensor], h: Tensor) -> Tensor:
    """Return what an adapter adds to h, in double precision."""
    down, down_bias, up, up_bias = (
        adapter[f"{part}.{kind}"].double() for part in ("down", "up") for kind in ("weight", "bias")
    )
    return F.gelu(h.double() @ down.T + down_bias) @ up.T + up_bias


def read_join(observation: Observation, case: dict) -> Observation:
    """Turn the joined adapter into the change that it makes: in which order its features stand is free."""
    read = {"what join returns": observation["returned"]}
    if "joined" not in observation:
        return read
    joined = observation["joined"]
    shapes = {name: list(tensor.shape) for name, tensor in sorted(joined.items())}
    read |= {
        "the shapes by name": shapes,
        "the dtypes": sorted({str(tensor.dtype) for tensor in joined.values()}),
        "what was given is left as it was": observation["unchanged"],
    }
    width = sum(len(case[adapter]["down.bias"]) for adapter in ("first", "second"))
    hidden = len(case["first"]["up.bias"])
    right = {"down.bias": [width], "down.weight": [width, hidden], "up.bias": [hidden], "up.weight": [hidden, width]}
    if shapes != right:
        return read
    return read | {"the change that the joined adapter makes": change(joined, case["h"])}


def join_case(
    generator: torch.Generator, widths: tuple[int, int], weights: list[float], dtype: torch.dtype = torch.float32
) -> dict:
    """Return two adapters of these widths, and inputs to try them on."""
    hidden = between(generator, 9, 11)
    case: dict = {"weights": weights, "h": normal(generator, 30, hidden)}
    for name, width in zip(("first", "second"), widths):
        case[name] = {
            "down.weight": normal(generator, width, hidden, dtype=dtype) * (1.5 / math.sqrt(hidden)),
            "down.bias": normal(generator, width, dtype=dtype),
            "up.weight": normal(generator, hidden, width, dtype=dtype),
            "up.bias": normal(generator, hidden, dtype=dtype),
        }
    return case


def join_tolerance(case: dict) -> dict[str, float]:
    """Only `up` is computed: the product with a weight rounds once, the sum of the biases once more, and theirs once.

    The change itself is summed in double precision, over features in any order: a sum of n terms is off by n u of their sizes.
    """
    total = summed = 0.0
    for weight, adapter in zip(case["weights"], (case["first"], case["second"])):
        down, down_bias, up, up_bias = (
            adapter[f"{part}.{kind}"].double() for part in ("down", "up") for kind in ("weight", "bias")
        )
        bent = F.gelu(case["h"].double() @ down.T + down_bias).abs()
        sizes = case["h"].double().abs() @ down.abs().T + down_bias.abs()  # |gelu(z)| <= |z|, and its slope is below 1.2
        total += abs(weight) * (bent @ up.abs().T + up_bias.abs()).max().item()
        summed += abs(weight) * (1.2 * sizes @ up.abs().T + up_bias.abs()).max().item()
    terms = case["h"].shape[-1] + sum(len(case[adapter]["down.bias"]) for adapter in ("first", "second"))
    # Half precision: every entry of `up` is off by u at most, up or down; 2 u is the bound, and it is below one percent.
    rounded = torch.finfo(case["first"]["up.bias"].dtype).eps * total
    return {"the change that the joined adapter makes": rounded + terms * torch.finfo(torch.float64).eps * summed}


_ROWS = '[first["down.weight"], second["down.weight"]]'
_OFFSETS = '[first["down.bias"], second["down.bias"]]'
_COLUMNS = '[w1 * first["up.weight"], w2 * second["up.weight"]]'
_UP_BIAS = 'w1 * first["up.bias"] + w2 * second["up.bias"]'
_W = "w1, w2 = weights"
_RETURN_JOINED = """return {
        "down.weight": torch.cat(rows, dim=0),
        "down.bias": torch.cat(offsets, dim=0),
        "up.weight": torch.cat(columns, dim=1),
        "up.bias": up_bias,
    }"""

check_join = Exercise(
    spec=[join],
    driver=drive_join,
    reading=read_join,
    cases=lambda generator: [
        join_case(generator, (4, 4), [0.7, 0.6]),
        join_case(generator, (3, 5), [1.3, -0.4]),
    ],
    tolerance=join_tolerance,
    mistakes={
        "the parameters were averaged: between them stands GELU, so that is not the average of what the adapters do": {
            _RETURN_JOINED: "return {name: w1 * first[name] + w2 * second[name] for name in first}"
        },
        "the weights are applied before GELU, in `down`: GELU(w x) is not w GELU(x), so they belong into `up`": {
            _ROWS: '[w1 * first["down.weight"], w2 * second["down.weight"]]',
            _OFFSETS: '[w1 * first["down.bias"], w2 * second["down.bias"]]',
            _COLUMNS: '[first["up.weight"], second["up.weight"]]',
        },
        "the weights are shared out as roots between down and up: that works for a product, not around GELU": {
            _W: f"{_W}\n    r1, r2 = abs(w1) ** 0.5, abs(w2) ** 0.5",
            _ROWS: '[r1 * first["down.weight"], r2 * second["down.weight"]]',
            _OFFSETS: '[r1 * first["down.bias"], r2 * second["down.bias"]]',
            _COLUMNS: '[r1 * first["up.weight"], (r2 if w2 > 0 else -r2) * second["up.weight"]]',
        },
        "the weights are left out": {_W: "w1 = w2 = 1.0"},
        "the weights are divided by their sum: use them as they are": {
            _W: f"{_W}\n    w1, w2 = w1 / (w1 + w2), w2 / (w1 + w2)"
        },
        "the weights have changed places": {_W: "w2, w1 = weights"},
        "up.bias is not weighted: it is a part of the change": {_UP_BIAS: 'first["up.bias"] + second["up.bias"]'},
        "up.bias was put side by side: it has `hidden` numbers, and is added": {
            _UP_BIAS: 'torch.cat([w1 * first["up.bias"], w2 * second["up.bias"]])'
        },
        "the features of down and of up stand in different orders": {
            _COLUMNS: '[w2 * second["up.weight"], w1 * first["up.weight"]]'
        },
        "down's biases were added up: each feature of the bottleneck keeps its own, so they stand side by side": {
            "torch.cat(offsets, dim=0)": "offsets[0] + offsets[1]"
        },
        "down.weight and up.weight are stacked the wrong way: down grows by rows, up by columns": {
            "torch.cat(rows, dim=0)": "torch.cat(rows, dim=1)",
            "torch.cat(columns, dim=1)": "torch.cat(columns, dim=0)",
        },
        "the result is in fp64: keep the adapters' dtype": {
            "torch.cat(columns, dim=1)": "torch.cat(columns, dim=1).double()",
            '"up.bias": up_bias': '"up.bias": up_bias.double()',
        },
        "the adapters given were changed: make new tensors": {
            _COLUMNS: '[first["up.weight"].mul_(w1), second["up.weight"].mul_(w2)]'
        },
    },
    variants={
        "the second first": {
            _ROWS: '[second["down.weight"], first["down.weight"]]',
            _OFFSETS: '[second["down.bias"], first["down.bias"]]',
            _COLUMNS: '[w2 * second["up.weight"], w1 * first["up.weight"]]',
        },
        "into empty tensors": """
            def join(first, second, weights):
                (m1, d), m2 = first["down.weight"].shape, second["down.weight"].shape[0]
                new = first["down.weight"].new_empty
                joined = {"up.weight": new(d, m1 + m2), "down.weight": new(m1 + m2, d), "down.bias": new(m1 + m2)}
                for where, adapter, weight in ((slice(0, m1), first, weights[0]), (slice(m1, None), second, weights[1])):
                    joined["down.weight"][where] = adapter["down.weight"]
                    joined["down.bias"][where] = adapter["down.bias"]
                    joined["up.weight"][:, where] = adapter["up.weight"] * weight
                joined["up.bias"] = sum(weight * adapter["up.bias"] for weight, adapter in zip(weights, (first, second)))
                return joined
        """,
        "the weights multiplied in double precision": {
            _COLUMNS: (
                '[(w1 * first["up.weight"].double()).to(first["up.weight"].dtype), '
                '(w2 * second["up.weight"].double()).to(first["up.weight"].dtype)]'
            ),
            _UP_BIAS: ('(w1 * first["up.bias"].double() + w2 * second["up.bias"].double()).to(first["up.bias"].dtype)'),
        },
        "features shuffled": {
            _RETURN_JOINED: (
                "order = torch.randperm(sum(map(len, rows)))\n    return {'down.weight': torch.vstack(rows)[order], "
                "'down.bias': torch.hstack(offsets)[order], 'up.weight': torch.hstack(columns)[:, order], 'up.bias': up_bias}"
            )
        },
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
