"""DoRALinear: what it starts from, and the forward and backward pass."""

import torch

from autograder.checking.cases import normal
from autograder.checking.exercise import Exercise
from autograder.checks.lora_in_practice.dora_linear import (
    ADAPTED,
    MOVED,
    NO_ZERO,
    NORM,
    RETURNED,
    DoRALinear,
    dora_case,
    read_finite,
    relative_error,
    sizes,
    sum_error,
)


def dora_forward_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, **options: object) -> dict:
    """Return a layer and an input (see `dora_case`), and a gradient of the output."""
    case = dora_case(generator, dtype, **options)
    return case | {"output_gradient": normal(generator, 2, 6, case["weight"].shape[0], dtype=dtype)}


def drive_dora_forward(DoRALinear, weight, bias, lora_A, lora_B, magnitude, alpha, x, output_gradient):
    """Build the layer around a base with these weights; return its start, and its output and gradients with these factors."""
    import torch
    from torch import nn

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    base.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    rank = lora_A.shape[0]
    try:
        torch.set_deterministic_debug_mode("warn")  # fills what is left uninitialised with NaN
        layer, other = (DoRALinear(base, rank=rank, alpha=alpha) for _ in range(2))
    finally:
        torch.set_deterministic_debug_mode("default")
    small = nn.Linear(3, 4, dtype=torch.bfloat16)
    try:
        with torch.device("meta"):  # a device without numbers, for all tensors that are created without naming one
            elsewhere = DoRALinear(small, rank=2, alpha=4.0)
    except (
        Exception
    ):  # what was created there is moved to the base's device, which is right too, but cannot be done from "meta"
        elsewhere = DoRALinear(small, rank=2, alpha=4.0)
    parts, there = ([at.lora_A, at.lora_B, at.magnitude] for at in (layer, elsewhere))
    seen = {
        "the list of parameters that are trained": sorted(n for n, p in layer.named_parameters() if p.requires_grad),
        "`base` is the very layer that was given": layer.base is base,
        "the list of shapes of lora_A, lora_B and magnitude": [list(part.shape) for part in parts],
        "the list of their dtypes": [str(part.dtype) for part in parts],
        "the list of their dtypes on a bfloat16 base": [str(part.dtype) for part in there],
        "the list of their devices, where the base's is the CPU and torch's default another,": [p.device.type for p in there],
        "`scaling`": float(layer.scaling),
        "`merged` at the start": bool(layer.merged),
        "lora_A at the start is random": bool(layer.lora_A.isfinite().all()) and not torch.equal(layer.lora_A, other.lora_A),
        "lora_B at the start is zero": not layer.lora_B.any().item(),
        "magnitude at the start": layer.magnitude.detach().clone(),
    }
    if seen["the list of shapes of lora_A, lora_B and magnitude"] != [list(t.shape) for t in (lora_A, lora_B, magnitude)]:
        return seen
    given = x.clone()
    seen["the output at the start (the base's is expected)"] = layer(x).detach().clone()
    with torch.no_grad():
        for part, value in zip(parts, (lora_A, lora_B, magnitude), strict=True):
            part.copy_(value)
    seen["x and the base's weight are left as they were"] = torch.equal(x, given) and torch.equal(base.weight, weight)
    x.requires_grad_(True)
    output = layer(x)
    output.backward(output_gradient)
    seen |= {
        "the output": output.detach(),
        "the output in eval mode": layer.eval()(x).detach(),
        "the gradient of x": x.grad,
        "the gradient of lora_A": layer.lora_A.grad,
        "the gradient of lora_B": layer.lora_B.grad,
        "the gradient of magnitude": layer.magnitude.grad,
    }
    layer.merged = True
    return seen | {"the output while `merged` is True": layer(x).detach()}


