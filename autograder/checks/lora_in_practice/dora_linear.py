"""DoRALinear: a right answer, and what the checks of its forward pass and of its merge share."""

import math

import torch
from torch import Tensor, nn

from autograder.checking.cases import between, normal
from autograder.checking.drive import Observation


class DoRALinear(nn.Module):
    """y = m (W + s B A) x / |W + s B A| + bias, the norm taken of each row; the norm counts as a constant in backward."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        like_base = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **like_base))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **like_base))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(base.weight.norm(dim=1))
        self.scaling = alpha / rank
        self.merged = False

    def adapted_weight(self) -> Tensor:
        """Return the weight of the plain linear layer that computes the same."""
        moved = self.base.weight + self.scaling * (self.lora_B @ self.lora_A)
        norm = moved.norm(dim=1).detach()
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        return (self.magnitude / norm)[:, None] * moved

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted layer's output; the base's alone once the adapted weight is merged."""
        if self.merged:
            return self.base(x)
        return nn.functional.linear(x, self.adapted_weight(), self.base.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the adapted weight into the base's, in place, unless that has been done."""
        if not self.merged:
            self.base.weight.copy_(self.adapted_weight())
            self.merged = True


MOVED = "self.base.weight + self.scaling * (self.lora_B @ self.lora_A)"
NORM = "moved.norm(dim=1).detach()"
NO_ZERO = "torch.where(norm == 0, torch.ones_like(norm), norm)"
ADAPTED = "return (self.magnitude / norm)[:, None] * moved"
RETURNED = "return nn.functional.linear(x, self.adapted_weight(), self.base.bias)"
COPY = "self.base.weight.copy_(self.adapted_weight())"


def dora_case(
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    zero_row: bool = False,
    rank: int | None = None,
) -> dict:
    """Return a base, its adapter and an input; no two sizes are equal, so that no mix-up can hide.

    Where a row of the weight is zero, so are its magnitude and its row of lora_B: they start so, and get no gradient.
    """
    out_features = between(generator, 9, 12)
    in_features = out_features + between(generator, 3, 6)
    rank = rank or between(generator, 3, 5)
    weight = normal(generator, out_features, in_features, dtype=dtype)
    stretch = 0.5 + torch.rand(out_features, generator=generator, dtype=torch.float64)
    case = {
        "weight": weight,
        "bias": normal(generator, out_features, dtype=dtype) if bias else None,
        "lora_A": normal(generator, rank, in_features, dtype=dtype),
        "lora_B": 0.4 * normal(generator, out_features, rank, dtype=dtype),  # the update is about as large as the weight
        "magnitude": (stretch * weight.double().norm(dim=1)).to(dtype),
        "alpha": rank * (1.2 + torch.rand((), generator=generator).item()),  # no whole multiple of the rank, or of anything
        "x": normal(generator, 2, 6, in_features, dtype=dtype),
    }
    if zero_row:
        row = between(generator, 0, out_features - 1)
        for name in ("weight", "lora_B", "magnitude"):
            case[name][row] = 0
    return case


def read_finite(observation: Observation, case: dict) -> Observation:
    """List the tensors with NaN or infinity, and replace these by numbers: NaN equals nothing, no mistake's NaN either."""
    tensors = {name: value for name, value in observation.items() if isinstance(value, Tensor)}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    return {"the list of what contains NaN or infinity": broken, **observation} | {
        name: value.nan_to_num() for name, value in tensors.items()
    }


def sum_error(terms: int, dtype: torch.dtype) -> float:
    """Bound by how much two computed sums differ, relative to the sum of their |terms|.

    It is at most n * eps (Higham 2002, section 3.1). torch adds up 16-bit numbers in fp32, and rounds the sum once.
    """
    eps = torch.finfo(dtype).eps
    return terms * min(eps, torch.finfo(torch.float32).eps) + eps


def sizes(case: dict) -> dict[str, Tensor]:
    """Return, in double precision, the parts of the formula on absolute values, for bounds on their rounding."""
    parts = {name: value.double() for name, value in case.items() if isinstance(value, Tensor)}
    scaling = case["alpha"] / case["lora_A"].shape[0]
    norm = (parts["weight"] + scaling * parts["lora_B"] @ parts["lora_A"]).norm(dim=1)
    norm = torch.where(norm == 0, 1.0, norm)
    size = {name: value.abs() for name, value in parts.items()}
    size["moved"] = size["weight"] + scaling * size["lora_B"] @ size["lora_A"]
    size["bias"] = size.get("bias", torch.zeros_like(norm))
    return size | {"norm": norm, "rescaling": size["magnitude"] / norm}


def relative_error(case: dict) -> float:
    """Bound by how much two right answers' adapted weights differ, relative to their size, m (|W| + s |B| |A|) / norm.

    An entry of W + s B A is a sum of `rank` products, which is scaled and added to W. The norm is a sum of such entries, and
    has their errors and one of its own; two roundings rescale, and one more makes the output. The norm may have 1e-6 added to
    it, against the division by zero.
    """
    size, dtype = sizes(case), case["weight"].dtype
    rank, in_features = case["lora_A"].shape
    entry = sum_error(rank, dtype) + 2 * torch.finfo(dtype).eps
    norm = entry * (size["moved"].norm(dim=1) / size["norm"]).max().item() + sum_error(in_features, dtype)
    return entry + norm + 3 * torch.finfo(dtype).eps + 1e-6 / size["norm"].min().item()
