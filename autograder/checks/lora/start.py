"""LoRALinear: where training starts."""

import math

import torch

from autograder.cases import between, normal
from autograder.checks.lora.lora_linear import RETURNED, LoRALinear
from autograder.drive import Observation
from autograder.exercise import Exercise


def start_case(generator: torch.Generator, dtype: str = "float32") -> dict:
    """Return sizes large enough (2,000 entries of A) for their standard deviation to be told from another scale."""
    in_features = between(generator, 250, 300)
    return {
        "in_features": in_features,
        "out_features": between(generator, 90, 110),
        "rank": 8,
        "dtype": dtype,
        "x": normal(generator, 3, in_features),
    }


def drive_start(LoRALinear, in_features, out_features, rank, dtype, x):
    """Build two layers, take one backward pass through one of them, and return what it starts from and what learns."""
    import torch
    from torch import nn

    torch_dtype = getattr(torch, dtype)
    bases = [nn.Linear(in_features, out_features, dtype=torch_dtype) for _ in range(2)]
    try:
        torch.use_deterministic_algorithms(True)  # fills what is left uninitialised with NaN
        layers = [LoRALinear(base, rank=rank, alpha=2.0 * rank) for base in bases]
    finally:
        torch.use_deterministic_algorithms(False)
    x = x.to(torch_dtype)
    layer, base = layers[0], bases[0]
    shapes = [list(layer.lora_A.shape), list(layer.lora_B.shape)]
    trainable = sorted(name for name, parameter in layer.named_parameters() if parameter.requires_grad)
    if shapes != [[rank, in_features], [out_features, rank]]:
        return {"shapes": shapes}
    factors = {"A": layer.lora_A.detach().clone(), "B": layer.lora_B.detach().clone()}
    start, expected = layer(x), base(x)
    start.float().sum().backward()
    with torch.no_grad():
        base.weight += 1  # the layer holds the base itself, so it sees this
    elsewhere = LoRALinear(nn.Linear(3, 4, device="meta"), rank=2, alpha=4.0)
    return {
        **factors,
        "other A": layers[1].lora_A.detach().clone(),
        "start": start.detach(),
        "base": expected.detach(),
        "after": layer(x).detach(),
        "base after": base(x).detach(),
        "gradients": {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
        "shapes": shapes,
        "trainable": trainable,
        "devices": [elsewhere.lora_A.device.type, elsewhere.lora_B.device.type],
    }


_SPREAD = "the base-2 logarithm of lora_A's standard deviation times sqrt(3 * in_features)"


def read_start(observation: Observation, case: dict) -> Observation:
    """Turn the random start into figures that any right answer gives."""
    read = {"the list of shapes of lora_A and lora_B": observation["shapes"]}
    if "A" not in observation:
        return read
    A, B = observation["A"].double(), observation["B"].double()
    spread = A.std().item() * math.sqrt(3 * case["in_features"])
    return read | {
        "the dtype of the factors": [str(A_or_B.dtype) for A_or_B in (observation["A"], observation["B"])],
        "lora_B is zero at the start": not B.any().item(),
        _SPREAD: math.log2(spread) if spread > 0 else -99.0,
        "the layer gives its base's output at the start": torch.equal(observation["start"], observation["base"]),
        "the layer follows its base when that is changed": torch.equal(observation["after"], observation["base after"]),
        "the list of parameters that require a gradient": observation["trainable"],
        "the list of parameters that get a gradient": sorted(observation["gradients"]),
        "the list of devices of the factors of a base on the meta device": observation["devices"],
        "two layers start from the same lora_A": torch.equal(observation["A"], observation["other A"]),
    }


_INIT_A = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"

check_lora_start = Exercise(
    spec=[LoRALinear],
    cases=lambda generator: [start_case(generator), start_case(generator, "bfloat16")],
    driver=drive_start,
    reading=read_start,
    # The standard deviation of n = 2,000 normal numbers scatters by 1 / sqrt(2 n) = 1.6%, of two answers by 2.2%; 0.2
    # doublings are 15%, six times that.
    tolerance=lambda case: {_SPREAD: 0.2},
    mistakes={
        "lora_B starts at random, so the model changes before it has learned anything: B starts at zero": {
            _INIT_A: _INIT_A + "\n        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))"
        },
        "lora_A and lora_B both start at zero: each then multiplies the other's gradient by zero, for ever": {
            _INIT_A: "nn.init.zeros_(self.lora_A)"
        },
        "lora_A starts at zero and lora_B at random: it is the other way round": {
            _INIT_A: "nn.init.zeros_(self.lora_A)\n        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))"
        },
        "lora_A starts with standard deviation 1: use kaiming_uniform_ with a=sqrt(5), as nn.Linear does": {
            _INIT_A: "nn.init.normal_(self.lora_A)"
        },
        "lora_A starts from kaiming_uniform_ without a=sqrt(5), so about 2.4 times too large": {
            _INIT_A: "nn.init.kaiming_uniform_(self.lora_A)"
        },
        "the base layer is not frozen: its weight and bias get gradients": {
            "self.base.requires_grad_(False)": "pass",
        },
        "the base layer's bias is not frozen: freeze the whole layer, not its weight alone": {
            "self.base.requires_grad_(False)": "self.base.weight.requires_grad_(False)",
        },
        "lora_A and lora_B are frozen along with the base: freeze it before you create them": {
            "self.merged = False": "self.merged = False\n        self.requires_grad_(False)\n        self.base.bias.requires_grad_(True)",
        },
        "lora_A and lora_B are plain tensors: only an nn.Parameter is found by the optimizer": {
            "nn.Parameter(torch.empty(rank, base.in_features, **like_base))": (
                "torch.empty(rank, base.in_features, **like_base).requires_grad_()"
            ),
            "nn.Parameter(torch.zeros(base.out_features, rank, **like_base))": (
                "torch.zeros(base.out_features, rank, **like_base).requires_grad_()"
            ),
            _INIT_A: "nn.init.kaiming_uniform_(self.lora_A.data, a=math.sqrt(5))",
        },
        "the layer holds a copy of its base: keep the base itself, or its weight is in memory twice": {
            "self.base = base": "import copy; self.base = copy.deepcopy(base)",
        },
        "lora_A and lora_B are not on the base's device: create them with `device=base.weight.device`": {
            '"device": base.weight.device': '"device": "cpu"',
        },
        "lora_A and lora_B are in fp32 whatever the base is in: create them with `dtype=base.weight.dtype`": {
            '"dtype": base.weight.dtype': '"dtype": torch.float32',
        },
        "the base is left out of the gradients by detaching, but not frozen: its weight still asks for a gradient": {
            "self.base.requires_grad_(False)": "pass",
            RETURNED: "return torch.nn.functional.linear(x, self.base.weight.detach(), self.base.bias.detach()) + self.scaling * update",
            "return self.base(x)\n": "return torch.nn.functional.linear(x, self.base.weight.detach())\n",
        },
        "every layer starts from the same lora_A: do not set a seed inside the layer": {
            _INIT_A: "torch.manual_seed(0); " + _INIT_A
        },
    },
    variants={
        "uniform by hand": {_INIT_A: "nn.init.uniform_(self.lora_A, -(base.in_features**-0.5), base.in_features**-0.5)"},
        "rand, then shifted": {
            "torch.empty(rank, base.in_features, **like_base)": (
                "(2 * torch.rand(rank, base.in_features, **like_base) - 1) / math.sqrt(base.in_features)"
            ),
            _INIT_A: "pass",
        },
        "a normal of the same standard deviation": {
            _INIT_A: "nn.init.normal_(self.lora_A, std=(3 * base.in_features) ** -0.5)"
        },
        "a loop over the base's parameters": {
            "self.base.requires_grad_(False)": "for p in base.parameters(): p.requires_grad = False",
        },
        "new_zeros": {"torch.zeros(base.out_features, rank, **like_base)": "base.weight.new_zeros(base.out_features, rank)"},
    },
)
