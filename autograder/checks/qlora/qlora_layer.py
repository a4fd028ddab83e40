"""LoRA on a quantized base."""

import math

import torch
from torch import Tensor, nn

from autograder.cases import EPS, between, normal, total_bytes
from autograder.checks.qlora.cases import coarse, unit_rows
from autograder.drive import Observation
from autograder.exercise import Exercise


class QLoRALinear(nn.Module):
    """y = base(x) + (alpha / rank) B A x; the factors stored in `dtype`, the products computed in the dtype of x."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.base = base
        out_features, in_features = base.shape
        stored = {"dtype": dtype, "device": base.packed.device}
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **stored))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **stored))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        compressed = torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))
        update = torch.einsum("...r,or->...o", compressed, self.lora_B.to(x.dtype))
        return self.base(x) + self.scaling * update


def qlora_layer_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, stored: str = "float32") -> dict:
    """Return a base, factors and an input of random shapes; in 16 bits such that right answers are exact."""
    out_features = between(generator, 40, 50)
    in_features = out_features + between(generator, 40, 60)
    rank, tokens = between(generator, 3, 4), 2 * between(generator, 10, 15)
    exact = dtype.itemsize == 2
    draw = (lambda *shape: coarse(generator, *shape)) if exact else (lambda *shape: normal(generator, *shape))
    x = unit_rows(generator, tokens, in_features) if exact else normal(generator, tokens, in_features)
    gradient = normal(generator, tokens, out_features)
    if exact:
        gradient = torch.zeros(tokens, out_features)
        gradient[torch.arange(tokens), torch.randint(0, out_features, (tokens,), generator=generator)] = 1.0
    return {
        "weight": draw(out_features, in_features),
        "lora_A": draw(rank, in_features),
        "lora_B": draw(out_features, rank),
        "alpha": rank * (0.5 if exact else 2.2 + torch.rand((), generator=generator).item()),
        "stored": stored,
        "x": x.view(2, -1, in_features).to(dtype),
        "output_gradient": gradient.view(2, -1, out_features).to(dtype),
    }


def drive_qlora_layer(QLoRALinear, weight, lora_A, lora_B, alpha, stored, x, output_gradient):
    """Put the layer on a base that multiplies by `weight` and keeps nothing; take a training step with it."""
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ weight.to(x.dtype).T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ weight.to(gradient.dtype)

    class Base(nn.Module):
        def __init__(self, device="cpu"):
            super().__init__()
            self.register_buffer("packed", torch.zeros(4, 1, dtype=torch.uint8, device=device))
            self.shape = tuple(weight.shape)

        def forward(self, x):
            return Product.apply(x)

    dtype = getattr(torch, stored)
    base = Base()
    given_dtype = () if stored == "float32" else (dtype,)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # `torch.empty` then holds NaN, not what was in memory
    try:
        layer = QLoRALinear(base, lora_A.shape[0], alpha, *given_dtype)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    factors = [layer.lora_A, layer.lora_B]
    seen = {
        "the list of shapes of lora_A and lora_B": [list(factor.shape) for factor in factors],
        "the list of dtypes of lora_A and lora_B": [str(factor.dtype) for factor in factors],
        "the list of parameters that require a gradient": sorted(n for n, p in layer.named_parameters() if p.requires_grad),
        "lora_B is zero at the start": not factors[1].detach().any().item(),
        "start": factors[0].detach().clone(),
        "the layer holds the base itself": layer.base is base,
        "the attribute `scaling`": float(layer.scaling) if hasattr(layer, "scaling") else None,
    }
    if seen["the list of shapes of lora_A and lora_B"] != [list(lora_A.shape), list(lora_B.shape)]:
        return seen
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    x.requires_grad_(True)
    output = layer(x)
    seen |= {"the dtype of the output": str(output.dtype), "the output": output.detach()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.0)
    loss = lambda: (layer(x).float() * output_gradient.float()).sum()  # noqa: E731
    tensors = tensors_of_step(loss, layer.parameters(), optimizer, not_counted=[x, output_gradient, weight])
    seen |= {
        "the gradient of x": x.grad,
        "the gradient of lora_A": layer.lora_A.grad,
        "the gradient of lora_B": layer.lora_B.grad,
        "saved": tensors["saved"],
    }
    elsewhere = QLoRALinear(Base("meta"), 2, 4.0)
    return seen | {
        "the list of devices of the factors on a base on 'meta'": [elsewhere.lora_A.device.type, elsewhere.lora_B.device.type]
    }


_SPREAD_OF_A = "log2 of lora_A's spread at the start over that of kaiming_uniform_ with a=sqrt(5)"
_SAVED = "bytes that forward saves for backward besides x and the factors"


def read_qlora_layer(observation: Observation, case: dict) -> Observation:
    """Count the saved bytes; the loss's own, a product in fp32, are the same for everybody.

    A spread that is no number, or off by a million, is that of what was in memory: one value for all of these.
    """
    read = {name: value for name, value in observation.items() if name not in ("saved", "start")}
    spread = observation["start"].double().std().item() * math.sqrt(3 * case["lora_A"].shape[1])
    if spread == 0:
        read[_SPREAD_OF_A] = -99.0
    else:
        read[_SPREAD_OF_A] = math.log2(spread) if 1e-6 < spread < 1e6 else 99.0
    if "saved" in observation:
        read[_SAVED] = total_bytes(observation["saved"])
    return read


def qlora_layer_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers, as in unit 08; in 16 bits the output and the factors' gradients are exact.

    (In 16 bits every row of x has a single number, so nothing is rounded but the sum of base and update, the same in every order.) Two
    copies of the factors, and a scale, may be saved.
    """
    dtype = case["x"].dtype
    rank, in_features = case["lora_A"].shape
    out_features = case["lora_B"].shape[0]
    copies = 2 * dtype.itemsize * rank * (in_features + out_features) + 64
    scaling = case["alpha"] / rank
    A, B, W, x, g = (case[name].double().abs() for name in ("lora_A", "lora_B", "weight", "x", "output_gradient"))
    dense = W + scaling * B @ A
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    unit = (in_features + out_features + len(x) + rank + 4) * torch.finfo(dtype).eps
    # The standard deviation of 250 numbers or more scatters by 4%; 0.6 doublings are 50%.
    tolerance = {"the gradient of x": unit * (g @ dense).max().item(), _SAVED: copies, _SPREAD_OF_A: 0.6}
    tolerance |= {"the attribute `scaling`": 2 * EPS * scaling}  # a quotient, rounded once if it is a tensor
    if dtype.itemsize == 2:
        return tolerance
    return tolerance | {
        "the output": unit * (x @ dense.T).max().item(),
        "the gradient of lora_A": unit * scaling * (B.T @ g.T @ x).max().item(),
        "the gradient of lora_B": unit * scaling * (g.T @ (x @ A.T)).max().item(),
    }


