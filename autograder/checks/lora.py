"""Checks of unit 08_lora (Hu et al. 2022, arXiv 2106.09685)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from autograder.cases import between, normal, read_safetensors, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise


# ======================================================================================================================
# 1. LoRALinear: the forward pass
# ======================================================================================================================
class LoRALinear(nn.Module):
    """y = W x + bias + (alpha / rank) B A x, with W frozen (section 4.1)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base
        self.base.requires_grad_(False)
        like_base = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like_base))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like_base))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the base layer's output plus the scaled update's; the base's alone once the update is merged."""
        if self.merged:
            return self.base(x)
        compressed = torch.einsum("...i,ri->...r", x, self.lora_A)
        update = torch.einsum("...r,or->...o", compressed, self.lora_B)
        return self.base(x) + self.scaling * update


def drive_forward(LoRALinear, weight, bias, lora_A, lora_B, alpha, x, output_gradient):
    """Build the layer around a base with these weights; return its output and gradients, before and after 'merging'."""
    import torch
    from torch import nn

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    base.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    layer = LoRALinear(base, rank=lora_A.shape[0], alpha=alpha)
    seen = {"the list of types of lora_A and lora_B": [type(layer.lora_A).__name__, type(layer.lora_B).__name__]}
    if not (torch.is_tensor(layer.lora_A) and torch.is_tensor(layer.lora_B)):
        return seen
    seen |= {"the shape of lora_A": list(layer.lora_A.shape), "the shape of lora_B": list(layer.lora_B.shape)}
    if (layer.lora_A.shape, layer.lora_B.shape) != (lora_A.shape, lora_B.shape):
        return seen
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    x.requires_grad_(True)
    output = layer(x)
    if not torch.is_tensor(output):
        return seen | {"what forward returns": repr(output)}
    seen |= {"what forward returns": "a tensor", "the output": output.detach()}
    output.backward(output_gradient)
    seen |= {
        "the output in eval mode": layer.eval()(x).detach(),
        "the gradient of x": x.grad,
        "the gradient of lora_A": layer.lora_A.grad,
        "the gradient of lora_B": layer.lora_B.grad,
    }
    layer.merged = True
    return seen | {"the output while merged is True": layer(x).detach()}


def forward_case(generator: torch.Generator, dtype: torch.dtype = torch.float32, bias: bool = False) -> dict:
    """Return a base, factors and an input of random shapes; no two sizes are equal, so that no mix-up can hide."""
    out_features = between(generator, 9, 12)
    in_features = out_features + between(generator, 3, 6)
    rank = between(generator, 3, 5)
    return {
        "weight": normal(generator, out_features, in_features, dtype=dtype),
        "bias": normal(generator, out_features, dtype=dtype) if bias else None,
        "lora_A": normal(generator, rank, in_features, dtype=dtype),
        "lora_B": normal(generator, out_features, rank, dtype=dtype),
        "alpha": rank * (2.2 + torch.rand((), generator=generator).item()),  # no whole multiple of the rank, or of anything
        "x": normal(generator, 2, 6, in_features, dtype=dtype),
        "output_gradient": normal(generator, 2, 6, out_features, dtype=dtype),
    }


