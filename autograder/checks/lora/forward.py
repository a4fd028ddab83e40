"""LoRALinear: the forward pass."""

import torch
from torch import Tensor

from autograder.cases import between, normal
from autograder.checks.lora.lora_linear import COMPRESSED, RETURNED, SCALED, UPDATE, LoRALinear
from autograder.exercise import Exercise


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


check_lora_forward = Exercise(
    spec=[LoRALinear],
    cases=lambda generator: [forward_case(generator), forward_case(generator, bias=True)],
    driver=drive_forward,
    tolerance=forward_tolerance,
    mistakes={
        "the update is not scaled: multiply it by alpha / rank": {"= alpha / rank": "= 1.0"},
        "the update is multiplied by alpha: it should be alpha / rank": {"= alpha / rank": "= alpha"},
        "the scale is upside down: it should be alpha / rank": {"= alpha / rank": "= rank / alpha"},
        "the update is divided by sqrt(rank), as in rsLoRA: here it should be alpha / rank": {
            "= alpha / rank": "= alpha / math.sqrt(rank)"
        },
        "the base layer's output is missing: the update is added to it": {RETURNED: "return self.scaling * update"},
        "the base layer's output is scaled as well: alpha / rank belongs to the update alone": {
            RETURNED: "return self.scaling * (self.base(x) + update)"
        },
        "the base layer's bias is lost: call `self.base(x)` instead of using its weight alone": {
            RETURNED: "return x @ self.base.weight.T + self.scaling * update"
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
        "lora_A gets no gradient: something between it and the output is detached": {COMPRESSED: COMPRESSED + ".detach()"},
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
        "forward returns nothing: the `return` is missing": {RETURNED: "self.base(x) + self.scaling * update"},
        "there is a nonlinearity between A and B: LoRA is linear, or it could not be merged": {
            COMPRESSED: COMPRESSED + ".relu()"
        },
    },
    variants={
        "matrix products": {COMPRESSED: "x @ self.lora_A.T", UPDATE: "compressed @ self.lora_B.T"},
        "F.linear twice": {
            COMPRESSED: "torch.nn.functional.linear(x, self.lora_A)",
            UPDATE: "torch.nn.functional.linear(compressed, self.lora_B)",
        },
        "the input scaled first": {"x, self.lora_A)": "self.scaling * x, self.lora_A)", SCALED: "update"},
        "the whole matrix first": {
            COMPRESSED: "self.lora_B @ self.lora_A",
            UPDATE: "x @ compressed.T",
        },
        "in double precision": {
            "x, self.lora_A)": "x.double(), self.lora_A.double())",
            "compressed, self.lora_B)": "compressed, self.lora_B.double())",
            SCALED: "(self.scaling * update).to(x.dtype)",
        },
        "a loop over the rank": {UPDATE: "sum(compressed[..., [r]] * self.lora_B[:, r] for r in range(self.lora_A.shape[0]))"},
    },
)