_COMPRESSED = 'torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))'
_UPDATE = 'torch.einsum("...r,or->...o", compressed, self.lora_B.to(x.dtype))'
_SUM = "self.base(x) + self.scaling * update"
_INIT_A = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"

check_qlora_layer = Exercise(
    spec=[QLoRALinear],
    cases=lambda generator: [
        qlora_layer_case(generator),
        qlora_layer_case(generator, torch.bfloat16),
        qlora_layer_case(generator, torch.bfloat16, "bfloat16"),
    ],
    driver=drive_qlora_layer,
    reading=read_qlora_layer,
    tolerance=qlora_layer_tolerance,
    at_most=frozenset({_SAVED}),
    mistakes={
        "x is cast to the factors' dtype, and that copy is kept for backward: cast the factors, which are small": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", x.to(self.lora_A.dtype), self.lora_A)',
            _UPDATE: 'torch.einsum("...r,or->...o", compressed, self.lora_B).to(x.dtype)',
        },
        "the output is in the factors' dtype: all that follows would be computed in it, and take its bytes": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", x.to(self.lora_A.dtype), self.lora_A)',
            _UPDATE: 'torch.einsum("...r,or->...o", compressed, self.lora_B)',
        },
        "the factors are stored in 16 bits whatever `dtype` says: small updates would be rounded away": {
            '"dtype": dtype,': '"dtype": torch.bfloat16,',
        },
        "`dtype` is not used: the factors are stored in it": {'"dtype": dtype,': '"dtype": torch.float32,'},
        "the factors are cast and detached on the way: they get no gradient": {
            "self.lora_A.to(x.dtype)": "self.lora_A.detach().to(x.dtype)",
        },
        "the update is not scaled: multiply it by alpha / rank": {_SUM: "self.base(x) + update"},
        "the scale is upside down: it should be alpha / rank": {"= alpha / rank": "= rank / alpha"},
        "the scale is alpha alone: it should be alpha / rank": {"= alpha / rank": "= alpha"},
        "the scale is rounded down: `//` drops what is left over, so divide with `/`": {"= alpha / rank": "= alpha // rank"},
        "alpha is divided by the root of the rank, as in rsLoRA: here the scale is alpha / rank": {
            "= alpha / rank": "= alpha / rank**0.5",
        },
        "the scale has another name than the docstring gives it: cells further down use `scaling`": {
            "self.scaling = alpha / rank": "self.scale = alpha / rank",
            _SUM: "self.base(x) + self.scale * update",
        },
        "a scaled copy of x is kept for backward: scale the update, which needs no copy of x": {
            _COMPRESSED: 'torch.einsum("...i,ri->...r", self.scaling * x, self.lora_A.to(x.dtype))',
            _SUM: "self.base(x) + update",
        },
        "the base's output is missing: the update is added to it": {_SUM: "self.scaling * update"},
        "the base's output is scaled as well: alpha / rank belongs to the update alone": {
            _SUM: "self.scaling * (self.base(x) + update)"
        },
        "the base is computed without gradients: the layers below would only learn through the update": {
            _SUM: "self.base(x).detach() + self.scaling * update",
        },
        "the update does not pass its gradient on to x: nothing may be detached on the way": {
            '"...i,ri->...r", x,': '"...i,ri->...r", x.detach(),',
        },
        "lora_B starts at random, so that the model changes before it has learned anything: B starts at zero": {
            _INIT_A: f"{_INIT_A}\n        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))",
        },
        "lora_A and lora_B both start at zero: each then multiplies the other's gradient by zero, for ever": {
            _INIT_A: "nn.init.zeros_(self.lora_A)",
        },
        "lora_A is not initialized: `torch.empty` holds whatever was in memory, so use kaiming_uniform_ with a=sqrt(5)": {
            _INIT_A: "pass",
        },
        "lora_A starts with standard deviation 1: use kaiming_uniform_ with a=sqrt(5), as nn.Linear does": {
            _INIT_A: "nn.init.normal_(self.lora_A)",
        },
        "lora_A starts from kaiming_uniform_ without a=sqrt(5), so about 2.4 times too large": {
            _INIT_A: "nn.init.kaiming_uniform_(self.lora_A)",
        },
        "in and out have changed places: `base.shape` is (out_features, in_features)": {
            "out_features, in_features = base.shape": "in_features, out_features = base.shape",
        },
        "lora_A and lora_B are not on the base's device: create them with `device=base.packed.device`": {
            '"device": base.packed.device': '"device": "cpu"',
        },
        "the update is computed as a whole matrix B A: multiply x by A first, then by B": {
            _COMPRESSED: "self.lora_B.to(x.dtype) @ self.lora_A.to(x.dtype)",
            _UPDATE: "x @ compressed.T",
        },
    },
    variants={
        "matrix products": {
            _COMPRESSED: "x @ self.lora_A.to(x.dtype).T",
            _UPDATE: "compressed @ self.lora_B.to(x.dtype).T",
        },
        "F.linear twice": {
            _COMPRESSED: "torch.nn.functional.linear(x, self.lora_A.type_as(x))",
            _UPDATE: "torch.nn.functional.linear(compressed, self.lora_B.type_as(x))",
        },
        "the small product scaled": {
            _COMPRESSED: 'self.scaling * torch.einsum("...i,ri->...r", x, self.lora_A.to(x.dtype))',
            _SUM: "self.base(x) + update",
        },
        "a fused addition": {_SUM: "torch.add(self.base(x), update, alpha=self.scaling)"},
        "new_empty, and a start by hand": {
            "torch.empty(rank, in_features, **stored)": "base.packed.new_empty((rank, in_features), dtype=dtype)",
            _INIT_A: "nn.init.uniform_(self.lora_A, -(in_features**-0.5), in_features**-0.5)",
        },
    },
)