def forward_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of two right answers.

    A dot product of n terms is off by at most n * u * (sum of |terms|), u = eps / 2 (Higham 2002, section 3.1), and two
    answers by twice that. The chain W x + s B (A x) has in_features + rank + 4 roundings along its longest path, a
    gradient of a factor batch * seq + out_features + rank + 4; the sums of |terms| come from the same formulas on
    absolute values. Merging first, s B A + W, is covered as well.
    """
    magnitude = {name: value.double().abs() for name, value in case.items() if isinstance(value, Tensor)}
    weight, lora_A, lora_B, x, g = (magnitude[k] for k in ("weight", "lora_A", "lora_B", "x", "output_gradient"))
    rank, in_features = lora_A.shape
    scaling = case["alpha"] / rank
    dense = weight + scaling * lora_B @ lora_A
    g_flat, x_flat = g.flatten(0, -2), x.flatten(0, -2)
    roundings = in_features + weight.shape[0] + g_flat.shape[0] + rank + 4
    unit = roundings * torch.finfo(case["x"].dtype).eps
    output = (x @ dense.T).max().item() + magnitude.get("bias", torch.zeros(1)).max().item()
    return {
        "the output": unit * output,
        "the output in eval mode": unit * output,
        "the output while merged is True": unit * output,
        "the gradient of x": unit * (g @ dense).max().item(),
        "the gradient of lora_A": unit * scaling * (lora_B.T @ g_flat.T @ x_flat).max().item(),
        "the gradient of lora_B": unit * scaling * (g_flat.T @ (x_flat @ lora_A.T)).max().item(),
    }


_SCALED = "self.scaling * update"
_COMPRESSED = 'torch.einsum("...i,ri->...r", x, self.lora_A)'
_UPDATE = 'torch.einsum("...r,or->...o", compressed, self.lora_B)'
_RETURNED = "return self.base(x) + self.scaling * update"

check_lora_forward = Exercise(
    spec=[LoRALinear],
    driver=drive_forward,
    cases=lambda generator: [forward_case(generator), forward_case(generator, bias=True)],
    tolerance=forward_tolerance,
    mistakes={
        "the update is not scaled: multiply it by alpha / rank": {"= alpha / rank": "= 1.0"},
        "the update is multiplied by alpha: it should be alpha / rank": {"= alpha / rank": "= alpha"},
        "the scale is upside down: it should be alpha / rank": {"= alpha / rank": "= rank / alpha"},
        "the update is divided by sqrt(rank), as in rsLoRA: here it should be alpha / rank": {
            "= alpha / rank": "= alpha / math.sqrt(rank)"
        },
        "the base layer's output is missing: the update is added to it": {_RETURNED: "return self.scaling * update"},
        "the base layer's output is scaled as well: alpha / rank belongs to the update alone": {
            _RETURNED: "return self.scaling * (self.base(x) + update)"
        },
        "the base layer's bias is lost: call `self.base(x)` instead of using its weight alone": {
            _RETURNED: "return x @ self.base.weight.T + self.scaling * update"
        },
        "lora_A and lora_B are stored transposed: A is (rank, in_features), B is (out_features, rank)": {
            "torch.empty(rank, base.in_features, **like_base)": "torch.empty(base.in_features, rank, **like_base)",
            "torch.zeros(base.out_features, rank, **like_base)": "torch.zeros(rank, base.out_features, **like_base)",
            '"...i,ri->...r"': '"...i,ir->...r"',
            '"...r,or->...o"': '"...r,ro->...o"',
        },
        "lora_A and lora_B have changed places: A compresses the input, so it is (rank, in_features)": {
            "torch.empty(rank, base.in_features, **like_base)": "torch.empty(base.out_features, rank, **like_base)",
            "torch.zeros(base.out_features, rank, **like_base)": "torch.zeros(rank, base.in_features, **like_base)",
            "x, self.lora_A)": "x, self.lora_B)",
            "compressed, self.lora_B)": "compressed, self.lora_A)",
        },
        "lora_A gets no gradient: something between it and the output is detached": {_COMPRESSED: _COMPRESSED + ".detach()"},
        "the update does not pass its gradient on to x: nothing may be detached on the way": {
            "x, self.lora_A)": "x.detach(), self.lora_A)"
        },
        "the update is computed without gradients: lora_A and lora_B could never learn": {
            "return self.base(x) + self.scaling * update": "return self.base(x) + self.scaling * update.detach()"
        },
        "the update is applied twice when `merged` is True: the base already holds it": {"if self.merged:": "if False:"},
        "the update is left out in eval mode: only `merged` decides that": {
            "if self.merged:": "if self.merged or not self.training:"
        },
        "forward returns nothing: the `return` is missing": {_RETURNED: "self.base(x) + self.scaling * update"},
        "there is a nonlinearity between A and B: LoRA is linear, or it could not be merged": {
            _COMPRESSED: _COMPRESSED + ".relu()"
        },
    },
    variants={
        "matrix products": {_COMPRESSED: "x @ self.lora_A.T", _UPDATE: "compressed @ self.lora_B.T"},
        "F.linear twice": {
            _COMPRESSED: "torch.nn.functional.linear(x, self.lora_A)",
            _UPDATE: "torch.nn.functional.linear(compressed, self.lora_B)",
        },
        "the input scaled first": {"x, self.lora_A)": "self.scaling * x, self.lora_A)", _SCALED: "update"},
        "the whole matrix first": {
            _COMPRESSED: "self.lora_B @ self.lora_A",
            _UPDATE: "x @ compressed.T",
        },
        "in double precision": {
            "x, self.lora_A)": "x.double(), self.lora_A.double())",
            "compressed, self.lora_B)": "compressed, self.lora_B.double())",
            _SCALED: "(self.scaling * update).to(x.dtype)",
        },
        "a loop over the rank": {_UPDATE: "sum(compressed[..., [r]] * self.lora_B[:, r] for r in range(self.lora_A.shape[0]))"},
    },
)


# ======================================================================================================================
# 2. LoRALinear: where training starts
# ======================================================================================================================
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


_INIT_A = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"
_INIT_B = "torch.zeros(base.out_features, rank, **like_base)"

check_lora_start = Exercise(
    spec=[LoRALinear],
    driver=drive_start,
    reading=read_start,
    cases=lambda generator: [start_case(generator), start_case(generator, "bfloat16")],
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
            _RETURNED: "return torch.nn.functional.linear(x, self.base.weight.detach(), self.base.bias.detach()) + self.scaling * update",
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
        "new_zeros": {_INIT_B: "base.weight.new_zeros(base.out_features, rank)"},
    },
)


# ======================================================================================================================
# 3. LoRALinear: measured memory
# ======================================================================================================================
def drive_memory(LoRALinear, in_features, out_features, rank, rows):
    """Take a training step; return what is there after it, and what forward kept for backward.

    The base is filled with a constant: a random 4096 x 4096 matrix would take longer to draw than all the rest.
    """
    import torch
    from torch import nn

    from peftlab.memory import tensors_of_step

    base = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
    nn.init.constant_(base.weight, 0.01)
    layer = LoRALinear(base, rank=rank, alpha=2.0 * rank)
    x = torch.ones(rows, in_features, requires_grad=True)  # its gradient is wanted by the layers below
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    tensors = tensors_of_step(lambda: layer(x).sum(), layer.parameters(), optimizer, not_counted=[x])
    if in_features >= 1024:  # too large to send: the process is measured from outside
        return {"shape": list(layer(x).shape)}
    return tensors | {"kept": {name: tensor.detach() for name, tensor in layer.state_dict().items()}}


def read_memory(observation: Observation, case: dict) -> Observation:
    """Count the bytes of the tensors that came back."""
    if "shape" in observation:
        return {"the shape of the output": observation["shape"]}
    return {
        "gradient bytes": total_bytes(observation["gradients"]),
        "optimizer state bytes": total_bytes(observation["optimizer state"]),
        "bytes of weights and buffers": total_bytes(observation["kept"].values()),
        "bytes that forward saves for backward, besides x and the weights,": total_bytes(observation["saved"]),
    }


_BASE_PLUS_UPDATE = "self.base(x) + self.scaling * update"
_SCALING = "self.scaling = alpha / rank"


def memory_tolerance(case: dict) -> dict[str, float]:
    """Return by how much a sparing answer may exceed the spec's bytes.

    Half of the large base for the peak; a scaled copy of the factors among the saved tensors; a scale kept as a buffer.
    """
    factors = 4 * case["rank"] * (case["in_features"] + case["out_features"])
    return {
        "peak bytes": 32 * 2**20,
        "bytes that forward saves for backward, besides x and the weights,": factors,
        "bytes of weights and buffers": 64,
    }


check_lora_memory = Exercise(
    spec=[LoRALinear],
    driver=drive_memory,
    reading=read_memory,
    measures_peak=lambda case: case["in_features"] >= 1024,
    cases=lambda generator: [
        {"in_features": between(generator, 60, 90), "out_features": between(generator, 92, 99), "rank": 4, "rows": 50},
        # The base weighs 64 MiB; half of that tells a second matrix of its size from the noise of the process, 5 MiB.
        {"in_features": 4096, "out_features": 4096, "rank": 8, "rows": 4},
    ],
    at_most=frozenset(
        {
            "gradient bytes",
            "optimizer state bytes",
            "bytes of weights and buffers",
            "peak bytes",
            "bytes that forward saves for backward, besides x and the weights,",
        }
    ),
    tolerance=memory_tolerance,
    mistakes={
        "the base is left trainable: its gradient and its optimizer state are what LoRA is there to save": {
            "self.base.requires_grad_(False)": "pass",
        },
        "the update is computed as a whole matrix B A: multiply x by A first, then by B": {
            _COMPRESSED: "self.lora_B @ self.lora_A",
            _UPDATE: "x @ compressed.T",
        },
        "the merged weight is built in every forward pass: that is one more matrix of the base's size": {
            _RETURNED: "return x @ (self.base.weight + self.scaling * self.lora_B @ self.lora_A).T",
        },
        "a second matrix of the base's size is kept: merging adds to the base's own weight, unmerging subtracts again": {
            _SCALING: _SCALING + "\n        self.merged_weight = nn.Parameter(base.weight.detach() + 0, requires_grad=False)",
        },
        "the process grows by another matrix of the base's size: the base is copied, or a merged weight cached": {
            "self.base = base": "import copy; self.base = copy.deepcopy(base)",
        },
        "lora_A and lora_B are in fp64: twice the bytes, twice the optimizer state": {
            '"dtype": base.weight.dtype': '"dtype": torch.float64',
            "x, self.lora_A)": "x, self.lora_A.to(x.dtype))",
            "compressed, self.lora_B)": "compressed, self.lora_B.to(x.dtype))",
        },
        "the rank is not the one asked for: lora_A and lora_B are twice as large as they should be": {
            "torch.empty(rank,": "torch.empty(2 * rank,",
            "torch.zeros(base.out_features, rank,": "torch.zeros(base.out_features, 2 * rank,",
        },
        "a matrix as large as the base's is trained: the factors are to be trained, not their product": {
            _SCALING: _SCALING + "\n        self.delta = nn.Parameter(torch.zeros_like(base.weight))",
            _BASE_PLUS_UPDATE: _BASE_PLUS_UPDATE + " + x @ self.delta.T",
        },
        "the input is converted to fp64, and that copy is kept for backward": {
            "x, self.lora_A)": "x.double(), self.lora_A.double())",
            "compressed, self.lora_B)": "compressed, self.lora_B.double())",
            _BASE_PLUS_UPDATE: "self.base(x) + (self.scaling * update).to(x.dtype)",
        },
        "a scaled copy of x is kept for backward: scale the small product or the result instead, with brackets": {
            "x, self.lora_A)": "self.scaling * x, self.lora_A)",
            "self.scaling * update": "update",
        },
        "the scale is a tensor as large as the output, and kept for backward: multiply by the plain number": {
            "self.scaling * update": "torch.full_like(update, self.scaling).requires_grad_() * update",
        },
    },
    variants={
        "matrix products": {_COMPRESSED: "x @ self.lora_A.T", _UPDATE: "compressed @ self.lora_B.T"},
        "F.linear twice": {
            _COMPRESSED: "torch.nn.functional.linear(x, self.lora_A)",
            _UPDATE: "torch.nn.functional.linear(compressed, self.lora_B)",
        },
        "the small product scaled": {_COMPRESSED: "self.scaling * (x @ self.lora_A.T)", _SCALED: "update"},
        "a scaled copy of B, and a scale that is a buffer": {
            _UPDATE: "compressed @ (self.scaling * self.lora_B).T",
            _SCALED: "update",
            _SCALING: 'self.register_buffer("scaling", torch.tensor(alpha / rank), persistent=False)',
        },
        "a fused addition": {
            _RETURNED: "return torch.add(self.base(x), update, alpha=self.scaling)",
        },
    },
)


# ======================================================================================================================
# 4. inject
# ======================================================================================================================
def inject(model: nn.Module, target_modules: Sequence[str], make_layer: Callable[[nn.Linear], nn.Module]) -> list[str]:
    """Freeze the model, then wrap every nn.Linear whose own name is in `target_modules`; return the wrapped names."""
    model.requires_grad_(False)
    wrapped = []
    for name, module in list(model.named_modules()):
        parent_name, _, own_name = name.rpartition(".")
        if own_name in target_modules and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent_name), own_name, make_layer(module))
            wrapped.append(name)
    if not wrapped:
        raise ValueError(f"no nn.Linear is named {target_modules}")
    return wrapped


def drive_inject(inject, weights, x, target_modules, hopeless):
    """Inject a layer that scales its base's output into a small model with misleading names."""
    import torch
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.gain = nn.Parameter(torch.tensor(2.0 + base.weight.detach().mean().abs().item()))

        def forward(self, x):
            return self.base(x) * self.gain

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q_proj = nn.Linear(width, width)
            self.v_proj = nn.Linear(width, width, bias=False)
            self.q_proj_gate = nn.Linear(width, width)
            self.aux_q_proj = nn.Linear(width, width)
            self.norms = nn.ModuleDict({"q_proj": nn.LayerNorm(width)})

        def forward(self, x):
            x = x + self.q_proj(x) * self.q_proj_gate(x)
            return self.norms["q_proj"](x + self.v_proj(x) + self.aux_q_proj(x))

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed = nn.Linear(width, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.q_proj = nn.Linear(width, width)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.q_proj(x)

    def fresh():
        model = Model(x.shape[-1])
        nn.utils.vector_to_parameters(weights, model.parameters())
        return model

    model = fresh()
    returned = inject(model, target_modules, Scaled)
    output = model(x)
    gradients = {}
    if output.requires_grad:
        output.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    try:
        inject(fresh(), hopeless, Scaled)
        refused = "nothing"
    except Exception as error:
        refused = type(error).__name__
    return {
        "the list of wrapped modules": sorted(name for name, module in model.named_modules() if isinstance(module, Scaled)),
        "the model's output afterwards": output.detach(),
        "gradients": gradients,
        "the returned list": sorted(returned) if isinstance(returned, list) else f"no list but a {type(returned).__name__}",
        f"the error for target_modules={hopeless}, which match nothing,": refused,
    }


def read_inject(observation: Observation, case: dict) -> Observation:
    """List the parameters that got a gradient, from the gradients themselves."""
    read = {name: value for name, value in observation.items() if name != "gradients"}
    return read | {"the list of parameters that get a gradient": sorted(observation["gradients"])}


def inject_case(generator: torch.Generator, target_modules: list[str], hopeless: list[str], width: int = 6) -> dict:
    """Return random weights for the small model: 8 biased and 2 unbiased square layers, and two norms."""
    parameters = (2 * 3 + 2) * (width * width + width) + 2 * width * width + 2 * 2 * width
    return {
        "weights": normal(generator, parameters) / math.sqrt(width),
        "x": normal(generator, 5, width),
        "target_modules": target_modules,
        "hopeless": hopeless,
    }


_FREEZE = "model.requires_grad_(False)"
_MATCH = "own_name in target_modules and isinstance(module, nn.Linear)"
_SETATTR = "setattr(model.get_submodule(parent_name), own_name, make_layer(module))"
_REFUSE = 'if not wrapped:\n        raise ValueError(f"no nn.Linear is named {target_modules}")'

check_inject = Exercise(
    spec=[inject],
    driver=drive_inject,
    reading=read_inject,
    cases=lambda generator: [
        inject_case(generator, ["q_proj"], ["proj", "k_proj"]),
        inject_case(generator, ["v_proj", "q_proj"], ["blocks"]),
        inject_case(generator, ["embed", "v_proj"], ["_proj"]),
    ],
    mistakes={
        "a name matches if it contains a target: compare the last part of the name, whole": {
            _MATCH: "any(target in name for target in target_modules) and isinstance(module, nn.Linear)",
        },
        "a name matches if its last part contains a target: compare the last part whole": {
            _MATCH: "any(target in own_name for target in target_modules) and isinstance(module, nn.Linear)",
        },
        "a name matches if it ends with a target's letters: `aux_q_proj` is not `q_proj`": {
            _MATCH: "name.endswith(tuple(target_modules)) and isinstance(module, nn.Linear)",
        },
        "a name matches if it begins with a target's letters: `q_proj_gate` is not `q_proj`": {
            _MATCH: "own_name.startswith(tuple(target_modules)) and isinstance(module, nn.Linear)",
        },
        "the rest of the model is not frozen: only what make_layer adds may learn": {_FREEZE: "pass"},
        "only the wrapped layers are frozen: freeze the whole model, norms and embeddings too": {
            _FREEZE: "pass",
            "wrapped.append(name)": "wrapped.append(name)\n            module.requires_grad_(False)",
        },
        "the model is frozen after wrapping, so the new parameters are frozen too: freeze it first": {
            _FREEZE: "pass",
            "return wrapped": "model.requires_grad_(False)\n    return wrapped",
        },
        "the new layer is set on the model, not on the module that held the old one: use `get_submodule`": {
            _SETATTR: "setattr(model, own_name, make_layer(module))",
        },
        "a module that is no nn.Linear was wrapped: ask `isinstance(module, nn.Linear)`": {
            _MATCH: "own_name in target_modules",
            "make_layer(module))": ("make_layer(module) if hasattr(module, 'weight') else module)"),
        },
        "only the first match is wrapped: do not return from inside the loop": {
            "wrapped.append(name)": "wrapped.append(name)\n            break",
        },
        "only direct children of the model are looked at: `named_modules` goes all the way down": {
            "model.named_modules()": "model.named_children()",
        },
        "one new layer was made for all: call make_layer once for every module": {
            _FREEZE: _FREEZE + "\n    shared = None",
            _SETATTR: "shared = shared or make_layer(module)\n            " + _SETATTR.replace("make_layer(module)", "shared"),
        },
        "targets that match nothing go unnoticed: raise a ValueError, or a typo would train nothing": {_REFUSE: "pass"},
        "the list of names is not returned": {"return wrapped": "return None"},
    },
    variants={
        "split": {
            'parent_name, _, own_name = name.rpartition(".")': (
                'parts = name.split(".")\n        parent_name, own_name = ".".join(parts[:-1]), parts[-1]'
            ),
        },
        "from the parents": """
            def inject(model, target_modules, make_layer):
                for parameter in model.parameters():
                    parameter.requires_grad = False
                names = []
                for prefix, parent in list(model.named_modules()):
                    for child_name, child in list(parent.named_children()):
                        if child_name in target_modules and type(child) is nn.Linear:
                            setattr(parent, child_name, make_layer(child))
                            names.append(f"{prefix}.{child_name}".lstrip("."))
                if len(names) == 0:
                    raise ValueError("nothing matched")
                return names
        """,
        "names first": """
            def inject(model, target_modules, make_layer):
                model.requires_grad_(False)
                linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
                chosen = [name for name in linears if name.split(".")[-1] in set(target_modules)]
                if not chosen:
                    raise ValueError(target_modules)
                for name in chosen:
                    model.set_submodule(name, make_layer(model.get_submodule(name)))
                return chosen
        """,
    },
    tolerance=lambda case: {
        # The wrapped model does the same operations in the same order whoever wrapped it: only the norm's gains are large.
        "the model's output afterwards": 1e-4,
    },
)


# ======================================================================================================================
# 5. merge and unmerge
# ======================================================================================================================
@torch.no_grad()
def merge(layer: LoRALinear) -> None:
    """Add the update to the base's weight, in place, unless that has been done."""
    if not layer.merged:
        layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = True


@torch.no_grad()
def unmerge(layer: LoRALinear) -> None:
    """Take the update out of the base's weight again, in place, if it is there."""
    if layer.merged:
        layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)
        layer.merged = False