def dora_forward_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers: that of the adapted weight, and of the sums in which it stands.

    They hold as well for peft's way to compute it, base(x) + (m / norm - 1) (base(x) - bias) + m / norm * s B A x: to the terms
    come the base's output, and the bias.
    """
    size, dtype = sizes(case), case["weight"].dtype
    x, g = (size[name].reshape(-1, size[name].shape[-1]) for name in ("x", "output_gradient"))
    rescaled = g * size["rescaling"]
    scaling = case["alpha"] / case["lora_A"].shape[0]
    adapted, (out_features, in_features) = relative_error(case), case["weight"].shape
    over_in, over_out = adapted + sum_error(in_features, dtype), adapted + sum_error(out_features, dtype)
    over_tokens = adapted + sum_error(in_features, dtype) + sum_error(out_features, dtype) + sum_error(len(x), dtype)
    products = x @ size["moved"].T + size["bias"]
    start = x @ size["weight"].T + size["bias"]
    output = over_in * (products * size["rescaling"] + start + size["bias"]).max().item()
    return {
        "`scaling`": 1e-9 * scaling,
        "magnitude at the start": sum_error(in_features, dtype) * size["weight"].norm(dim=1).max().item(),
        "the output at the start (the base's is expected)": 3 * over_in * start.max().item(),
        "the output": output,
        "the output in eval mode": output,
        "the gradient of x": over_out * (rescaled @ size["moved"] + g @ size["weight"]).max().item(),
        "the gradient of lora_A": over_tokens * scaling * (size["lora_B"].T @ rescaled.T @ x).max().item(),
        "the gradient of lora_B": over_tokens * scaling * (rescaled.T @ (x @ size["lora_A"].T)).max().item(),
        "the gradient of magnitude": over_tokens * ((g * products).sum(dim=0) / size["norm"]).max().item(),
        "the output while `merged` is True": over_in * start.max().item(),
    }


_MAGNITUDE = "nn.Parameter(base.weight.norm(dim=1))"
_A_START = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"

check_dora_forward = Exercise(
    spec=[DoRALinear],
    cases=lambda generator: [dora_forward_case(generator), dora_forward_case(generator, bias=True, zero_row=True)],
    driver=drive_dora_forward,
    reading=read_finite,
    tolerance=dora_forward_tolerance,
    mistakes={
        "the norm is taken of each column, over the outputs: each row, that is each output, has a norm and a magnitude": {
            _MAGNITUDE: "nn.Parameter(base.weight.norm(dim=0))",
            NORM: "moved.norm(dim=0).detach()",
            ADAPTED: "return self.magnitude / norm * moved",
        },
        "the gradient flows through the norm: detach it, because it counts as a constant": {NORM: "moved.norm(dim=1)"},
        "the norm is that of the whole matrix: take one of each row": {NORM: "moved.norm().detach()"},
        "the norm is squared: take the root of the sum of squares": {NORM: "moved.square().sum(dim=1).detach()"},
        "the output is not multiplied by the magnitude": {ADAPTED: "return (1 / norm)[:, None] * moved"},
        "the output is not divided by the norm of W + s B A": {ADAPTED: "return self.magnitude[:, None] * moved"},
        "the output is divided by the magnitude and multiplied by the norm: it is the other way round": {
            ADAPTED: "return (norm / torch.where(self.magnitude == 0, 1, self.magnitude))[:, None] * moved"
        },
        "the norm is that of W alone, or still that of the start: take that of W + s B A, anew in each call": {
            NORM: "self.base.weight.norm(dim=1)"
        },
        "the norm is that of s B A alone: take that of W + s B A": {NORM: "(moved - self.base.weight).norm(dim=1).detach()"},
        "the update is not scaled: multiply B A by alpha / rank": {MOVED: "self.base.weight + self.lora_B @ self.lora_A"},
        "`scaling` is alpha: it should be alpha / rank": {"= alpha / rank": "= alpha"},
        "`scaling` is alpha / sqrt(rank), as in rsLoRA: here it should be alpha / rank": {
            "= alpha / rank": "= alpha / math.sqrt(rank)"
        },
        "only the update is rescaled: W is multiplied by magnitude / norm as well": {
            ADAPTED: "return self.base.weight + (self.magnitude / norm)[:, None] * (moved - self.base.weight)"
        },
        "the base's output is added to the adapted one, which contains W already": {
            RETURNED: "return self.base(x) + nn.functional.linear(x, self.adapted_weight())"
        },
        "the bias is rescaled: add it afterwards": {
            ADAPTED: "return (self.magnitude / norm)[:, None] * moved, self.magnitude / norm",
            RETURNED: (
                "adapted, rescaling = self.adapted_weight()\n        y = x @ adapted.T\n"
                "        return y if self.base.bias is None else y + rescaling * self.base.bias"
            ),
        },
        "the bias is lost: add it if the base has one": {RETURNED: "return x @ self.adapted_weight().T"},
        "magnitude starts at one: it should start as the norm of each row of the weight": {
            _MAGNITUDE: "nn.Parameter(torch.ones(base.out_features, **like_base))"
        },
        "magnitude starts as the squared norm of each row: take the root": {
            _MAGNITUDE: "nn.Parameter(base.weight.square().sum(dim=1))"
        },
        "magnitude is a plain tensor: only an nn.Parameter is found by the optimizer": {
            _MAGNITUDE: "base.weight.norm(dim=1).requires_grad_()"
        },
        "magnitude has a second axis of size 1: its shape should be (out_features,)": {
            _MAGNITUDE: "nn.Parameter(base.weight.norm(dim=1, keepdim=True))",
            ADAPTED: "return self.magnitude / norm[:, None] * moved",
        },
        "magnitude gets no gradient: detach the norm, and not the quotient magnitude / norm": {
            ADAPTED: "return (self.magnitude / norm).detach()[:, None] * moved"
        },
        "lora_A and lora_B get no gradient: detach the norm, and not W + s B A": {MOVED: f"({MOVED}).detach()"},
        "a row of zeros gives NaN, because its norm is 0: do not divide by 0": {NO_ZERO: "norm"},
        "magnitude gets NaN as its gradient where a row is zero: `torch.where` comes too late after the division, replace the "
        "norm before it": {
            NO_ZERO: "norm",
            ADAPTED: "return torch.where(norm == 0, 0, self.magnitude / norm)[:, None] * moved",
        },
        "the update is applied twice when `merged` is True: return the base's output alone": {"if self.merged:": "if False:"},
        "lora_B starts at random, so the model changes before it has learned anything: B starts at zero": {
            _A_START: _A_START + "\n        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))"
        },
        "lora_A holds whatever was in memory: fill it at random, with kaiming_uniform_": {_A_START: "pass"},
        "lora_A starts at zero, like lora_B: then neither ever gets a gradient": {_A_START: "nn.init.zeros_(self.lora_A)"},
        "the base is not frozen: its weight and bias are trained": {"base.requires_grad_(False)": "base"},
        "magnitude and the factors do not have the base's dtype": {
            '"dtype": base.weight.dtype': '"dtype": torch.float32',
            _MAGNITUDE: "nn.Parameter(base.weight.float().norm(dim=1))",
        },
        "lora_A and lora_B are created on torch's default device: name the base's, `device=base.weight.device`": {
            '"device": base.weight.device': '"device": None'
        },
    },
    variants={
        "as in the paper's section 4.3, on the outputs": {
            RETURNED: (
                "with torch.no_grad():\n"
                "            V = self.base.weight + self.scaling * self.lora_B @ self.lora_A\n"
                "            norm = V.square().sum(1).sqrt().clamp(min=1e-12)\n"
                "        y = x @ self.base.weight.T + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T\n"
                "        y = y * (self.magnitude / norm)\n"
                "        return y if self.base.bias is None else y + self.base.bias"
            )
        },
        "as peft does it": {
            RETURNED: (
                "V = self.base.weight + self.scaling * (self.lora_B @ self.lora_A).detach()\n"
                "        ratio = self.magnitude / torch.linalg.norm(V, dim=1).clamp(min=torch.finfo(V.dtype).tiny)\n"
                "        y = self.base(x)\n"
                "        unbiased = y if self.base.bias is None else y - self.base.bias\n"
                "        lora = (x @ self.lora_A.T) @ self.lora_B.T * self.scaling\n"
                "        return y + (ratio - 1) * unbiased + ratio * lora"
            )
        },
        "something small added to the norm": {NO_ZERO: "norm + 1e-6"},
        "normalized directions, in double precision": {
            ADAPTED: (
                "rows = moved.double() / moved.detach().double().norm(dim=1, keepdim=True).clamp(min=1e-12)\n"
                "        return (self.magnitude.double()[:, None] * rows).to(moved.dtype)"
            )
        },
        "a loop over the rank": {
            MOVED: "self.base.weight + sum(self.scaling * torch.outer(b, a) for a, b in zip(self.lora_A, self.lora_B.T))"
        },
    },
)