def drive_merge(merge, unmerge, weight, lora_A, lora_B, scaling):
    """Merge twice and unmerge twice; return the weight after each call, as someone who shares it sees it."""
    from torch import nn

    layer = nn.Module()
    layer.base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype).requires_grad_(False)
    layer.base.weight.copy_(weight)
    layer.lora_A, layer.lora_B = nn.Parameter(lora_A.clone()), nn.Parameter(lora_B.clone())
    layer.scaling, layer.merged = scaling, False
    shared = layer.base.weight.detach()
    seen = {}
    for moment, call in (
        ("after merge", merge),
        ("after a second merge", merge),
        ("after unmerge", unmerge),
        ("after a second unmerge", unmerge),
        ("after merging again", merge),
    ):
        call(layer)
        seen[f"the weight {moment}"] = layer.base.weight.detach().clone()
        seen[f"`merged` {moment}"] = bool(layer.merged)
        seen[f"the weight tensor that the layer was given, {moment},"] = shared.clone()
    seen["the base's weight requires a gradient"] = layer.base.weight.requires_grad
    return seen | {"lora_A afterwards": layer.lora_A.detach(), "lora_B afterwards": layer.lora_B.detach()}


def merge_case(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict:
    """Return a weight and its update, of unequal sizes and about the same magnitude."""
    out_features, rank = between(generator, 9, 12), between(generator, 3, 5)
    in_features = out_features + between(generator, 3, 6)
    return {
        "weight": normal(generator, out_features, in_features, dtype=dtype),
        "lora_A": normal(generator, rank, in_features, dtype=dtype),
        "lora_B": normal(generator, out_features, rank, dtype=dtype),
        "scaling": 1.0 + between(generator, 3, 9) / 4,
    }


def merge_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding: each entry of s B A sums `rank` products, and every call adds it to the weight once.

    rank + 2 roundings make the update, one the sum; the errors of the three calls that change the weight add up.
    """
    rank = case["lora_A"].shape[0]
    update = case["scaling"] * (case["lora_B"].double().abs() @ case["lora_A"].double().abs())
    size = (case["weight"].double().abs() + update).max().item()
    bound = 3 * (rank + 3) * torch.finfo(case["weight"].dtype).eps * size
    moments = ("after merge", "after a second merge", "after unmerge", "after a second unmerge", "after merging again")
    return {
        name: bound
        for moment in moments
        for name in (f"the weight {moment}", f"the weight tensor that the layer was given, {moment},")
    }


_ADD = "layer.base.weight += layer.scaling * (layer.lora_B @ layer.lora_A)"
_SUBTRACT = "layer.base.weight -= layer.scaling * (layer.lora_B @ layer.lora_A)"

check_merge = Exercise(
    spec=[merge, unmerge],
    driver=drive_merge,
    cases=lambda generator: [merge_case(generator), merge_case(generator)],
    tolerance=merge_tolerance,
    mistakes={
        "the update is not scaled: what is merged is scaling * B A, as in forward": {
            _ADD: _ADD.replace("layer.scaling * ", ""),
            _SUBTRACT: _SUBTRACT.replace("layer.scaling * ", ""),
        },
        "merge scales the update and unmerge does not: both must use scaling * B A": {
            _SUBTRACT: _SUBTRACT.replace("layer.scaling * ", ""),
        },
        "the product is A B: the update is lora_B @ lora_A, (out, rank) by (rank, in)": {
            _ADD: _ADD.replace("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
            _SUBTRACT: _SUBTRACT.replace("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
        },
        "the update is transposed: nn.Linear keeps (out_features, in_features), just as B A": {
            _ADD: _ADD.replace("(layer.lora_B @ layer.lora_A)", "(layer.lora_B @ layer.lora_A).T"),
            _SUBTRACT: _SUBTRACT.replace("(layer.lora_B @ layer.lora_A)", "(layer.lora_B @ layer.lora_A).T"),
        },
        "merge subtracts and unmerge adds: it is the other way round": {
            _ADD: _ADD.replace("+=", "-="),
            _SUBTRACT: _SUBTRACT.replace("-=", "+="),
        },
        "merging twice adds the update twice: do nothing if `layer.merged` is already True": {
            "if not layer.merged:": "if True:",
        },
        "unmerging twice subtracts the update twice: do nothing if `layer.merged` is False": {
            "    if layer.merged:": "    if True:",
        },
        "`layer.merged` is never set: forward would add the update a second time": {
            _ADD + "\n        layer.merged = True": _ADD,
            _SUBTRACT + "\n        layer.merged = False": _SUBTRACT,
        },
        "`layer.merged` stays True after unmerge: forward would leave the update out": {
            _SUBTRACT + "\n        layer.merged = False": _SUBTRACT,
        },
        "the weight is replaced by the update: it is added to the weight": {
            _ADD: "layer.base.weight.copy_(layer.scaling * (layer.lora_B @ layer.lora_A))",
        },
        "the layer got a new weight tensor: change the weight in place, for others may share it": {
            _ADD: "layer.base.weight = nn.Parameter(layer.base.weight + layer.scaling * (layer.lora_B @ layer.lora_A), False)",
            _SUBTRACT: (
                "layer.base.weight = nn.Parameter(layer.base.weight - layer.scaling * (layer.lora_B @ layer.lora_A), False)"
            ),
        },
        "the base's weight became trainable: merge without gradients, under `torch.no_grad()`": {
            _ADD: _ADD + "\n        layer.base.weight.requires_grad_(True)",
        },
        "the factors were reset by merging: unmerge needs them": {
            _ADD: _ADD + "\n        layer.lora_B.zero_()",
        },
    },
    variants={
        "einsum": {
            _ADD: 'layer.base.weight.add_(torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A), alpha=layer.scaling)',
        },
        "through .data": """
            def merge(layer):
                if layer.merged:
                    return
                layer.base.weight.data.addmm_(layer.lora_B.data, layer.lora_A.data, alpha=layer.scaling)
                layer.merged = True

            def unmerge(layer):
                if not layer.merged:
                    return
                layer.base.weight.data.addmm_(layer.lora_B.data, layer.lora_A.data, alpha=-layer.scaling)
                layer.merged = False
        """,
        "one helper, in fp64": """
            @torch.no_grad()
            def add_update(layer, sign):
                update = layer.lora_B.double() @ layer.lora_A.double()
                layer.base.weight.copy_(layer.base.weight.double() + sign * layer.scaling * update)
                layer.merged = sign > 0

            def merge(layer):
                if layer.merged is False:
                    add_update(layer, +1)

            def unmerge(layer):
                if layer.merged is True:
                    add_update(layer, -1)
        """,
        "a loop over the rank": {
            _ADD: (
                "for r in range(layer.lora_A.shape[0]):\n"
                "            layer.base.weight += layer.scaling * torch.outer(layer.lora_B[:, r], layer.lora_A[r])"
            ),
        },
    },
)


# ======================================================================================================================
# 6. adapter files
# ======================================================================================================================
def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write lora_A and lora_B of every layer, under their full names, to a safetensors file."""
    from safetensors.torch import save_file

    adapter = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}
    save_file(adapter, path)


@torch.no_grad()
def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Copy the factors from the file into the model's own, in place; the names in both must be the same."""
    from safetensors.torch import load_file

    adapter = load_file(path)
    own = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    if adapter.keys() != own.keys():
        raise ValueError(f"the adapter does not fit: {sorted(adapter.keys() ^ own.keys())}")
    for name, tensor in own.items():
        tensor.copy_(adapter[name])


def drive_adapter_files(save_adapter, load_adapter, weights, other_weights, in_features, out_features, rank):
    """Save one model's adapter, load it into another model that already has an optimizer, and try one that does not fit."""
    import os
    import tempfile
    import warnings

    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(in_features, out_features, bias=False).requires_grad_(False)
            self.lora_A = nn.Parameter(torch.empty(rank, in_features))
            self.lora_B = nn.Parameter(torch.empty(out_features, rank))

    def model(values, layers=2):
        built = nn.ModuleDict({"blocks": nn.ModuleList(Layer() for _ in range(layers)), "norm": nn.LayerNorm(3)})
        nn.utils.vector_to_parameters(values[: sum(p.numel() for p in built.parameters())].clone(), built.parameters())
        return built

    warnings.simplefilter("ignore")  # a slower way to save is still a way to save
    source, target = model(weights), model(other_weights)
    held_by_an_optimizer = dict(target.named_parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "adapter.safetensors")
        save_adapter(source, path)
        with open(path, "rb") as file:
            content = torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8).clone()
        try:
            load_adapter(target, path)
            loading = "nothing"
        except Exception as error:
            loading = f"{type(error).__name__}: {error}"
        refused, untouched = [], []
        for misfit in (model(other_weights, layers=1), model(torch.cat([other_weights, other_weights]), layers=3)):
            before = {name: tensor.clone() for name, tensor in misfit.state_dict().items()}
            try:
                load_adapter(misfit, path)
                refused.append("nothing")
            except Exception as error:
                refused.append(type(error).__name__)
            untouched.append(all(torch.equal(before[name], tensor) for name, tensor in misfit.state_dict().items()))
    return {
        "file": content,
        "loading": loading,
        "untouched": untouched,
        "loaded": {name: tensor.detach() for name, tensor in target.state_dict().items()},
        "held": {name: tensor.detach() for name, tensor in held_by_an_optimizer.items()},
        "trainable": sorted(name for name, p in target.named_parameters() if p.requires_grad),
        "refused": refused,
    }


def read_adapter_files(observation: Observation, case: dict) -> Observation:
    """Read the file, as bytes, without the student's help."""
    names, tensors, size = read_safetensors(observation["file"])
    return {
        "the list of names in the file": names,
        "bytes of the file": size,
        **{f"{name} in the file": tensor for name, tensor in tensors.items()},
        "the error when loading what was saved": observation["loading"],
        **{f"{name} after loading": tensor for name, tensor in observation["loaded"].items()},
        "the parameters that an optimizer already held, after loading,": torch.cat(
            [tensor.flatten() for tensor in observation["held"].values()]
        ),
        "the list of trainable parameters after loading": observation["trainable"],
        "the list of errors for a file with a layer too many, and for one with a layer too few": observation["refused"],
        "the model is left alone when a file with a layer too many is refused": observation["untouched"][0],
        "the model is left alone when a file with a layer too few is refused": observation["untouched"][1],
    }


def adapter_case(generator: torch.Generator) -> dict:
    """Return the flat weights of two models with two layers each."""
    in_features, out_features, rank = between(generator, 9, 12), between(generator, 5, 8), between(generator, 2, 4)
    size = 2 * (in_features * out_features + rank * (in_features + out_features)) + 6
    sizes = {"in_features": in_features, "out_features": out_features, "rank": rank}
    return {"weights": normal(generator, size), "other_weights": normal(generator, size), **sizes}


_ADAPTER = '{name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lora_" in name}'
_COPY = "for name, tensor in own.items():\n        tensor.copy_(adapter[name])"
_REFUSE_ADAPTER = 'if adapter.keys() != own.keys():\n        raise ValueError(f"the adapter does not fit: {sorted(adapter.keys() ^ own.keys())}")'

check_adapter_files = Exercise(
    spec=[save_adapter, load_adapter],
    driver=drive_adapter_files,
    reading=read_adapter_files,
    cases=lambda generator: [adapter_case(generator)],
    # An adapter's metadata may take some room in the header; a base layer may not.
    tolerance=lambda case: {"bytes of the file": 2048},
    at_most=frozenset({"bytes of the file"}),
    mistakes={
        "the file holds the whole model: an adapter is only what was learned, lora_A and lora_B": {
            _ADAPTER: "{name: tensor.contiguous() for name, tensor in model.state_dict().items()}",
            'model.state_dict().items() if "lora_" in name}\n    if': "model.state_dict().items()}\n    if",
        },
        "the file holds whatever is trainable, the norm too: an adapter is lora_A and lora_B": {
            _ADAPTER: "{name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}",
            '{name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}': (
                "{name: p for name, p in model.named_parameters() if p.requires_grad}"
            ),
        },
        "lora_B is missing in the file: both factors are needed": {
            'model.state_dict().items() if "lora_" in name}\n    save': 'model.state_dict().items() if "lora_A" in name}\n    save',
            'model.state_dict().items() if "lora_" in name}\n    if': 'model.state_dict().items() if "lora_A" in name}\n    if',
        },
        "the file holds no tensor at all: no name matched (peft issue 286: the 443-byte adapter file)": {
            'model.state_dict().items() if "lora_" in name}\n    save': (
                'model.state_dict().items() if name.startswith("lora_")}\n    save'
            ),
            'model.state_dict().items() if "lora_" in name}\n    if': (
                'model.state_dict().items() if name.startswith("lora_")}\n    if'
            ),
            "adapter.keys() != own.keys()": "False",
        },
        "layers overwrite each other in the file: keep the full name, not its last part": {
            "{name: tensor.contiguous() for": '{name.split(".")[-1]: tensor.contiguous() for',
            "adapter.keys() != own.keys()": "False",
            "adapter[name]": 'adapter[name.split(".")[-1]]',
        },
        "the file is a pickle: write safetensors, which cannot run code when it is opened": {
            "from safetensors.torch import save_file": "save_file = torch.save",
            "from safetensors.torch import load_file": "load_file = torch.load",
        },
        "loading replaced the parameters by new ones, and an optimizer would go on training the old: copy into them": {
            "tensor.copy_(adapter[name])": (
                'layer, _, factor = name.rpartition(".")\n'
                "        setattr(model.get_submodule(layer), factor, nn.Parameter(adapter[name]))"
            ),
        },
        "a file that does not fit the model is loaded without a word: raise a ValueError": {
            _REFUSE_ADAPTER: "pass",
            _COPY: "model.load_state_dict(adapter, strict=False)",
        },
        "a file that lacks layers of the model is loaded without a word: the names must be exactly the model's": {
            "adapter.keys() != own.keys()": "adapter.keys() - own.keys()",
            _COPY: "model.load_state_dict(adapter, strict=False)",
        },
        "a refused file has changed half of the model already: compare the names before the first copy": {
            _REFUSE_ADAPTER: "pass",
            _COPY: (
                "for name, tensor in own.items():\n        if name in adapter: tensor.copy_(adapter[name])\n"
                "    if adapter.keys() != own.keys():\n        raise ValueError('too late')"
            ),
        },
        "nothing was loaded: changing a dict of clones does not change the model": {
            "own = {name: tensor for": "own = {name: tensor.clone() for",
        },
        "loading changed the base as well: an adapter touches lora_A and lora_B only": {
            _COPY: _COPY + '\n    for name, tensor in model.state_dict().items():\n        if "base" in name: tensor.zero_()',
        },
        "lora_A and lora_B are frozen after loading: training could not go on": {
            _COPY: _COPY + "\n    model.requires_grad_(False)\n    model['norm'].requires_grad_(True)",
        },
        "the factors are rounded to bf16 in the file: save them as they are": {
            "tensor.contiguous() for": "tensor.contiguous().bfloat16() for",
        },
    },
    variants={
        "by parameter": {
            _ADAPTER: "{n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(('lora_A', 'lora_B'))}",
        },
        "load_state_dict": {
            _COPY: ("missing, unexpected = model.load_state_dict(adapter, strict=False)\n    assert not unexpected"),
        },
        "with open, and bytes": """
            def save_adapter(model, path):
                from safetensors.torch import save
                state = {}
                for name, module in model.named_modules():
                    if hasattr(module, "lora_A"):
                        state[name + ".lora_A"] = module.lora_A.data
                        state[name + ".lora_B"] = module.lora_B.data
                with open(path, "wb") as file:
                    file.write(save(state))

            def load_adapter(model, path):
                from safetensors import safe_open
                layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
                with safe_open(path, "pt") as file:
                    expected = {f"{n}.{factor}" for n in layers for factor in ("lora_A", "lora_B")}
                    if set(file.keys()) != expected:
                        raise ValueError("other layers")
                    for name, layer in layers.items():
                        layer.lora_A.data[:] = file.get_tensor(name + ".lora_A")
                        layer.lora_B.data[:] = file.get_tensor(name + ".lora_B")
        """,
    },
)


# ======================================================================================================================
# 7. bug hunt: merging into tied embeddings
# ======================================================================================================================
@torch.no_grad()
def merge_into_head(model: nn.Module) -> None:
    """Merge the head's update; if the embedding shares the head's weight, give the head a weight of its own first."""
    head = model.lm_head
    if head.base.weight is model.model.embed_tokens.weight:
        head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)
    head.base.weight += head.scaling * (head.lora_B @ head.lora_A)
    head.merged = True


def drive_merge_into_head(merge_into_head, tied, weights, lora_A, lora_B, scaling, input_ids):
    """Give a tiny LLaMA's head an update, merge it, and return the logits before and after."""
    import dataclasses

    from torch import nn

    from peftlab.llama import Llama, LlamaConfig

    class Head(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.scaling, self.merged = base, scaling, False
            self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

        def forward(self, x):
            return self.base(x) + (0 if self.merged else self.scaling * (x @ self.lora_A.T) @ self.lora_B.T)

    config = LlamaConfig(40, 16, 24, 1, 2, 1)
    model = Llama(dataclasses.replace(config, tie_word_embeddings=tied)).requires_grad_(False)
    nn.utils.vector_to_parameters(weights[: sum(p.numel() for p in model.parameters())], model.parameters())
    embedding_before = model.model.embed_tokens.weight.clone()
    head_before = model.lm_head.weight
    model.lm_head = Head(model.lm_head)
    before = model(input_ids).detach()
    merge_into_head(model)
    after = model(input_ids).detach()
    embedding = model.model.embed_tokens.weight
    return {
        "before": before,
        "the logits after merging": after,
        "the embedding's change": embedding.detach() - embedding_before,
        "the head's weight after merging": model.lm_head.base.weight.detach(),
        "`merged`": bool(model.lm_head.merged),
        "the head has a weight tensor of its own": embedding.data_ptr() != model.lm_head.base.weight.data_ptr(),
        "the head has a parameter of its own": embedding is not model.lm_head.base.weight,
        "an untied head was copied": not tied and model.lm_head.base.weight.data_ptr() != head_before.data_ptr(),
        "the list of trainable parameters": sorted(n for n, p in model.named_parameters() if p.requires_grad),
    }


def read_merge_into_head(observation: Observation, case: dict) -> Observation:
    """Leave out what only the message needs."""
    return {name: value for name, value in observation.items() if name != "before"}


def tied_case(generator: torch.Generator, tied: bool) -> dict:
    """Return a tiny LLaMA's weights, and an update of its head that moves every logit."""
    rank = between(generator, 2, 4)
    return {
        "tied": tied,
        "weights": normal(generator, 5_000) * 0.3,
        "lora_A": normal(generator, rank, 16),
        "lora_B": normal(generator, 40, rank),
        "scaling": 1.5,
        "input_ids": torch.randint(0, 40, (2, 7), generator=generator),
    }


def tied_tolerance(case: dict) -> dict[str, float]:
    """Bound the rounding of the head: hidden + rank + 4 roundings of terms whose sizes add up to the magnitude below.

    The norm's gain here is at most max|weights|, so |hidden| <= sqrt(16) * max|weights| in every feature.
    """
    rank, hidden_size = case["lora_A"].shape
    dense = case["weights"].abs().max() + case["scaling"] * (case["lora_B"].abs() @ case["lora_A"].abs()).max()
    hidden = math.sqrt(hidden_size) * case["weights"].abs().max()
    unit = (hidden_size + rank + 4) * torch.finfo(torch.float32).eps
    return {
        "the logits after merging": (unit * hidden_size * hidden * dense).item(),
        "the head's weight after merging": (unit * dense).item(),
    }


_UNTIE = "head.base.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)"
_IS_TIED = "if head.base.weight is model.model.embed_tokens.weight:"
_MERGE_HEAD = "head.base.weight += head.scaling * (head.lora_B @ head.lora_A)"

check_merge_into_head = Exercise(
    spec=[merge_into_head],
    driver=drive_merge_into_head,
    reading=read_merge_into_head,
    cases=lambda generator: [tied_case(generator, tied=True), tied_case(generator, tied=False)],
    tolerance=tied_tolerance,
    mistakes={
        "the update went into the embedding too: head and embedding are one tensor, so untie them first": {
            _IS_TIED: "if False:",
        },
        "the head is copied although it is not tied: that is a second matrix of vocabulary size for nothing": {
            _IS_TIED: "if True:",
        },
        "the weight is untied after merging, when the embedding has changed already: untie it first": {
            f"{_IS_TIED}\n        {_UNTIE}\n    {_MERGE_HEAD}": f"{_MERGE_HEAD}\n    {_IS_TIED}\n        {_UNTIE}",
        },
        "the update is not merged: the logits lose it": {_MERGE_HEAD: "pass"},
        "the update is not scaled: what is merged is scaling * B A": {_MERGE_HEAD: _MERGE_HEAD.replace("head.scaling * ", "")},
        "`merged` is not set: forward adds the update a second time": {"head.merged = True": "pass"},
        "the head starts from zeros: it needs a copy of the shared weight": {
            "head.base.weight.clone()": "torch.zeros_like(head.base.weight)"
        },
        "the head's weight has become trainable: it is frozen, before and after": {
            "requires_grad=False)": "requires_grad=True)",
            _MERGE_HEAD: "head.base.weight.data += head.scaling * (head.lora_B @ head.lora_A)",
        },
        "the tie is still there: a Parameter made of the same tensor shares its memory, so `clone` it": {
            "head.base.weight.clone()": "head.base.weight",
        },
        "the embedding was changed back, but the head with it: they are still one tensor": {
            _IS_TIED: "tied = head.base.weight is model.model.embed_tokens.weight\n    if False:",
            "head.merged = True": (
                "if tied: model.model.embed_tokens.weight -= head.scaling * (head.lora_B @ head.lora_A)\n    head.merged = True"
            ),
        },
    },
    variants={
        "by data_ptr": {
            _IS_TIED: "if head.base.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr():",
        },
        "out of place": {
            _IS_TIED: "update = head.scaling * (head.lora_B @ head.lora_A)\n    if model.config.tie_word_embeddings:",
            _UNTIE: "head.base.weight = nn.Parameter(head.base.weight + update, requires_grad=False)",
            _MERGE_HEAD: "else:\n        head.base.weight += update",
        },
        "a copy for the embedding": {
            _UNTIE: "model.model.embed_tokens.weight = nn.Parameter(head.base.weight.clone(), requires_grad=False)",
        },
    },
)

EXERCISES = {name: exercise for name, exercise in globals().items() if isinstance(exercise, Exercise)}
"""Every exercise of the unit, by the name of its check."""
